"""The token files: what they hold, whether they are whole, and the batch of any step.

`train.bin` and `validation.bin` are raw little-endian uint16 ids, one stream a split, an
end-of-text id after every story. `meta.json` beside them says what they hold.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from config import InputError

SPLITS = ("train", "validation")
PREPARE = "`python prepare_data.py --data_dir {}`"


class SplitWriter:
    """Writes one split's file, and counts and hashes what it holds."""

    def __init__(self, path: Path):
        self.file, self.digest = path.open("wb"), hashlib.sha256()
        self.counts = {"stories": 0, "tokens": 0, "bytes": 0}

    def write(self, ids: np.ndarray, stories: int, num_bytes: int) -> None:
        """Appends the (tokens,) uint16 `ids` of `stories`, whose text has `num_bytes` of UTF-8."""
        self.file.write(ids.data)
        self.digest.update(ids.data)
        for name, more in (("stories", stories), ("tokens", len(ids)), ("bytes", num_bytes)):
            self.counts[name] += int(more)

    def close(self) -> dict:
        """Puts the file on disk; returns the split's entry in meta.json."""
        with self.file as file:
            file.flush()
            os.fsync(file.fileno())
        return self.counts | {"sha256": self.digest.hexdigest()}


def install(scratch: Path, data_dir: Path, meta: dict) -> None:
    """Writes `meta.json` and moves it and the finished files of `scratch` into `data_dir`."""
    (scratch / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    # Without its meta.json a data folder counts as not prepared: a run killed between these lines
    # can leave no mix of old and new.
    (data_dir / "meta.json").unlink(missing_ok=True)
    for name in (*(f"{split}.bin" for split in SPLITS), "meta.json"):
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


def load_meta(data_dir: Path, vocab_size: int) -> dict:
    """What `meta.json` says of the token files beside it, for a model of `vocab_size`.

    Raises InputError where there is none, it is not as prepare_data wrote it, or its vocabulary
    is not the model's.
    """
    path, prepare = Path(data_dir) / "meta.json", PREPARE.format(data_dir)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no prepared data in {data_dir} (no {path}): run {prepare}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged (not JSON): run {prepare} again") from error
    if not is_meta(meta):
        raise InputError(f"{path} is damaged or of an older version: run {prepare} again")
    if meta["vocab_size"] != vocab_size:
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
    path, again = Path(data_dir) / f"{split}.bin", f"run {PREPARE.format(data_dir)} again"
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


def story_starts(tokens: np.ndarray, end_of_text: int) -> np.ndarray:
    """Where stories start: at their first token, and at the end-of-text before it.

    Prompts come with and without one.
    """
    ends = np.flatnonzero(tokens == end_of_text)
    return np.concatenate(([0], ends, ends + 1))


def training_batch(
    tokens: np.ndarray,
    seed: int,
    step: int,
    positions: range,
    context_length: int,
    stories: np.ndarray | None = None,
    story_windows: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The windows at `positions` of the global batch of `step`: (len(positions), context_length).

    A share `story_windows` of them starts at one of `stories`, the others anywhere. A pure
    function: resuming needs no sampler state, and N processes that each ask for their own
    positions draw together what one process would.
    """
    draws = np.random.default_rng([seed, step]).random((positions.stop, 2))[positions.start :]
    last = len(tokens) - context_length - 1
    starts = (draws[:, 0] * (last + 1)).astype(int)
    if story_windows:
        of_stories = stories[(draws[:, 0] * len(stories)).astype(int)]
        starts = np.where(draws[:, 1] < story_windows, np.minimum(of_stories, last), starts)
    return windows(tokens, starts, context_length)


def validation_starts(tokens: np.ndarray, context_length: int, most: int) -> np.ndarray:
    """Where at most `most` windows start, evenly spread over the split and not overlapping."""
    available = (len(tokens) - 1) // context_length
    return np.arange(min(most, available)) * available // min(most, available) * context_length


def mixed_seed(*numbers: int) -> int:
    """One seed below 2**64 of several numbers, such as a seed, a step and a micro-batch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
