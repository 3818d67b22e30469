"""The token files: what they hold, whether they are whole, and the batch of any step.

`train.bin` and `validation.bin` are raw little-endian uint16 ids, one stream a split, an
end-of-text id after every story. `meta.json` beside them says what they hold.
"""

import hashlib
import json
import math
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from config import InputError
from storygpt.cli import command_line
from storygpt.files import META

SPLITS = ("train", "validation")


class SplitWriter:
    """Writes one split's file, and counts and hashes what it holds."""

    def __init__(self, path: Path):
        self.file, self.digest = path.open("wb"), hashlib.sha256()
        self.counts = {"stories": 0, "tokens": 0, "bytes": 0}

    def write(self, ids: np.ndarray) -> None:
        """Appends (tokens,) uint16 `ids`."""
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.counts["tokens"] += len(ids)

    def count(self, stories: int, num_bytes: int) -> None:
        """Says that what was written are `stories`, whose text has `num_bytes` of UTF-8."""
        self.counts["stories"] += int(stories)
        self.counts["bytes"] += int(num_bytes)

    def close(self) -> dict:
        """Puts the file on disk; returns the split's entry in meta.json."""
        with self.file as file:
            file.flush()
            os.fsync(file.fileno())
        return self.counts | {"sha256": self.digest.hexdigest()}


def install(scratch: Path, data_dir: Path, meta: dict) -> None:
    """Writes `meta.json` and moves it and the finished files of `scratch` into `data_dir`."""
    (scratch / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    # Without its meta.json a data folder counts as not prepared: a run killed between these lines
    # can leave no mix of old and new.
    (data_dir / META).unlink(missing_ok=True)
    for name in (*(f"{split}.bin" for split in SPLITS), META):
        os.replace(scratch / name, data_dir / name)


def is_meta(meta) -> bool:
    """Whether `meta` has all that `meta.json` must say."""
    try:
        numbers = [meta["splits"][s][n] for s in SPLITS for n in ("stories", "tokens", "bytes")]
        texts = [meta["dataset"], *(meta["splits"][s]["sha256"] for s in SPLITS)]
        return (
            all(type(number) is int and number > 0 for number in [*numbers, meta["vocab_size"]])
            and all(isinstance(text, str) for text in texts)
            and meta["end_of_text"] == meta["vocab_size"] - 1
        )
    except (KeyError, TypeError):
        return False


def load_meta(data_dir: Path, vocab_size: int | None) -> dict:
    """What `meta.json` says of the token files beside it, for a model of `vocab_size` or for any.

    Raises InputError where there is none, it is not as prepare_data wrote it, or its vocabulary
    is not the model's.
    """
    path, known = Path(data_dir) / META, {"vocab_size": vocab_size} if vocab_size else {}
    prepare = f"`{command_line('prepare_data.py', data_dir=data_dir, **known)}`"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no prepared data in {data_dir} (no {path}): run {prepare}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged (not JSON): run {prepare} again") from error
    if not is_meta(meta):
        raise InputError(f"{path} is damaged or of an older version: run {prepare} again")
    if vocab_size is not None and meta["vocab_size"] != vocab_size:
        raise InputError(
            f"{data_dir} has a vocabulary of {meta['vocab_size']} where the model has {vocab_size}:"
            f" pass the --data_dir of the model's own data, or pass --vocab_size "
            f"{meta['vocab_size']} to train a model for this"
        )
    return meta


def data_fingerprint(meta: dict) -> str:
    """SHA-256 of what the files hold, wherever it came from and whatever it is called."""
    held = [meta["vocab_size"], *(meta["splits"][split]["sha256"] for split in SPLITS)]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def bits_per_byte(loss: float, counts: dict) -> float:
    """A mean loss in nats a token of a split, as bits a byte of UTF-8: exact, and the same scale
    for every vocabulary. `counts` is the split's entry in meta.json."""
    return loss / math.log(2) * counts["tokens"] / counts["bytes"]


def load_tokens(
    data_dir: Path, split: str, meta: dict, context_length: int, verify: bool = True
) -> np.ndarray:
    """The (tokens,) uint16 ids of one split, memory-mapped.

    With `verify`, reads the file once to compare it with `meta`: enough in one of the processes
    that share it. Raises InputError where the two disagree, an id is outside the vocabulary, or
    the split is shorter than one window of context_length + 1.
    """
    path, known = Path(data_dir) / f"{split}.bin", {k: meta[k] for k in ("dataset", "vocab_size")}
    again = f"run `{command_line('prepare_data.py', data_dir=data_dir, **known)}` again"
    counts = meta["splits"][split]
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: {again}") from error
    if size != 2 * counts["tokens"]:
        raise InputError(
            f"{path} has {size:,} bytes where meta.json says {2 * counts['tokens']:,}: {again}"
        )
    if counts["tokens"] <= context_length:
        raise InputError(
            f"{path} has {counts['tokens']:,} tokens, too few for one window of context_length "
            f"{context_length} + 1: prepare more stories, or pass a smaller --context_length"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if not verify:
        return tokens
    digest, highest = hashlib.sha256(), 0
    for start in range(0, len(tokens), 2**23):
        chunk = tokens[start : start + 2**23]
        digest.update(chunk.data)
        highest = max(highest, int(chunk.max()))
    if highest >= meta["vocab_size"]:
        raise InputError(
            f"{path} holds token {highest}, outside its vocabulary of {meta['vocab_size']}: {again}"
        )
    if digest.hexdigest() != counts["sha256"]:
        raise InputError(f"{path} is damaged (its checksum differs from meta.json's): {again}")
    return tokens


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, both (len(starts), length) int64; targets are one token ahead."""
    x, y = (tokens[(starts + i)[:, None] + np.arange(length)].astype(np.int64) for i in (0, 1))
    return x, y


def epoch_layout(num_tokens: int, context_length: int) -> tuple[int, range]:
    """How many windows an epoch has, and the offsets at which the first of them may start.

    At every offset the windows, end to end, leave less than one window at either end of the tokens.
    All epochs are equally long, so that a window's epoch is one division: offsets either fit all
    windows or all but one, and the kind with more offsets to choose from is taken.
    """
    num_windows, spare = divmod(num_tokens - 1, context_length)
    if num_windows == 1 or 2 * (spare + 1) >= context_length:
        return num_windows, range(spare + 1)
    return num_windows - 1, range(spare + 1, context_length)


def windows_per_epoch(num_tokens: int, context_length: int) -> int:
    """How many windows an epoch has."""
    return epoch_layout(num_tokens, context_length)[0]


@lru_cache(maxsize=2)  # a batch may cross from one epoch into the next
def epoch_order(
    num_windows: int, num_offsets: int, seed: int, epoch: int
) -> tuple[int, np.ndarray]:
    """Which offset an epoch takes, and the order of its windows: (num_windows,) uint32."""
    offsets = np.random.default_rng(seed).permutation(num_offsets)  # no two in a row are the same
    order = np.arange(num_windows, dtype=np.uint32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return int(offsets[epoch % num_offsets]), order


def training_starts(
    num_tokens: int,
    seed: int,
    step: int,
    positions: range,
    windows_per_step: int,
    context_length: int,
) -> np.ndarray:
    """Where the windows at `positions` of a step's global batch start: (len(positions),) int64.

    Steps count from 1 and go through the windows of an epoch in a seeded order, each once; the
    next epoch has another order and another offset.
    """
    num_windows, offsets = epoch_layout(num_tokens, context_length)
    drawn = (step - 1) * windows_per_step + np.arange(positions.start, positions.stop)
    epochs, places = np.divmod(drawn, num_windows)
    starts = np.empty(len(drawn), np.int64)
    for epoch in np.unique(epochs):
        offset, order = epoch_order(num_windows, len(offsets), seed, int(epoch))
        inside = epochs == epoch
        starts[inside] = offsets[offset] + order[places[inside]].astype(np.int64) * context_length
    return starts


def split_stories(tokens: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """The (tokens,) ids of each story, without its end-of-text."""
    ends = np.flatnonzero(tokens == end_of_text)
    return [story[:-1] for story in np.split(tokens, ends + 1)[: len(ends)]]


def training_batch(
    tokens: np.ndarray,
    seed: int,
    step: int,
    positions: range,
    windows_per_step: int,
    context_length: int,
    story_ends: np.ndarray | None = None,
    story_windows: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The windows at `positions` of the global batch of `step`, by training_starts: inputs and
    targets, (len(positions), context_length) int64.

    A share `story_windows` of them is moved back to where the story that they start in starts, by
    `story_ends`, the places of the end-of-text ids: to that id or behind it, because prompts come
    with and without one. A pure function: resuming needs no sampler state, and N processes that
    each ask for their own positions draw together what one process would.
    """
    starts = training_starts(len(tokens), seed, step, positions, windows_per_step, context_length)
    if story_windows:
        draws = np.random.default_rng([seed, step]).random(positions.stop)[positions.start :]
        ends = np.concatenate(([-1], story_ends))[np.searchsorted(story_ends, starts, "right")]
        moved = np.clip(ends + (draws < story_windows / 2), 0, starts)
        starts = np.where(draws < story_windows, moved, starts)
    return windows(tokens, starts, context_length)


class Batches:
    """The batches of a run: what `training_batch` needs, given once."""

    def __init__(
        self,
        tokens: np.ndarray,
        end_of_text: int,
        seed: int,
        windows_per_step: int,
        context_length: int,
        story_windows: float,
    ):
        self.tokens, self.seed, self.story_windows = tokens, seed, story_windows
        self.windows_per_step, self.context_length = windows_per_step, context_length
        self.story_ends = np.flatnonzero(tokens == end_of_text) if story_windows else None
        self.tokens_per_step = windows_per_step * context_length
        self.steps_per_epoch = windows_per_epoch(len(tokens), context_length) / windows_per_step

    def __call__(self, step: int, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """The windows at `positions` of the batch of `step`, which counts from 1."""
        which = (self.seed, step, positions, self.windows_per_step, self.context_length)
        return training_batch(self.tokens, *which, self.story_ends, self.story_windows)


def validation_starts(tokens: np.ndarray, context_length: int, most: int) -> np.ndarray:
    """Where at most `most` windows start, evenly spread over the split and not overlapping."""
    available = (len(tokens) - 1) // context_length
    return np.arange(min(most, available)) * available // min(most, available) * context_length


def mixed_seed(*numbers: int) -> int:
    """One seed below 2**64 of several numbers, such as a seed, a step and a micro-batch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
