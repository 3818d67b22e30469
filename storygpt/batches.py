"""The batch of any step, as a pure function of (seed, step, position in the global batch).

Resuming needs no sampler state, and N processes that each ask for their own positions draw together
what one would. An epoch, of windows of 4 tokens:

    tokens   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17 18
             └───┘ └─────────┘ └─────────┘ └─────────┘ └─────────┘ ↑
            offset   window 0    window 1    window 2    window 3  the last target

18 targets hold 4 windows, and 2 tokens are spare: the offset of an epoch is 0, 1 or 2, another one
than that of the epoch before. The windows come in a seeded order, each once an epoch.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


@dataclass(frozen=True, eq=False)
class Batches:
    """The training batches of a run, which counts its steps from 1."""

    tokens: np.ndarray
    """(tokens,) uint16: all of the split."""
    end_of_text: int
    seed: int
    windows_per_step: int
    """Windows in the global batch of a step, over all micro-batches and processes."""
    context_length: int
    story_windows: float = 0.0
    """Share of the windows that are moved back to the start of the story they begin in."""

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.context_length

    @property
    def steps_per_epoch(self) -> float:
        return self.windows_per_epoch / self.windows_per_step

    @property
    def windows_per_epoch(self) -> int:
        return self.layout[0]

    @cached_property
    def layout(self) -> tuple[int, range]:
        """How many windows an epoch has, and the offsets at which the first of them may start.

        At every offset less than one window is left at either end of the tokens. All epochs are
        equally long, so that a window's epoch is one division: offsets either fit all windows or
        all but one, and the kind with more offsets to choose from is taken.
        """
        num_windows, spare = divmod(len(self.tokens) - 1, self.context_length)
        if num_windows == 1 or 2 * (spare + 1) >= self.context_length:
            return num_windows, range(spare + 1)
        return num_windows - 1, range(spare + 1, self.context_length)

    @cached_property
    def story_ends(self) -> np.ndarray:
        """The places of the end-of-text ids: (stories,) int64."""
        return np.flatnonzero(self.tokens == self.end_of_text)

    def starts(self, step: int, positions: range) -> np.ndarray:
        """Returns where the windows at `positions` of a step's global batch start in their epoch's
        layout: (len(positions),) int64."""
        num_windows, offsets = self.layout
        drawn = (step - 1) * self.windows_per_step + np.arange(positions.start, positions.stop)
        epochs, places = np.divmod(drawn, num_windows)
        starts = np.empty(len(drawn), np.int64)
        for epoch in np.unique(epochs):  # a batch may cross from one epoch into the next
            offset = offset_of(epoch, offsets=offsets, seed=self.seed)
            order = order_of(int(epoch), num_windows=num_windows, seed=self.seed)
            inside = epochs == epoch
            starts[inside] = offset + order[places[inside]].astype(np.int64) * self.context_length
        return starts

    def story_starts(self, step: int, positions: range, starts: np.ndarray) -> np.ndarray:
        """Moves a share `story_windows` of `starts` back to where their story starts.

        Half of these to the end-of-text before it and half behind that, because prompts come with
        and without one.
        """
        draws = np.random.default_rng([self.seed, step]).random(positions.stop)[positions.start :]
        ends = np.concatenate(([-1], self.story_ends))
        before = ends[np.searchsorted(self.story_ends, starts, side="right")]
        moved = np.clip(before + (draws < self.story_windows / 2), 0, starts)
        return np.where(draws < self.story_windows, moved, starts)

    def __call__(self, step: int, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """Returns the windows at `positions` of the global batch of `step`: inputs and targets,
        both (len(positions), context_length) int64."""
        starts = self.starts(step, positions)
        if self.story_windows:
            starts = self.story_starts(step, positions, starts)
        return cut_windows(self.tokens, starts, self.context_length)


def offset_of(epoch: int, offsets: range, seed: int) -> int:
    """Returns the offset of an epoch's first window: all in a seeded order, so no two in a row are
    one."""
    return offsets[np.random.default_rng(seed).permutation(len(offsets))[epoch % len(offsets)]]


@lru_cache(maxsize=2)
def order_of(epoch: int, num_windows: int, seed: int) -> np.ndarray:
    """Returns the order of an epoch's windows: (num_windows,) uint32, of which a run has
    millions."""
    order = np.arange(num_windows, dtype=np.uint32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def cut_windows(
    tokens: np.ndarray, starts: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets, both (len(starts), length) int64; targets are one token ahead."""
    x, y = (tokens[(starts + i)[:, None] + np.arange(length)].astype(np.int64) for i in (0, 1))
    return x, y


def validation_starts(tokens: np.ndarray, context_length: int, most: int) -> np.ndarray:
    """Returns where at most `most` windows start, evenly spread over the split and not
    overlapping."""
    available = (len(tokens) - 1) // context_length
    return np.arange(min(most, available)) * available // min(most, available) * context_length


def mixed_seed(*numbers: int) -> int:
    """Returns one seed below 2**64 of several numbers, such as a seed, a step and a micro-batch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
