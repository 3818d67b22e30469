import json
import shlex
import shutil

import numpy as np
import pytest

from config import InputError
from storygpt.token_files import (
    bits_per_byte,
    data_fingerprint,
    install,
    load_meta,
    load_tokens,
    write_split,
)

TOKENS = np.arange(1000, dtype="<u2")


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


def test_the_command_that_prepares_anew_is_of_the_same_data(tmp_path):
    meta = small_data(tmp_path, np.array([1, 2, 299], "<u2"))
    meta |= {"dataset": "you/tales", "subset": "fr", "revision": "1f" * 20, "deduplicated": True}
    (tmp_path / "train.bin").unlink()
    same = f"--dataset you/tales --subset fr --revision {'1f' * 20} --deduplicate"
    with pytest.raises(InputError, match=rf"--data_dir \S+ {same} --vocab_size 300` again"):
        load_tokens(tmp_path, "train", meta, 1)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=f"{same} --preset 10m`, or"):
        load_meta(tmp_path, 8192, "10m")


def test_ids_and_models_of_another_vocabulary_are_named(data_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    change_meta(folder, lambda meta: meta.update(vocab_size=300, end_of_text=299))
    with pytest.raises(InputError, match="outside its vocabulary"):
        load_tokens(folder, "train", load_meta(folder, 300), 64)
    with pytest.raises(InputError, match="pass --vocab_size 300 to train"):
        load_meta(folder, 512)


@pytest.mark.parametrize(
    ("prepared", "vocab_size", "says"),
    [
        (False, 8192, "run `python prepare_data.py --data_dir {} --preset 10m`"),
        (False, 300, "run `python prepare_data.py --data_dir {} --vocab_size 300`"),
        (
            True,
            8192,
            "data, run `python prepare_data.py --data_dir {} --dataset sample --max_stories 5000 "
            "--validation_fraction 0.04 --preset 10m`, or",
        ),
        (True, 300, "pass the --data_dir of the model's own data, or pass --vocab_size 512 to"),
    ],
)
def test_the_preset_is_named_where_its_vocabulary_is_wanted(
    prepared, vocab_size, says, data_dir, tmp_path
):
    folder = data_dir if prepared else tmp_path
    with pytest.raises(InputError) as error:
        load_meta(folder, vocab_size, "10m")
    assert says.format(folder) in str(error.value)


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
        counts[split] = write_split(scratch / f"{split}.bin", [tokens], stories=1, num_bytes=1)
    meta = {"vocab_size": 300, "end_of_text": 299, "dataset": "x", "splits": counts}
    install(scratch, folder, meta)
    return load_meta(folder, 300)


def test_files_that_cannot_all_be_swapped_leave_the_old_ones(tmp_path):
    meta = small_data(tmp_path, np.array([1, 2, 299], "<u2"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    write_split(tmp_path / "scratch" / "train.bin", [], stories=0, num_bytes=0)
    with pytest.raises(InputError, match="what was there is kept"):  # after the first of them
        install(tmp_path / "scratch", tmp_path, meta)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert load_meta(tmp_path, 300) == meta


def test_split_shorter_than_a_window_is_named(data_dir):
    meta = load_meta(data_dir, 512)
    with pytest.raises(InputError, match="too few for one window"):
        load_tokens(data_dir, "validation", meta, meta["splits"]["validation"]["tokens"])
