"""What makes the plain model fast. Each function says what it saves, and is tested against it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, attention, attention_weights


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses of all rows; gradients are taken chunk by chunk on the way.

    They are of the sum and scaled only in backward: those of the mean would underflow in float16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        losses, x_grads = [], []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        vocab_size, weight = len(weight), weight.to(x.dtype)
        if x.is_cuda:  # tensor cores want rows of aligned length: the products are a little wider
            weight = F.pad(weight, (0, 0, 0, -vocab_size % 64))
        # All chunks share their memory: to a CPU fresh pages cost a fifth of the loss.
        shape = min(rows, len(x)), len(weight)
        logits = x.new_empty(shape)
        scores = logits if x.dtype == torch.float32 else x.new_empty(shape, dtype=torch.float32)
        log_p = x.new_empty(shape, dtype=torch.float32)
        for chunk, chunk_targets in zip(x.split(rows), targets.split(rows), strict=True):
            if len(chunk) < len(logits):  # the last one
                logits, scores, log_p = (t[: len(chunk)] for t in (logits, scores, log_p))
            torch.mm(chunk, weight.T, out=logits)
            logits[:, vocab_size:] = -torch.inf
            torch.log_softmax(scores.copy_(logits), -1, out=log_p)
            losses.append(F.nll_loss(log_p, chunk_targets, reduction="sum"))
            # The gradient of the logits is softmax minus one-hot.
            error = log_p.exp_()
            error[torch.arange(len(chunk), device=x.device), chunk_targets] -= 1
            error = logits.copy_(error)
            x_grads.append(error @ weight)
            weight_grad += (error.T @ chunk)[:vocab_size]
        ctx.save_for_backward(torch.cat(x_grads), weight_grad)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, loss_grad: Tensor):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * loss_grad, weight_grad * loss_grad, None, None


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`model.cross_entropy` without the logits of a whole batch, its largest tensor, in memory.

    x (N, C), weight (V, C), targets (N,) int64 to the mean loss in nats, a () float32 tensor.
    Under autocast the products run in its dtype; softmax, loss and sums are float32.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows = 4096 if device == "cuda" else 512
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return _ChunkedCrossEntropy.apply(x, weight, targets, rows) / len(x)
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        weight = weight.to(x.dtype)
        losses = [
            F.cross_entropy(F.linear(chunk, weight).float(), chunk_targets, reduction="sum")
            for chunk, chunk_targets in chunks
        ]
        return torch.stack(losses).sum() / len(x)


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout from 16 random bits an element: p is met to 1 / 65,536.

    A CPU draws random numbers one after the other; four elements share one here.
    """
    draws = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 4 + 1,))
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * keep / (1 - p)


def attention_on_cpu(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
    """`model.attention`, with a quicker way to drop: with dropout torch's fused kernel is, on a
    CPU, the equation written out as well, with more temporaries."""
    if not dropout_p:
        return attention(q, k, v, dropout_p, is_causal)
    return quick_dropout(attention_weights(q, k, is_causal), dropout_p) @ v


def speed_up_training(model: GPT, device: torch.device) -> None:
    """Puts into the model what computes the same in less time or memory on this device."""
    # Inside a compiled graph the chunks' products would be put off until all chunks are in memory
    # at once. (Not a decorator: it loads the compiler, a second that only training has to wait.)
    model.loss_function = torch.compiler.disable(chunked_cross_entropy)
    if device.type == "cpu":
        for block in model.h:
            block.attn.attention = attention_on_cpu


def onednn_operators() -> list | None:
    """oneDNN's reordering, product and bfloat16 check, or None where torch lacks one of them.

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
