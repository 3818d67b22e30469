"""Opens prepared token files, and draws the batch of any step as a pure function."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from config import InputError
from prepare_data import SPLITS, meta_checksum

PREPARE_AGAIN = "run `python prepare_data.py --data_dir {}` again"


def load_meta(data_dir: Path, vocab_size: int) -> dict:
    """What `meta.json` says of the token files beside it, for a model of `vocab_size`.

    Raises InputError where there is none, it is not as prepare_data wrote it, or its vocabulary
    is not the model's.
    """
    path = Path(data_dir) / "meta.json"
    again = PREPARE_AGAIN.format(data_dir)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no prepared data in {data_dir} (no {path}): {again[:-6]}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged (not JSON): {again}") from error
    if not isinstance(meta, dict) or meta.get("sha256") != meta_checksum(meta):
        raise InputError(f"{path} is damaged or was edited (its checksum differs): {again}")
    if meta["vocab_size"] != vocab_size:
        raise InputError(
            f"{data_dir} has a vocabulary of {meta['vocab_size']} where the model has {vocab_size}:"
            f" pass the --data_dir of the model's own data, or pass --vocab_size "
            f"{meta['vocab_size']} to train a model for this"
        )
    return meta


def load_tokens(data_dir: Path, split: str, meta: dict, context_length: int) -> np.ndarray:
    """The (tokens,) uint16 ids of one split, memory-mapped.

    Reads the file once to compare it with `meta`. Raises InputError where the two disagree, an id
    is outside the vocabulary, or the split is shorter than one window of context_length + 1.
    """
    assert split in SPLITS
    path = Path(data_dir) / f"{split}.bin"
    counts, again = meta["splits"][split], PREPARE_AGAIN.format(data_dir)
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


def windows(
    tokens: np.ndarray, starts: np.ndarray, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (len(starts), length) int64; targets are one token ahead."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


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
) -> tuple[torch.Tensor, torch.Tensor]:
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
