"""The optimizers, their schedule, and float16's choreography."""

import pytest
import torch

from config import GPTConfig, TrainingConfig
from model import GPT
from storygpt.optimizer import build_optimizers, build_schedule, parameter_groups


def test_parameter_groups_decay_matrices_only():
    model = GPT(GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=32))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    matrices, embeddings, vectors = ([names[id(p)] for p in g["params"]] for g in groups)
    assert all(n.startswith("h.") and ".c_" in n and n.endswith("weight") for n in matrices)
    assert embeddings == ["wte.weight", "wpe.weight"]
    assert sorted(vectors) == sorted(n for n in names.values() if "ln" in n or n.endswith("bias"))
    assert len(matrices) + len(embeddings) + len(vectors) == len(names)


def test_muon_orthogonalizes_the_blocks_matrices_and_leaves_the_rest_to_adamw():
    config = TrainingConfig(
        optimizer="muon", learning_rate=0.01, min_lr=0, weight_decay=0.0, max_steps=2_000
    )
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randint(300, (8, 17))
    model(x[:, :-1], x[:, 1:])[1].backward()
    for optimizer in build_optimizers(model, config):
        optimizer.step()
    for name, p in model.named_parameters():
        update = (before[name] - p.detach()) / 0.01
        if name.startswith("h.") and p.dim() == 2:
            # U Vᵀ of the gradient U S Vᵀ, as far as five Newton-Schulz steps go, 0.2 √max(shape)
            u, s, vt = torch.linalg.svd(p.grad, full_matrices=False)
            along = ((u.T @ update @ vt.T) / (0.2 * max(p.shape) ** 0.5)).diagonal()[s > 0.1 * s[0]]
            assert along.min() > 0.6 and along.max() < 1.3, name
        else:  # Adam's first step is the sign of the gradient
            moved = p.grad.abs() > 1e-5
            assert torch.allclose(update[moved], p.grad[moved].sign(), atol=1e-2), name


def test_schedule_is_the_references():
    config = TrainingConfig(max_steps=500, warmup_steps=100, learning_rate=3e-4, min_lr=3e-5)
    model = GPT(GPTConfig(vocab_size=300, context_length=8, n_layer=1, n_head=1, n_embd=8))
    (optimizer,) = build_optimizers(model, config)
    schedule = build_schedule(optimizer, config)
    rates = []
    for _ in range(500):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(3e-7)
    assert rates[50] == pytest.approx(3e-4 * (0.001 + 0.999 / 2))
    assert max(rates) == rates[100] == pytest.approx(3e-4)
    assert rates[300] == pytest.approx((3e-4 + 3e-5) / 2)
    assert rates[499] == pytest.approx(3e-5, rel=1e-2)
