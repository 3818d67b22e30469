"""An anchor outside this code: a run's first losses and gradient norms, by a loop of torch alone.

Only the initial weights are the project's. The loop below has its own reading of the token file,
its own forward on full logits, its own clipping, optimizers and schedule.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import GPTConfig
from model import GPT

SHAPE = {"vocab_size": 512, "context_length": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
RECIPE = {
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "warmup_steps": 3,
    "learning_rate": 0.01,
    "min_lr": 0.001,
    "weight_decay": 0.2,
    "grad_clip": 1.0,
    "beta1": 0.8,
    "beta2": 0.9,
    "seed": 11,
}


def forward(w: dict, idx: torch.Tensor) -> torch.Tensor:
    """(B, T) ids to (B, T, vocab_size) logits: GPT-2, written out."""
    B, T = idx.shape
    C, n_head = SHAPE["n_embd"], SHAPE["n_head"]

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for i in range(SHAPE["n_layer"]):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=-1)
        q, k, v = (t.view(B, T, n_head, -1).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT / math.sqrt(C / n_head)).masked_fill(future, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def schedule(step: int) -> float:
    """The learning rate of `step`, counted from 1."""
    peak, least = RECIPE["learning_rate"], RECIPE["min_lr"]
    warm, total = RECIPE["warmup_steps"], RECIPE["max_steps"]
    if step <= warm:
        return peak * (0.001 + 0.999 * (step - 1) / warm)
    done = (step - 1 - warm) / (total - warm)
    return least + (peak - least) * (1 + math.cos(math.pi * done)) / 2


# Muon orthogonalizes in bfloat16, where a last bit of a gradient becomes 0.4 % of an update.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-4), ("muon", 1e-3)])
def test_ten_steps_equal_a_loop_of_torch_alone(optimizer, tolerance, script, data_dir, tmp_path):
    flags = SHAPE | RECIPE | {"optimizer": optimizer, "dropout": 0, "eval_interval": 10}
    flags |= {"eval_windows": 4, "device": "cpu", "dtype": "float32"}
    flags |= {"data_dir": data_dir, "checkpoint_dir": tmp_path}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    result = script("train.py", *flags)
    assert result.code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    torch.manual_seed(RECIPE["seed"])
    w = dict(GPT(GPTConfig(**SHAPE, dropout=0)).named_parameters())
    matrices = [p for n, p in w.items() if n.startswith("h.") and p.dim() == 2]
    tables = [w["wte.weight"], w["wpe.weight"]]
    vectors = [p for p in w.values() if p.dim() == 1]
    decayed = tables if optimizer == "muon" else matrices + tables
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}],
        betas=(RECIPE["beta1"], RECIPE["beta2"]),
    )
    optimizers = [adamw]
    if optimizer == "muon":
        muon = torch.optim.Muon(matrices, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)

    tokens = np.fromfile(data_dir / "train.bin", dtype="<u2").astype(np.int64)
    T, size = SHAPE["context_length"], 2 * RECIPE["batch_size"]
    for line in lines:
        step = line["step"]
        rows = np.stack([tokens[s : s + T + 1] for s in window_starts(len(tokens), step, size, T)])
        rows = torch.from_numpy(rows)
        logits = forward(w, rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(w.values()))
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients))
        assert line["train_loss"] == pytest.approx(loss.item(), rel=tolerance)
        assert line["grad_norm"] == pytest.approx(norm, rel=tolerance)
        assert line["learning_rate"] == pytest.approx(schedule(step), rel=1e-6)
        for parameter, gradient in zip(w.values(), gradients, strict=True):
            parameter.grad = gradient * min(1, RECIPE["grad_clip"] / norm)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = schedule(step)
            o.step()
    assert len(lines) == 10
    held_out = np.fromfile(data_dir / "validation.bin", dtype="<u2").astype(np.int64)
    windows = (len(held_out) - 1) // T  # of which four are read, evenly spread
    starts = [i * windows // 4 * T for i in range(4)]
    rows = torch.from_numpy(np.stack([held_out[s : s + T + 1] for s in starts]))
    loss = F.cross_entropy(forward(w, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert lines[-1]["val_loss"] == pytest.approx(loss.item(), rel=tolerance)
    norms = [line["grad_norm"] for line in lines]
    assert min(norms) < 1 < max(norms)  # both sides of clipping


def window_starts(num_tokens: int, step: int, size: int, length: int) -> list[int]:
    """Where the windows of a step's batch start: all epochs laid out in full."""
    spare = (num_tokens - 1) % length
    few, many = range(spare + 1), range(spare + 1, length)
    offsets = few if len(few) >= len(many) else many
    shuffled = np.random.default_rng(RECIPE["seed"]).permutation(len(offsets))
    starts, epoch = [], 0
    while len(starts) < step * size:
        first = offsets[shuffled[epoch % len(offsets)]]
        of_epoch = np.arange(first, num_tokens - length, length)
        order = np.arange(len(of_epoch), dtype=np.uint32)
        np.random.default_rng([RECIPE["seed"], epoch]).shuffle(order)
        starts += of_epoch[order].tolist()
        epoch += 1
    return starts[(step - 1) * size : step * size]
