"""The optimizers, their schedule, and float16's choreography."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.optimizer import Muon, Optimizer, build_optimizers, build_schedule, parameter_groups
from storygpt.state import TrainState

SHAPE = GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
CPU = torch.device("cpu")


def recipe(**changes) -> TrainingConfig:
    numbers = {"learning_rate": 0.01, "min_lr": 0.001, "warmup_steps": 2, "max_steps": 10}
    return TrainingConfig(**numbers | changes)


def loss_of(model: GPT) -> torch.Tensor:
    x = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(3))
    return model(x[:, :-1], x[:, 1:])[1]


def weights_of(model: GPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_parameter_groups_decay_matrices_only():
    model = GPT(SHAPE)
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
    model = GPT(SHAPE)
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


def test_batched_muon_is_torchs_and_resumes_its_runs():
    torch.manual_seed(0)
    models = [GPT(SHAPE)]
    models.append(copy.deepcopy(models[0]))
    weights = [[p for p in model.h.parameters() if p.dim() == 2] for model in models]
    ours, theirs = (
        kind(ps, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for kind, ps in zip((Muon, torch.optim.Muon), weights, strict=True)
    )
    for step in range(6):
        if step == 3:  # each goes on from the other's state
            states = theirs.state_dict(), ours.state_dict()
            for optimizer, state in zip((ours, theirs), copy.deepcopy(states), strict=True):
                optimizer.load_state_dict(state)
        for mine, other in zip(*weights, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
        for mine, other in zip(*weights, strict=True):
            assert torch.allclose(mine, other, rtol=0, atol=1e-4 * 0.01)  # of a step's size


def test_a_muon_step_is_few_operators(record_property):
    """On a GPU each is a launch; torch's own takes 921 for these 40 matrices."""

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.number += not operator.is_view
            return operator(*args, **(kwargs or {}))

    shapes = 10 * [(96, 32), (32, 32), (128, 32), (32, 128)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Muon(weights, 0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        for p in weights:
            p.grad = torch.randn_like(p)
        with Count() as count:
            optimizer.step()
    record_property("operators of a Muon step", count.number)
    assert count.number < 150


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_of_another_shape_than_its_weight_is_refused(name):
    narrow, wide = (replace(SHAPE, n_embd=n_embd) for n_embd in (32, 64))
    states = []
    for shape in (narrow, wide):
        model = GPT(shape)
        optimizer = Optimizer(model, recipe(optimizer=name), CPU, torch.float32)
        optimizer.backward(loss_of(model))
        optimizer.step()
        states.append(optimizer.state_dict())
    optimizer.load_state_dict(states[1])
    with pytest.raises(ValueError, match="other shapes than the weights"):
        optimizer.load_state_dict(states[0])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_also_where_nothing_is_learned(name):
    model = GPT(SHAPE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in build_optimizers(model, recipe(optimizer=name, weight_decay=0.5)):
        optimizer.step()
    for key, p in model.named_parameters():
        kept = 1 - 0.01 * 0.5 if p.dim() == 2 else 1
        assert torch.allclose(p, kept * before[key], rtol=1e-6, atol=0), key


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


def test_clipping_is_of_the_whole_gradient_and_0_turns_it_off():
    """AdamW's second step tells: the first is the gradient's sign at any size."""
    moved = {}
    for clip in (0.0, 1e9, 0.1):
        torch.manual_seed(0)
        model = GPT(SHAPE)
        optimizer = Optimizer(model, recipe(grad_clip=clip), CPU, torch.float32)
        before = weights_of(model)
        for factor in (1, 5):
            optimizer.backward(factor * loss_of(model))
            norm, _ = optimizer.step()
        assert norm > 0.5  # that before clipping
        moved[clip] = weights_of(model) - before
    assert moved[0.0].abs().max() > 1e-3
    assert torch.equal(moved[0.0], moved[1e9]) and not torch.allclose(moved[0.0], moved[0.1])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_float16_does_what_float32_does_and_a_skipped_step_leaves_no_trace(name):
    """The scale is a power of two: what it does to the gradients can be undone to the last bit."""
    config = recipe(optimizer=name, grad_clip=0.5)
    torch.manual_seed(0)
    model = GPT(SHAPE)
    plain_model = copy.deepcopy(model)
    scaled = Optimizer(model, config, CPU, torch.float16)
    plain = Optimizer(plain_model, config, CPU, torch.float32)
    scale = scaled.scaler.get_scale()
    for overflow in (False, True, False, True, True, False):
        before, rate = weights_of(model), scaled.learning_rate
        scaled.backward(loss_of(model))
        if overflow:  # in one matrix: of Muon's and AdamW's, one has finite gradients alone
            model.h[1].mlp.c_fc.weight.grad[3, 3] = math.inf
            scale /= 2
        norm, skipped = scaled.step()
        assert skipped == overflow and scaled.scaler.get_scale() == scale
        if overflow:
            assert torch.equal(weights_of(model), before) and scaled.learning_rate == rate
        else:
            plain.backward(loss_of(plain_model))
            assert norm == pytest.approx(plain.step()[0].item(), rel=1e-5)
            assert torch.allclose(weights_of(model), weights_of(plain_model), atol=1e-5)
            assert scaled.learning_rate == plain.learning_rate != rate
    # A run that goes on in another process, and in one that was in float32 so far.
    resumed = Optimizer(model, config, CPU, torch.float16)
    resumed.load_state_dict(scaled.state_dict())
    assert resumed.scaler.get_scale() == scale
    resumed.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])  # 0: gradients that got lost
def test_a_gradient_that_teaches_nothing_ends_the_run(norm, tmp_path):
    model = GPT(SHAPE)
    state = TrainState(model, Optimizer(model, recipe(), CPU, torch.float32))
    state.stop_if_diverged({"train_loss": 3.0, "grad_norm": 1e-6}, tmp_path, recipe())
    with pytest.raises(InputError, match=f"a gradient norm of {norm}"):
        state.stop_if_diverged({"train_loss": 3.0, "grad_norm": norm}, tmp_path, recipe())


def test_a_scale_that_has_collapsed_ends_the_run(tmp_path):
    model = GPT(SHAPE)
    optimizer = Optimizer(model, recipe(), CPU, torch.float16)
    state = TrainState(model, optimizer)
    for _ in range(24):  # from 2**16 to 2**-8, which is low and no news
        optimizer.backward(loss_of(model) * math.inf)
        assert optimizer.step()[1]
    state.stop_if_diverged({"train_loss": 3.0, "grad_norm": None}, tmp_path, recipe())
    for _ in range(8):
        optimizer.backward(loss_of(model) * math.inf)
        optimizer.step()
    with pytest.raises(InputError, match="try bfloat16 or float32"):
        state.stop_if_diverged({"train_loss": 3.0, "grad_norm": None}, tmp_path, recipe())
