"""What stories have word for word from `train.bin`, which is looked through once, by chunks."""

from bisect import bisect
from collections.abc import Iterator, Sequence

import numpy as np

CHUNK_TOKENS = 2**20  # of train.bin, looked through at once
GAP = 2**16  # stands before each story: no token
BASE = np.uint64(0x9E3779B97F4A7C15)
TABLE_BITS = 22  # the first of a hash, by which a table has its place


def chunks(tokens: np.ndarray, overlap: int) -> Iterator[np.ndarray]:
    """Yields (at most overlap + CHUNK_TOKENS,) tokens at a time.

    Each chunk begins with the last `overlap` of the one before: no run of so many is cut in two.
    """
    for first in range(0, len(tokens), CHUNK_TOKENS):
        yield tokens[max(0, first - overlap) : first + CHUNK_TOKENS]


def window_hashes(ids: np.ndarray, n: int, at: np.ndarray | None = None) -> np.ndarray:
    """Returns the hashes, uint64, of the windows of `n` ids that start `at` these places, or all.

    A polynomial modulo 2**64 (Karp & Rabin, 1987): two different windows have the same by a
    chance of about 2**-64, which in a search of all of TinyStories comes to 1 in 100,000.
    """
    places = slice(max(0, len(ids) - n + 1)) if at is None else at
    hashes, ids = np.zeros(1, np.uint64), ids.astype(np.uint64)
    for i in range(n):
        hashes = hashes * BASE + ids[i:][places]
    return hashes


def table_places(hashes: np.ndarray) -> np.ndarray:
    """Returns the places of `hashes` in the table of a `CopySearch`."""
    return hashes >> np.uint64(64 - TABLE_BITS)


class CopySearch:
    """Finds which windows of `stories`, (tokens,) ids each, stand in the chunks it is shown.

    `found[n]` says it of the window of n tokens from each position of `ids`, the stories one after
    the other, for n of `lengths`; `longest` is the number of tokens of the longest run, 0 where
    it is shorter than all of these, and `longest_at` its position. Chunks that overlap by the
    longest story miss nothing.
    """

    def __init__(self, stories: Sequence[np.ndarray], lengths: Sequence[int]):
        self.ids = np.concatenate([np.append(GAP, story) for story in stories])
        self.found = {n: np.zeros(len(self.ids), bool) for n in lengths}
        self.shortest, self.most = min(lengths), max(len(story) for story in stories)
        self.longest, self.longest_at = 0, 0
        self.table = np.zeros(2**TABLE_BITS, bool)  # rules most windows of a chunk out at one look
        self.table[table_places(window_hashes(self.ids, self.shortest))] = True

    def scan(self, chunk: np.ndarray) -> None:
        """Looks for the stories' windows in the (tokens,) uint16 `chunk`."""
        at = np.flatnonzero(self.table[table_places(window_hashes(chunk, self.shortest))])
        for n, found in self.found.items():
            found |= self._stands(n, chunk, at)
        lengths = range(max(self.shortest, self.longest + 1), self.most + 1)
        if lengths and self._stands(lengths[0], chunk, at).any():
            # a run of n tokens begins with one of n - 1, so the longest is found by halving
            number = bisect(lengths, False, key=lambda n: not self._stands(n, chunk, at).any())
            self.longest = lengths[number - 1]
            self.longest_at = int(self._stands(self.longest, chunk, at).argmax())

    def share(self, n: int) -> np.ndarray:
        """Returns the share of each story's tokens inside a run of at least `n` that was found:
        (stories,) float64, NaN for an empty story."""
        covered = np.zeros(len(self.ids), bool)
        for i in range(min(n, len(covered))):  # a window covers its first token, its second, ...
            covered[i:] |= self.found[n][: len(covered) - i]
        stories = np.split(covered, np.flatnonzero(self.ids == GAP))[1:]
        return np.array([story[1:].mean() if len(story) > 1 else np.nan for story in stories])

    def longest_run(self) -> np.ndarray:
        """Returns the ids of the longest run that was found."""
        return self.ids[self.longest_at : self.longest_at + self.longest]

    def _stands(self, n: int, chunk: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Says of each position of `ids` whether its window of `n` tokens is one of those that
        start `at` these places of `chunk`."""
        there = window_hashes(chunk, n, at[at <= len(chunk) - n])
        stands = np.zeros(len(self.ids), bool)
        own = window_hashes(self.ids, n)
        stands[: len(own)] = np.isin(own, there)
        return stands
