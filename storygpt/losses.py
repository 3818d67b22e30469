"""How well a model predicts: the mean loss of a sample of a split or of all of it, and the loss of
each story alone, which compares models of any vocabulary and context."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT
from storygpt.cli import progress_bar
from storygpt.device import autocast, to_device
from storygpt.distributed import Processes
from storygpt.token_files import validation_starts, windows


@torch.no_grad()
def estimate_loss(
    model: nn.Module,
    tokens: np.ndarray,
    context_length: int,
    batch_size: int,
    num_batches: int,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes | None = None,
) -> float:
    """Mean loss in nats a token over at most `num_batches` batches of windows of `tokens`.

    The same windows every time; of several `processes` each takes its share of them.
    """
    rank, world_size = (processes.rank, processes.world_size) if processes else (0, 1)
    starts = validation_starts(tokens, context_length, num_batches * batch_size)
    losses, sizes = [torch.zeros((), device=device)], [0]  # there may be none for this process
    was_training = model.training
    model.eval()
    for first in range(rank * batch_size, len(starts), world_size * batch_size):
        x, y = windows(tokens, starts[first : first + batch_size], context_length)
        with autocast(device, dtype):
            _, loss = model(to_device(x, device), to_device(y, device))
        losses.append(loss)
        sizes.append(len(x))
    model.train(was_training)
    nats, count = weighted_sum(losses, sizes), sum(sizes)
    if processes and processes.launched:  # Apple's GPUs have no float64
        total = torch.tensor([nats, count], dtype=torch.float64, device=device)
        nats, count = processes.sum(total).tolist()
    return nats / count


def weighted_sum(losses: list[Tensor], weights: list[int]) -> float:
    """Sum () losses times their weights, in float64.

    They are fetched all at once, so that the device never waits for the host in between.
    """
    return float(np.dot(torch.stack(losses).tolist(), weights))


def all_windows(
    tokens: np.ndarray, end_of_text: int, context_length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of inputs and targets, (B, T) int64, in which every token is a target once.

    The first token is predicted from an end-of-text, which ended the story before it; the last
    window is as short as what is left, so T is context_length in all batches but the last.
    """
    stream = np.concatenate(([end_of_text], tokens[:context_length]))
    yield windows(stream, np.zeros(1, int), len(stream) - 1)
    starts = np.arange(context_length - 1, len(tokens) - context_length, context_length)
    for first in range(0, len(starts), batch_size):
        yield windows(tokens, starts[first : first + batch_size], context_length)
    scored = context_length * (len(starts) + 1)
    if scored < len(tokens):
        yield windows(tokens, np.array([scored - 1]), len(tokens) - scored)


@torch.no_grad()
def exact_loss(model: GPT, tokens: np.ndarray, end_of_text: int, batch_size: int) -> float:
    """Mean loss in nats over all `tokens` (uint16), each scored once; summed in float64."""
    device, losses, sizes = model.wte.weight.device, [], []
    batches = all_windows(tokens, end_of_text, model.config.context_length, batch_size)
    with progress_bar(total=len(tokens), unit=" tokens", desc="scoring") as bar:
        for x, y in batches:
            _, loss = model(to_device(x, device), to_device(y, device))
            losses.append(loss)
            sizes.append(y.size)
            bar.update(y.size)
    return weighted_sum(losses, sizes) / len(tokens)


# --- Each story alone ---

IGNORED = -100  # a target that is not scored


def logits_of(model: GPT) -> Callable[[Tensor], Iterator[Tensor]]:
    """`model` as `story_losses` takes it: (B, T) ids to (T, vocab_size) logits, row by row."""
    return lambda idx: (model.lm_head(row) for row in model.hidden(idx))


def story_windows(
    ids: np.ndarray, end_of_text: int, context_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, (T,) int64, that score every one of a story's (tokens,) ids once.

    The story stands alone after an end-of-text. A window slides on by half the context, so that
    what the first does not reach is predicted from half a context at least.
    """
    inputs, targets = np.append(end_of_text, ids[:-1]), np.array(ids)
    first = scored = 0
    while scored < len(ids):
        y = targets[first : first + context_length].astype(np.int64)
        y[: scored - first] = IGNORED
        yield inputs[first : first + context_length], y
        scored, first = first + context_length, first + max(1, context_length // 2)


@torch.no_grad()
def story_losses(
    logits: Callable[[Tensor], Iterable[Tensor]],
    stories: Sequence[np.ndarray],
    end_of_text: int,
    context_length: int,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """The nats of each story, (tokens,) ids without end-of-text, alone after one: (stories,)
    float64, the sum over its tokens.

    `logits` gives (B, T) int64 ids' logits, a (T, vocab_size) tensor a row. Divided by the UTF-8
    bytes of the stories' text, the sum compares models of any vocabulary and context.
    """
    windows = [
        (story, x, y)
        for story, ids in enumerate(stories)
        for x, y in story_windows(ids, end_of_text, context_length)
    ]
    windows.sort(key=lambda window: len(window[1]))  # a batch is as wide as its longest row
    nats = np.zeros(len(stories))
    with progress_bar(total=len(windows), unit=" windows", desc="scoring", leave=False) as bar:
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            idx = np.full((len(batch), len(batch[-1][1])), end_of_text)
            for row, (_, x, _) in zip(idx, batch, strict=True):
                row[: len(x)] = x  # what follows is after all that is scored: causal, no mask
            rows = logits(to_device(idx, device))
            for row, (story, _, y) in zip(rows, batch, strict=True):
                y = to_device(y, device)
                loss = F.cross_entropy(
                    row[: len(y)].float(), y, ignore_index=IGNORED, reduction="sum"
                )
                nats[story] += loss.item()
            bar.update(len(batch))
    return nats
