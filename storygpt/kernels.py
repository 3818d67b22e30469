"""What makes the plain model fast. Each function says what it saves, and is tested against it."""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import InputError
from model import GPT, attention, attention_weights

# --- The loss ---


def softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turns (rows, V) logits into probabilities, in place; returns the losses, (rows, 1) float32.

    The softmax is float32, whatever the logits are. Compiled for a GPU these are two kernels, which
    read the logits twice, write them once, and need no memory of their size.
    """
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    losses = -log_p.gather(1, targets.unsqueeze(1))
    logits.copy_(log_p.exp_())
    return losses


def softmax_in_parts_(logits: Tensor, targets: Tensor) -> Tensor:
    """Does the same without a compiler, a few rows at a time in the same memory.

    As float32 these stay in a CPU's cache, and on a GPU take as much memory as bfloat16 logits.
    """
    rows = 32 if logits.is_cpu else len(logits) // 4 + 1
    scores, log_p = logits.new_empty(2, rows, logits.size(1), dtype=torch.float32)
    losses = []
    for part, part_targets in zip(logits.split(rows), targets.split(rows), strict=True):
        if len(part) < rows:  # the last one
            scores, log_p = scores[: len(part)], log_p[: len(part)]
        torch.log_softmax(scores.copy_(part), -1, out=log_p)
        losses.append(-log_p.gather(1, part_targets.unsqueeze(1)))
        part.copy_(log_p.exp_())
    return torch.cat(losses)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to the float32 `total`, part by part: a product of the whole would need fresh
    memory.

    On CUDA the products are float32, too: a frequent token's sum over thousands of rows can be more
    than float16 holds.
    """
    if a.dtype == torch.float32:
        total.addmm_(a, b)
        return
    wide = {} if a.device.type in ("cpu", "mps") else {"out_dtype": torch.float32}
    for part, a_part in zip(total.split(4096), a.split(4096), strict=True):
        part += torch.mm(a_part, b, **wide)


@torch.no_grad()
def chunk_by_chunk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softmax: Callable[[Tensor, Tensor], Tensor],
    rows: int,
    columns: int,
    with_gradients: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Returns the () float32 sum of the losses of x (N, C) @ weight (V, C).T, and its gradients for
    both where they are wanted, taken while the logits of a chunk of `rows` are there.

    The logits are padded to a multiple of `columns`, which tensor cores want. Gradients are of the
    sum because those of the mean would underflow in float16.
    """
    vocab_size, weight = len(weight), weight.to(x.dtype)
    if padding := -vocab_size % columns:
        weight = F.pad(weight, (0, 0, 0, padding))
    weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_gradients else None
    # All chunks share their memory: to a CPU fresh pages cost a fifth of the loss.
    memory = x.new_empty(min(rows, len(x)), len(weight))
    losses, x_grads = [], []
    for chunk, chunk_targets in zip(x.split(rows), targets.split(rows), strict=True):
        logits = torch.mm(chunk, weight.T, out=memory[: len(chunk)])
        losses.append(softmax(logits[:, :vocab_size], chunk_targets))  # the padding stays 0
        if with_gradients:
            # The gradient of the logits is softmax minus one-hot: p - 1 is exp(-loss) - 1.
            minus_one = torch.expm1(-losses[-1]).to(x.dtype)
            error = logits.scatter_(1, chunk_targets.unsqueeze(1), minus_one)
            x_grads.append(error @ weight)
            add_product_(weight_grad, error.T, chunk)
    loss = torch.cat(losses).sum()
    return loss, (torch.cat(x_grads), weight_grad[:vocab_size]) if with_gradients else None


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients have been taken on the way to it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, loss: Tensor, x_grad: Tensor, weight_grad: Tensor):
        ctx.save_for_backward(x_grad, weight_grad)
        return loss.clone()

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * loss_grad, weight_grad * loss_grad, None, None, None


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softmax: Callable[[Tensor, Tensor], Tensor] = softmax_in_parts_,
) -> Tensor:
    """Computes `model.cross_entropy` without the logits of a whole batch, its largest tensor.

    x (N, C), weight (V, C), targets (N,) int64 to the mean loss in nats, a () float32 tensor.
    Under autocast the products run in its dtype; softmax, loss and sums are float32. `softmax` is
    `softmax_` or another way to the same.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows, columns = (4096, 64) if device == "cuda" else (512, 1)
    with torch.autocast(device, enabled=False):
        loss, gradients = chunk_by_chunk(
            x,
            weight,
            targets,
            softmax=softmax,
            rows=rows,
            columns=columns,
            with_gradients=torch.is_grad_enabled(),
        )
        if gradients:
            x_grad, weight_grad = gradients
            loss = _KnownGradients.apply(x, weight, loss, x_grad, weight_grad)
        return loss / len(x)


# --- Dropout and attention on a CPU ---


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """Drops as F.dropout does, from 16 random bits an element: p is met to 1 / 65,536.

    A CPU draws random numbers one after the other; four elements share one here.
    """
    draws = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 4 + 1,))
    least = min(round(p * 2**16), 2**16 - 1) - 2**15
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= least
    return x * keep / (1 - p)


def attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    """Computes `model.attention`, with a quicker way to drop: with dropout torch's fused kernel is,
    on a CPU, the equation written out as well, with more temporaries."""
    if not dropout_p:
        return attention(q, k, v, dropout_p, is_causal)
    return quick_dropout(attention_weights(q, k, is_causal), dropout_p) @ v


# --- Put into a model ---


def speed_up_training(model: GPT, device: torch.device) -> None:
    """Puts into the model what computes the same in less time or memory on this device."""
    # Inside a compiled graph the chunks' products would be put off until all chunks are in memory
    # at once. (Not a decorator: it loads the compiler, a second that only training has to wait.)
    model.loss_function = torch.compiler.disable(chunked_cross_entropy)
    if device.type == "cpu":
        for block in model.h:
            block.attn.attention = attention_on_cpu


def compile_model(model: GPT, wanted: bool | None, device: torch.device) -> nn.Module:
    """Returns torch.compile(model) if `wanted`; None means on CUDA, where it works.

    All shapes are static. Raises InputError where compiling is wanted and does not work: it needs a
    C++ compiler, and on GPUs Triton.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return model
    try:  # a small function first: a model's first step is late for such news
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: (x.sin() * 2).sum())(x).backward()
    except Exception as error:  # each layer of the compiler has its own
        reason = f"torch.compile does not work here ({type(error).__name__})"
        if wanted:
            raise InputError(f"{reason}: pass --compile False") from error
        print(f"{reason}: training goes on without it, more slowly")
        return model
    if device.type != "cpu":
        softmax = torch.compile(softmax_, dynamic=False)
        loss_function = partial(chunked_cross_entropy, softmax=softmax)
        model.loss_function = torch.compiler.disable(loss_function)
    # DDP's splitting of a graph would change the numbers: one process draws other dropout.
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(model, dynamic=False)


def failed_to_compile(error: Exception) -> bool:
    """Tells whether torch.compile has failed: on a model it can where the small function went."""
    compiler = sys.modules.get("torch._dynamo.exc")  # imported if it was used
    return compiler is not None and isinstance(error, compiler.TorchDynamoException)


# --- Generation on a CPU ---


def onednn_operators() -> list | None:
    """Returns oneDNN's reordering, product and bfloat16 check, or None where torch lacks one of
    them.

    torch promises none: they are its compiler's own.
    """
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    operators = [getattr(torch.ops.mkldnn, name, None) for name in names]
    return operators if torch.backends.mkldnn.is_available() and None not in operators else None


class _PackedLinear(nn.Module):
    """nn.Linear for inference, its weight arranged once for the CPU's vector units."""

    def __init__(self, linear: nn.Linear, reorder, product):
        super().__init__()
        self.weight, self.bias, self.product = reorder(linear.weight.detach()), linear.bias, product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Has oneDNN pack the weights of all linear layers of a model that will only generate.

    For a few rows a CPU spends longer on arranging a weight than on multiplying by it; packed, it
    is arranged once and not at every token. One way: the model cannot be trained or saved after
    it. Does nothing for a model that is not on a CPU, whose dtype oneDNN has no instructions for
    here, or in a torch without the operators.
    """
    operators, weight = onednn_operators(), next(model.parameters())
    if operators is None or not weight.is_cpu:
        return
    reorder, product, has_bfloat16 = operators
    if weight.dtype != torch.float32 and not (weight.dtype == torch.bfloat16 and has_bfloat16()):
        return
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                setattr(parent, name, _PackedLinear(module, reorder, product))
