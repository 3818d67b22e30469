import json
import shlex
import shutil

import numpy as np
import pytest

from config import InputError
from storygpt.batches import validation_starts
from storygpt.token_files import (
    SplitWriter,
    bits_per_byte,
    data_fingerprint,
    epoch_layout,
    epoch_order,
    install,
    load_meta,
    load_tokens,
    training_batch,
    training_starts,
)

TOKENS = np.arange(1000, dtype="<u2")


def test_targets_are_the_next_tokens():
    x, y = windows(TOKENS, np.array([0, 5, 990]), 9)
    assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert x.tolist() == [list(range(s, s + 9)) for s in (0, 5, 990)]
    assert np.array_equal(y, x + 1)


def targets_of_an_epoch(num_tokens: int, length: int, epoch: int) -> np.ndarray:
    """How often each position is a target in all windows of one epoch, drawn as one step."""
    num_windows, _ = epoch_layout(num_tokens, length)
    tokens = np.arange(num_tokens, dtype="<u2")
    _, y = training_batch(tokens, 3, epoch + 1, range(num_windows), num_windows, length)
    return np.bincount(y.flatten(), minlength=num_tokens)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 64])
def test_each_token_is_a_target_once_an_epoch_but_for_less_than_a_window_at_either_end(length):
    for num_tokens in (
        length + 1,
        2 * length,
        2 * length + 1,
        5 * length,
        *range(300, 300 + length),
    ):
        firsts = []
        for epoch in range(3):
            counts = targets_of_an_epoch(num_tokens, length, epoch)
            seen = np.flatnonzero(counts)
            assert (counts[seen[0] : seen[-1] + 1] == 1).all()
            assert seen[0] - 1 < length  # the first token of all can be no target
            assert num_tokens - 1 - seen[-1] < length
            firsts.append(seen[0])
        if num_tokens > 2 * length and length > 2:
            assert firsts[0] != firsts[1] != firsts[2]  # another offset each time


def test_two_epochs_in_steps_that_cross_them():
    tokens = np.arange(1000, dtype="<u2")
    num_windows, _ = epoch_layout(1000, 16)
    assert num_windows % 8 and 2 * num_windows % 8  # both epochs end within a step
    steps = range(1, 2 * num_windows // 8 + 2)
    rows = np.concatenate([training_batch(tokens, 3, s, range(8), 8, 16)[1] for s in steps])
    counts = np.bincount(rows[: 2 * num_windows].flatten(), minlength=1000)
    assert set(counts[17:-17]) == {2} and counts.max() == 2
    assert len(np.unique(rows[:num_windows], axis=0)) == num_windows
    first, second = rows[:num_windows, 0], rows[num_windows : 2 * num_windows, 0]
    assert not np.array_equal(first // 16, second // 16)  # another order
    assert not np.array_equal(np.sort(first), first)


def test_any_number_of_processes_draws_the_batches_of_one():
    for step in (1, 7, 8, 100):
        whole = training_batch(TOKENS, 7, step, range(12), 12, 16)
        for processes in (2, 4):
            own = 12 // processes
            parts = [
                training_batch(TOKENS, 7, step, range(i, i + own), 12, 16)
                for i in reversed(range(0, 12, own))
            ]
            for i in (0, 1):
                assert np.array_equal(np.concatenate([part[i] for part in parts[::-1]]), whole[i])
        assert not np.array_equal(whole[0], training_batch(TOKENS, 8, step, range(12), 12, 16)[0])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_windows_is_moved_back_to_where_its_story_starts(share):
    tokens = np.random.default_rng(0).integers(0, 40, 20_000).astype("<u2")  # 0 ends a story
    ends = np.flatnonzero(tokens == 0)
    plain = training_starts(20_000, 5, 3, range(300), 300, 16)
    x, y = training_batch(tokens, 5, 3, range(300), 300, 16, ends, share)
    places = {tokens[i : i + 17].tobytes(): i for i in range(20_000 - 16)}
    rows = np.concatenate((x, y[:, -1:]), 1).astype("<u2")
    starts = np.array([places[row.tobytes()] for row in rows])
    moved, behind = 0, 0
    for start, was in zip(starts, plain, strict=True):
        if start != was:
            (between,) = np.nonzero(tokens[start : was + 1] == 0)  # no other story between
            assert between.tolist() in ([0], []) and (
                start == 0 or 0 in tokens[start - 1 : start + 1]
            )
            moved, behind = moved + 1, behind + (tokens[start] != 0)
    assert abs(moved / 300 - share) < 0.1 and abs(behind / moved - 0.5) < 0.15
    parts = [training_batch(tokens, 5, 3, range(i, i + 100), 300, 16, ends, share)[0]
             for i in (0, 100, 200)]  # fmt: skip
    assert np.array_equal(np.concatenate(parts), x)


def test_data_is_known_by_what_it_holds():
    def meta(dataset="a", vocab_size=512, train="1", validation="2"):
        splits = {"train": {"sha256": train}, "validation": {"sha256": validation}}
        return {"dataset": dataset, "vocab_size": vocab_size, "splits": splits}

    assert data_fingerprint(meta()) == data_fingerprint(meta(dataset="elsewhere"))
    others = [meta(vocab_size=513), meta(train="2"), meta(validation="1"), meta("a", 512, "2", "1")]
    assert len({data_fingerprint(m) for m in [meta(), *others]}) == 5


def test_bits_per_byte_counts_what_a_code_would_take():
    # 100 tokens of 2 bits each, for a text of 50 bytes
    assert bits_per_byte(2 * np.log(2), {"tokens": 100, "bytes": 50}) == pytest.approx(4)


def test_files_are_read_whole_by_those_alone_who_verify(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    flip_a_byte(tmp_path / "data" / "train.bin")
    meta = load_meta(tmp_path / "data", 512)
    assert len(load_tokens(tmp_path / "data", "train", meta, 64, verify=False)) > 1_000_000
    with pytest.raises(InputError, match="checksum differs"):
        load_tokens(tmp_path / "data", "train", meta, 64)


def test_the_order_of_an_epoch_is_kept_in_four_bytes_a_window():
    _, order = epoch_order(100_000, 64, seed=1, epoch=5)
    assert order.nbytes == 400_000 and np.array_equal(np.sort(order), np.arange(100_000))


def test_validation_windows_are_spread_and_do_not_overlap():
    for length, most in ((100, 3), (100, 1000), (999, 1), (7, 40)):
        starts = validation_starts(TOKENS, length, most)
        assert len(starts) == min(most, 999 // length)
        assert starts[0] == 0 and starts[-1] + length < len(TOKENS)
        assert (np.diff(starts) >= length).all()
        assert len(starts) == 1 or starts[-1] >= (len(TOKENS) - 1) * (1 - 2 / len(starts))


def change_meta(folder, edit):
    meta = json.loads((folder / "meta.json").read_text())
    edit(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


NO_META = ("no prepared data", "not JSON", "is damaged")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "meta.json").unlink(), "no prepared data"),
        (lambda d: (d / "meta.json").write_text("{"), "not JSON"),
        (lambda d: (d / "meta.json").write_text("[1]"), "is damaged"),
        (lambda d: change_meta(d, lambda m: m.update(vocab_size=513)), "is damaged"),
        (lambda d: change_meta(d, lambda m: m["splits"].pop("train")), "is damaged"),
        (lambda d: change_meta(d, lambda m: m["splits"]["train"].update(bytes=0)), "is damaged"),
        (lambda d: (d / "train.bin").unlink(), "train.bin is missing"),
        (lambda d: (d / "train.bin").write_bytes(b"123"), "has 3 bytes where meta.json says"),
        (lambda d: shutil.copy(d / "validation.bin", d / "train.bin"), "bytes where meta.json"),
        (lambda d: flip_a_byte(d / "train.bin"), "checksum differs"),
    ],
)
def test_damage_is_named(damage, says, data_dir, tmp_path):
    folder = tmp_path / "the data"
    shutil.copytree(data_dir, folder)
    assert len(load_tokens(folder, "train", load_meta(folder, 512), 64)) > 1_000_000
    damage(folder)
    with pytest.raises(InputError, match=says) as error:
        load_tokens(folder, "train", load_meta(folder, 512), 64)
    command = shlex.split(str(error.value).split("`")[1])  # as a shell takes it
    assert command[:4] == ["python", "prepare_data.py", "--data_dir", str(folder)]
    assert command[-2:] == ["--vocab_size", "512"]
    assert (command[4:6] == ["--dataset", "sample"]) == (says not in NO_META)


def test_ids_and_models_of_another_vocabulary_are_named(data_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    change_meta(folder, lambda meta: meta.update(vocab_size=300, end_of_text=299))
    with pytest.raises(InputError, match="outside its vocabulary"):
        load_tokens(folder, "train", load_meta(folder, 300), 64)
    with pytest.raises(InputError, match="pass --vocab_size 300 to train"):
        load_meta(folder, 512)


def test_an_id_just_outside_the_vocabulary_is_named(tmp_path):
    for highest, good in ((299, True), (300, False)):
        meta = small_data(tmp_path, np.array([1, highest, 299], "<u2"))
        if good:
            assert load_tokens(tmp_path, "train", meta, 1).tolist() == [1, highest, 299]
            continue
        with pytest.raises(InputError, match="holds token 300, outside its vocabulary of 300"):
            load_tokens(tmp_path, "train", meta, 1)


def test_large_files_are_verified_to_their_end(tmp_path):
    tokens = np.zeros(2**23 + 1_000, "<u2")  # more than is read at once
    tokens[-5:] = 1, 2, 3, 4, 299
    meta = small_data(tmp_path, tokens)
    assert load_tokens(tmp_path, "train", meta, 64)[-5:].tolist() == [1, 2, 3, 4, 299]
    tokens[-3] = 5
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(InputError, match="checksum differs"):
        load_tokens(tmp_path, "train", meta, 64)
    tokens[-3] = 300
    with pytest.raises(InputError, match="holds token 300"):
        load_tokens(tmp_path, "train", small_data(tmp_path, tokens), 64)


def small_data(folder, tokens: np.ndarray) -> dict:
    """Token files with the same tokens as both splits, in a vocabulary of 300; their meta.json."""
    counts, scratch = {}, folder / "scratch"
    scratch.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        writer = SplitWriter(scratch / f"{split}.bin")
        writer.write(tokens)
        writer.count(1, 1)
        counts[split] = writer.close()
    meta = {"vocab_size": 300, "end_of_text": 299, "dataset": "x", "splits": counts}
    install(scratch, folder, meta)
    return load_meta(folder, 300)


def test_files_swapped_in_part_do_not_count_as_prepared(tmp_path):
    meta = small_data(tmp_path, np.array([1, 2, 299], "<u2"))
    SplitWriter(tmp_path / "scratch" / "train.bin").close()
    with pytest.raises(FileNotFoundError):  # a disk that fails after the first of the two
        install(tmp_path / "scratch", tmp_path, meta)
    assert (tmp_path / "train.bin").stat().st_size == 0
    with pytest.raises(InputError, match="no prepared data"):
        load_meta(tmp_path, 300)


def test_split_shorter_than_a_window_is_named(data_dir):
    meta = load_meta(data_dir, 512)
    with pytest.raises(InputError, match="too few for one window"):
        load_tokens(data_dir, "validation", meta, meta["splits"]["validation"]["tokens"])
