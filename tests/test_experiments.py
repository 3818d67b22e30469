"""What experiments/ promises, by real runs that are small."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, metrics_of, python
from matplotlib import image
from matplotlib.figure import Figure

from config import GPTConfig, InputError
from experiments import benchmark
from experiments.benchmark import Arguments, make_setting, read_stories
from experiments.compare import draw, group, read_run, table

COMPARE = "experiments.compare.py"  # as the fork server finds it
SMALL = (
    "--vocab_size 512 --context_length 32 --n_layer 1 --n_head 2 --n_embd 32 --batch_size 2 "
    "--rounds 1 --decode_tokens 4 --device cpu --dtype float32"
).split()


def rows_of(output: str) -> list[dict]:
    """The Markdown table as a dict a row."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


@pytest.fixture(scope="module")
def runs(script, data_dir, run_dir, tmp_path_factory) -> list[Path]:
    """Two runs that differ by their seed, and one of another optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    for name, *flags in (("other_seed", "--seed", 7), ("muon", "--optimizer", "muon")):
        flags = (*TINY, *flags, "--data_dir", data_dir, "--checkpoint_dir", folder / name)
        result = script("train.py", *flags)
        assert result.code == 0, result.output
    return [run_dir, folder / "other_seed", folder / "muon"]


@pytest.fixture
def copied(run_dir, tmp_path) -> Path:
    return shutil.copytree(run_dir, tmp_path / "copied")


# --- compare.py ---


def test_compare_draws_curves_and_a_row_for_each_recipe(runs, tmp_path):
    picture = tmp_path / "curves.png"
    result = python("experiments/compare.py", *runs, "--output", picture)
    assert result.returncode == 0, result.stderr
    adamw, muon = rows_of(result.stdout)
    assert adamw["run"] == f"{runs[0]}, {runs[1]}" and muon["run"] == str(runs[2])
    assert (adamw["optimizer"], muon["optimizer"]) == ("adamw", "muon")
    assert (muon["step"], muon["tokens"]) == ("20", f"{20 * 4 * 2 * 64:,}")
    assert muon["machine"] == "cpu in float32"

    both = [
        [line["val_loss"] for line in metrics_of(run) if "val_loss" in line] for run in runs[:2]
    ]
    last = sorted(losses[-1] for losses in both)
    assert adamw["last val_loss"] == f"{np.mean(last):.3f} ({last[0]:.3f} to {last[1]:.3f})"
    best = min(line.get("val_loss", math.inf) for line in metrics_of(runs[2]))
    assert muon["best val_loss"] == f"{best:.3f}"
    assert np.ptp(image.imread(picture)[..., :3]) > 0.5


def test_a_run_is_read_as_it_was_written(runs):
    lines, run = metrics_of(runs[2]), read_run(runs[2])
    assert run.step.tolist() == [10, 20] and run.tokens.tolist() == [5_120, 10_240]
    seconds = np.cumsum([512 / line["tokens_per_second"] for line in lines])
    assert run.seconds == pytest.approx(seconds[[9, 19]])
    losses = np.array([line["train_loss"] for line in lines])
    assert run.train_loss == pytest.approx([losses[:10].mean(), losses[10:].mean()])
    assert run.val_loss.tolist() == [line["val_loss"] for line in lines if "val_loss" in line]


def test_runs_of_one_recipe_differ_in_nothing_but_their_seed(runs):
    one, other, muon = map(read_run, runs)
    assert list(map(len, group([one, muon, other]))) == [2, 1]
    for changed in (
        replace(other, settings=other.settings | {"learning_rate": 0.001}),
        replace(other, settings=other.settings | {"dropout": 0.2}),
        replace(other, data="other data"),
        replace(other, start="the sum of other weights"),
    ):
        assert len(group([one, changed])) == 2


def test_what_compare_draws_and_lists_are_the_runs_numbers(runs, tmp_path, monkeypatch):
    """Of one recipe: a run whose best is not its last, and one that is not as far yet."""
    whole = replace(read_run(runs[0]), val_loss=np.array([2.0, 3.0]))
    arrays = ("step", "tokens", "seconds", "train_loss", "val_loss")
    short = {name: getattr(read_run(runs[1]), name)[:1] for name in arrays}
    short = replace(read_run(runs[1]), **short | {"val_loss": np.array([1.0])})
    scales = {whole.name: 0.5, short.name: 0.5}
    ((row,), drawn, save) = (rows_of(table([[whole]], scales)), [], Figure.savefig)
    assert (row["best val_loss"], row["last val_loss"]) == ("2.000", "3.000")
    assert row["best bits per byte"] == "1.0000" and float(row["learning_rate"]) == 0.003

    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    draw([[whole, short]], scales, tmp_path / "curves.png")
    for axes, x in zip(drawn[0].axes, ("tokens", "seconds"), strict=True):
        validation, training = (line.get_xydata() for line in axes.lines)
        mean = np.mean([getattr(whole, x)[0], getattr(short, x)[0]])
        assert validation == pytest.approx(np.array([[mean, 0.5 * 1.5]]))
        loss = 0.5 * np.mean([whole.train_loss[0], short.train_loss[0]])
        assert training == pytest.approx(np.array([[mean, loss]]))


def test_steps_whose_lines_are_lost_still_took_their_time(copied):
    lines = [line | {"tokens_per_second": 512.0} for line in metrics_of(copied)]  # one a second
    kept = [json.dumps(line) + "\n" for line in lines[:2] + lines[7:]]
    (copied / "metrics.jsonl").write_text("".join(kept))
    assert read_run(copied).seconds.tolist() == [10, 20]


def test_compare_tells_bits_per_byte_of_the_runs_own_data(script, runs, data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--output", tmp_path / "curves.png")
    row, _ = rows_of(script(COMPARE, *runs[1:], *flags).output)
    counts = json.loads((data_dir / "meta.json").read_text())["splits"]["validation"]
    loss = min(line.get("val_loss", math.inf) for line in metrics_of(runs[1]))
    bits = loss / math.log(2) * counts["tokens"] / counts["bytes"]
    assert row["best bits per byte"] == f"{bits:.4f}"


def test_compare_leaves_a_run_as_it_is_while_a_line_is_being_written(script, copied, tmp_path):
    path = copied / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 21, "tok')
    before = path.read_bytes()
    result = script(COMPARE, copied, "--output", tmp_path / "curves.png")
    assert result.code == 0, result.output
    assert path.read_bytes() == before


def test_compare_needs_a_run_with_an_evaluation(fails, copied, tmp_path):
    output = ("--output", tmp_path / "curves.png")
    fails(COMPARE, *output, says="nothing to compare")
    fails(COMPARE, tmp_path / "nowhere", *output, says="holds no run")
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[:5]))
    fails(COMPARE, copied, *output, says="no evaluation yet")
    (copied / "metrics.jsonl").write_text("".join([*lines[:3], "what?\n", *lines[4:]]))
    fails(COMPARE, copied, *output, says="line 4 of")
    without_speed = [{k: v for k, v in json.loads(x).items() if "second" not in k} for x in lines]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in without_speed))
    fails(COMPARE, copied, *output, says="tokens_per_second")
    assert not (tmp_path / "curves.png").exists()


def test_compare_refuses_spoiled_checkpoints_and_other_data(
    script, fails, copied, run_dir, data_dir, tmp_path
):
    output = ("--output", tmp_path / "curves.png")
    other = tmp_path / "data"
    flags = ("--dataset", "builtin", "--max_stories", 400, "--vocab_size", 512, "--num_proc", 1)
    assert script("prepare_data.py", *flags, "--seed", 5, "--data_dir", other).code == 0
    fails(COMPARE, run_dir, "--data_dir", other, *output, says="is not what")
    result = script(COMPARE, run_dir, "--data_dir", other, data_dir, *output)
    assert result.code == 0, result.output

    fails(COMPARE, run_dir, "--output", tmp_path / "no" / "curves.png", says="cannot be written")
    latest = copied / "StoryGPT_latest.pt"
    latest.write_bytes(latest.read_bytes()[:-1000])
    fails(COMPARE, copied, *output, says="StoryGPT_latest.pt")
    for path in copied.glob("*.pt"):
        path.unlink()
    fails(COMPARE, copied, *output, says="no checkpoint")


# --- benchmark.py ---


def test_benchmark_measures_all_that_it_promises(tmp_path):
    output = tmp_path / "figures.json"
    flags = ("--parts", "training", "decoding", "--output", output)
    # compiling would take minutes, and is torch's to test
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    result = python("experiments/benchmark.py", *SMALL, *flags, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    assert {"training", "decoding", "machine", "seconds"} == set(report)
    for name in ("StoryGPT", "transformers"):
        for how in ("", ", compiled"):
            assert report["training"][f"{name}{how}, tokens/s"] > 0
        assert report["training"][f"{name}, peak memory, GB"] > 0.05
        for size in (1, 8, 64):
            assert report["decoding"][f"{name}, batch {size}, tokens/s"] > 0
        assert report["decoding"][f"{name}, first token, ms"] > 0
    figures = [v for part in report.values() if isinstance(part, dict) for v in part.values()]
    assert all(v > 0 and math.isfinite(v) for v in figures if isinstance(v, float))
    assert report["machine"]["dtype"] == "float32"


def test_benchmark_compares_medians_of_turns_after_one_to_warm_up(monkeypatch):
    now, lasting = [0.0], {"a": [99, 1, 5, 2], "b": [0, 3, 3, 4]}
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    order = []

    def turn(name: str) -> None:
        order.append(name)
        now[0] += lasting[name].pop(0)

    setting = benchmark.Setting(GPTConfig(), torch.device("cpu"), torch.float32, 1, 3, 1, 1, False)
    contenders = {name: partial(turn, name) for name in lasting}
    assert benchmark.take_turns(contenders, setting) == {"a": 2, "b": 3}
    assert order == ["a", "b"] * 4


def test_the_ceiling_of_a_step_is_its_products_at_the_speed_of_two(monkeypatch):
    monkeypatch.setattr(benchmark, "take_turns", lambda turns, _: dict.fromkeys(turns, 1.0))
    gpt = GPTConfig(vocab_size=512, context_length=32, n_layer=3, n_head=2, n_embd=32)
    setting = benchmark.Setting(gpt, torch.device("cpu"), torch.float32, 2, 1, 1, 1, False)
    figures = benchmark.measure_training(setting)
    # forward and twice as much backward, of the head and of 3 layers with 3 + 1 + 4 + 4 matrices
    # of 32 x 32, where the product timed has 4; and of the attention, two products with 32 tokens
    products = 3 * 1 + 3 * 3 * 12 / 4 + 3 * 3 * 2 * 32 * 32 / (4 * 32**2)
    assert figures["StoryGPT, share of the ceiling"] == pytest.approx(products, rel=0.05)
    assert figures["transformers, tokens/s"] == 64


@pytest.fixture
def one_cpu():
    """Of several, as a container or a scheduler gives them out."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system lets no process keep to a CPU")
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_of_them)})
    yield
    os.sched_setaffinity(0, all_of_them)


def test_benchmark_tokenizes_more_and_more_stories(one_cpu, tmp_path):
    stories = [f"Tom had {n} kites.\nThey were réd, all {n} of them." for n in range(300)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    shape = (GPTConfig(), torch.device("cpu"), torch.float32)
    numbers = {"batch_size": 1, "rounds": 1, "decode_tokens": 1, "seed": 1, "thorough": False}
    setting = benchmark.Setting(*shape, **numbers)
    figures = benchmark.measure_tokenizing(str(tmp_path / "stories.txt"), setting)
    assert [name.split(" x ")[0] for name in figures] == ["1"] * 5 + ["4"] * 5
    assert "1 x the stories: prepare_data.py with 1 processes, MB/s" in figures
    assert all(value > 0 and math.isfinite(value) for value in figures.values())


def test_benchmark_reads_the_stories_as_they_are(tmp_path):
    stories = ["Ann ran.", "Ben — and “Kim” — sat.\n\nThey slept. ", "Dan did not.", "The 🦆 swam."]
    lines = "".join(json.dumps({"text": story}) + "\n" for story in stories)
    (tmp_path / "stories.jsonl").write_text(lines)
    assert sorted(read_stories(str(tmp_path / "stories.jsonl"), seed=1)) == sorted(stories)


def test_benchmark_says_what_is_wrong_before_it_measures(fails, tmp_path):
    script, output = "experiments.benchmark.py", ("--output", tmp_path / "figures.json")
    fails(script, "--rounds", 0, *output, says="rounds must be")
    fails(script, "--batch_size", 0, *output, says="batch_size must be")
    fails(script, "--decode_tokens", 999, *output, says="decode_tokens 999 is over 240")
    fails(script, "--parts", "sleeping", *output, says="sleeping")
    fails(script, "--output", tmp_path / "no" / "figures.json", says="there is no folder")
    tokenize = ("--parts", "tokenizing", "--dataset", tmp_path / "nowhere.txt")
    fails(script, *tokenize, *output, says="there is no file")
    assert not output[1].exists()


def test_benchmark_names_the_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-dev\.txt"):
        make_setting(Arguments(output=tmp_path / "figures.json"))
