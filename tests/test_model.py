"""The model against independent references: transformers' GPT-2, float64, and plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES
from transformers import GPT2Config, GPT2LMHeadModel

from config import GPTConfig, InputError
from model import GPT, sample, written_out_attention
from storygpt.kernels import chunked_cross_entropy, speed_up_training

SMALL = GPTConfig(vocab_size=301, context_length=32, n_layer=3, n_head=4, n_embd=48, dropout=0.0)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def small_gpt(device="cpu", **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(vars(SMALL) | changes))).to(device).eval()
    with torch.no_grad():  # sharper than at the start, so that sampling has something to choose
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def as_transformers(model: GPT) -> GPT2LMHeadModel:
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.context_length,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
    )
    theirs = GPT2LMHeadModel(config).eval()
    state = {}
    for name, weight in model.state_dict().items():
        transpose = name.endswith("weight") and (".c_" in name)  # theirs are Conv1D
        name = name if name.startswith("lm_head") else f"transformer.{name}"
        state[name] = weight.T if transpose else weight
    if not c.bias:
        zeros = {n: torch.zeros_like(w) for n, w in theirs.state_dict().items() if "bias" in n}
        state = zeros | state
    theirs.load_state_dict(state)
    return theirs.to(model.wte.weight.device)


def ids(rows=2, length=32, device="cpu", seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (rows, length), generator=generator).to(device)


def test_parameter_count_of_the_reference():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_parameters() == 57_387_520
    assert model.lm_head.weight is model.wte.weight


@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_transformers(bias, device):
    model, x = small_gpt(device, bias=bias), ids(device=device)
    with torch.no_grad():
        logits, loss = model(x)
        theirs = as_transformers(model)(x).logits
    assert loss is None and logits.shape == (2, 32, 301)
    assert (logits - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.5  # so that the bound says something


@pytest.mark.parametrize("chunked", [False, True])
def test_loss_and_gradients_equal_transformers(chunked, device):
    model, x = small_gpt(device), ids(device=device)
    if chunked:
        model.loss_function = chunked_cross_entropy
    theirs = as_transformers(model)
    _, loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    expected = theirs(x, labels=x).loss  # shifts the labels itself
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    for name, parameter in theirs.named_parameters():
        ours = model.get_parameter(name.removeprefix("transformer."))
        grad = parameter.grad.T if ".c_" in name and "weight" in name else parameter.grad
        assert torch.allclose(ours.grad, grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("changes", [{}, {"init_std": 0.09}])
def test_initialization_is_gpt2s(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, n_layer=8, n_head=4, n_embd=128, **changes))
    init_std = changes.get("init_std", 0.02)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            expected = 1.0 if "ln" in name and "weight" in name else 0.0
            assert (parameter == expected).all(), name
        else:
            std = init_std / math.sqrt(2 * 8) if "c_proj" in name else init_std
            assert abs(parameter.std().item() / std - 1) < 0.03, name
            assert abs(parameter.mean().item()) < 0.1 * std, name


@pytest.mark.parametrize("is_causal", [True, False])
def test_written_out_attention_equals_sdpa(is_causal, device):
    q, k, v = torch.randn(3, 2, 4, 16, 8, device=device, requires_grad=True).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    ours, weights = written_out_attention(q, k, v, is_causal=is_causal)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(weights @ v, expected, atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 16, device=device))
    assert not is_causal or (weights.triu(1) == 0).all()


def test_the_weights_of_a_layer_equal_transformers(device):
    model, x = small_gpt(device), ids(device=device)
    theirs = as_transformers(model)
    theirs.set_attn_implementation("eager")  # SDPA keeps none
    with torch.no_grad():
        expected = theirs(x, output_attentions=True).attentions
        for layer, weights in enumerate(expected):
            assert torch.allclose(model.attention_weights(x, layer), weights, atol=1e-5)
    assert len(expected) == 3 and expected[2].std() > 0.05
    with pytest.raises(InputError, match="33 tokens do not fit context_length 32"):
        model.attention_weights(ids(length=33, device=device), 0)


def test_model_works_without_sdpa(monkeypatch):
    model, x = small_gpt(), ids()
    expected, _ = model(x)
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    assert torch.allclose(model(x)[0], expected, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "without SDPA", "of training"])
@torch.no_grad()
def test_training_drops_at_every_site(form, device, monkeypatch):
    """What leaves a site is 0 as often as it should be, and else what there is without dropout,
    made up for by 1 / (1 - p). A mean over many draws would be the same without any."""
    p, x = 0.25, ids(100, 8, device)
    model = small_gpt(device, dropout=p)
    if form == "without SDPA":
        monkeypatch.delattr(F, "scaled_dot_product_attention")
    elif form == "of training":
        speed_up_training(model, torch.device(device))
    block, seen = model.h[0], {}
    block.register_forward_pre_hook(lambda _, inputs: seen.update(embedding=inputs[0]))
    block.attn.c_proj.register_forward_pre_hook(lambda _, inputs: seen.update(y=inputs[0]))
    block.attn.register_forward_hook(lambda _, __, output: seen.update(attention=output))
    block.mlp.register_forward_hook(lambda _, inputs, output: seen.update(mlp=(*inputs, output)))
    model.train()(x)
    mlp_input, mlp = seen["mlp"]
    # The first token looks at itself alone: a head's whole value is dropped there, or kept.
    _, _, v = block.attn.heads(block.ln_1(seen["embedding"]))
    first = seen["y"][:, 0].view(100, 4, 12)
    for name, ours, whole in (
        ("embedding", seen["embedding"], model.wte(x) + model.wpe.weight[:8]),
        ("attention weights", first, v[:, :, 0]),
        ("attention", seen["attention"], block.attn.c_proj(seen["y"])),
        ("mlp", mlp, block.mlp.eval()(mlp_input)),
    ):
        zero = ours == 0
        assert zero.float().mean().item() == pytest.approx(p, abs=0.07), name
        assert torch.allclose(ours[~zero], whole[~zero] / (1 - p), atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loss_is_close(dtype, device):
    model, x = small_gpt(device), ids(device=device)
    _, expected = model(x[:, :-1], x[:, 1:])
    with torch.autocast(device, dtype):
        _, loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) < 0.01
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.to(dtype)  # weights too: what the logits lose, the loss of them does not lose again
    with torch.no_grad():
        logits, loss = model(x[:, :-1])[0].double(), model(x[:, :-1], x[:, 1:])[1]
    exact = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def recompute(model: GPT, x: torch.Tensor, number: int, choose) -> torch.Tensor:
    """The plain loop: the whole context through the model for every token."""
    for _ in range(number):
        x = torch.cat([x, choose(model(x)[0][:, -1])], dim=1)
    return x


SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
]


@torch.no_grad()
def test_logits_that_are_no_numbers_are_found_in_any_row():
    model, x = small_gpt(), ids(3, 5)
    x[1] = 7  # in one row alone
    x[[0, 2]] = 3
    model.wpe.weight.zero_()
    model.wte.weight[7, 0] = math.nan
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    assert model(x)[0].isnan().any(-1).any(-1).tolist() == [False, True, False]
    with pytest.raises(InputError, match="logits are not finite"):
        model.generate(x, 1)


@pytest.mark.parametrize("sampling", SAMPLING)
@torch.no_grad()
def test_cached_generation_equals_the_plain_loop(sampling, device):
    model, x = small_gpt(device), ids(3, 5, device)
    number = 32 - 5 + 1  # fills the context; the last token needs no room in it
    generators = [torch.Generator(device).manual_seed(4) for _ in range(2)]
    cached = model.generate(x, number, **sampling, generator=generators[0])
    plain = recompute(
        model, x, number, lambda logits: sample(logits, **sampling, generator=generators[1])
    )
    assert torch.equal(cached, plain)
    assert len(cached[:, 5:].unique()) > 5


@pytest.mark.parametrize(("rows", "most", "kept"), [(2, 32, 16), (8, 32, 16), (2, 1, 1)])
@torch.no_grad()
def test_past_the_context_the_last_half_is_read_again(rows, most, kept, device):
    model, x = small_gpt(device, context_length=most), ids(rows, min(3, most), device)
    told = model.generate(x, 100, temperature=0)
    expected, window = x, x
    for _ in range(100):
        if window.size(1) > most:
            window = window[:, -kept:]
        token = model(window)[0][:, -1].argmax(-1, keepdim=True)
        expected, window = (torch.cat([t, token], dim=1) for t in (expected, window))
    assert torch.equal(told, expected)
    long = ids(2, 50, device)  # of a prompt over the context, the last tokens are read
    assert torch.equal(
        model.generate(long, 1, 0.0)[:, -1], model(long[:, -most:])[0][:, -1].argmax(-1)
    )


@torch.no_grad()
def test_greedy_equals_transformers_generate(device):
    model, x = small_gpt(device), ids(4, 6, device)
    theirs = as_transformers(model)
    mask = torch.ones_like(x)
    expected = theirs.generate(
        x, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    assert torch.equal(model.generate(x, 20, temperature=0), expected)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    number = 40_000
    generator = torch.Generator().manual_seed(0)
    order = torch.tensor([2, 0, 4, 1, 3])  # ids are in no order of their own

    def frequencies(**sampling):
        drawn = sample(logits[:, order].expand(number, -1), generator=generator, **sampling)
        return torch.bincount(order[drawn[:, 0]], minlength=5) / number

    for sampling, expected in (
        ({}, logits[0].softmax(0)),
        ({"temperature": 0.5}, (logits[0] / 0.5).softmax(0)),
        ({"top_k": 2}, torch.cat([logits[0, :2].softmax(0), torch.zeros(3)])),
        # probabilities .644 .237 .087 .032: the second is needed to reach 0.7, the third is not
        ({"top_p": 0.7}, torch.cat([logits[0, :2].softmax(0), torch.zeros(3)])),
        ({"top_p": 0.5}, torch.tensor([1.0, 0, 0, 0, 0])),
        ({"top_k": 100}, logits[0].softmax(0)),
        # of three .665 .245 .090, so that two reach 0.7 and one reaches 0.65: of all it would not
        ({"top_k": 3, "top_p": 0.7}, torch.cat([logits[0, :2].softmax(0), torch.zeros(3)])),
        ({"top_k": 3, "top_p": 0.65}, torch.tensor([1.0, 0, 0, 0, 0])),
        ({"top_k": 100, "top_p": 0.5}, torch.tensor([1.0, 0, 0, 0, 0])),
    ):
        assert (frequencies(**sampling) - expected).abs().max() < 0.012, sampling


@torch.no_grad()
def test_end_of_text_ends_rows_and_then_the_stream(device):
    model, x = small_gpt(device), ids(4, 4, device)
    free = model.generate(x, 28, temperature=0)[:, 4:]
    end = free[0, 10].item()  # a token that some rows tell
    stopped = model.generate(x, 28, temperature=0, end_of_text=end)[:, 4:]
    longest = 0
    for free_row, row in zip(free.tolist(), stopped.tolist(), strict=True):
        first = free_row.index(end) if end in free_row else len(free_row) - 1
        assert row[: first + 1] == free_row[: first + 1]
        assert set(row[first + 1 :]) <= {end}
        longest = max(longest, first + 1)
    assert stopped.size(1) == longest
    alone = model.generate(x[:1], 28, temperature=0, end_of_text=end)[0, 4:].tolist()
    assert alone == free[0, : free[0].tolist().index(end) + 1].tolist()  # and nothing after it
    twice = model.generate(x[[0, 0]], 28, temperature=0, end_of_text=end)
    assert twice.size(1) == 4 + len(alone)


def test_generation_leaves_training_mode_as_it_was():
    model = small_gpt(dropout=0.5).train()
    first = model.generate(ids(1, 4), 10, temperature=0)
    assert model.training
    assert torch.equal(first, model.generate(ids(1, 4), 10, temperature=0))  # no dropout within


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"temperature": -1}, "temperature must be at least 0, not -1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"idx": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt has no tokens"),
    ],
)
def test_sampling_mistakes_are_named(arguments, says):
    with pytest.raises(InputError, match=says):
        small_gpt().generate(**({"idx": ids(1, 4), "max_new_tokens": 3} | arguments))


def test_too_long_an_input_is_named():
    model = small_gpt()
    with pytest.raises(InputError, match="33 tokens do not fit context_length 32"):
        model(ids(1, 33))
    cache = model.new_cache()
    model.hidden(ids(1, 32), cache)
    with pytest.raises(InputError, match="33 tokens do not fit"):
        model.hidden(ids(1, 1), cache)


@torch.no_grad()
def test_several_tokens_after_cached_ones_are_refused():
    """The causal mask would be wrong for them, and the logits silently so."""
    model, cache = small_gpt(), small_gpt().new_cache()
    model.hidden(ids(1, 5), cache)
    with pytest.raises(InputError, match="takes one more at a time, not 2"):
        model.hidden(ids(1, 2), cache)


@torch.no_grad()
def test_a_row_draws_from_its_own_generator():
    model, x = small_gpt(), ids(3, 5)
    together = model.generate(
        x, 20, generator=[torch.Generator().manual_seed(n) for n in (4, 5, 6)]
    )
    for row, n in zip(range(3), (4, 5, 6), strict=True):
        torch.manual_seed(n)  # what a published model's card does
        assert torch.equal(model.generate(x[row : row + 1], 20)[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1e-39, 1e-300, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature):
    model, x = small_gpt(), ids(2, 5)
    expected = model.generate(x, 20, temperature=0)
    assert torch.equal(model.generate(x, 20, temperature=temperature), expected)
    told = model.generate(x, 20, temperature=temperature, top_k=50, top_p=0.9)
    assert torch.equal(told, expected)


def test_broken_weights_are_named():
    model = small_gpt()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 3] = math.nan
    with pytest.raises(InputError, match="its weights are broken"):
        model.generate(ids(1, 4), 3)


def test_memory_depends_neither_on_how_much_may_come_nor_on_how_much_came():
    model, kept = small_gpt(), []
    model.lm_head.register_forward_hook(lambda *hooked: kept.append(hooked[2].requires_grad))
    stream = model.stream(ids(1, 4), 10**15, temperature=0)
    assert len([next(stream) for _ in range(100)]) == 100
    assert not any(kept)  # a graph would keep all that came before


def test_future_tokens_do_not_matter():
    model, x = small_gpt(), ids(1, 32)
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 301
    before, after = model(x)[0], model(changed)[0]
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 0.1


def test_flops_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(vocab_size=512, context_length=64, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config)
    x = torch.randint(512, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    counted = counter.get_total_flops() / x.numel()
    # Biases and norms are counted as weights, attention's backward is counted with recomputation.
    assert model.flops_per_token() == pytest.approx(counted, rel=0.1)
    longer = GPT(GPTConfig(**vars(config) | {"context_length": 128}))  # costs more attention alone
    assert longer.flops_per_token() - model.flops_per_token() == 12 * 2 * 64 * 64
