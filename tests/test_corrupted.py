"""Damaged inputs, many, through the scripts: exact work or one sentence, nothing else."""

import random
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import TINY

from storygpt.checkpoint import load_checkpoint

CASES = 40
SHORT = [*TINY, "--max_steps", "2", "--warmup_steps", "1", "--eval_interval", "2", "--dropout", "0"]


def damage(path, rng: random.Random, other: bytes) -> str:
    """Flips a bit or a byte, cuts, extends, swaps two blocks, or splices in another file."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "byte", "cut", "extend", "swap", "splice"])
    # Half the time near an end, where headers and directories are.
    near = rng.choice([rng.randrange(len(data)), rng.randrange(min(600, len(data)))])
    place = rng.choice([near, len(data) - 1 - near])
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "cut":
        del data[place:]
    elif kind == "extend":
        data += rng.randbytes(rng.choice([1, 2, 100]))
    elif kind == "swap":
        size = min(rng.choice([2, 16, 512]), len(data) // 4)
        a, b = sorted(rng.sample(range(len(data) // size), 2))
        first, second = data[a * size :][:size], data[b * size :][:size]
        data[a * size : (a + 1) * size], data[b * size : (b + 1) * size] = second, first
    else:
        data[place : place + 64] = other[:64]
    path.write_bytes(data)
    return kind


@pytest.fixture(scope="module")
def good(script, tmp_path_factory):
    """A folder with small data, a finished run of two steps, and what each script makes of it."""
    folder = tmp_path_factory.mktemp("good")
    stories = folder / "stories.txt"
    stories.write_text(
        "\n<|endoftext|>\n".join(f"Once there was a cat named Tom {i}." for i in range(400))
    )
    flags = ["--dataset", stories, "--vocab_size", 512, "--data_dir", folder / "data"]
    result = script("prepare_data.py", *flags, "--validation_fraction", 0.1)
    assert result.code == 0, result.output
    result = script("train.py", *commands(folder)["train.py"])
    assert result.code == 0, result.output
    return folder


def commands(folder) -> dict[str, list]:
    data = ["--data_dir", folder / "data"]
    checkpoint = ["--checkpoint", folder / "run" / "StoryGPT_final.pt"]
    return {
        "train.py": [*SHORT, *data, "--checkpoint_dir", folder / "run"],
        "evaluate.py": [*checkpoint, *data],
        "generate.py": [*checkpoint, "--max_new_tokens", 5],
    }


def outcome(result, folder) -> tuple:
    """What a run gave: its printed numbers or story, or its weights."""
    text = re.sub(r"\d+ tokens in .*|scoring:.*|.*step/s.*|/\S+", "", result.output)
    weights = None
    if (folder / "run" / "StoryGPT_final.pt").exists():
        state = load_checkpoint(folder / "run" / "StoryGPT_final.pt")["model_state_dict"]
        weights = torch.cat([w.flatten() for w in state.values()])
    return text, weights


def test_damaged_inputs(script, good, tmp_path, record_property):
    expected = {}
    for name in ("evaluate.py", "generate.py"):
        result = script(name, *commands(good)[name])
        assert result.code == 0, result.output
        expected[name] = outcome(result, tmp_path / "none")[0]
    _, weights = outcome(result, good)

    counts = Counter()
    for case in range(CASES):
        rng = random.Random(case)
        name = ["train.py", "evaluate.py", "generate.py"][case % 3]
        folder = tmp_path / str(case)
        shutil.copytree(good, folder)
        data = [folder / "data" / f for f in ("train.bin", "validation.bin", "meta.json")]
        run = folder / "run"
        if name == "train.py" and rng.random() < 0.4:  # resume a damaged run
            victim, extra = run / "StoryGPT_latest.pt", ["--resume"]
            (run / "StoryGPT_final.pt").unlink()
        elif name == "train.py":
            shutil.rmtree(run)
            victim, extra = rng.choice(data), []
        else:
            files = [run / "StoryGPT_final.pt"] * 3
            victim = rng.choice(files + data[1:] if name == "evaluate.py" else files)
            extra = []
        kind = damage(victim, rng, rng.choice(data).read_bytes())
        result = script(name, *commands(folder)[name], *extra)
        what = f"case {case}: {name} with a {kind} in {victim.name}:\n{result.output}"
        assert "Traceback" not in result.output, what
        if result.code == 0:
            text, told = outcome(result, folder)
            if name == "train.py":
                assert torch.equal(told, weights), what
            else:
                assert text == expected[name], what
            counts["works exactly"] += 1
        else:
            errors = re.findall(r"^error: .+$", result.output, re.M)
            assert len(errors) == 1 and result.code == 1, what
            counts["one sentence"] += 1
        shutil.rmtree(folder)
    record_property(f"{CASES} damaged inputs", dict(counts))
    assert counts["one sentence"] > CASES / 2
