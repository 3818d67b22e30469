"""What experiments/race.py promises, by small runs: of ours, and of a stand-in for nanoGPT."""

import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import image
from test_experiments import rows_of

from experiments import race
from experiments.race import Contender, Run, alone_in, draw
from storygpt.checkpoint import load_model

RACE = "experiments.race.py"  # as the fork server finds it
SMALL = (
    "--vocab_size 512 --context_length 32 --n_layer 1 --n_head 2 --n_embd 16 --device cpu "
    "--seconds 0.1 --learning_rates 0.003"
).split()

# Does what nanoGPT's does with its flags and files, with a model of nothing but a table.
MODEL = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a table")
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""
TRAIN = """
import pickle, sys, time
from pathlib import Path
import torch
from model import GPT, GPTConfig

flags = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
data, out = Path(flags["dataset"]), Path(flags["out_dir"])
out.mkdir(parents=True)
assert (flags["n_embd"], flags["max_iters"]) == ("16", flags["lr_decay_iters"]), flags
assert (data / "train.bin").read_bytes() and (data / "val.bin").read_bytes()
if float(flags["learning_rate"]) > 1:
    sys.exit("ValueError: that is too much")
args = {
    "block_size": int(flags["block_size"]),
    "vocab_size": pickle.loads((data / "meta.pkl").read_bytes())["vocab_size"],
}
torch.manual_seed(1337)
model = GPT(GPTConfig(**args))
for step in range(int(flags["max_iters"]) + 1):
    if step and step % int(flags["eval_interval"]) == 0:
        weights = {"_orig_mod.table.weight": model.table.weight.detach() * (1 - step / 100)}
        torch.save({"model": weights, "model_args": args, "iter_num": step}, out / "ckpt.pt")
    print(f"iter {step}: loss 1.0, time 10.00ms", flush=True)
    time.sleep(0.01)
    for _ in range(3_000):  # it evaluates for longer than a checkpoint takes to be moved away
        if not (out / "ckpt.pt").exists():
            break
        time.sleep(0.01)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "their code"
    folder.mkdir()
    for name, text in (("model.py", MODEL), ("train.py", TRAIN), ("configurator.py", "")):
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def races(monkeypatch, capsys):
    """races(*flags) is what race.py prints, run in this process."""

    def run(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["race.py", *map(str, (*SMALL, *flags))])
        race.main()
        return capsys.readouterr().out

    return run


def loss_of(logits, tokens: np.ndarray) -> float:
    """The mean loss of the tokens after an end-of-text, in windows of 32, by definition."""
    stream, nats = torch.tensor([511, *tokens.tolist()]), 0.0
    for first in range(0, len(tokens), 32):
        x, y = stream[first : first + 33][:-1], stream[first + 1 : first + 33]
        nats += F.cross_entropy(logits(x[None])[0], y, reduction="sum").item()
    return nats / len(tokens)


def test_a_race_scores_ours_and_nanogpt_on_all_that_is_held_out(races, small, checkout):
    output = checkout.parent / "race"
    flags = ("--data_dir", small.folder, "--nanogpt", checkout, "--output_dir", output)
    flags += ("--optimizers", "muon", "--seeds", 7, 8)
    rows = rows_of(races(*flags))
    winner = min(rows[:2], key=lambda row: float(row["loss"]))
    assert [row["seed"] for row in rows] == ["7", "1337", *(["8"] if winner is rows[0] else [])]

    tokens = np.fromfile(small.folder / "validation.bin", "<u2")
    counts = small.meta["splits"]["validation"]
    for row, last in zip(rows, ("StoryGPT, muon*seed 7", "nanoGPT, adamw"), strict=False):
        assert (row["steps"], row["learning rate"]) == ("10", "0.12" if "muon" in last else "0.003")
        (path,) = output.glob(f"{last}*10 kept/StoryGPT_step_000010.pt")
        if "muon" in last:
            model = load_model(path)[0]
            expected = loss_of(lambda x, model=model: model(x)[0], tokens)
        else:
            table = torch.load(path)["model"]["_orig_mod.table.weight"]
            expected = loss_of(lambda x, table=table: table[x], tokens)
        assert float(row["loss"]) == pytest.approx(expected, abs=6e-4)
        bits = expected / math.log(2) * counts["tokens"] / counts["bytes"]
        assert float(row["bits a byte"]) == pytest.approx(bits, abs=6e-4)
    assert not list(output.glob("*200 steps*"))  # which would outlast a race of so few seconds
    steps = {path.name for path in output.glob("nanoGPT*10 kept/*.pt")}
    assert steps == {f"StoryGPT_step_{step:06}.pt" for step in range(1, 11)}
    assert np.ptp(image.imread(output / "race.png")[..., :3]) > 0.5
    (output / "nanogpt_data" / "train.bin").unlink()
    (output / "nanogpt_data" / "train.bin").symlink_to(output / "where it was")
    again = races(*flags)  # nothing is left to run
    assert rows_of(again) == rows and " s\n" not in again
    assert pickle.loads((output / "nanogpt_data" / "meta.pkl").read_bytes()) == {"vocab_size": 512}


def run(seconds: list[float], losses: dict[str, float]) -> Run:
    contender = Contender("a", Path(), (0.1,), (1,), lambda *_: {}, lambda path: losses[path.name])
    paths, steps = [Path(name) for name in losses], [100, 200, 300]
    return Run(contender, 0.1, 1, steps, seconds, paths)


def test_a_race_fits_the_steps_to_the_seconds_and_the_start_up(tmp_path):
    measured = run([25.0, 45.0, 65.0], {"one": 3.0, "two": 2.0, "three": 1.0})
    assert measured.seconds_a_step == pytest.approx(0.2)  # after 5 seconds of start-up
    assert measured.steps_in(105) == 500 and measured.steps_in(106.9) == 500
    assert measured.steps_in(107) == 510
    assert measured.steps_in(1) == 10
    draw([measured], "title", tmp_path / "race.png")
    assert (measured.last_loss, measured.losses) == (1.0, [3.0, 2.0, 1.0])


def test_a_race_says_what_is_wrong(fails, data_dir, checkout, tmp_path):
    flags = [*SMALL, "--data_dir", data_dir, "--output_dir", tmp_path / "race"]
    fails(RACE, *flags, "--seconds", 0, says="seconds must be above 0")
    fails(RACE, *flags, "--seeds", says="one or more")
    fails(RACE, *flags, "--vocab_size", 600, says="vocabulary of 512")
    fails(RACE, *flags, "--nanogpt", tmp_path, says="is no checkout of nanoGPT: it has no train.py")
    assert not (tmp_path / "race").exists()
    (tmp_path / "race").mkdir()  # an empty folder is nobody's
    theirs = ("--optimizers", "--nanogpt", checkout, "--learning_rates", 2)
    fails(RACE, *flags, *theirs, says="ended with 1: ValueError: that is too much")
    fails(RACE, *flags, "--batch_size", 4, says="holds another race")
    with alone_in(tmp_path / "race"):  # whose runs another would take for interrupted ones
        fails(RACE, *flags, *theirs, says="another race is going on")
