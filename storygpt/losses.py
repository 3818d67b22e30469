"""How well a model predicts: the mean loss of a sample of a split, or of all of it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from model import GPT
from storygpt.batches import cut_windows, validation_starts
from storygpt.cli import progress_bar
from storygpt.device import autocast, to_device
from storygpt.distributed import Processes


@torch.no_grad()
def estimate_loss(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    batch_size: int,
    num_windows: int,
    dtype: torch.dtype,
    processes: Processes | None = None,
) -> float:
    """Returns the mean loss in nats a token over at most `num_windows` windows of `tokens`.

    The same windows every time; of several `processes` each takes its share of them.
    """
    plain = getattr(model, "_orig_mod", model)  # a compiled model would be compiled for each shape
    device, context_length = plain.wte.weight.device, plain.config.context_length
    rank, world_size = (processes.rank, processes.world_size) if processes else (0, 1)
    starts = validation_starts(tokens, context_length, num_windows)
    losses, sizes = [torch.zeros((), device=device)], [0]  # there may be none for this process
    was_training = model.training
    model.eval()
    for first in range(rank * batch_size, len(starts), world_size * batch_size):
        x, y = cut_windows(tokens, starts[first : first + batch_size], context_length)
        with autocast(device, dtype):
            forward = model if len(x) == batch_size else plain
            _, loss = forward(to_device(x, device), to_device(y, device))
        losses.append(loss)
        sizes.append(len(x))
    model.train(was_training)
    nats, count = weighted_sum(losses, sizes), sum(sizes)
    if processes and processes.launched:  # Apple's GPUs have no float64
        total = torch.tensor([nats, count], dtype=torch.float64, device=device)
        nats, count = processes.sum(total).tolist()
    return nats / count


def weighted_sum(losses: list[Tensor], weights: list[int]) -> float:
    """Sums () losses times their weights, in float64.

    They are fetched all at once, so that the device never waits for the host in between.
    """
    return float(np.dot(torch.stack(losses).tolist(), weights))


def all_windows(
    tokens: np.ndarray, end_of_text: int, context_length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of inputs and targets, (B, T) int64, in which every token is a target once.

    The first token is predicted from an end-of-text, which ended the story before it; the last
    window is as short as what is left, so T is context_length in all batches but the last.
    """
    stream = np.concatenate(([end_of_text], tokens[:context_length]))
    yield cut_windows(stream, np.zeros(1, int), len(stream) - 1)
    starts = np.arange(context_length - 1, len(tokens) - context_length, context_length)
    for first in range(0, len(starts), batch_size):
        yield cut_windows(tokens, starts[first : first + batch_size], context_length)
    scored = context_length * (len(starts) + 1)
    if scored < len(tokens):
        yield cut_windows(tokens, np.array([scored - 1]), len(tokens) - scored)


@torch.no_grad()
def exact_loss(model: GPT, tokens: np.ndarray, end_of_text: int, batch_size: int) -> float:
    """Returns the mean loss in nats over all `tokens` (uint16), each of them scored once."""
    device, losses, sizes = next(model.parameters()).device, [], []
    batches = all_windows(tokens, end_of_text, model.config.context_length, batch_size)
    with progress_bar(total=len(tokens), unit=" tokens", desc="scoring") as bar:
        for x, y in batches:
            _, loss = model(to_device(x, device), to_device(y, device))
            losses.append(loss)
            sizes.append(y.size)
            bar.update(y.size)
    return weighted_sum(losses, sizes) / len(tokens)
