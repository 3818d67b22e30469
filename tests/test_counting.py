"""What a GPU would have to do, counted without one: traffic, memory, graphs, fetches.

Tensors on the meta device have shapes and no data, and take the ways of a GPU.
"""

import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import GPTConfig
from model import GPT
from storygpt.kernels import chunk_by_chunk, softmax_, softmax_in_parts_
from storygpt.losses import estimate_loss, exact_loss

# A micro-batch of the reference, its logits in chunks of 4,096 rows.
N, C, V, ROWS = 64 * 256, 512, 50257, 4096
CHUNK = 2 * ROWS * V  # bytes of a chunk's bfloat16 logits
WEIGHT = 4 * V * C
PRODUCTS = ("mm", "addmm_")


class Count(TorchDispatchMode):
    """Adds up what operators read and write, and how much memory lives at the peak, in bytes."""

    def __init__(self):
        super().__init__()
        self.traffic, self.live, self.peak, self.operators = 0, 0, 0, Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in written:
            storage = tensor.untyped_storage()
            if all(storage._cdata != t.untyped_storage()._cdata for t in read):
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        name = operator.overloadpacket.__name__
        self.operators[name] += 1
        if name in ("gather", "scatter_"):  # one element a row
            return result
        if name == "log_softmax":  # a row is read for its maximum, its sum, and its result
            read = 3 * read[:1]
        elif name == "copy_":
            read = read[1:]
        elif name == "zeros_like":
            read = []
        # What products read and write is in their time; views and empty memory cost nothing.
        if name not in PRODUCTS and not operator.is_view and "empty" not in name:
            self.traffic += sum(t.numel() * t.element_size() for t in (*read, *written))
        return result

    def free(self, size: int) -> None:
        self.live -= size


def count(softmax) -> Count:
    """One micro-batch's loss and gradients, as a GPU takes them in bfloat16."""
    x = torch.empty(N, C, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(V, C, device="meta")
    targets = torch.empty(N, device="meta", dtype=torch.int64)
    with Count() as counted:
        chunk_by_chunk(
            x, weight, targets, softmax=softmax, rows=ROWS, columns=64, with_gradients=True
        )
    return counted


def compiled_traffic(monkeypatch) -> int:
    """Bytes that softmax_ moves for one chunk, in the kernels that Inductor plans for Triton."""
    import torch._inductor.config
    import torch._inductor.scheduler
    from torch._inductor.graph import GraphLowering

    planned = []

    class Planned(Exception):
        """Enough is known before any code is written."""

    def plan(graph):
        graph.init_wrapper_code()
        graph._update_scheduler()
        planned.append(graph.count_bytes()[0])
        raise Planned

    monkeypatch.setattr(torch._inductor.scheduler, "has_triton", lambda *_: True)
    monkeypatch.setattr(GraphLowering, "compile_to_module", plan)
    how = {"cpu_backend": "triton", "force_disable_caches": True}
    with (
        torch._inductor.config.patch(how),
        torch._subclasses.FakeTensorMode(),
        torch.no_grad(),
        pytest.raises(Exception, match="Planned"),
    ):
        logits = torch.empty_strided((ROWS, V), (50304, 1), dtype=torch.bfloat16)
        targets = torch.empty(ROWS, dtype=torch.int64)
        torch.compile(softmax_, dynamic=False, fullgraph=True)(logits, targets)
    return planned[0]


def only_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """What is left of a compiled softmax once its kernels are counted by themselves."""
    return logits.new_empty((len(logits), 1), dtype=torch.float32)


def test_a_compiled_loss_passes_over_its_logits_less_than_five_times(monkeypatch, record_property):
    softmax = compiled_traffic(monkeypatch) * (N // ROWS)
    passes = (softmax + count(only_losses).traffic) / (2 * N * V)
    record_property("passes over the logits, compiled", round(passes, 2))
    assert 3 <= passes < 5


def test_a_compiled_loss_takes_the_memory_of_one_chunk_and_the_weights(record_property):
    peak = count(only_losses).peak
    record_property("GB of the loss at its peak, compiled", round(peak / 1e9, 2))
    assert CHUNK < peak < 1.5 * CHUNK + 4 * WEIGHT


def test_a_loss_without_a_compiler_takes_one_more_chunk(record_property):
    counted = count(softmax_in_parts_)
    passes = counted.traffic / (2 * N * V)
    record_property("passes over the logits, not compiled", round(passes, 2))
    record_property("GB of the loss at its peak, not compiled", round(counted.peak / 1e9, 2))
    assert passes < 20 and counted.peak < 2.5 * CHUNK + 4 * WEIGHT


def test_products_for_the_weights_gradient_are_float32():
    """4,096 rows' sum for a frequent token can be more than float16 holds."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if operator.overloadpacket.__name__ == "mm" and args[0].size(1) == ROWS:
                dtypes.append(result.dtype)
            return result

    dtypes = []
    with Products():
        count(only_losses)
    assert len(dtypes) >= N // ROWS and set(dtypes) == {torch.float32}


class Fetches(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    number = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
        self.number += getattr(function, "__name__", "") in names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["estimate", "exact"])
def test_an_evaluation_waits_for_the_device_once(kind):
    model = GPT(GPTConfig(vocab_size=300, context_length=16, n_layer=1, n_head=1, n_embd=16))
    tokens = np.random.default_rng(0).integers(0, 300, 16 * 400 + 1).astype("<u2")
    with Fetches() as fetches:
        if kind == "estimate":
            estimate_loss(model, tokens, batch_size=4, num_windows=400, dtype=torch.float32)
        else:
            exact_loss(model, tokens, 299, 4)
    assert 1 <= fetches.number <= 2
