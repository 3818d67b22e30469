"""Script: stories in, token files out.

Writes `train.bin` and `validation.bin` (raw little-endian uint16 ids, one stream a split, an
end-of-text id after every story) and `meta.json`, which says what they hold.
"""

import hashlib
import json
import os
import random
import re
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
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from config import InputError
from storygpt.builtin_stories import sample_stories
from storygpt.cli import parse_flags, progress_bar, run
from storygpt.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, load_tokenizer

SPLITS = ("train", "validation")
NUM_SAMPLE_STORIES = 20_000
BATCH = 1_000  # stories a worker encodes at once
FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Arguments:
    """Encode stories into train.bin, validation.bin and meta.json."""

    dataset: str = "roneneldan/TinyStories"
    """A data set on the Hub, `sample` (built in, needs no network), a local data-set folder, or a
    .txt, .jsonl, .csv or .parquet file."""
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
    """Seed of the hold-out and of the sample stories."""


# --- Where stories come from: every source is an iterator of batches (lists of strings) a split ---


def batched(stories: Iterable[str], size: int) -> Iterator[list[str]]:
    """Consecutive lists of `size` stories; the last may be shorter."""
    stories = iter(stories)
    while batch := list(islice(stories, size)):
        yield batch


def read_text_files(paths: list[Path]) -> Iterator[str]:
    """The stories of .txt files, which lines of `<|endoftext|>` separate (TinyStories' format)."""
    for path in paths:
        lines = []
        with open(path, encoding="utf-8") as file:
            try:
                for line in file:
                    if line.strip() == END_OF_TEXT:
                        yield "".join(lines).strip("\n")
                        lines = []
                    else:
                        lines.append(line)
            except UnicodeDecodeError as error:
                raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error
        if "".join(lines).strip():
            yield "".join(lines).strip("\n")


def read_columns(tables: Iterable, name: str, text_column: str) -> Iterator[list[str]]:
    """The stories of one split, from Arrow tables or record batches."""
    try:
        for batch in tables:
            if text_column not in batch.schema.names:
                raise InputError(
                    f"{name} has no column {text_column!r}: pass --text_column with one of "
                    + ", ".join(batch.schema.names)
                )
            stories = batch[text_column].to_pylist()
            if wrong := set(map(type, stories)) - {str, type(None)}:
                raise InputError(
                    f"column {text_column!r} of {name} holds {wrong.pop().__name__}, not text: "
                    "pass --text_column"
                )
            yield stories
    except InputError:
        raise
    except Exception as error:  # each file format raises exceptions of its own
        raise InputError(f"cannot read {name}: {_one_line(error)}") from error


def quiet_datasets():
    """The `datasets` library, its warnings off: what goes wrong, this script says itself."""
    import datasets
    import huggingface_hub

    # A streamed data set would import PyTorch, which takes longer than to encode a small one.
    datasets.config.TORCH_AVAILABLE = False
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    return datasets


def open_hub_dataset(name: str) -> dict[str, tuple[Iterator, int]]:
    """Arrow tables and count of stories by split of a data set on the Hub.

    Downloads it, or takes it from the local cache where the Hub cannot be reached.
    """
    datasets = quiet_datasets()
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    reachable = True
    try:
        HfApi().dataset_info(name, timeout=10)
    except HFValidationError as error:
        raise InputError(
            f"{name} is neither a file, a folder nor a data set's name on the Hub: "
            "pass --dataset owner/name, a path, or --dataset sample"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(
            f"the Hub does not give out {name} (HTTP {error.response.status_code}): check "
            "--dataset, or log in with `hf auth login` if it is private"
        ) from error
    except Exception:  # no connection: the cache may have it, and asking it must not retry
        reachable = False
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        splits = datasets.load_dataset(name)
        return {s: (d.with_format("arrow").iter(BATCH), len(d)) for s, d in splits.items()}
    except Exception as error:
        if reachable:
            raise InputError(f"cannot load {name}: {_one_line(error)}") from error
        raise InputError(
            f"the Hub cannot be reached to download {name}: check the network, or use the "
            "built-in stories with --dataset sample"
        ) from error


def open_stories(arguments: Arguments) -> tuple[dict[str, Iterator[list[str]]], int | None]:
    """Batches of stories by split (`validation` only where the source has one), and their count.

    The count is None where only reading everything would tell.
    """
    name, path = arguments.dataset, Path(arguments.dataset)
    if name == "sample":
        stories = sample_stories(NUM_SAMPLE_STORIES, seed=arguments.seed)
        return {"train": batched(stories, BATCH)}, NUM_SAMPLE_STORIES

    text_files = sorted(path.glob("*.txt")) if path.is_dir() else [path] * (path.suffix == ".txt")
    if path.exists() and text_files:
        held_out = [file for file in text_files if "valid" in file.name.lower()]
        splits = {"train": [file for file in text_files if file not in held_out]}
        if held_out and splits["train"]:
            splits["validation"] = held_out
        else:
            splits["train"] = text_files
        return {split: batched(read_text_files(s), BATCH) for split, s in splits.items()}, None

    if not path.exists() and (path.suffix in {".txt", *FILE_TYPES} or path.is_absolute()):
        raise InputError(f"there is no file or folder {name}: check --dataset")
    if path.exists():
        if path.is_file() and path.suffix not in FILE_TYPES:
            kinds = ", ".join([".txt", *FILE_TYPES])
            raise InputError(f"{name} is of no kind this script reads ({kinds}): check --dataset")
        dataset = open_local_dataset(path)
    else:
        dataset = open_hub_dataset(name)

    validation = next((s for s in ("validation", "valid", "dev", "test") if s in dataset), None)
    train = "train" if "train" in dataset else next(iter(dataset))
    found = {"train": dataset[train]}
    if validation not in (None, train):
        found["validation"] = dataset[validation]
    counts = [count for _, count in found.values()]
    return (
        {s: read_columns(t, name, arguments.text_column) for s, (t, _) in found.items()},
        None if None in counts else sum(counts),
    )


def open_local_dataset(path: Path) -> dict[str, tuple[Iterator, int | None]]:
    """A folder or file as `datasets` finds it: Arrow tables and count of stories by split.

    Streamed: no copy of it is left in a cache. Parquet files are left to pyarrow, as the scanner
    that `datasets` streams them with reads up to a gigabyte ahead.
    """
    load_dataset_builder = quiet_datasets().load_dataset_builder
    try:
        if path.is_dir():
            builder = load_dataset_builder(str(path))
        else:
            files = {"train": str(path)}
            builder = load_dataset_builder(FILE_TYPES[path.suffix], data_files=files)
        if builder.info.builder_name == "parquet":
            return {s: read_parquet(paths) for s, paths in builder.config.data_files.items()}
        streams = builder.as_streaming_dataset()
        return {s: (d.with_format("arrow").iter(BATCH), None) for s, d in streams.items()}
    except Exception as error:
        raise InputError(f"{path} cannot be read as a data set: {_one_line(error)}") from error


def read_parquet(paths: list[str]) -> tuple[Iterator, int]:
    """Record batches of all files, and the count of their rows."""
    from pyarrow import parquet

    def batches() -> Iterator:
        for path in paths:
            # its buffer would keep the whole file
            yield from parquet.ParquetFile(path, pre_buffer=False).iter_batches(BATCH)

    return batches(), sum(parquet.read_metadata(path).num_rows for path in paths)


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


# --- From stories to files ---


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


def meta_checksum(meta: dict) -> str:
    """SHA-256 of all of meta.json but its own `sha256`."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
        sources, num_stories = open_stories(arguments)
        batches = split_batches(sources, arguments.validation_fraction, arguments.seed)
        encoded = encode_in_parallel(batches, pool, arguments.vocab_size, arguments.num_proc)

        counts = {split: {"stories": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
        digests = {split: hashlib.sha256() for split in SPLITS}
        seen, skipped = np.zeros(arguments.vocab_size, bool), 0
        data_dir = arguments.data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".prepare-", dir=data_dir)
        scratch = Path(stack.enter_context(scratch))
        files = {s: stack.enter_context(open(scratch / f"{s}.bin", "wb")) for s in SPLITS}
        bar = stack.enter_context(progress_bar(total=num_stories, unit=" stories", desc="encoding"))
        for split, count, (ids, kept, num_bytes) in encoded:
            files[split].write(ids.data)
            digests[split].update(ids.data)
            counts[split]["stories"] += kept
            counts[split]["tokens"] += len(ids)
            counts[split]["bytes"] += num_bytes
            skipped += count - kept
            seen[ids.astype(np.intp)] = True  # NumPy is twice as slow to convert them itself
            bar.update(count)
        for split, file in files.items():
            if not counts[split]["stories"]:
                raise InputError(
                    f"{arguments.dataset} has no stories for the {split} split: "
                    "check --dataset and --text_column"
                )
            counts[split]["sha256"] = digests[split].hexdigest()
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.n_vocab,
            "end_of_text": tokenizer.eot_token,
            "dataset": arguments.dataset,
            "splits": counts,
        }
        meta["sha256"] = meta_checksum(meta)
        (scratch / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        # Without its meta.json a data folder counts as not prepared: a run killed between these
        # lines can leave no mix of old and new.
        (data_dir / "meta.json").unlink(missing_ok=True)
        for name in ("train.bin", "validation.bin", "meta.json"):
            os.replace(scratch / name, data_dir / name)

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


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def main() -> None:
    prepare(parse_flags(Arguments))


if __name__ == "__main__":
    run(main)
