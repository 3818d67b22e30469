"""The token files: what they hold, and whether they are whole.

`train.bin` and `validation.bin` are raw little-endian uint16 ids, one stream a split, an
end-of-text id after every story. `meta.json` beside them says what they hold.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from config import InputError, PresetName, preset
from storygpt.cli import command_line
from storygpt.files import META

SPLITS = ("train", "validation")
# What decides which stories are taken, as a flag of prepare_data.py and in meta.json.
CHOICES = ("text_column", "max_stories", "validation_fraction", "seed")


def write_split(path: Path, parts: Iterable[np.ndarray], stories: int, num_bytes: int) -> dict:
    """Writes one split's file from (tokens,) uint16 arrays of ids; returns its entry in meta.json,
    which says that these are `stories` with `num_bytes` of UTF-8."""
    tokens, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for ids in parts:
            file.write(ids.data)
            digest.update(ids.data)
            tokens += len(ids)
        file.flush()
        os.fsync(file.fileno())
    sha256 = digest.hexdigest()
    return {"stories": stories, "tokens": tokens, "bytes": num_bytes, "sha256": sha256}


def install(scratch: Path, data_dir: Path, meta: dict) -> None:
    """Writes `meta.json` and moves it and the finished files of `scratch` into `data_dir`.

    Raises InputError where that fails; the old files are there again then.
    """
    (scratch / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    # Without its meta.json a data folder counts as not prepared: a run killed between these lines
    # can leave no mix of old and new.
    names, aside = (*(f"{split}.bin" for split in SPLITS), META), {}
    try:
        for name in names:
            place = data_dir / name
            if place.is_dir():
                raise IsADirectoryError(0, "a folder is in the way")
            if place.exists():
                os.replace(place, scratch / f"old-{name}")
                aside[place] = scratch / f"old-{name}"
        for name in names:
            place = data_dir / name
            os.replace(scratch / name, place)
    except BaseException as error:
        for old, kept in aside.items():
            os.replace(kept, old)
        if isinstance(error, OSError):
            raise InputError(
                f"{place} cannot be replaced ({error.strerror}), and what was there is kept: move "
                "it away, or pass another --data_dir"
            ) from error
        raise


def is_meta(meta) -> bool:
    """Tells whether `meta` has all that `meta.json` must say."""
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


def prepare_command(data_dir: Path, meta: dict, **flags) -> str:
    """Returns in backticks the command that prepares `data_dir` with what a meta.json names."""
    known = {name: meta.get(name) for name in ("dataset", "subset", "revision", *CHOICES)}
    known |= {"deduplicate": meta.get("deduplicated") or None} | flags
    known = {name: value for name, value in known.items() if value is not None}
    return f"`{command_line('prepare_data.py', data_dir=data_dir, **known)}`"


def load_meta(
    data_dir: Path, vocab_size: int | None, preset_name: PresetName | None = None
) -> dict:
    """Returns what `meta.json` says of the token files beside it, for a model of `vocab_size`,
    perhaps a preset's, or for any.

    Raises InputError where there is none, it is not as prepare_data wrote it, or its vocabulary
    is not the model's.
    """
    path = Path(data_dir) / META
    by_preset = preset_name and preset(preset_name)[0].vocab_size == vocab_size
    wanted = {"preset": preset_name} if by_preset else {"vocab_size": vocab_size}
    prepare = prepare_command(data_dir, {}, **wanted)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        mend = f"run {prepare}, or pass the --data_dir that has it"
        raise InputError(f"no prepared data in {data_dir} (no {path}): {mend}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged (not JSON): run {prepare} again") from error
    if not is_meta(meta):
        raise InputError(f"{path} is damaged or of an older version: run {prepare} again")
    if vocab_size is not None and meta["vocab_size"] != vocab_size:
        own = "pass the --data_dir of the model's own data"
        if by_preset:
            own += f", run {prepare_command(data_dir, meta, **wanted)}"
        raise InputError(
            f"{data_dir} has a vocabulary of {meta['vocab_size']} where the model has {vocab_size}:"
            f" {own}, or pass --vocab_size {meta['vocab_size']} to train a model for this"
        )
    return meta


def data_fingerprint(meta: dict) -> str:
    """Returns SHA-256 of what the files hold, wherever it came from and whatever it is called."""
    held = [meta["vocab_size"], *(meta["splits"][split]["sha256"] for split in SPLITS)]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def bits_per_byte(loss: float, counts: dict) -> float:
    """Converts a mean loss in nats a token of a split, as bits a byte of UTF-8: exact, and the same
    scale for every vocabulary. `counts` is the split's entry in meta.json."""
    return loss / math.log(2) * counts["tokens"] / counts["bytes"]


def perplexity(loss: float) -> float:
    """Returns e to the power of a mean loss in nats: infinite where no float is as large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def load_tokens(
    data_dir: Path, split: str, meta: dict, context_length: int = 0, verify: bool = True
) -> np.ndarray:
    """Returns the (tokens,) uint16 ids of one split, memory-mapped.

    With `verify`, reads the file once to compare it with `meta`: enough in one of the processes
    that share it. Raises InputError where the two disagree, an id is outside the vocabulary, or
    the split is shorter than one window of context_length + 1.
    """
    path, counts = Path(data_dir) / f"{split}.bin", meta["splits"][split]
    again = f"run {prepare_command(data_dir, meta, vocab_size=meta['vocab_size'])} again"
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
            f"{context_length} + 1: prepare more stories, or with a larger "
            "--validation_fraction, or pass a smaller --context_length"
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


def split_stories(tokens: np.ndarray, end_of_text: int) -> list[np.ndarray]:
    """Returns the (tokens,) ids of each story, without its end-of-text."""
    ends = np.flatnonzero(tokens == end_of_text)
    return [story[:-1] for story in np.split(tokens, ends + 1)[: len(ends)]]
