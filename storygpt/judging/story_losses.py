"""The loss of each story alone, which compares models of any vocabulary and context."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from storygpt.cli import progress_bar

IGNORED = -100  # a target that is not scored


def logits_of(model: GPT) -> Callable[[Tensor], Iterator[Tensor]]:
    """Returns what `story_losses` takes of `model`: the logits of ids, row by row."""
    device = model.wte.weight.device
    return lambda idx: (model.lm_head(row) for row in model.hidden(idx.to(device)))


def scored_windows(
    ids: np.ndarray, end_of_text: int, context_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields inputs and targets, (T,) int64, that score every one of a story's (tokens,) ids once.

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
) -> np.ndarray:
    """Sums the nats of each story's tokens, alone after an end-of-text: (stories,) float64.

    `stories` are (tokens,) ids without end-of-text; `logits` takes (B, T) int64 ids on the CPU
    and gives a (T, vocab_size) tensor a row, on any device. Divided by the UTF-8 bytes of the
    stories' text, the sum compares models of any vocabulary and context.
    """
    order = sorted(range(len(stories)), key=lambda i: len(stories[i]))
    windows = (  # one batch of them in memory, as wide as its longest row
        (i, x, y) for i in order for x, y in scored_windows(stories[i], end_of_text, context_length)
    )
    nats = np.zeros(len(stories))
    with progress_bar(unit=" windows", desc="scoring", leave=False) as bar:
        while batch := list(islice(windows, batch_size)):
            idx = np.full((len(batch), max(len(y) for *_, y in batch)), end_of_text)
            for row, (_, x, _) in zip(idx, batch, strict=True):
                row[: len(x)] = x  # what follows is after all that is scored: causal, no mask
            rows = logits(torch.from_numpy(idx))
            for row, (story, _, y) in zip(rows, batch, strict=True):
                y = torch.from_numpy(y).to(row.device)
                loss = F.cross_entropy(
                    row[: len(y)].float(), y, ignore_index=IGNORED, reduction="sum"
                )
                nats[story] += loss.item()
            bar.update(len(batch))
    return nats
