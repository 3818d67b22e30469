"""What stories have word for word from `train.bin`, which is read once, in bounded memory."""

from collections.abc import Iterator, Sequence

import numpy as np

CHUNK_TOKENS = 2**20  # of train.bin, looked through at once
GAP = 2**16  # stands before each story: no token
BASE = np.uint64(0x9E3779B97F4A7C15)


def chunks(tokens: np.ndarray, overlap: int) -> Iterator[np.ndarray]:
    """Yield (at most overlap + CHUNK_TOKENS,) tokens at a time.

    Each chunk begins with the last `overlap` of the one before: no run of so many is cut in two.
    """
    for first in range(0, len(tokens), CHUNK_TOKENS):
        yield tokens[max(0, first - overlap) : first + CHUNK_TOKENS]


def window_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Give the hash of the window of `n` ids from each position, where so many follow: uint64.

    A polynomial modulo 2**64 (Karp & Rabin, 1987): two different windows have the same by a
    chance of about 2**-64, which in a search of all of TinyStories comes to 1 in 100,000.
    """
    ids, hashes = ids.astype(np.uint64), np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for i in range(n):
        hashes = hashes * BASE + ids[i : i + len(hashes)]
    return hashes


class CopySearch:
    """Finds which windows of `stories`, (tokens,) ids each, stand in the chunks it is shown.

    `found[n]` says it of the window of n tokens from each position of `ids`, the stories one after
    the other, for n of `lengths`; `longest` is the longest run's number of tokens, `longest_at` its
    position. Chunks that overlap by the longest story miss nothing.
    """

    def __init__(self, stories: Sequence[np.ndarray], lengths: Sequence[int]):
        self.ids = np.concatenate([np.append(GAP, story) for story in stories])
        self.found = {n: np.zeros(len(self.ids), bool) for n in lengths}
        self.longest, self.longest_at = 0, 0

    def scan(self, chunk: np.ndarray) -> None:
        """Look for the stories' windows in the (tokens,) uint16 `chunk`."""
        for n, found in self.found.items():
            found |= self._stands_in(chunk, n)
        while (found := self._stands_in(chunk, self.longest + 1)).any():
            self.longest, self.longest_at = self.longest + 1, int(found.argmax())

    def share(self, n: int) -> np.ndarray:
        """Give the share of each story's tokens inside a run of at least `n` that was found:
        (stories,) float64, NaN for an empty story."""
        covered = np.zeros(len(self.ids), bool)
        for i in range(n):  # a window covers its first token, its second, ...
            covered[i:] |= self.found[n][: len(covered) - i]
        stories = np.split(covered, np.flatnonzero(self.ids == GAP))[1:]
        return np.array([story[1:].mean() if len(story) > 1 else np.nan for story in stories])

    def longest_run(self) -> np.ndarray:
        """Give the ids of the longest run that was found."""
        return self.ids[self.longest_at : self.longest_at + self.longest]

    def _stands_in(self, chunk: np.ndarray, n: int) -> np.ndarray:
        """Say of each position whether the window of `n` tokens from there stands in `chunk`."""
        known, wanted = np.sort(window_hashes(chunk, n)), window_hashes(self.ids, n)
        count = np.searchsorted(known, wanted, "right") - np.searchsorted(known, wanted, "left")
        found = np.zeros(len(self.ids), bool)
        found[: len(count)] = count > 0
        return found
