"""What told stories have word for word from `train.bin`, which is read once, in bounded memory:
the windows of what was told are hashed and looked up, not those of what is read."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHUNK = 2**20  # tokens read at once
GAP = 2**16  # between two stories: no token
BASES = (0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 2**64))  # odd, and so with an inverse
TABLE_BITS = 22


def read_chunks(path: Path, overlap: int, size: int = CHUNK) -> Iterator[np.ndarray]:
    """The ids of a token file, (at most overlap + size,) uint16 at a time: each chunk begins with
    the last `overlap` >= 1 of the one before."""
    chunk = np.empty(0, "<u2")
    with open(path, "rb") as file:  # not mapped: pages once read would count as this process's
        while (read := np.fromfile(file, "<u2", size)).size:
            chunk = np.concatenate((chunk[-overlap:], read))
            yield chunk


class Windows(NamedTuple):
    """The told windows of `n` tokens: their distinct hashes, sorted, and a position of each; which
    of them each window has; and a table by the first bits of a hash that rules most others out."""

    n: int
    distinct: np.ndarray
    position: np.ndarray
    which: np.ndarray
    table: np.ndarray


class CopySearch:
    """Which windows of told `stories`, (tokens,) ids each, stand in the chunks it is shown.

    `found[n]` says it of the window of n tokens from each told position, for n of `lengths`;
    `longest` and `longest_at` are the tokens of the longest run (0 where it has fewer than the
    least of `lengths`) and where it was told. Chunks that overlap by the longest story miss
    nothing.
    """

    def __init__(self, stories: Sequence[np.ndarray], lengths: tuple[int, ...] = (12, 25)):
        self.sizes = [len(story) for story in stories]
        self.ids = np.concatenate([np.append(story, GAP) for story in stories])
        self.found = {n: np.zeros(len(self.ids), bool) for n in lengths}
        self.longest, self.longest_at = 0, 0
        self.powers = self.inverse = np.ones(1, np.uint64)
        self.windows = [self._windows(n) for n in lengths]
        self.longer = self._windows(min(lengths))

    def scan(self, chunk: np.ndarray) -> None:
        """Looks for what was told in the (tokens,) uint16 `chunk`."""
        sums = self._sums(chunk)
        for windows in self.windows:
            self.found[windows.n] |= self._matches(chunk, sums, windows)
        while (matched := self._matches(chunk, sums, self.longer)).any():
            self.longest, self.longest_at = self.longer.n, int(matched.argmax())
            self.longer = self._windows(self.longest + 1)

    def share(self, n: int) -> np.ndarray:
        """The share of each story's tokens inside a run of at least `n` that was found: (stories,)
        float64, NaN for an empty story."""
        before = np.concatenate(([0], self.found[n].cumsum()))  # windows found before a position
        position = np.arange(len(self.ids))
        covered = before[position + 1] > before[(position + 1 - n).clip(min=0)]
        stories = np.split(covered, np.cumsum([size + 1 for size in self.sizes]))[:-1]
        return np.array([story[:-1].mean() if len(story) > 1 else np.nan for story in stories])

    def longest_run(self) -> np.ndarray:
        """Its ids."""
        return self.ids[self.longest_at : self.longest_at + self.longest]

    def _sums(self, ids: np.ndarray) -> np.ndarray:
        """The running sums of id_i · base^i modulo 2**64: (len(ids) + 1,) uint64."""
        if len(self.powers) <= len(ids):
            powers = (np.full(len(ids), base, np.uint64).cumprod() for base in BASES)
            self.powers, self.inverse = (np.append(np.ones(1, np.uint64), p) for p in powers)
        terms = ids.astype(np.uint64) * self.powers[: len(ids)]
        return np.append(np.zeros(1, np.uint64), terms.cumsum())

    def _hashes(self, sums: np.ndarray, n: int) -> np.ndarray:
        """The hash of every window of n ids, Σ id_k · base^k (Karp & Rabin, 1987): out of the
        running sums, it costs the same for every n."""
        return (sums[n:] - sums[:-n]) * self.inverse[: len(sums[n:])]

    def _windows(self, n: int) -> Windows:
        hashes = self._hashes(self._sums(self.ids), n)
        distinct, position, which = np.unique(hashes, return_index=True, return_inverse=True)
        table = np.zeros(2**TABLE_BITS, bool)
        table[distinct >> np.uint64(64 - TABLE_BITS)] = True
        return Windows(n, distinct, position, which, table)

    def _matches(self, chunk: np.ndarray, sums: np.ndarray, windows: Windows) -> np.ndarray:
        """Whether the window from each told position stands in `chunk`, the ids themselves
        compared: (told,) bool."""
        n, distinct, position, which, table = windows
        matched = np.zeros(len(self.ids), bool)
        hashes = self._hashes(sums, n)
        at = np.flatnonzero(table[hashes >> np.uint64(64 - TABLE_BITS)])
        if not len(at):
            return matched
        rank = np.searchsorted(distinct, hashes[at]).clip(max=len(distinct) - 1)
        same = distinct[rank] == hashes[at]
        rank, first = np.unique(rank[same], return_index=True)
        at, offsets = at[same][first, None], np.arange(n)
        equal = (self.ids[position[rank, None] + offsets] == chunk[at + offsets]).all(1)
        stands = np.zeros(len(distinct), bool)
        stands[rank[equal]] = True
        matched[: len(which)] = stands[which]
        return matched
