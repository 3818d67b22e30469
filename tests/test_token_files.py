import json
import shutil

import numpy as np
import pytest

from config import InputError
from storygpt.token_files import (
    load_meta,
    load_tokens,
    story_starts,
    training_batch,
    validation_starts,
    windows,
)

TOKENS = np.arange(1000, dtype="<u2")


def test_targets_are_the_next_tokens():
    x, y = windows(TOKENS, np.array([0, 5, 990]), 9)
    assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert x.tolist() == [list(range(s, s + 9)) for s in (0, 5, 990)]
    assert np.array_equal(y, x + 1)


def test_batch_is_a_function_of_seed_step_and_position():
    whole, _ = training_batch(TOKENS, 7, 3, range(12), 16)
    parts = [training_batch(TOKENS, 7, 3, range(i, i + 4), 16)[0] for i in (8, 0, 4)]
    assert np.array_equal(whole, np.concatenate([parts[1], parts[2], parts[0]]))
    assert not np.array_equal(whole, training_batch(TOKENS, 7, 4, range(12), 16)[0])
    assert not np.array_equal(whole, training_batch(TOKENS, 8, 3, range(12), 16)[0])


def test_every_offset_is_drawn_about_equally_often():
    tokens = np.arange(20, dtype="<u2")
    x, y = training_batch(tokens, 0, 0, range(16_000), 4)
    counts = np.bincount(x[:, 0], minlength=16)
    assert len(counts) == 16 and y.max() == 19  # the last window ends at the last token
    assert abs(counts - 1000).max() < 150  # nearly 5 standard deviations


def test_a_share_of_the_windows_starts_where_stories_start():
    tokens = np.array([5, 6, 0, 7, 0, 8, 9, 0, 1, 0] * 100, dtype="<u2")  # 0 ends a story
    stories = story_starts(tokens, 0)
    assert sorted(stories)[:7] == [0, 2, 3, 4, 5, 7, 8] and len(stories) == 801
    for share in (0.0, 0.25, 1.0):
        x, y = training_batch(tokens, 0, 0, range(8000), 4, stories, share)
        assert x.shape == y.shape == (8000, 4)
        # Of ten places, eight are starts of stories and two, the 6 and the 9, are not.
        inside = ((x[:, 0] == 6) | (x[:, 0] == 9)).mean()
        assert abs(inside - 0.2 * (1 - share)) < 0.02


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
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    assert len(load_tokens(folder, "train", load_meta(folder, 512), 64)) > 1_000_000
    damage(folder)
    with pytest.raises(InputError, match=says) as error:
        load_tokens(folder, "train", load_meta(folder, 512), 64)
    assert "python prepare_data.py --data_dir" in str(error.value)


def test_ids_and_models_of_another_vocabulary_are_named(data_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    change_meta(folder, lambda meta: meta.update(vocab_size=300, end_of_text=299))
    with pytest.raises(InputError, match="outside its vocabulary"):
        load_tokens(folder, "train", load_meta(folder, 300), 64)
    with pytest.raises(InputError, match="pass --vocab_size 300 to train"):
        load_meta(folder, 512)


def test_split_shorter_than_a_window_is_named(data_dir):
    meta = load_meta(data_dir, 512)
    with pytest.raises(InputError, match="too few for one window"):
        load_tokens(data_dir, "validation", meta, meta["splits"]["validation"]["tokens"])
