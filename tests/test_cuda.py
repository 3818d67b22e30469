"""All that needs an NVIDIA GPU: collected everywhere, skipped with one reason elsewhere."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import GPTConfig, TrainingConfig
from model import GPT, attention, written_out_attention
from storygpt.checkpoint import load_checkpoint
from storygpt.device import autocast, fit_micro_batch, peak_memory, use_device
from storygpt.distributed import Processes
from storygpt.files import BEST, LATEST
from storygpt.kernels import (
    chunked_cross_entropy,
    compile_model,
    softmax_,
    softmax_in_parts_,
    speed_up_training,
)
from storygpt.optimizer import Optimizer
from storygpt.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here")
DEVICE = "cuda"
DTYPES = ["float32", "bfloat16", "float16"]


def small_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 301, "context_length": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    return GPT(GPTConfig(**shape | {"dropout": 0.0, "init_std": 0.1} | changes)).to(DEVICE)


def train(script, data_dir, folder, *flags) -> list[dict]:
    """The metrics of a tiny run on the GPU."""
    where = ("--device", DEVICE, "--data_dir", data_dir, "--checkpoint_dir", folder)
    result = script("train.py", *TINY, *flags, *where, timeout=300)
    assert result.code == 0, result.output
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_gradients_equal_eager_ones(dtype):
    model, device = small_gpt(), use_device(DEVICE)
    speed_up_training(model, device)
    rows, gradients = torch.randint(301, (4, 33), device=DEVICE), []
    for forward in (model, compile_model(model, True, device)):
        model.zero_grad()
        with autocast(torch.device(DEVICE), getattr(torch, dtype)):
            forward(rows[:, :-1], rows[:, 1:])[1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    tolerance = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}[dtype]
    for name, grad in gradients[0].items():
        assert grad.norm() > 0, name
        assert (gradients[1][name] - grad).norm() < tolerance * grad.norm(), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 5000])
def test_the_chunked_loss_equals_float64(rows, compiled):
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    x = torch.randn(rows, 64, device=DEVICE, requires_grad=True)
    weight = torch.randn(3001, 64, device=DEVICE, requires_grad=True)
    targets = torch.randint(3001, (rows,), device=DEVICE)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    softmax = torch.compile(softmax_, dynamic=False) if compiled else softmax_in_parts_
    loss = chunked_cross_entropy(x, weight, targets, softmax)
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for grad, wide_grad in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(exact, wide), strict=True
    ):
        assert (grad - wide_grad).norm() < 1e-5 * wide_grad.norm()


def test_a_frequent_tokens_gradient_does_not_overflow_float16():
    """The sum of 4,096 rows of 30 is more than float16 holds."""
    x = torch.full((4096, 64), 30.0, device=DEVICE, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(301, 64, device=DEVICE, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.int64, device=DEVICE)
    (grad,) = torch.autograd.grad(chunked_cross_entropy(x, weight, targets) * 4096, weight)
    assert torch.allclose(grad[0], torch.tensor(-30.0 * 4096 * 300 / 301, device=DEVICE), rtol=1e-2)


def test_flash_attention_takes_our_shapes_and_equals_the_equation():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 8, 256, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot be taken
        attention(*half, 0.1, is_causal=True)
        y = attention(*half, 0.0, is_causal=True)
    wide = [t.detach().double().requires_grad_() for t in half]
    exact, _ = written_out_attention(*wide, is_causal=True)
    assert (y - exact).norm() < 0.01 * exact.norm()
    for grad, wide_grad in zip(
        torch.autograd.grad(y.sum(), half), torch.autograd.grad(exact.sum(), wide), strict=True
    ):
        assert (grad - wide_grad).norm() < 0.02 * wide_grad.norm()


@pytest.mark.parametrize(
    ("dtype", "optimizer", "compiled"),
    [("float32", "adamw", False), ("float16", "adamw", False), ("bfloat16", "muon", True)],
)
def test_a_run_learns(dtype, optimizer, compiled, script, data_dir, tmp_path):
    flags = ("--dtype", dtype, "--optimizer", optimizer, "--learning_rate", 0.01)
    flags += ("--compile", compiled)
    metrics = train(script, data_dir, tmp_path, *flags)
    assert metrics[-1]["val_loss"] < metrics[0]["train_loss"] - 0.5
    assert all(line["grad_norm"] is None or line["grad_norm"] > 0 for line in metrics)
    assert metrics[-1].get("skipped_steps", 0) < 10


@pytest.mark.parametrize(("dtype", "compiled"), [("bfloat16", True), ("float16", False)])
def test_a_resumed_run_goes_on_as_the_run_would_have(dtype, compiled, script, data_dir, tmp_path):
    how = ("--dtype", dtype, "--compile", compiled)
    whole = train(script, data_dir, tmp_path / "whole", *how)
    flags = (*TINY, *how, "--device", DEVICE, "--data_dir", data_dir)
    folder = ("--checkpoint_dir", tmp_path / "parts")
    stopped = script("train.py", *flags, *folder, "--max_hours", 1e-9, timeout=300)
    assert stopped.code == 75, stopped.output
    resumed = train(script, data_dir, tmp_path / "parts", *how, "--resume")
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    for ours, theirs in zip(resumed, whole, strict=True):  # CUDA adds in no fixed order
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)


@torch.no_grad()
def test_decoding_equals_reading_everything_anew():
    torch.set_float32_matmul_precision("highest")
    model = small_gpt(context_length=64).eval()
    idx = torch.randint(301, (3, 5), device=DEVICE)
    told = model.generate(idx, 50, 0.0)
    for _ in range(50):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(told, idx)


def test_a_step_of_the_reference_fits_in_five_gigabytes():
    device = use_device(DEVICE)
    model = GPT(GPTConfig()).to(device).train()
    speed_up_training(model, device)
    optimizer = Optimizer(model, TrainingConfig().filled_in(512), device, torch.bfloat16)
    forward = compile_model(model, True, device)
    rows = torch.randint(50257, (64, 257), device=device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        with autocast(device, torch.bfloat16):
            loss = forward(rows[:, :-1], rows[:, 1:])[1]
        optimizer.backward(loss)
        optimizer.step()
    assert peak_memory(device) < 5e9


def test_a_micro_batch_is_cut_to_the_memory_there_is():
    device = use_device(DEVICE)
    model = GPT(GPTConfig(n_layer=2)).to(device).train()
    speed_up_training(model, device)
    optimizer = Optimizer(model, TrainingConfig().filled_in(512), device, torch.bfloat16)
    memory = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(3e9 / memory)
    try:
        windows = fit_micro_batch(
            model,
            256,
            dtype=torch.bfloat16,
            spare=8 * model.num_parameters(),
            processes=Processes(),
        )
        assert 1 < windows < 256
        rows = torch.randint(50257, (windows, 257), device=device)
        for _ in range(3):
            with autocast(device, torch.bfloat16):
                loss = model(rows[:, :-1], rows[:, 1:])[1]
            optimizer.backward(loss)
            optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("room", [True, False])
def test_a_save_is_of_the_moment_it_was_asked_for(room, tmp_path, monkeypatch):
    """Training writes into the weights at once, while their copy may be on its way to the host."""
    monkeypatch.setattr("storygpt.run_folder.has_room", lambda device, size: room)
    model, folder = small_gpt(n_layer=8, n_embd=512), RunFolder(tmp_path)
    checkpoint = {"gpt_config": model.config, "training_config": TrainingConfig(), "step": 1}
    checkpoint |= {"val_loss": 1.0, "model_state_dict": model.state_dict()}
    before = {name: weight.cpu() for name, weight in model.state_dict().items()}
    folder.lock()
    folder.cut(0)
    try:
        folder.save([BEST, LATEST], checkpoint, {"average": 2 * model.wte.weight.detach()})
        with torch.no_grad():
            for _ in range(100):  # as much as an update has to do, and more
                for weight in model.parameters():
                    weight.add_(1.0)
        folder.wait()
    finally:
        folder.close()
    for name in (BEST, LATEST):
        saved = torch.load(tmp_path / name, weights_only=False)["model_state_dict"]
        assert all(weight.device.type == "cpu" for weight in saved.values())
        assert all(torch.equal(saved[name], weight) for name, weight in before.items())
    assert torch.equal(load_checkpoint(tmp_path / LATEST)["average"], 2 * before["wte.weight"])


def test_one_process_over_nccl_does_what_it_does_alone(script, data_dir, tmp_path):
    alone = train(script, data_dir, tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "train.py", *TINY]
    where = ["--device", DEVICE, "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "nccl"]
    done = subprocess.run(
        [str(part) for part in (*command, *where)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "nccl" / "metrics.jsonl").read_text().splitlines()
    for ours, theirs in zip(map(json.loads, lines), alone, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
