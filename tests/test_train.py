import math
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, metrics_of, wait_for_step
from PIL import Image

import train
from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt import cli
from storygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from storygpt.distributed import Processes
from storygpt.files import FINAL, LATEST
from storygpt.losses import estimate_loss
from storygpt.token_files import load_meta, load_tokens


def test_a_run_leaves_what_it_promises(run_dir, data_dir):
    metrics = metrics_of(run_dir)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert [line["step"] for line in metrics if "val_loss" in line] == [10, 20]
    assert metrics[-1]["tokens"] == 20 * 4 * 2 * 64
    tokens = (data_dir / "train.bin").stat().st_size // 2
    assert metrics[-1]["epoch"] == pytest.approx(20 * 4 * 2 * 64 / tokens, abs=1e-4)
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in metrics)
    assert metrics[-1]["val_loss"] < metrics[9]["val_loss"] < math.log(512)
    best, final, latest = (
        load_checkpoint(run_dir / f"StoryGPT_{name}.pt") for name in ("best", "final", "latest")
    )
    assert best["val_loss"] == final["val_loss"] == metrics[-1]["val_loss"]
    assert best.keys() == final.keys() < latest.keys()
    image = Image.open(run_dir / "loss_plot.png")
    assert image.size == (960, 600)
    assert len(np.unique(np.asarray(image).reshape(-1, 4), axis=0)) > 50  # there are curves on it
    names = {path.name for path in run_dir.iterdir()}
    weights = {f"StoryGPT_{name}.pt" for name in ("best", "final", "latest")}
    assert names == weights | {"metrics.jsonl", "loss_plot.png", ".lock"}


def test_evaluation_leaves_training_as_it_was(data_dir):
    model = GPT(GPTConfig(vocab_size=512, context_length=64, n_layer=1, n_head=1, n_embd=16))
    tokens = load_tokens(data_dir, "validation", load_meta(data_dir, 512), 64)
    where = {"dtype": torch.float32, "processes": Processes()}
    losses = set()
    for training in (True, False, True):
        losses.add(
            estimate_loss(model.train(training), tokens, batch_size=4, num_windows=2, **where)
        )
        assert model.training == training
    assert len(losses) == 1  # the same windows, without dropout


# --- In this process, where a test can look at a step ---


def test_every_micro_batch_of_every_step_draws_its_own_dropout(set_up):
    setting, state = set_up()
    drawn = []

    def model(x, y):
        drawn.append(torch.rand(1).item())  # what a dropout would draw first
        return state.model(x, y)

    for _ in range(3):
        train.train_step(setting, state, model, 0)
    assert len(set(drawn)) == 3 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_products_and_not_of_the_weights(dtype, set_up):
    setting, state = set_up("--dtype", str(dtype).removeprefix("torch."))
    seen = []
    state.model.h[0].mlp.c_fc.register_forward_hook(lambda *hooked: seen.append(hooked[2].dtype))
    train.train_step(setting, state, state.model, 0)
    train.validate(setting, state.model, 1)
    assert seen == [dtype] * 3
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}


def test_story_windows_begin_where_stories_do(set_up):
    share = {}
    for wanted in ("0", "0.5", "1"):
        batches = set_up("--story_windows", wanted)[0].batches
        first = np.concatenate([batches(step, range(8))[0][:, 0] for step in range(1, 41)])
        share[wanted] = (first == 511).mean()  # half of them on the end-of-text before the story
    assert share["0"] < 0.05 and abs(share["0.5"] - 0.25) < 0.1 and abs(share["1"] - 0.5) < 0.1


@pytest.mark.parametrize(("name", "steps"), [(LATEST, 0), (FINAL, 2)])
def test_a_checkpoint_that_cannot_be_written_is_told_at_once(name, steps, set_up, tmp_path):
    """Before the first step, and still at the end of a run that saves in the background."""
    setting, state = set_up("--max_steps", "2", "--warmup_steps", "0")
    (tmp_path / "run" / name).mkdir(parents=True)  # in the way
    with pytest.raises(InputError, match=f"{name} cannot be written"):
        train.train(setting, state)
    assert state.step == steps


def test_a_run_that_breaks_names_the_checkpoint_that_is_left(set_up, tmp_path):
    setting, state = set_up()

    def broken(*_) -> None:
        if state.step == 3:
            state.model.ln_f.weight.data.fill_(math.inf)

    state.model.register_forward_pre_hook(broken)
    left = f"the last good checkpoint is {tmp_path / 'run' / LATEST}"
    with pytest.raises(InputError, match=left):
        train.train(setting, state)
    setting, state = set_up("--resume")
    with pytest.raises(InputError, match=left):  # none is saved yet since it goes on
        state.stop_if_diverged(
            {"train_loss": math.nan}, tmp_path / "run", setting.arguments.training
        )


def test_a_compiled_run_saves_the_plain_names(set_up, monkeypatch, tmp_path):
    """With a compiler of the test's own, which takes the graphs and leaves them as they are."""
    compiled, compile_with = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_with(model, backend=backend))
    setting, state = set_up("--compile", "True", "--max_steps", "2", "--warmup_steps", "0")
    assert train.train(setting, state) == 0
    assert compiled
    plain = GPT(setting.arguments.gpt).state_dict().keys()
    for name in ("best", "final", "latest"):
        saved = load_checkpoint(tmp_path / "run" / f"StoryGPT_{name}.pt")["model_state_dict"]
        assert saved.keys() == plain


def test_the_clock_saves_in_time_and_ends_in_time(set_up, monkeypatch, tmp_path):
    """On a stand-in for the clock, by which every step takes ten minutes."""
    setting, state = set_up("--max_hours", "1", "--save_minutes", "25", "--eval_interval", "500")
    start, batches, lost, saved = cli.STARTED, setting.batches, [], set()

    class SlowBatches:
        tokens, tokens_per_step = batches.tokens, batches.tokens_per_step
        windows_per_step, steps_per_epoch = batches.windows_per_step, batches.steps_per_epoch
        minutes = 0

        def __call__(self, step, positions):
            lost.append(self.minutes - 10 * state.saved_step)  # by a power cut now
            saved.add(10 * state.saved_step)
            self.minutes += 5  # of two micro-batches a step
            return batches(step, positions)

    slow = SlowBatches()
    monkeypatch.setattr(train.time, "monotonic", lambda: start + 60 * slow.minutes)
    monkeypatch.setattr(train.time, "time", lambda: 1e9 * len(lost) % 7)  # a clock that jumps
    status = train.train(replace(setting, batches=slow), state)
    assert status == 75 and 40 <= slow.minutes <= 60
    assert load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["step"] == state.step
    assert 25 <= max(lost) <= 25 + 2 * 10
    assert all(later - earlier >= 25 for earlier, later in pairwise(sorted(saved)))


@pytest.mark.parametrize(
    ("minutes", "unused"),
    [
        ([10] * 9, 10),
        ([30, *[1] * 99], 1),  # the first compiles
        ([1, 1, 1, 31, *[1] * 99], 1),  # a laptop slept in the fourth
        ([1] * 40 + [3] * 99, 3),
    ],
)
def test_max_hours_looks_at_recent_steps(minutes, unused, monkeypatch):
    """On a stand-in for the clock: an hour, of which a save takes a minute."""
    now, made = cli.STARTED, 0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    config = TrainingConfig(eval_interval=10_000)
    pace = train.Pace(config, config.eval_windows, deadline=now + 3_600)
    stop = False
    while not stop:
        stop = not pace.allows_two(made, save_seconds=60)
        now, made = now + 60 * minutes[made], made + 1
        pace.steps.append(60 * minutes[made - 1])
    assert 0 <= cli.STARTED + 3_600 - 60 - now <= 60 * unused


def test_max_hours_knows_an_evaluation_from_the_last(monkeypatch):
    """Of five minutes where a step takes one: 20 minutes hold ten steps and one, or two of both."""
    now, made = cli.STARTED, 0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)
    pace = train.Pace(TrainingConfig(eval_interval=5), 6_400, deadline=now + 20 * 60)
    stop = False
    while not stop:
        stop = not pace.allows_two(made, save_seconds=0)
        made += 1
        evaluated = train.is_evaluated(made, pace.training)
        now += 60 + 300 * evaluated
        pace.steps.append(60)
        pace.evaluation = 300 if evaluated else pace.evaluation
    assert made == 10 and now - cli.STARTED == pytest.approx(20 * 60)


@pytest.mark.parametrize(
    ("eval_windows", "measured", "expected"),
    [
        (0, None, 90 * 2),
        (60, None, 90 * 2 + 9 * 2 * 60 / 12),  # forward alone is a third of a step's work
        (60, 7, 90 * 2 + 9 * 7),
    ],
)
def test_what_is_said_to_be_left_has_the_evaluations(eval_windows, measured, expected):
    """They were left out: a third of the time of the README's run of `3m` on two cores."""
    recipe = TrainingConfig(
        batch_size=4, gradient_accumulation_steps=1, max_steps=100, eval_interval=10
    )
    pace = train.Pace(recipe, eval_windows, deadline=math.inf)
    pace.evaluation = measured
    for _ in range(10):
        pace.steps.append(2)
    assert pace.left(10) == pytest.approx(expected)


def test_best_is_the_lowest_loss_and_final_the_last_also_when_resumed(script, data_dir, tmp_path):
    """A run whose first step helps and whose others ruin it, interrupted after the first."""
    flags = [*TINY, "--max_steps", "6", "--warmup_steps", "1", "--eval_interval", "1"]
    flags += ["--learning_rate", "2", "--min_lr", "2", "--grad_clip", "0", "--dropout", "0"]
    flags += ["--data_dir", data_dir, "--checkpoint_dir", tmp_path]
    assert script("train.py", *flags, "--max_hours", "1e-9").code == 75
    assert len(metrics_of(tmp_path)) == 1
    assert script("train.py", *flags, "--resume").code == 0
    losses = [line["val_loss"] for line in metrics_of(tmp_path)]
    assert len(losses) == 6 and min(losses) == losses[0] < min(losses[1:]) < losses[-1]
    tokens = load_tokens(data_dir, "validation", load_meta(data_dir, 512), 64)
    for name, expected in (("best", losses[0]), ("final", losses[-1])):
        model, checkpoint = load_model(tmp_path / f"StoryGPT_{name}.pt")
        assert checkpoint["val_loss"] == expected
        assert checkpoint["step"] == 1 + losses.index(expected)
        loss = estimate_loss(model, tokens, batch_size=4, num_windows=16, dtype=torch.float32)
        assert loss == pytest.approx(expected, rel=1e-5)  # of the weights themselves
    assert load_checkpoint(tmp_path / "StoryGPT_latest.pt")["best_val_loss"] == losses[0]


def test_mistakes_are_named_before_any_step(fails, data_dir, run_dir, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(data_dir, short)
    (short / "train.bin").write_bytes((data_dir / "train.bin").read_bytes()[:-2])
    data = ["--data_dir", data_dir]
    for flags, says in (
        (["--data_dir", tmp_path / "none"], "no prepared data in"),
        (["--data_dir", short], "where meta.json says"),
        ([*data, "--vocab_size", "513"], "pass --vocab_size 512"),
        ([*data, "--n_head", "3"], "n_embd 32 is not divisible by n_head 3"),
        ([*data, "--warmup_steps", "20"], "pass --warmup_steps 2"),
        ([*data, "--device", "tpu"], "is no device"),
        ([*data, "--device", "cuda:99"], "there is no device cuda:99"),
        ([*data, "--context_length", "60000"], "too few for one window"),
    ):
        fails("train.py", *TINY, "--checkpoint_dir", tmp_path / "out", *flags, says=says)
        assert not (tmp_path / "out").exists()
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    flags = [*TINY, *data, "--checkpoint_dir", run_dir]
    fails("train.py", *flags, says="already holds a finished run")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize(
    "flags", [["--preset", "huge"], ["--n_layers", "3"], ["--n_layer", "x"], ["--checkpoint_dir"]]
)
def test_mistyped_flags_are_named(flags, script):
    result = script("train.py", *flags)
    assert result.code == 2 and "Traceback" not in result.output
    assert flags[0] in result.output


def test_help_explains_every_number(script):
    result = script("train.py", "--help")
    assert result.code == 0
    for name in (*vars(GPTConfig()), *vars(TrainingConfig()), "preset", "resume", "data_dir"):
        assert f"--{name}" in result.output, name


def test_real_stories_are_learned(script, tinystories, tmp_path):
    data = tmp_path / "data"
    flags = ("--dataset", tinystories, "--vocab_size", 1024, "--data_dir", data)
    assert script("prepare_data.py", *flags).code == 0
    flags = "--n_layer 2 --n_embd 64 --n_head 2 --batch_size 4 --gradient_accumulation_steps 1 "
    flags += "--vocab_size 1024 --warmup_steps 10 --max_steps 90 --eval_interval 30 "
    flags += "--eval_windows 40 --learning_rate 0.003 --min_lr 0.0003 --device cpu"
    result = script(
        "train.py", *flags.split(), "--data_dir", data, "--checkpoint_dir", tmp_path / "run"
    )
    assert result.code == 0, result.output
    losses = [line["val_loss"] for line in metrics_of(tmp_path / "run") if "val_loss" in line]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 5.2  # of ln 1024 = 6.9 at the start


def test_what_is_not_finite_is_never_saved(fails, flags, tmp_path):
    for steps, interval in (("1", "1"), ("12", "1"), ("12", "20")):
        these = [*flags, "--max_steps", steps, "--warmup_steps", "0", "--eval_interval", interval]
        these += ["--learning_rate", "1e30", "--grad_clip", "0"]
        fails("train.py", *these, says="no step was saved")
        assert not (tmp_path / "run" / "StoryGPT_best.pt").exists()
        latest = load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")
        assert latest["step"] == 0
        assert all(w.isfinite().all() for w in latest["model_state_dict"].values())


def test_a_run_that_made_no_step_stops_no_other(fails, script, flags, tmp_path):
    large = [*flags, "--batch_size", 20_000, "--gradient_accumulation_steps", 3]
    less = "--batch_size 10000 --gradient_accumulation_steps 6"
    fails("little_memory.py", *large, says=less)
    result = script("train.py", *flags, "--resume")  # the corrected command
    assert result.code == 0 and "starting a new run" in result.output, result.output


@pytest.mark.parametrize(
    ("size", "less"),
    [(15, "--batch_size 5 --gradient_accumulation_steps 9"),
     (2, "--batch_size 1 --gradient_accumulation_steps 6"),
     (1, "pass a smaller --context_length")],
)  # fmt: skip
def test_the_same_run_in_less_memory_is_named_for_any_batch(size, less):
    recipe = TrainingConfig(batch_size=size, gradient_accumulation_steps=3)
    assert less in str(cli.advice_on_memory(recipe, micro_batch=size))
    if size > 2:  # what already was cut is cut further
        less = "--batch_size 1 --gradient_accumulation_steps 45 --resume"
        assert less in str(cli.advice_on_memory(recipe, micro_batch=3))


def test_another_precision_on_resume_is_said(script, flags, data_dir, tmp_path):
    """As when `auto` was bfloat16 on the first machine and float16 here, told by its own file."""
    flags = [*flags, "--dtype", "auto"]
    process = script.start("train.py", *flags, "--max_steps", "60", "--eval_interval", "60")
    wait_for_step(process, tmp_path / "run", 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    latest = load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")
    scale = torch.amp.GradScaler("cpu").state_dict()
    latest |= {"dtype": "float16", "scaler_state_dict": scale}
    save_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt", latest)
    command = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    result = script("train.py", *command)
    assert result.code == 0 and "this run was in float16 and goes on in" in result.output


def test_max_hours_says_that_there_is_more(script, flags, tmp_path):
    flags += ["--max_steps", "3", "--warmup_steps", "1", "--resume", "--max_hours", "1e-9"]
    for step in (1, 2, 3):  # one is made however little time there is: a chain of jobs ends
        result = script("train.py", *flags)
        assert result.code == (75 if step < 3 else 0), result.output
        assert (f"continue with: python {ROOT}/train.py --resume" in result.output) == (step < 3)
        assert ("done: best val_loss" in result.output) == (step == 3)
        assert metrics_of(tmp_path / "run")[-1]["step"] == step
        assert load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["step"] == step
