import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import nats_of_windows, write_data
from matplotlib.figure import Figure

import evaluate
from storygpt.checkpoint import load_checkpoint, load_start, save_checkpoint
from storygpt.files import BEST
from storygpt.judging.measures import ROWS, story_table
from storygpt.token_files import data_fingerprint, load_meta
from storygpt.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(512)


@pytest.mark.parametrize("split", ["validation", "train"])
def test_losses_agree_with_float64(small, split):
    model, meta = small.model("short"), load_meta(small.folder, 512)
    arguments = evaluate.Arguments(data_dir=small.folder, split=split, batch_size=5)
    report = evaluate.score(model, {"step": 7}, meta, arguments)
    model.double()
    stories = [TOKENIZER.encode_ordinary(text) for text in getattr(small, split)]
    stream = [token for story in stories for token in [*story, 511]]
    whole = nats_of_windows(model, stream, context_length=64, step=64)
    alone = sum(nats_of_windows(model, story, context_length=64, step=32) for story in stories)
    bits = math.log(2) * sum(len(text.encode()) for text in getattr(small, split))
    assert report["tokens"] == len(stream) and report["step"] == 7 and report["split"] == split
    for name, expected in (
        ("loss", whole / len(stream)),
        ("perplexity", math.exp(whole / len(stream))),
        ("bits_per_byte", whole / bits),
        ("story_bits_per_byte", alone / bits),
    ):
        assert report[name] == pytest.approx(expected, rel=1e-5), name


def test_a_split_shorter_than_a_window_is_scored_all_the_same(small, tmp_path):
    meta = write_data(tmp_path, train=small.train[:2], validation=["Tom ran. Mia sat."])
    arguments = evaluate.Arguments(data_dir=tmp_path, num_stories=1)
    model = small.model("long")
    report = evaluate.score(model, {"step": 7}, meta, arguments)
    ids = [*TOKENIZER.encode_ordinary("Tom ran. Mia sat."), 511]
    nats = nats_of_windows(model.double(), ids, context_length=280, step=280)
    assert report["loss"] == pytest.approx(nats / len(ids), rel=1e-5)
    judged = evaluate.judge(small.model("long"), meta, arguments)
    assert judged["columns"]["held-out"]["length"] == [4, 4, 4]


ASKED = {"temperature": 0.9, "top_k": 9, "top_p": 0.6, "seed": 5}


@pytest.fixture(scope="module")
def evaluated(small, script):
    """evaluate.json of the small model, and what was printed."""
    flags = ("--checkpoint", small.folder / "long.pt", "--data_dir", small.folder)
    flags += ("--num_stories", 4, "--device", "cpu", "--output", small.folder / "a.json")
    flags += tuple(f"--{name}={value}" for name, value in ASKED.items())
    result = script("evaluate.py", *flags)
    assert result.code == 0, result.output
    return json.loads((small.folder / "a.json").read_text()), result.output


def test_what_is_printed_and_written(small, evaluated):
    report, output = evaluated
    titles = ["told from nothing", "told from first sentences", "held-out"]
    assert list(report["columns"]) == list(report["longest_copy"]) == titles
    assert all(set(column) == set(ROWS) for column in report["columns"].values())
    assert story_table(report["columns"]) in output
    assert "longest run from train.bin, held-out:" in output
    printed = [float(n) for n in re.findall(r"^\w.*  ([\d.]+)(?: nats.*)?$", output, re.M)]
    numbers = [report[name] for name in ("loss", "perplexity", "bits_per_byte")]
    assert np.allclose(printed, numbers, rtol=1e-4)
    assert (report["data"], report["num_stories"]) == (data_fingerprint(small.meta), 4)
    assert report["weights_sha256"] == load_start(small.folder / "long.pt").origin["sha256"]
    assert {name: report[name] for name in ASKED} == ASKED


def test_data_that_the_model_was_not_trained_on_is_named(script, run_dir, data_dir, small):
    """A split that was drawn anew holds out stories that the model has seen."""
    for folder in (data_dir, small.folder):
        flags = ("--checkpoint", run_dir / BEST, "--data_dir", folder)
        result = script("evaluate.py", *flags, "--device", "cpu")
        assert result.code == 0, result.output
        assert ("is other data than the model was" in result.output) == (folder != data_dir)


def test_evaluations_side_by_side(script, fails, evaluated, tmp_path):
    report, _ = evaluated
    other = report["columns"]["told from nothing"] | {"ends": [0.5, 0.25, 0.75], "returns": None}
    later = report | {"step": 4_000, "columns": report["columns"] | {"told from nothing": other}}
    for name, content in (("a", report), ("b", later)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command = ("experiments.stories.py", "--output", tmp_path / "c.png", tmp_path / "b.json")
    result = script(*command, tmp_path / "a.json")
    assert result.code == 0, result.output
    assert "| step 4,000 " in result.output and "| 50.0 (25.0–75.0) " in result.output
    assert "| held-out " in result.output and "| 100.0 (100.0–100.0) " in result.output
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    fails(*command, tmp_path / "b.json", says="a step of its own")


def test_what_is_drawn_of_evaluations_are_their_numbers(evaluated, tmp_path, monkeypatch):
    from experiments import stories

    report, _ = evaluated
    other = report["columns"]["told from nothing"] | {"ends": [0.5, 0.25, 0.75]}
    later = report | {"step": 4_000, "columns": report["columns"] | {"told from nothing": other}}
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    stories.draw([later, report], "step", "told from nothing", tmp_path / "c.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    first = report["columns"]["told from nothing"]["ends"][0]
    assert lines["told from nothing"].get_xydata().tolist() == [[7, 100 * first], [4_000, 50]]
    assert lines["held-out"].get_ydata().tolist() == [100, 100]


def test_mistakes_are_named(fails, small, tmp_path):
    best = ("--checkpoint", small.folder / "short.pt")
    data = ("--data_dir", small.folder)
    fails("evaluate.py", "--checkpoint", tmp_path / "a.pt", says="there is no checkpoint")
    fails("evaluate.py", *best, "--data_dir", tmp_path, says="no prepared data")
    fails("evaluate.py", *best, *data, "--batch_size", 0, says="batch_size must")
    fails("evaluate.py", *best, *data, "--top_p", 0, says="top_p must")
    (tmp_path / "b.json").mkdir()
    for name in ("a.txt", "b.json"):
        fails("evaluate.py", *best, *data, "--output", tmp_path / name, says="is no .json file")
    nowhere = tmp_path / "no" / "a.json"
    fails("evaluate.py", *best, *data, "--output", nowhere, says="in a folder that exists")
    fails("evaluate.py", *best, *data, "--device", "abacus", says="is no device")
    fails("evaluate.py", *best, *data, "--num_stories", 9_999, says="held-out stories to compare")
    cut = shutil.copytree(small.folder, tmp_path / "cut")
    flags = ("--data_dir", cut, "--num_stories", 1)
    tokens = (cut / "train.bin").read_bytes()
    (cut / "train.bin").write_bytes(tokens[::-1])
    fails("evaluate.py", *best, *flags, says="train.bin")
    (cut / "train.bin").write_bytes(tokens[:1_000])
    fails("evaluate.py", *best, *flags, says="train.bin has 1,000 bytes")
    broken = load_checkpoint(small.folder / "short.pt")
    for weight in (3e38, 3e5):  # finite; of the first the products are not, of the second exp(loss)
        broken["model_state_dict"]["ln_f.weight"][:] = weight
        save_checkpoint(tmp_path / "broken.pt", broken)
        flags = ("--checkpoint", tmp_path / "broken.pt", *data)
        fails("evaluate.py", *flags, says="weights are broken")
