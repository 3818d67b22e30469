"""Script: stories in, token files out.

Writes `train.bin` and `validation.bin` (raw little-endian uint16 ids, one stream a split, an
end-of-text id after every story) and `meta.json`, which says what they hold.
"""

import os
import random
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from config import InputError
from storygpt.cli import parse_flags, progress_bar, run
from storygpt.sources import BATCH, batched, open_stories
from storygpt.token_files import SPLITS, SplitWriter, install
from storygpt.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, load_tokenizer


@dataclass(frozen=True)
class Arguments:
    """Encode stories into train.bin, validation.bin and meta.json."""

    dataset: str = "roneneldan/TinyStories"
    """A data set on the Hub, `builtin` (a story grammar, needs no network; also `sample`), a local
    data-set folder, or a .txt, .jsonl, .csv or .parquet file."""
    text_column: str = "text"
    """The column that holds the stories."""
    vocab_size: int = GPT2_VOCAB_SIZE
    """Token ids to use: GPT-2's first vocab_size - 1 tokens and end-of-text."""
    validation_fraction: float = 0.01
    """Share of stories held out where the data set has no validation split."""
    num_proc: int = os.cpu_count() or 1
    """Processes that encode."""
    data_dir: Path = Path("data")
    """Folder to write to."""
    seed: int = 1337
    """Seed of the hold-out and of the built-in stories."""


def split_batches(
    sources: dict[str, Iterator[list[str]]], validation_fraction: float, seed: int
) -> Iterator[tuple[str, list[str]]]:
    """(split, stories) in file order; without a validation split, holds out a seeded share.

    The share is drawn block by block, so that it needs no count of the whole, comes from
    everywhere in the data, and is never empty.
    """
    if "validation" in sources:
        for split in SPLITS:
            for batch in sources[split]:
                yield split, batch
        return
    rng = random.Random(seed)
    stories = (story for batch in sources["train"] for story in batch)
    for block in batched(stories, max(BATCH, round(1 / validation_fraction))):
        num_held_out = max(1, round(len(block) * validation_fraction))
        held_out = set(rng.sample(range(len(block)), num_held_out))
        yield "train", [story for i, story in enumerate(block) if i not in held_out]
        yield "validation", [story for i, story in enumerate(block) if i in held_out]


def encode_stories(stories: list[str | None], vocab_size: int) -> tuple[np.ndarray, int, int]:
    """All stories as one (tokens,) uint16 array, and the counts of stories and UTF-8 bytes in it.

    Empty stories are left out.
    """
    tokenizer = load_tokenizer(vocab_size)
    kept = [story for story in stories if story and not story.isspace()]
    text = END_OF_TEXT.join([*kept, ""])
    try:
        num_bytes = len(text.encode()) - len(kept) * len(END_OF_TEXT)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but UTF-8 cannot
        kept = [s.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for s in kept]
        return encode_stories(kept, vocab_size)
    if text.count(END_OF_TEXT) == len(kept):  # all in one call: a call a story is slower
        ids = tokenizer.encode_to_numpy(text, allowed_special={END_OF_TEXT})
    else:  # a story spells end-of-text: there it stays text
        encode = partial(tokenizer.encode_to_numpy, disallowed_special=())
        ids = np.concatenate([x for s in kept for x in (encode(s), [tokenizer.eot_token])])
    return ids.astype("<u2"), len(kept), num_bytes


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


def encode_in_parallel(
    batches: Iterable[tuple[str, list[str]]], pool: Executor, vocab_size: int, num_proc: int
) -> Iterator[tuple[str, int, tuple[np.ndarray, int, int]]]:
    """(split, stories read, encode_stories of them) in order, with a bounded number in memory."""
    waiting = deque()
    for split, stories in batches:
        waiting.append((split, len(stories), pool.submit(encode_stories, stories, vocab_size)))
        if len(waiting) > 3 * num_proc:
            split, count, future = waiting.popleft()
            yield split, count, future.result()
    while waiting:
        split, count, future = waiting.popleft()
        yield split, count, future.result()


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
    if arguments.num_proc < 1:
        raise InputError(f"num_proc {arguments.num_proc} is below 1: pass --num_proc 1")
    start = time.perf_counter()
    with ExitStack() as stack:
        pool = stack.enter_context(start_workers(arguments.num_proc, arguments.vocab_size))
        tokenizer = load_tokenizer(arguments.vocab_size)
        sources, num_stories = open_stories(
            arguments.dataset, arguments.text_column, arguments.seed
        )
        batches = split_batches(sources, arguments.validation_fraction, arguments.seed)
        encoded = encode_in_parallel(batches, pool, arguments.vocab_size, arguments.num_proc)

        seen, skipped = np.zeros(arguments.vocab_size, bool), 0
        data_dir = arguments.data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".prepare-", dir=data_dir)
        scratch = Path(stack.enter_context(scratch))
        writers = {split: SplitWriter(scratch / f"{split}.bin") for split in SPLITS}
        for writer in writers.values():
            stack.enter_context(writer.file)
        bar = stack.enter_context(progress_bar(total=num_stories, unit=" stories", desc="encoding"))
        for split, count, (ids, kept, num_bytes) in encoded:
            writers[split].write(ids, kept, num_bytes)
            skipped += count - kept
            seen[ids.astype(np.intp)] = True  # NumPy is twice as slow to convert them itself
            bar.update(count)
        for split, writer in writers.items():
            if not writer.counts["stories"]:
                raise InputError(
                    f"{arguments.dataset} has no stories for the {split} split: "
                    "check --dataset and --text_column"
                )
        counts = {split: writer.close() for split, writer in writers.items()}
        meta = {
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.n_vocab,
            "end_of_text": tokenizer.eot_token,
            "dataset": arguments.dataset,
            "splits": counts,
        }
        install(scratch, data_dir, meta)

    seconds = time.perf_counter() - start
    total = {key: sum(counts[split][key] for split in SPLITS) for key in ("tokens", "bytes")}
    for split in SPLITS:
        c = counts[split]
        print(f"{split + ':':12}{c['stories']:>11,} stories {c['tokens']:>14,} tokens")
    print(
        f"{total['bytes'] / (total['tokens'] or 1):.2f} bytes a token, {seen.sum():,} distinct ids "
        f"of {arguments.vocab_size:,}, {skipped:,} empty stories skipped\n"
        f"{seconds:.1f} s, {total['bytes'] / 1e6 / seconds:.1f} MB/s with {arguments.num_proc} "
        f"processes; written to {data_dir}"
    )
    return meta


def main() -> None:
    prepare(parse_flags(Arguments))


if __name__ == "__main__":
    run(main)
