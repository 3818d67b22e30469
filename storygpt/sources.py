"""Where stories come from: the Hub, a folder, a file, or the built-in grammar.

Every source is an iterator of batches (lists of strings) a split.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from config import InputError
from storygpt.builtin_stories import sample_stories
from storygpt.tokenizer import END_OF_TEXT

BUILTIN = ("builtin", "sample")
NUM_BUILTIN_STORIES = 20_000
BATCH = 1_000  # stories read at once
FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
        raise InputError(f"cannot read {name}: {one_line(error)}") from error


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
            "pass --dataset owner/name, a path, or --dataset builtin"
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
            raise InputError(f"cannot load {name}: {one_line(error)}") from error
        raise InputError(
            f"the Hub cannot be reached to download {name}: check the network, or use the "
            "built-in stories with --dataset builtin"
        ) from error


def open_stories(
    dataset: str, text_column: str = "text", seed: int = 0
) -> tuple[dict[str, Iterator[list[str]]], int | None]:
    """Batches of stories by split (`validation` only where the source has one), and their count.

    The count is None where only reading everything would tell.
    """
    name, path = dataset, Path(dataset)
    if name in BUILTIN:
        stories = sample_stories(NUM_BUILTIN_STORIES, seed=seed)
        return {"train": batched(stories, BATCH)}, NUM_BUILTIN_STORIES

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
        opened = open_local_dataset(path)
    else:
        opened = open_hub_dataset(name)

    validation = next((s for s in ("validation", "valid", "dev", "test") if s in opened), None)
    train = "train" if "train" in opened else next(iter(opened))
    found = {"train": opened[train]}
    if validation not in (None, train):
        found["validation"] = opened[validation]
    counts = [count for _, count in found.values()]
    return (
        {s: read_columns(t, name, text_column) for s, (t, _) in found.items()},
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
        raise InputError(f"{path} cannot be read as a data set: {one_line(error)}") from error


def read_parquet(paths: list[str]) -> tuple[Iterator, int]:
    """Record batches of all files, and the count of their rows."""
    from pyarrow import parquet

    def batches() -> Iterator:
        for path in paths:
            # its buffer would keep the whole file
            yield from parquet.ParquetFile(path, pre_buffer=False).iter_batches(BATCH)

    return batches(), sum(parquet.read_metadata(path).num_rows for path in paths)


def one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
