"""Script: stories in, token files out.

One pass encodes all stories into a scratch file and keeps of each its length and hashes; then the
stories held out, and with --deduplicate the repeated ones, are known, and the files are written.
"""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tiktoken
from filelock import FileLock

from config import InputError, PresetName, check_whole, preset
from storygpt.cli import one_line, parse_flags, progress_bar, run, usable_cpus
from storygpt.encoding import NO_STORIES, Encoded, concatenate, encode_stories, opening_of
from storygpt.files import take_lock, writing
from storygpt.sources import Stories, list_left_out, open_stories
from storygpt.token_files import CHOICES, SPLITS, install, write_split
from storygpt.tokenizer import END_OF_TEXT, load_tokenizer

BATCH = 1_000  # stories a worker encodes at once, unless they have more than
BATCH_CHARACTERS = 2**20
ENOUGH_PROCESSES = 16  # for more, one process does not read stories fast enough
MOST_PROCESSES = 61 if sys.platform == "win32" else 1_000  # no more can be waited for on Windows
NUM_OPENINGS = 5
RAREST_OPENING = 0.01  # of the stories
SCRATCH_IDS = "stories.ids"  # of all stories, whatever their split


@dataclass(frozen=True)
class Arguments:
    """Encodes stories into train.bin, validation.bin and meta.json."""

    dataset: str = "roneneldan/TinyStories"
    """A data set on the Hub, `builtin` (a story grammar, needs no network; also `sample`), a
    folder, or a .txt, .jsonl, .json, .csv, .tsv or .parquet file; docs/data.md has the rules."""
    subset: str | None = None
    """Subset (configuration) of a data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    max_stories: int | None = None
    """Most stories to take of each split; from the Hub, only files with these are downloaded."""
    text_column: str = "text"
    """The column that holds the stories; `story.text` is the field text of the column story."""
    preset: PresetName = "storygpt"
    """The preset of train.py whose model is to read the files: where vocab_size comes from."""
    vocab_size: int | None = None
    """Token ids to use: GPT-2's first vocab_size - 1 tokens and end-of-text; None takes the
    preset's."""
    validation_fraction: float = 0.01
    """Share of stories held out where the data set has no validation split."""
    deduplicate: bool = False
    """Keep only the first of equal train stories, and none that the validation split holds."""
    num_proc: int = min(usable_cpus(), ENOUGH_PROCESSES)
    """Processes that encode, at most: a small data set needs fewer."""
    data_dir: Path = Path("data")
    """Folder to write to."""
    seed: int = 1337
    """Seed of the hold-out and of the built-in stories."""


def main() -> None:
    prepare(parse_flags(Arguments))


def prepare(arguments: Arguments) -> None:
    """Writes the three files of `arguments.data_dir`, and prints what they hold.

    They are made beside it and moved in whole at the end: until then the old ones stay.
    Raises InputError.
    """
    if arguments.vocab_size is None:
        arguments = replace(arguments, vocab_size=preset(arguments.preset)[0].vocab_size)
    check_arguments(arguments)
    tokenizer = load_tokenizer(arguments.vocab_size)
    flags = {name: getattr(arguments, name) for name in CHOICES}
    chosen = {name: value for name, value in flags.items() if value != getattr(Arguments, name)}
    start, data_dir = time.perf_counter(), arguments.data_dir
    with start_workers(arguments.num_proc) as pool:
        submit(pool, encode_stories, [], arguments.vocab_size)  # a worker gets ready meanwhile
        source = open_stories(
            arguments.dataset,
            text_column=arguments.text_column,
            subset=arguments.subset,
            revision=arguments.revision,
            seed=arguments.seed,
        )
        with writing(data_dir, "pass another --data_dir"), scratch_folder(data_dir) as scratch:
            read, tally = encode_splits(source, scratch, pool, arguments)
            meta = {
                "dataset": arguments.dataset,
                "subset": arguments.subset,
                "revision": source.commit,
                **chosen,
                **write_splits(scratch, read, tokenizer, arguments),
            }
            install(scratch, data_dir, meta)
    seconds = time.perf_counter() - start
    summarize(meta, source, arguments=arguments, tally=tally, seconds=seconds)


def check_arguments(arguments: Arguments) -> None:
    """Raises InputError with the first number that is off."""
    if not 0 < arguments.validation_fraction < 1:
        raise InputError(
            f"validation_fraction {arguments.validation_fraction} is not between 0 and 1: "
            "pass --validation_fraction 0.01"
        )
    check_whole("num_proc", arguments.num_proc, 1, MOST_PROCESSES)
    check_whole("seed", arguments.seed, 0, 2**63 - 1)
    if arguments.max_stories is not None:
        check_whole("max_stories", arguments.max_stories, 1)


def encode_splits(
    source: Stories, scratch: Path, pool: Executor, arguments: Arguments
) -> tuple[dict[str, Encoded], Counter]:
    """Writes the ids of all stories to one file in `scratch`; returns what is kept of each beside
    them, by split, and a tally of "empty" stories, of "separators" in them that stay text, and of
    "distinct" ids.

    Raises InputError where a split has no stories.
    """
    read, tally, seen = {}, Counter(), np.zeros(arguments.vocab_size, bool)
    most = arguments.max_stories
    total = most * len(source.splits) if most else source.total
    with (
        progress_bar(total=total, unit=" stories", desc="encoding") as bar,
        (scratch / SCRATCH_IDS).open("wb") as file,
    ):
        for split, rows in source.splits.items():
            stories = islice(kept_stories(rows, tally), most)
            parts = []
            for part in encode_in_parallel(
                batched(stories), pool, vocab_size=arguments.vocab_size, num_proc=arguments.num_proc
            ):
                file.write(part.ids.data)
                seen[part.ids.astype(np.intp)] = True  # NumPy is twice as slow to convert them
                parts.append(part._replace(ids=NO_STORIES.ids))  # a slice would keep all of them
                bar.update(len(part.tokens))
            if not parts:
                raise InputError(
                    f"{arguments.dataset} has no stories for the {split} split: "
                    "check --dataset and --text_column"
                )
            read[split] = concatenate(parts)
    tally["distinct"] = int(seen.sum())
    return read, tally


def write_splits(
    scratch: Path, read: dict[str, Encoded], tokenizer: tiktoken.Encoding, arguments: Arguments
) -> dict:
    """Writes the two files in `scratch` from what was `read` into it; returns what meta.json says
    of what they hold. Raises InputError where a split would be empty."""
    encoded = concatenate(read.values())
    sizes = [len(part.tokens) for part in read.values()]
    if "validation" in read:
        held_out = np.repeat([split == "validation" for split in read], sizes)
    else:
        fraction, seed = arguments.validation_fraction, arguments.seed
        held_out = hold_out(sum(sizes), fraction, seed=seed, name=arguments.dataset)
    once, repeated, in_train = find_duplicates(encoded.hashes, held_out)
    if arguments.deduplicate and not once.any():
        raise InputError(
            f"every train story of {arguments.dataset} is in the validation split, too: "
            "leave out --deduplicate"
        )
    keep = {"train": once if arguments.deduplicate else ~held_out, "validation": held_out}
    counts = {}
    with (scratch / SCRATCH_IDS).open("rb") as file:
        for split in SPLITS:
            counts[split] = write_split(
                scratch / f"{split}.bin",
                read_ids(file, encoded, keep[split]),
                stories=int(keep[split].sum()),
                num_bytes=int(encoded.bytes[keep[split]].sum()),
            )
        # a story that is there several times is still one story
        openings = find_openings(file, encoded, keep=once, tokenizer=tokenizer)
    return {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.n_vocab,
        "end_of_text": tokenizer.eot_token,
        "splits": counts,
        "duplicates": {"in train": repeated, "validation in train": in_train},
        "deduplicated": arguments.deduplicate,
        "openings": openings,
    }


def summarize(
    meta: dict, source: Stories, arguments: Arguments, tally: Counter, seconds: float
) -> None:
    """Prints what was read, what was not, and what the files hold."""
    counts = meta["splits"]
    total = {key: sum(counts[split][key] for split in SPLITS) for key in ("tokens", "bytes")}
    if source.commit:
        print(f"{arguments.dataset} at commit {source.commit}")
    for split in SPLITS:
        c = counts[split]
        print(f"{split + ':':12}{c['stories']:>11,} stories {c['tokens']:>14,} tokens")
    repeated, in_train = meta["duplicates"].values()
    print(
        f"{total['bytes'] / total['tokens']:.2f} bytes a token, {tally['distinct']:,} distinct "
        f"ids of {arguments.vocab_size:,}, {tally['empty']:,} empty stories skipped\n"
        f"duplicates: {repeated:,} train stories repeat another, {in_train:,} validation stories "
        "are in train, too" + ("; dropped from train" if meta["deduplicated"] else "")
    )
    for note in source.notes:
        print(f"note: {note}")
    if number := tally["separators"]:
        print(
            f"note: stories that hold {END_OF_TEXT} as text: {number:,}; take it out, and put one "
            "story in a row"
        )
    if counts["train"]["stories"] == 1:
        print(f"note: train is a single story: in a .txt put {END_OF_TEXT} between stories")
    if counts["validation"]["stories"] == 1 and "validation" in source.splits:
        print("note: validation is a single story: its loss will say little")
    if source.left_out:
        print(f"not read: {list_left_out(source.left_out)}")
    print(
        f"{seconds:.1f} s, {total['bytes'] / 1e6 / seconds:.1f} MB/s with at most "
        f"{arguments.num_proc} processes; written to {arguments.data_dir}"
    )


# --- Worker processes ---


@contextmanager
def start_workers(num_proc: int) -> Iterator[Executor]:
    """Yields a pool of at most `num_proc` processes, or of threads where there can be none."""
    try:
        pool = ProcessPoolExecutor(num_proc, get_context("spawn"), follow_parent)
    except (ImportError, NotImplementedError, OSError) as error:  # no semaphores, no descriptors
        reason = one_line(error)
        print(f"no worker processes can be had ({reason}): encoding in this one", file=sys.stderr)
        pool = ThreadPoolExecutor(num_proc)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died, perhaps for want of memory: pass a smaller --num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def follow_parent() -> None:
    """Ends this worker when its parent has ended, however that was; leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def submit(pool: Executor, function: Callable, *arguments) -> Future:
    """Gives the pool some work, for which it starts one more process unless one is idle.

    A Ctrl-C waits for that: a worker that is half started would end in a traceback.
    """
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    posix = os.name == "posix"  # where a process inherits this: a worker's imports are silent, too
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if posix else None
    try:
        return pool.submit(function, *arguments)
    except OSError as error:
        raise InputError(
            f"no more processes can be started ({error.strerror}): pass a smaller --num_proc"
        ) from error
    finally:
        if posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if interrupts and handler is not signal.SIG_IGN:
            raise KeyboardInterrupt


def batched(stories: Iterable[str]) -> Iterator[list[str]]:
    """Yields consecutive lists of at most BATCH stories and about BATCH_CHARACTERS characters."""
    batch, characters = [], 0
    for story in stories:
        batch.append(story)
        characters += len(story)
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_in_parallel(
    batches: Iterable[list[str]], pool: Executor, vocab_size: int, num_proc: int
) -> Iterator[Encoded]:
    """Encodes batches in order, with a bounded number of them in memory."""

    def result(future: Future) -> Encoded:
        try:
            return future.result()
        except (InputError, BrokenProcessPool):
            raise
        except Exception as error:
            raise InputError(f"a worker failed to encode stories: {one_line(error)}") from error

    waiting = deque()
    for batch in batches:
        waiting.append(submit(pool, encode_stories, batch, vocab_size))
        del batch
        if len(waiting) > 2 * num_proc:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


# --- Which stories go where ---


def kept_stories(stories: Iterable[str | None], tally: Counter) -> Iterator[str]:
    """Yields the stories that hold anything; counts as "empty" those that do not, and as
    "separators" those with an end-of-text in them.

    A byte-order mark belongs to the file that a story comes from, not to the story.
    """
    for story in stories:
        story = story and story.lstrip("\ufeff")
        if story and not story.isspace():
            tally["separators"] += END_OF_TEXT in story
            yield story
        else:
            tally["empty"] += 1


def hold_out(num_stories: int, fraction: float, seed: int, name: str) -> np.ndarray:
    """Draws which stories are held out: (num_stories,) bool.

    Raises InputError where there is but one.
    """
    if num_stories == 1:
        raise InputError(
            f"{name} holds one story alone, which cannot be both train and validation: add "
            f"stories, put {END_OF_TEXT} between them, or pass a larger --max_stories"
        )
    number = min(max(round(num_stories * fraction), 1), num_stories - 1)
    held_out = np.zeros(num_stories, bool)
    held_out[np.random.default_rng(seed).choice(num_stories, number, replace=False)] = True
    return held_out


def find_duplicates(hashes: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Finds which train stories are the first of their kind and not in validation, (stories,) bool;
    how many train stories repeat an earlier one, and how many validation stories are in train.

    The stories are given as hashes, (stories, 2) uint64; `held_out`, (stories,) bool, are those of
    validation.
    """
    order = np.lexsort(hashes.T)
    new = np.diff(hashes[order], axis=0, prepend=hashes[order[:1]]).any(1)
    kind = np.empty(len(order), np.int64)
    kind[order] = new.cumsum()
    train = np.flatnonzero(~held_out)
    kinds, first = np.unique(kind[train], return_index=True)
    once = np.zeros(len(hashes), bool)
    once[train[first]] = ~np.isin(kinds, kind[held_out])
    return once, len(train) - len(kinds), int(np.isin(kind[held_out], kinds).sum())


# --- The scratch folder ---


@contextmanager
def scratch_folder(data_dir: Path) -> Iterator[Path]:
    """Yields an empty folder in `data_dir`, which goes in the end.

    Raises InputError where another process is at work in it; on a disk without locks nobody is
    seen.
    """
    scratch = data_dir / ".prepare"
    scratch.mkdir(parents=True, exist_ok=True)
    lock = FileLock(scratch / "lock", fallback_to_soft=False)
    with suppress(OSError):
        busy = f"another process is writing to {data_dir}: wait for it, or pass another --data_dir"
        take_lock(lock, busy)
    try:
        for leftover in scratch.glob("*.*"):  # of a run that was killed
            with suppress(OSError):  # a network drive keeps what somebody still reads
                leftover.unlink()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # first, or it would be another's by then
        lock.release()
        with suppress(OSError):
            scratch.rmdir()  # on Windows, where a file that is open stays


def read_ids(file: BinaryIO, encoded: Encoded, keep: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the ids of the stories to `keep`, (stories,) bool, from a scratch file that holds
    those of all stories of `encoded`: (tokens,) uint16, about a million at a time."""
    starts = encoded.starts
    changes = np.flatnonzero(np.diff(keep, prepend=False, append=False))
    for first, last in changes.reshape(-1, 2):
        file.seek(2 * starts[first])
        for start in range(starts[first], starts[last], 2**20):
            yield np.frombuffer(file.read(2 * min(2**20, starts[last] - start)), "<u2")


def find_openings(
    file: BinaryIO, encoded: Encoded, keep: np.ndarray, tokenizer: tiktoken.Encoding
) -> list[tuple[str, float]]:
    """Returns the openings that the stories to `keep` have most often, out of a scratch file, each
    with its share of these stories.

    What one story alone begins with, or less than one in a hundred, is not to be shown.
    """
    kept = np.flatnonzero(keep)
    kinds, firsts, counts = np.unique(encoded.openings[kept], return_index=True, return_counts=True)
    common = (kinds != 0) & (counts > 1) & (counts >= RAREST_OPENING * len(kept))
    commonest = sorted(np.flatnonzero(common), key=lambda kind: (-counts[kind], firsts[kind]))
    openings = []
    for kind in commonest[:NUM_OPENINGS]:
        story = kept[firsts[kind]]
        file.seek(2 * encoded.starts[story])
        beginning = np.frombuffer(file.read(2 * min(400, encoded.tokens[story] - 1)), "<u2")
        share = round(counts[kind] / len(kept), 4)
        openings.append((opening_of(tokenizer.decode(beginning.tolist())), share))
    return openings


if __name__ == "__main__":
    run(main)
