"""Script: stories in, token files out.

One pass encodes all stories into scratch files and keeps of each its length and a hash; then the
stories held out, and with --deduplicate the repeated ones, are known, and the files are written.
"""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import hashlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from config import InputError, check_whole
from storygpt.cli import one_line, parse_flags, progress_bar, run
from storygpt.files import writing
from storygpt.sources import Stories, describe, open_stories
from storygpt.token_files import SPLITS, SplitWriter, install
from storygpt.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, check_vocab_size, load_tokenizer

BATCH = 1_000  # stories a worker encodes at once, unless they have more than
BATCH_CHARACTERS = 2**20
# GPT-2's pattern takes white space before a word as one piece but for its last character, and at
# the end of the text as one piece. The engine that finds it gives up at about a million.
WHITE_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_WHITE_SPACE = re.compile(rf"{WHITE_SPACE}{{1000,}}(?:(?={WHITE_SPACE})|\Z)")


@dataclass(frozen=True)
class Arguments:
    """Encode stories into train.bin, validation.bin and meta.json."""

    dataset: str = "roneneldan/TinyStories"
    """A data set on the Hub, `builtin` (a story grammar, needs no network; also `sample`), a
    folder, or a .txt, .jsonl, .json, .csv, .tsv or .parquet file; docs/data.md has the rules."""
    subset: str | None = None
    """Subset (configuration) of a data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    max_stories: int | None = None
    """Most stories to take of each split; from the Hub, no more than these are downloaded."""
    text_column: str = "text"
    """The column that holds the stories; `story.text` is the field text of the column story."""
    vocab_size: int = GPT2_VOCAB_SIZE
    """Token ids to use: GPT-2's first vocab_size - 1 tokens and end-of-text."""
    validation_fraction: float = 0.01
    """Share of stories held out where the data set has no validation split."""
    deduplicate: bool = False
    """Keep only the first of equal train stories, and none that the validation split holds."""
    num_proc: int = os.cpu_count() or 1
    """Processes that encode."""
    data_dir: Path = Path("data")
    """Folder to write to."""
    seed: int = 1337
    """Seed of the hold-out and of the built-in stories."""


class Encoded(NamedTuple):
    """Stories as one (tokens,) uint16 array, and of each story, (stories,): its tokens and UTF-8
    bytes as uint32, and 16 bytes of hash as two uint64, (stories, 2)."""

    ids: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    hashes: np.ndarray


# --- Encoding, in worker processes ---


def encode_text(text: str, tokenizer) -> np.ndarray:
    """The ids of a text in which nothing is special, (tokens,) uint16, also where it has miles of
    white space. Raises InputError for what cannot be encoded."""
    try:
        return tokenizer.encode_to_numpy(text, disallowed_special=()).astype("<u2")
    except ValueError:  # the pattern's engine gave up: each of these pieces it would match alone
        pieces, end = [], 0
        for match in LONG_WHITE_SPACE.finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        pieces.append(text[end:])
    try:
        ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate(ids).astype("<u2")
    except ValueError as error:
        raise InputError(
            f"the story that begins {text[:40]!r} cannot be encoded: {one_line(error)}"
        ) from error


def encode_stories(stories: list[str], vocab_size: int) -> Encoded:
    """Each story's ids and an end-of-text. Raises InputError for what cannot be encoded."""
    tokenizer = load_tokenizer(vocab_size)
    try:
        texts = [story.encode() for story in stories]
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but UTF-8 cannot
        stories = [s.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for s in stories]
        texts = [story.encode() for story in stories]
    hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    sizes, ids = [len(text) for text in texts], None
    del texts
    if len(stories) > 1:
        joined = END_OF_TEXT.join([*stories, ""])
        if joined.count(END_OF_TEXT) == len(stories):  # where a story spells it, it stays text
            with suppress(ValueError):  # all in one call: a call a story is slower
                ids = tokenizer.encode_to_numpy(joined, allowed_special={END_OF_TEXT}).astype("<u2")
    if ids is None:
        end = np.array([tokenizer.eot_token], "<u2")
        each = [part for story in stories for part in (encode_text(story, tokenizer), end)]
        ids = np.concatenate([end[:0], *each])
    lengths = np.diff(np.flatnonzero(ids == tokenizer.eot_token), prepend=-1)
    pairs = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    return Encoded(ids, lengths.astype(np.uint32), np.array(sizes, np.uint32), pairs)


def describe_tokenizer(vocab_size: int) -> dict:
    """What meta.json says of the tokenizer. The parent has no need of it, which takes memory."""
    tokenizer = load_tokenizer(vocab_size)
    name, end_of_text = tokenizer.name, tokenizer.eot_token
    return {"tokenizer": name, "vocab_size": tokenizer.n_vocab, "end_of_text": end_of_text}


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


@contextmanager
def start_workers(num_proc: int, vocab_size: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for encode_stories that get ready while the caller opens the stories."""
    pool = ProcessPoolExecutor(num_proc, get_context("spawn"), _ignore_interrupt)
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: imports are silent, too
        for _ in range(num_proc):  # a process starts when it is given work: no stories, for now
            pool.submit(encode_stories, [], vocab_size)
        signal.signal(signal.SIGINT, handler)
        yield pool
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died, perhaps for want of memory: pass a smaller --num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def batched(stories: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive lists of at most BATCH stories and about BATCH_CHARACTERS characters."""
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
    """encode_stories of each batch in order, with a bounded number of them in memory."""

    def result(future: Future) -> Encoded:
        try:
            return future.result()
        except (InputError, BrokenProcessPool):
            raise
        except Exception as error:
            raise InputError(f"a worker failed to encode stories: {one_line(error)}") from error

    waiting = deque()
    for batch in batches:
        waiting.append(pool.submit(encode_stories, batch, vocab_size))
        del batch
        if len(waiting) > 2 * num_proc:
            yield result(waiting.popleft())
    while waiting:
        yield result(waiting.popleft())


# --- From stories to files ---


def kept_stories(
    stories: Iterable[str | None], most: int | None, skipped: Counter
) -> Iterator[str]:
    """The stories that hold anything, at most `most`; those that do not are counted in `skipped`.

    A byte-order mark belongs to the file that a story comes from, not to the story.
    """
    for story in stories:
        story = story and story.lstrip("\ufeff")
        if story and not story.isspace():
            yield story
            most = most and most - 1
            if most == 0:
                return
        else:
            skipped["empty"] += 1


def find_duplicates(train: np.ndarray, validation: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Which train stories are the first of their kind and not in validation, (train,) bool; how
    many train stories repeat an earlier one, and how many validation stories are in train.

    The stories are given as hashes, (stories, 2) uint64.
    """
    hashes = np.concatenate((validation, train))
    order = np.lexsort(hashes.T)
    new = np.diff(hashes[order], axis=0, prepend=hashes[order[:1]]).any(1)
    kind = np.empty(len(order), np.int64)
    kind[order] = new.cumsum()
    of_validation, of_train = kind[: len(validation)], kind[len(validation) :]
    kinds, first = np.unique(of_train, return_index=True)
    keep = np.zeros(len(train), bool)
    keep[first] = ~np.isin(kinds, of_validation)
    return keep, len(train) - len(kinds), int(np.isin(of_validation, kinds).sum())


def hold_out(num_stories: int, fraction: float, seed: int, name: str) -> np.ndarray:
    """Which stories are held out: (num_stories,) bool. Raises InputError where there is but one."""
    if num_stories == 1:
        raise InputError(
            f"{name} holds one story alone, which cannot be both train and validation: add "
            "stories, or put <|endoftext|> between them"
        )
    number = min(max(round(num_stories * fraction), 1), num_stories - 1)
    held_out = np.zeros(num_stories, bool)
    held_out[np.random.default_rng(seed).choice(num_stories, number, replace=False)] = True
    return held_out


def copy_stories(file: BinaryIO, encoded: Encoded, keep: np.ndarray, writer: SplitWriter) -> None:
    """Copies the ids of the stories to `keep` from a scratch file (encoded.ids stays empty)."""
    ends = np.concatenate(([0], encoded.tokens.cumsum(dtype=np.int64)))
    changes = np.flatnonzero(np.diff(keep, prepend=False, append=False))
    for first, last in changes.reshape(-1, 2):
        file.seek(2 * ends[first])
        for start in range(ends[first], ends[last], 2**20):
            ids = np.fromfile(file, "<u2", min(2**20, ends[last] - start))
            writer.write(ids)
    writer.count(keep.sum(), encoded.bytes[keep].sum())


def encode_split(
    stories: Iterator[str], pool: Executor, path: Path, arguments: Arguments, bar, seen: np.ndarray
) -> Encoded:
    """Encodes all `stories` into the file `path`; returns what is kept of each, without the ids.

    Marks the ids that are used in `seen`, (vocab_size,) bool.
    """
    none = np.empty(0, np.uint32)
    parts = [Encoded(np.empty(0, "<u2"), none, none, np.empty((0, 2), np.uint64))]
    with path.open("wb") as file:
        batches = batched(stories)
        for part in encode_in_parallel(batches, pool, arguments.vocab_size, arguments.num_proc):
            file.write(part.ids.data)
            seen[part.ids.astype(np.intp)] = True  # NumPy is twice as slow to convert them itself
            parts.append(part._replace(ids=parts[0].ids))  # a slice would keep all of them
            bar.update(len(part.tokens))
    return Encoded(*map(np.concatenate, zip(*parts, strict=True)))


def write_splits(scratch: Path, read: dict[str, Encoded], arguments: Arguments) -> dict:
    """Writes the two files in `scratch` from what was encoded there; returns what meta.json says
    of them and of the duplicates. Raises InputError where a split would be empty."""
    source, keep = dict.fromkeys(SPLITS, "train"), {}
    for split, encoded in read.items():
        source[split], keep[split] = split, np.ones(len(encoded.tokens), bool)
        if not len(encoded.tokens):
            raise InputError(
                f"{arguments.dataset} has no stories for the {split} split: "
                "check --dataset and --text_column"
            )
    if "validation" not in read:
        number, fraction = len(keep["train"]), arguments.validation_fraction
        keep["validation"] = hold_out(number, fraction, arguments.seed, arguments.dataset)
        keep["train"] = ~keep["validation"]
    hashes = {split: read[source[split]].hashes[keep[split]] for split in SPLITS}
    first, repeated, in_train = find_duplicates(hashes["train"], hashes["validation"])
    if arguments.deduplicate:
        keep["train"][keep["train"]] = first
        if not first.any():
            raise InputError(
                f"every train story of {arguments.dataset} is in the validation split, too: "
                "leave out --deduplicate"
            )
    counts = {}
    for split in SPLITS:
        writer = SplitWriter(scratch / f"{split}.bin")
        with (scratch / f"{source[split]}.ids").open("rb") as file:
            copy_stories(file, read[source[split]], keep[split], writer)
        counts[split] = writer.close()
    return {
        "splits": counts,
        "duplicates": {"in train": repeated, "validation in train": in_train},
        "deduplicated": arguments.deduplicate,
    }


@contextmanager
def scratch_folder(data_dir: Path) -> Iterator[Path]:
    """A folder in `data_dir`, which goes in the end, as does what runs that were killed have left.

    Raises InputError where another process is at work in one. The lock ends with its process; on a
    disk without locks nobody is seen.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    for leftover in data_dir.glob(".prepare-*"):
        lock = FileLock(leftover / "lock", fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError(
                f"another process is writing to {data_dir}: wait for it, or pass another --data_dir"
            ) from error
        except OSError:
            pass
        lock.release()
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=data_dir) as scratch:
        lock = FileLock(Path(scratch, "lock"), fallback_to_soft=False)
        with suppress(OSError):
            lock.acquire()
        try:
            yield Path(scratch)
        finally:
            lock.release()


def prepare(arguments: Arguments) -> dict:
    """Writes the three files of `arguments.data_dir` and returns what meta.json says.

    They are made beside it and moved in whole at the end: until then the old ones stay.
    Raises InputError.
    """
    if not 0 < arguments.validation_fraction < 1:
        raise InputError(
            f"validation_fraction {arguments.validation_fraction} is not between 0 and 1: "
            "pass --validation_fraction 0.01"
        )
    check_whole("num_proc", arguments.num_proc, 1, 1_000)
    check_whole("seed", arguments.seed, 0, 2**63 - 1)
    if arguments.max_stories is not None:
        check_whole("max_stories", arguments.max_stories, 1)
    check_vocab_size(arguments.vocab_size)
    start = time.perf_counter()
    data_dir, skipped, read = arguments.data_dir, Counter(), {}
    with ExitStack() as stack:
        pool = stack.enter_context(start_workers(arguments.num_proc, arguments.vocab_size))
        source = open_stories(
            arguments.dataset,
            arguments.text_column,
            arguments.subset,
            arguments.revision,
            arguments.max_stories,
            arguments.seed,
        )
        remedy = "free some space or pass another --data_dir"
        stack.enter_context(writing(data_dir, remedy))
        scratch = stack.enter_context(scratch_folder(data_dir))
        total = arguments.max_stories or source.total
        seen = np.zeros(arguments.vocab_size, bool)
        with progress_bar(total=total, unit=" stories", desc="encoding") as bar:
            for split, stories in source.splits.items():
                stories = kept_stories(stories, arguments.max_stories, skipped)
                path = scratch / f"{split}.ids"
                read[split] = encode_split(stories, pool, path, arguments, bar, seen)
        meta = {
            **pool.submit(describe_tokenizer, arguments.vocab_size).result(),
            "dataset": arguments.dataset,
            "subset": arguments.subset,
            "revision": source.revision,
            **write_splits(scratch, read, arguments),
        }
        install(scratch, data_dir, meta)
    summarize(
        meta, source, skipped["empty"], int(seen.sum()), time.perf_counter() - start, arguments
    )
    return meta


def summarize(
    meta: dict, source: Stories, empty: int, distinct: int, seconds: float, arguments: Arguments
) -> None:
    """Prints what was read, what was not, and what the files hold."""
    counts = meta["splits"]
    total = {key: sum(counts[split][key] for split in SPLITS) for key in ("tokens", "bytes")}
    for split in SPLITS:
        c = counts[split]
        print(f"{split + ':':12}{c['stories']:>11,} stories {c['tokens']:>14,} tokens")
    repeated, in_train = meta["duplicates"].values()
    print(
        f"{total['bytes'] / total['tokens']:.2f} bytes a token, {distinct:,} distinct ids "
        f"of {arguments.vocab_size:,}, {empty:,} empty stories skipped\n"
        f"duplicates: {repeated:,} train stories repeat another, {in_train:,} validation stories "
        "are in train, too" + ("; dropped from train" if meta["deduplicated"] else "")
    )
    if source.left_out:
        print(f"not read: {describe(source.left_out)}")
    print(
        f"{seconds:.1f} s, {total['bytes'] / 1e6 / seconds:.1f} MB/s with {arguments.num_proc} "
        f"processes; written to {arguments.data_dir}"
    )


def main() -> None:
    prepare(parse_flags(Arguments))


if __name__ == "__main__":
    run(main)
