import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

import train
from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt import cli
from storygpt.checkpoint import FINAL, LATEST, load_checkpoint, load_model
from storygpt.device import (
    check_fits,
    describe,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
)
from storygpt.distributed import Processes
from storygpt.kernels import compile_model
from storygpt.losses import estimate_loss
from storygpt.metrics import draw_loss_plot
from storygpt.token_files import (
    Batches,
    load_meta,
    load_tokens,
    training_batch,
    validation_starts,
)


def metrics_of(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


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


def test_reported_losses_are_those_of_a_plain_float64_loop(script, data_dir, tmp_path):
    """Replays the run by hand: Adam written out, one large batch for the accumulated ones."""
    flags = [*TINY, "--dropout", "0", "--max_steps", "6", "--eval_interval", "3"]
    flags += ["--data_dir", data_dir, "--checkpoint_dir", tmp_path, "--grad_clip", "0.5"]
    flags += ["--beta1", "0.8", "--beta2", "0.9"]
    result = script("train.py", *flags)
    assert result.code == 0, result.output
    checkpoint = load_checkpoint(tmp_path / "StoryGPT_final.pt")
    config = checkpoint["training_config"]
    torch.manual_seed(config.seed)
    model = GPT(checkpoint["gpt_config"]).double()
    meta = load_meta(data_dir, 512)
    tokens, val_tokens = (load_tokens(data_dir, s, meta, 64) for s in ("train", "validation"))
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}

    def loss_of(x, y):
        return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())

    for line in metrics_of(tmp_path):
        step = line["step"]
        model.zero_grad()
        x, y = map(torch.from_numpy, training_batch(tokens, config.seed, step, range(8), 8, 64))
        loss = loss_of(x, y)
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        warm = (step - 1) / 4  # the share of the warm-up that is over
        lr = 3e-3 * (1e-3 + (1 - 1e-3) * warm)
        if step > 4:
            lr = 3e-4 + (3e-3 - 3e-4) * (1 + math.cos(math.pi * (step - 5) / 2)) / 2
        assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert line["learning_rate"] == pytest.approx(lr, rel=1e-6)
        with torch.no_grad():
            for name, p in model.named_parameters():
                mean, square = moments[name]
                grad = p.grad * min(1, 0.5 / norm)
                mean.lerp_(grad, 0.2)
                square.lerp_(grad**2, 0.1)
                if p.dim() >= 2:
                    p.mul_(1 - lr * 0.1)
                p -= lr * (mean / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
        if "val_loss" in line:
            starts = validation_starts(val_tokens, 64, 16)
            rows = np.stack([val_tokens[s : s + 65] for s in starts]).astype(np.int64)
            rows = torch.from_numpy(rows)
            with torch.no_grad():
                expected = loss_of(rows[:, :-1], rows[:, 1:]).item()
            assert line["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_leaves_training_as_it_was(data_dir):
    model = GPT(GPTConfig(vocab_size=512, context_length=64, n_layer=1, n_head=1, n_embd=16))
    tokens = load_tokens(data_dir, "validation", load_meta(data_dir, 512), 64)
    where = (torch.device("cpu"), torch.float32, Processes())
    losses = set()
    for training in (True, False, True):
        losses.add(estimate_loss(model.train(training), tokens, 64, 4, 2, *where))
        assert model.training == training
    assert len(losses) == 1  # the same windows, without dropout


def test_a_ragged_last_batch_counts_by_its_windows():
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "context_length": 16, "n_layer": 1, "n_head": 1, "n_embd": 16}
    model = GPT(GPTConfig(**shape, init_std=0.5)).eval()  # windows of very different losses
    tokens = np.random.default_rng(0).integers(0, 300, 7 * 16 + 1).astype("<u2")
    loss = estimate_loss(model, tokens, 16, 4, 2, torch.device("cpu"), torch.float32)
    x, y = (torch.from_numpy(tokens[i:][: 7 * 16].astype(np.int64)).view(7, 16) for i in (0, 1))
    expected = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
    assert loss == pytest.approx(expected, rel=1e-6)


# --- In this process, where a test can look at a step ---


@pytest.fixture
def set_up(data_dir, tmp_path, monkeypatch):
    """set_up(*flags) -> what `train.py` trains with, of a new tiny run in tmp_path / "run"."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()

    def made(*flags):
        folders = ["--data_dir", str(data_dir), "--checkpoint_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *folders, *flags])
        return train.set_up(*train.parse_arguments())

    yield made
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
        state.check({"train_loss": math.nan}, tmp_path / "run", setting.arguments.training)


def test_a_resumed_run_goes_on_in_its_tracker(set_up, monkeypatch, capsys):
    """A stand-in for wandb, which is not installed here; the second of four sittings has none."""
    begun, steps = [], []

    def init(**settings):
        assert (Path(settings["dir"]) / ".lock").exists()  # nothing is sent of a run in use
        begun.append((settings["id"], settings["name"], settings["config"]["n_embd"]))
        return SimpleNamespace(log=lambda entry, step: steps.append(step))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for tracker, status in (("wandb", 75), ("none", 75), ("wandb", 75), ("wandb", 0)):
        flags = ["--resume", "--max_steps", "4", "--warmup_steps", "0", "--tracker", tracker]
        assert train.train(*set_up(*flags, "--max_hours", "1e-9")) == status
        command = re.search("continue with: (.*)", capsys.readouterr().out)
        assert ("--tracker wandb" in command[1]) == (tracker == "wandb") if status else not command
    assert steps == [1, 3, 4] and len(begun) == 3
    assert len(set(begun)) == 1 and all(begun[0])


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
        steps_per_epoch, minutes = batches.steps_per_epoch, 0

        def __call__(self, step, positions):
            lost.append(self.minutes - 10 * state.saved_step)  # by a power cut now
            saved.add(10 * state.saved_step)
            self.minutes += 5  # of two micro-batches a step
            return batches(step, positions)

    slow = SlowBatches()
    monkeypatch.setattr(train.time, "monotonic", lambda: start + 60 * slow.minutes)
    status = train.train(replace(setting, batches=slow), state)
    assert status == 75 and 40 <= slow.minutes <= 60
    assert load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["step"] == state.step
    assert 25 <= max(lost) <= 25 + 2 * 10
    assert all(later - earlier >= 25 for earlier, later in pairwise(sorted(saved)))


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
        loss = estimate_loss(model, tokens, 64, 4, 4, torch.device("cpu"), torch.float32)
        assert loss == pytest.approx(expected, rel=1e-5)  # of the weights themselves
    assert load_checkpoint(tmp_path / "StoryGPT_latest.pt")["best_val_loss"] == losses[0]


def test_plot_of_a_run_without_evaluations_is_left_out(tmp_path):
    draw_loss_plot([], tmp_path / "a.png")
    draw_loss_plot([{"step": 1, "tokens": 5, "train_loss": 3.0}], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


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
    fails("train.py", *flags, says="already holds a run")
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
    flags += "--eval_iters 10 --learning_rate 0.003 --min_lr 0.0003 --device cpu"
    result = script(
        "train.py", *flags.split(), "--data_dir", data, "--checkpoint_dir", tmp_path / "run"
    )
    assert result.code == 0, result.output
    losses = [line["val_loss"] for line in metrics_of(tmp_path / "run") if "val_loss" in line]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 5.2  # of ln 1024 = 6.9 at the start


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_takes_bfloat16_only_where_the_cpu_has_it(has_it, monkeypatch):
    """A stand-in for the processor: without instructions for it, it would be far slower."""
    known = {"avx512_bf16": has_it, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    expected = torch.bfloat16 if has_it else torch.float32
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32


def test_float32_on_a_gpu_says_that_its_products_are_tf32():
    assert describe(torch.device("cuda"), torch.float32) == "cuda, float32 with products in TF32"
    assert describe(torch.device("cuda"), torch.bfloat16) == "cuda, bfloat16"
    assert describe(torch.device("cpu"), torch.float32) == "cpu, float32"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_found_by_its_whole_name(name, known, monkeypatch):
    """A stand-in for the driver, which alone knows the name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == known


def test_what_a_run_will_be_is_said_as_it_begins(set_up, capsys):
    setting, state = set_up()
    few = Batches(setting.batches.tokens[:5_000], 511, 1337, 8, 64, 0.0)
    train.open_folder(replace(setting, batches=few), state)
    said = re.search("5,000 train tokens, 512 a step, (.*) epochs", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(20 * 512 / 5_000, abs=0.1)


def test_each_of_several_gpus_has_its_share_of_the_work(set_up, monkeypatch):
    """A stand-in for the driver, and for the process beside this one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    setting, state = set_up()
    gpus = {"processes": SimpleNamespace(world_size=2), "device": torch.device("cuda")}
    _, log = train.open_folder(replace(setting, **gpus, dtype=torch.float16), state)
    with log:
        entry = {"step": 1, "tokens": 512, "train_loss": 6.0, "epoch": 0.0}
        log.add(entry | {"tokens_per_second": 1e8})
    share = state.model.flops_per_token() * 1e8 / 2 / 65e12  # a T4 has 65 TFLOP/s
    assert share > 0.1 and f"MFU={share:.1%}" in log.bar.postfix


def test_a_gpu_is_taken_and_one_that_is_not_there_is_named(monkeypatch):
    """A stand-in for a machine with one GPU, which has no bfloat16 but in software."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated)
    for name in (
        "cuda.set_device",
        "backends.cuda.enable_cudnn_sdp",
        "set_float32_matmul_precision",
    ):
        monkeypatch.setattr(f"torch.{name}", lambda setting: None)
    assert pick_device() == torch.device("cuda")
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(InputError, match="there is no device cuda:1 here: pass --device cuda"):
        pick_device("cuda:1")


def test_a_compiler_that_does_not_work_ends_only_a_run_that_asks_for_it(monkeypatch, capsys):
    def broken(model, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    model, cpu, cuda = torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cuda")
    with pytest.raises(InputError, match=r"does not work here .*: pass --compile False"):
        compile_model(model, True, cpu)
    assert compile_model(model, False, cuda) is compile_model(model, None, cpu) is model
    assert not capsys.readouterr().out
    assert compile_model(model, None, cuda) is model
    assert "training goes on without it" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs /proc")
def test_memory_is_counted_in_bytes():
    number = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    with pytest.raises(InputError) as error:
        check_fits(GPTConfig(n_layer=1000, n_embd=2**16), 1, torch.device("cpu"))
    said = re.search(r"cpu has ([\d,]+): pass a smaller --n_layer", str(error.value))[1]
    assert int(said.replace(",", "")) == pytest.approx(1024 * number / 1e9, rel=0.05, abs=1)
    large = np.ones(30_000_000)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    del large  # the peak remains
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0.95 * pages * resource.getpagesize() < peak_memory(torch.device("cpu")) < 1.05 * most
