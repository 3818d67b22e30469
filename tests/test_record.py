import json

import pytest
from conftest import TINY, new_checkpoint

from config import InputError
from storygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from storygpt.files import BEST, FINAL, LATEST
from storygpt.record import begin_record, fingerprint_of, opening_of, origin_of, record_of
from storygpt.token_files import data_fingerprint

COUNTS = {"stories": 2, "tokens": 90, "bytes": 300, "sha256": "of this split"}


def meta(**changes) -> dict:
    """A meta.json as prepare_data.py writes it of a data set on the Hub."""
    whole = {"vocab_size": 512, "dataset": "them/stories", "subset": "small", "revision": "0a1b"}
    whole |= {"splits": {"train": COUNTS | {"stories": 7}, "validation": COUNTS}}
    return whole | {"openings": [["Once upon a time", 0.61], ["One day, a little", 0.2]]} | changes


def test_what_a_run_begins_with_is_a_plain_dict_of_its_data_and_origin():
    origin = {"checkpoint": "them/base", "sha256": "0"}
    begun = begin_record(meta(), origin)
    assert begun == json.loads(json.dumps(begun)) == {
        "data": {
            "name": "them/stories",
            "subset": "small",
            "commit": "0a1b",
            "fingerprint": data_fingerprint(meta()),
            "splits": {
                "train": {"stories": 7, "tokens": 90, "bytes": 300},
                "validation": {"stories": 2, "tokens": 90, "bytes": 300},
            },
            "openings": [["Once upon a time", 0.61], ["One day, a little", 0.2]],
        },
        "init_from": origin,
    }  # fmt: skip
    older = {name: value for name, value in meta().items() if name not in ("openings", "subset")}
    assert begin_record(older, None)["data"]["openings"] == []


def test_a_path_of_this_machine_is_no_name_of_a_data_set():
    for path in ("/home/me/stories", "my/stories", "data/mine.txt", "../up", "stories"):
        data = begin_record(meta(dataset=path, revision=None), None)["data"]
        assert data["name"] is data["subset"] is data["commit"] is None, path
    for name in ("builtin", "sample"):
        assert begin_record(meta(dataset=name, revision=None), None)["data"]["name"] == name


def test_every_checkpoint_of_a_run_carries_its_record(run_dir, data_dir):
    known = json.loads((data_dir / "meta.json").read_text())
    for name in (BEST, FINAL, LATEST):
        checkpoint = load_checkpoint(run_dir / name)
        assert checkpoint["record"] == begin_record(known, None), name
        model, _ = load_model(run_dir / name)
        record = record_of(checkpoint)
        assert record.parameters == model.num_parameters() and record.init_from is None
        assert (record.step, record.val_loss) == (checkpoint["step"], checkpoint["val_loss"])
        assert record.data.fingerprint == fingerprint_of(checkpoint) == data_fingerprint(known)


@pytest.fixture
def older_run(run_dir, tmp_path):
    """A run in the middle, saved by a version that knew of no record, and moved."""
    checkpoint = load_checkpoint(run_dir / LATEST)
    record = checkpoint.pop("record")
    checkpoint |= {"data": record["data"]["fingerprint"], "init_from": None}
    (tmp_path / "older").mkdir()
    save_checkpoint(tmp_path / "older" / LATEST, checkpoint)
    (tmp_path / "older" / "metrics.jsonl").write_bytes((run_dir / "metrics.jsonl").read_bytes())
    return tmp_path / "older"


def test_a_run_of_an_older_version_goes_on_and_has_a_record_from_then_on(
    script, fails, older_run, data_dir, small
):
    before = load_checkpoint(older_run / LATEST)
    assert fingerprint_of(before) and origin_of(before) is None
    assert opening_of(before) == "Once upon a time" and record_of(before).data is None
    flags = [*TINY, "--checkpoint_dir", older_run, "--resume", "--data_dir"]
    fails("train.py", *flags, small.folder, says="is not what the run was trained on so far")
    result = script("train.py", *flags, data_dir)
    assert result.code == 0, result.output
    known = json.loads((data_dir / "meta.json").read_text())
    for name in (LATEST, FINAL):
        assert load_checkpoint(older_run / name)["record"] == begin_record(known, None)


def test_a_record_that_is_none_is_damage_and_no_traceback(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / BEST)
    good = checkpoint["record"]
    for record in (
        "text",
        {},
        {"data": good["data"]},
        good | {"init_from": "text"},
        good | {"init_from": {"checkpoint": "them/base"}},
        good | {"data": good["data"] | {"name": "a](https://example.com)"}},
        good | {"data": good["data"] | {"splits": {}}},
        good | {"data": good["data"] | {"openings": [[1, 2]]}},
        good | {"data": good["data"] | {"more": 1}},
    ):
        save_checkpoint(tmp_path / "a.pt", checkpoint | {"record": record})
        with pytest.raises(InputError, match="is damaged or not a checkpoint"):
            load_checkpoint(tmp_path / "a.pt")


def test_the_opening_of_a_model_is_the_commonest_of_its_stories():
    assert opening_of(new_checkpoint() | {"record": begin_record(meta(), None)}) == (
        "Once upon a time"
    )
    begins = meta(openings=[["This is the story", 0.9]])
    assert opening_of({"record": begin_record(begins, None)}) == "This is the story"
    for unknown in ({}, {"record": begin_record(meta(openings=[]), None)}):
        assert opening_of(unknown) == "Once upon a time"
