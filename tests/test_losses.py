import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import GPTConfig
from model import GPT
from storygpt.kernels import speed_up_training
from storygpt.losses import all_windows, estimate_loss


def test_a_ragged_last_batch_counts_by_its_windows():
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "context_length": 16, "n_layer": 1, "n_head": 1, "n_embd": 16}
    model = GPT(GPTConfig(**shape, init_std=0.5)).eval()  # windows of very different losses
    tokens = np.random.default_rng(0).integers(0, 300, 7 * 16 + 1).astype("<u2")
    loss = estimate_loss(model, tokens, batch_size=4, num_windows=8, dtype=torch.float32)
    x, y = (torch.from_numpy(tokens[i:][: 7 * 16].astype(np.int64)).view(7, 16) for i in (0, 1))
    expected = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_does_not_depend_on_the_micro_batch():
    """As many windows whatever the batch_size: they were eval_iters batches of it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "context_length": 16, "n_layer": 1, "n_head": 1, "n_embd": 16}
    model = GPT(GPTConfig(**shape, init_std=0.5)).eval()
    tokens = np.random.default_rng(0).integers(0, 300, 40 * 16 + 1).astype("<u2")
    losses = [
        estimate_loss(model, tokens, batch_size=size, num_windows=10, dtype=torch.float32)
        for size in (1, 4, 10, 64)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_every_token_is_a_target_once():
    for number in (5, 16, 17, 100, 161):
        tokens = np.arange(1, number + 1, dtype="<u2")
        targets = []
        for x, y in all_windows(tokens, 0, 16, 3):
            assert x.shape == y.shape and x.shape[1] <= 16
            assert np.array_equal(x + 1, y)  # 0, the end-of-text, comes before the first token
            targets += y.flatten().tolist()
        assert targets == tokens.tolist()


def test_a_ragged_batch_is_not_compiled_for():
    """A shape more would be a graph more, or with dynamic shapes one for all, training too."""
    model = GPT(GPTConfig(vocab_size=300, context_length=16, n_layer=1, n_head=1, n_embd=16))
    tokens = np.random.default_rng(0).integers(0, 300, 7 * 16 + 1).astype("<u2")
    shapes = []

    def note(graph: torch.fx.GraphModule, inputs: list):
        shapes.append([tuple(x.shape) for x in inputs if x.dtype == torch.int64])
        return graph.forward

    where = {"dtype": torch.float32}
    expected = estimate_loss(model, tokens, batch_size=4, num_windows=7, **where)
    speed_up_training(model, torch.device("cpu"))
    compiled = torch.compile(model, dynamic=False, backend=note)
    assert estimate_loss(compiled, tokens, batch_size=4, num_windows=7, **where) == pytest.approx(
        expected, rel=1e-6
    )
    assert len(shapes) == 1 and (4, 16) in shapes[0]
