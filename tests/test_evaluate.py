import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import python

from storygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from storygpt.losses import all_windows
from storygpt.measures import ROWS
from storygpt.telling import tell_from
from storygpt.token_files import load_meta, load_tokens, split_stories


def test_every_token_is_a_target_once():
    for number in (5, 16, 17, 100, 161):
        tokens = np.arange(1, number + 1, dtype="<u2")
        targets = []
        for x, y in all_windows(tokens, 0, 16, 3):
            assert x.shape == y.shape and x.shape[1] <= 16
            assert np.array_equal(x + 1, y)  # 0, the end-of-text, comes before the first token
            targets += y.flatten().tolist()
        assert targets == tokens.tolist()


def test_agrees_with_float64(script, run_dir, data_dir):
    result = script(
        "evaluate.py", "--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir
    )
    assert result.code == 0, result.output
    model, _ = load_model(run_dir / "StoryGPT_best.pt")
    model.double()
    meta = load_meta(data_dir, 512)
    counts = meta["splits"]["validation"]
    tokens = load_tokens(data_dir, "validation", meta, 64).astype(np.int64)
    stream = torch.from_numpy(np.concatenate(([meta["end_of_text"]], tokens)))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), 64):
            x, y = stream[start : start + 64], stream[start + 1 : start + 65]
            log_probabilities = model(x[None, : len(y)])[0][0].log_softmax(-1)
            total -= log_probabilities[range(len(y)), y].sum().item()
    loss = total / len(tokens)
    bits_per_byte = total / math.log(2) / counts["bytes"]
    printed = [float(n) for n in re.findall(r"^\w.*  ([\d.]+)(?: nats.*)?$", result.output, re.M)]
    assert np.allclose(printed, [loss, math.exp(loss), bits_per_byte], rtol=1e-4)


def test_each_story_alone(script, run_dir, data_dir, tmp_path):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir, "--output")
    assert script("evaluate.py", *flags, tmp_path / "a.json").code == 0
    report = json.loads((tmp_path / "a.json").read_text())
    model, _ = load_model(run_dir / "StoryGPT_best.pt")
    meta = load_meta(data_dir, 512)
    stories = split_stories(load_tokens(data_dir, "validation", meta, 64), meta["end_of_text"])
    total = 0.0
    with torch.no_grad():
        for ids in stories:  # the last tokens of a story by the shortest window that reaches them
            stream = torch.tensor([[meta["end_of_text"], *ids.tolist()]])
            for end in range(64, 64 + len(ids), 32):
                x, y = stream[:, end - 64 : end], stream[:, end - 63 : end + 1]
                losses = -model(x[:, : y.size(1)])[0].log_softmax(-1).gather(2, y[..., None])
                total += losses[:, 0 if end == 64 else 32 :].sum().item()
                if end >= len(ids):
                    break
    bits_per_byte = total / math.log(2) / meta["splits"]["validation"]["bytes"]
    assert report["story_bits_per_byte"] == pytest.approx(bits_per_byte, abs=1e-5)
    assert "columns" not in report and not (tmp_path / "a.png").exists()


def test_stories_are_measured(script, run_dir, data_dir, tmp_path):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir, "--controls")
    flags += ("--num_stories", 6, "--device", "cpu", "--output")
    files = []
    for name in ("a", "b"):
        result = script("evaluate.py", *flags, tmp_path / f"{name}.json")
        assert result.code == 0, result.output
        files.append((tmp_path / f"{name}.json").read_bytes())
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert files[0] == files[1]  # the same seed, the same file
    report = json.loads(files[0])
    assert list(report["columns"]) == [
        "told from nothing", "told from first sentences", "held-out",
        "sentences shuffled", "words shuffled",
    ]  # fmt: skip
    assert all(set(column) == set(ROWS) for column in report["columns"].values())
    assert report["columns"]["told from nothing"]["keeps"] == [0, 0, 0]  # the grammar's own row
    for row in ROWS.values():
        assert row.label in result.output
    assert "longest run from train.bin, held-out:" in result.output
    result = script("evaluate.py", *flags, tmp_path / "a.json", "--seed", 5)
    assert (tmp_path / "a.json").read_bytes() != files[0]


def test_evaluations_side_by_side(script, run_dir, data_dir, tmp_path):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir)
    flags += ("--num_stories", 3, "--output", tmp_path / "a.json")
    assert script("evaluate.py", *flags).code == 0
    report = json.loads((tmp_path / "a.json").read_text())
    other = report["columns"]["told from nothing"] | {"ends": [0.5, 0.25, 0.75], "returns": None}
    report |= {"step": 4_000, "columns": report["columns"] | {"told from nothing": other}}
    (tmp_path / "b.json").write_text(json.dumps(report))
    command = ("experiments/stories.py", "--output", tmp_path / "c.png", tmp_path / "b.json")
    result = python(*command, tmp_path / "a.json")
    assert result.returncode == 0, result.stderr
    assert "| step 4,000 " in result.stdout and "| 50.0 (25.0–75.0) " in result.stdout
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    result = python(*command, tmp_path / "b.json")
    assert result.returncode == 1 and "a step of its own" in result.stderr


@torch.no_grad()
def test_prompts_of_different_lengths_go_side_by_side(run_dir):
    model, _ = load_model(run_dir / "StoryGPT_best.pt")
    prompts = [[], [5], list(range(40)), list(range(90))]  # the last is longer than the context
    told = tell_from(model, prompts, 511, seed=1, temperature=0)
    for prompt, ids in zip(prompts, told, strict=True):
        start = torch.tensor([[511, *prompt[:63]]])
        alone = model.generate(start, 65 - start.size(1), temperature=0, end_of_text=511)
        alone = alone[0, 1:].tolist() if len(prompt) < 64 else prompt[:64]
        assert ids[: len(alone)] == alone and set(ids[len(alone) :]) <= {511}


def test_mistakes_are_named(fails, run_dir, data_dir, tmp_path):
    best = ("--checkpoint", run_dir / "StoryGPT_best.pt")
    data = ("--data_dir", data_dir)
    fails("evaluate.py", "--checkpoint", tmp_path / "a.pt", says="there is no checkpoint")
    fails("evaluate.py", *best, "--data_dir", tmp_path, says="no prepared data")
    fails("evaluate.py", *best, *data, "--batch_size", 0, says="batch_size must")
    fails("evaluate.py", *best, *data, "--top_p", 0, says="top_p must")
    fails("evaluate.py", *best, *data, "--output", tmp_path / "a.txt", says="is no .json file")
    fails("evaluate.py", *best, *data, "--num_stories", 9_999, says="held-out stories to compare")
    broken = load_checkpoint(run_dir / "StoryGPT_best.pt")
    broken["model_state_dict"]["ln_f.weight"][:] = 3e38  # finite, its products are not
    save_checkpoint(tmp_path / "broken.pt", broken)
    fails("evaluate.py", "--checkpoint", tmp_path / "broken.pt", *data, says="weights are broken")
