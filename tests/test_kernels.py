"""The fast forms against the plain ones, in float64 where there is a number to compare."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES

from config import GPTConfig
from model import GPT, cross_entropy, written_out_attention
from storygpt import kernels
from storygpt.kernels import (
    attention_on_cpu,
    chunk_by_chunk,
    chunked_cross_entropy,
    onednn_operators,
    pack_linears,
    quick_dropout,
    softmax_,
    softmax_in_parts_,
    speed_up_training,
)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=["in parts", "compiled"])
def softmax(request):
    """Both ways to a chunk's losses."""
    if request.param == "in parts":
        return softmax_in_parts_
    return torch.compile(softmax_, dynamic=False)


def small_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 301, "context_length": 32, "n_layer": 2, "n_head": 4, "n_embd": 48}
    return GPT(GPTConfig(**shape | {"dropout": 0.0, "init_std": 0.1} | changes))


@pytest.mark.parametrize("rows", [1, 511, 512, 1300])
def test_chunked_cross_entropy_equals_float64(rows, device, softmax):
    chunked_cross_entropy = partial(kernels.chunked_cross_entropy, softmax=softmax)
    torch.manual_seed(0)
    x = torch.randn(rows, 24, device=device, requires_grad=True)
    weight = torch.randn(3001, 24, device=device, requires_grad=True)
    targets = torch.randint(3001, (rows,), device=device)
    loss = chunked_cross_entropy(x, weight, targets)
    (3 * loss).backward()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(x64 @ weight64.T, targets)
    (3 * expected).backward()
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    for grad, grad64 in ((x.grad, x64.grad), (weight.grad, weight64.grad)):
        assert (grad - grad64).norm() / grad64.norm() < 1e-6
    with torch.no_grad():
        assert chunked_cross_entropy(x, weight, targets).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_cross_entropy_under_autocast_is_as_close_as_the_plain_loss(dtype, device, softmax):
    chunked_cross_entropy = partial(kernels.chunked_cross_entropy, softmax=softmax)
    torch.manual_seed(0)
    x = torch.randn(1500, 24, device=device, requires_grad=True)
    weight = torch.randn(3001, 24, device=device, requires_grad=True)
    targets = torch.randint(3001, (1500,), device=device)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.cross_entropy(x64 @ weight64.T, targets)
    exact_grads = torch.autograd.grad(exact, (x64, weight64))
    errors = {}
    for function in (cross_entropy, chunked_cross_entropy):
        with torch.autocast(device, dtype):
            loss = function(x, weight, targets)
        scale = 2.0**10  # as float16's scaler does
        grads = torch.autograd.grad(loss * scale, (x, weight))
        errors[function] = [abs(loss.item() - exact.item()) / exact.item()] + [
            ((g / scale - g64).norm() / g64.norm()).item()
            for g, g64 in zip(grads, exact_grads, strict=True)
        ]
    for plain, chunked in zip(*errors.values(), strict=True):
        assert chunked < 2 * plain + 1e-4 and chunked < 0.02
    with torch.no_grad(), torch.autocast(device, dtype):  # of the same logits, in validation
        assert chunked_cross_entropy(x, weight, targets).item() == pytest.approx(loss.item(), 1e-5)


def test_columns_that_pad_the_head_change_neither_loss_nor_gradients(softmax):
    """A GPU's products have them; their logits of 0 are more than those of a trained model's."""
    torch.manual_seed(0)
    x, weight = torch.randn(100, 24), torch.randn(301, 24)
    x[:, 0], weight[:, 0] = 10, -2  # logits of -20 and around
    targets = torch.randint(301, (100,))
    wide = [t.double().requires_grad_() for t in (x, weight)]
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    loss, gradients = chunk_by_chunk(
        x, weight, targets, softmax=softmax, rows=64, columns=64, with_gradients=True
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for grad, wide_grad in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        assert grad.shape == wide_grad.shape
        assert (grad - wide_grad).norm() < 1e-5 * wide_grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_gradient_is_summed_in_float32(dtype):
    """In bfloat16 a sum of 512 does not change any more when 1 is added."""
    x, weight = torch.ones(2048, 8, dtype=dtype), torch.zeros(301, 8)
    _, (_, weight_grad) = chunk_by_chunk(
        x,
        weight,
        torch.zeros(2048, dtype=torch.int64),
        softmax=softmax_in_parts_,
        rows=1,
        columns=1,
        with_gradients=True,
    )
    assert torch.allclose(weight_grad[0], torch.tensor(-2048 * 300 / 301), rtol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_fifty_steps_follow_the_plain_loss(dtype, tolerance, device):
    def losses(function) -> torch.Tensor:
        model = small_gpt().to(device).train()
        model.loss_function = function
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seen = []
        for step in range(50):
            generator = torch.Generator().manual_seed(step % 5)
            rows = torch.randint(301, (8, 33), generator=generator).to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(rows[:, :-1], rows[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        return torch.stack(seen)

    plain, chunked = losses(cross_entropy), losses(chunked_cross_entropy)
    assert plain[-1] < plain[0] - 0.3  # something was learned
    assert ((chunked - plain).abs() / plain).max() <= tolerance


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_equal_eager_ones(backend, device):
    """On torch 2.11 a compiled loss that changed its result in place had gradients of exactly 0."""
    torch.manual_seed(1)
    model = small_gpt().to(device)
    speed_up_training(model, torch.device(device))
    rows = torch.randint(301, (4, 33), device=device)
    gradients = []
    for forward in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        forward(rows[:, :-1], rows[:, 1:])[1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    eager, compiled = gradients
    for name, grad in eager.items():
        assert grad.norm() > 0 and torch.allclose(compiled[name], grad, rtol=1e-3, atol=1e-6), name


def test_training_keeps_no_logits_of_a_whole_batch():
    model, rows, kept = small_gpt().train(), torch.randint(301, (40, 33)), []
    speed_up_training(model, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
    ):
        model(rows[:, :-1], rows[:, 1:])
    assert max(kept) < 40 * 32 * 301


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_breaks_its_graph_only_at_the_loss(fused):
    """Fused, the softmax is a graph of its own; a validation batch adds a graph without dropout."""
    graphs, softmax_graphs = [], []

    def note(graphs: list, graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    model = small_gpt(dropout=0.1).train()
    speed_up_training(model, torch.device("cpu"))
    torch._dynamo.reset()
    if fused:
        softmax = torch.compile(softmax_, dynamic=False, backend=partial(note, softmax_graphs))
        loss_function = partial(chunked_cross_entropy, softmax=softmax)
        model.loss_function = torch.compiler.disable(loss_function)
    compiled = torch.compile(model, dynamic=False, backend=partial(note, graphs))
    rows = torch.randint(301, (4, 33))
    for _ in range(3):
        compiled(rows[:, :-1], rows[:, 1:])[1].backward()
    assert len(graphs) == 1 and len(softmax_graphs) == fused
    compiled.eval()
    with torch.no_grad():
        compiled(rows[:, :-1], rows[:, 1:])
    compiled.train()
    compiled(rows[:, :-1], rows[:, 1:])[1].backward()
    assert len(graphs) == 2 and len(softmax_graphs) == fused


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_dropout_drops_each_element_by_itself_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    y = quick_dropout(torch.ones(999, 1001, dtype=dtype), p).float()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    dropped = (y == 0).float() - p
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean()) < 4 * sigma / 1000
    for means in (dropped.mean(0), dropped.mean(1)):  # no row and no column is favoured
        assert means.abs().max() < 5.5 * sigma / 1000**0.5
    for distance in (1, 2, 3, 4, 1001):  # elements that share a draw, and those above each other
        flat = dropped.flatten()
        assert abs((flat[distance:] * flat[:-distance]).mean()) < 4 * sigma**2 / 1000


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_on_cpu_equals_the_equation_in_float64(is_causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    for p in (0.0, 0.25):
        torch.manual_seed(1)
        y = attention_on_cpu(q, k, v, p, is_causal)
        _, weights = written_out_attention(*wide, is_causal=is_causal)
        torch.manual_seed(1)
        scale = quick_dropout(torch.ones(2, 3, 16, 16), p) if p else 1.0
        expected = (weights * scale) @ wide[2]
        assert torch.allclose(y.double(), expected, atol=1e-6)
        grads = torch.autograd.grad(y.square().sum(), (q, k, v))
        for grad, exact in zip(
            grads, torch.autograd.grad(expected.square().sum(), wide), strict=True
        ):
            assert torch.allclose(grad.double(), exact, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_packed_model_equals_the_plain_one(dtype, tolerance, bias):
    plain = small_gpt(bias=bias)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):  # a new model's are 0, and would not be missed
            parameter.normal_(std=0.3)
    plain.to(dtype).eval()
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    if onednn_operators():
        assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
    for rows, length in ((1, 1), (3, 7), (8, 32)):
        x = torch.randint(301, (rows, length))
        expected = copy.deepcopy(plain).double()(x)[0]
        assert torch.allclose(packed(x)[0].double(), expected, atol=tolerance, rtol=tolerance)
    if dtype == torch.float32:
        x = torch.randint(301, (2, 5))
        assert torch.equal(packed.generate(x, 60, 0.0), plain.generate(x, 60, 0.0))


@torch.no_grad()
def test_float16_is_left_as_it_is():
    """Few CPUs can pack it, and the others raise."""
    model, x = small_gpt().half().eval(), torch.randint(301, (2, 5))
    expected = model(x)[0]
    pack_linears(model)
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize(
    "lacking", ["_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"]
)
@torch.no_grad()
def test_a_torch_without_an_operator_tells_the_same_story(lacking, monkeypatch):
    names = {"_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"} - {lacking}
    there = type("mkldnn", (), {name: getattr(torch.ops.mkldnn, name) for name in names})
    monkeypatch.setattr(kernels.torch, "ops", type("ops", (), {"mkldnn": there}))
    model, x = small_gpt().eval(), torch.randint(301, (2, 5))
    expected = model.generate(x, 40, 0.0)
    pack_linears(model)
    assert any(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert torch.equal(model.generate(x, 40, 0.0), expected)
