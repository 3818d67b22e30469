"""Where stories come from: the Hub, a folder, a file, or the built-in grammar.

Only the text column is ever looked at, and nothing guesses a type. docs/data.md has the rules for
which files are read, and as which split.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from config import InputError
from storygpt.builtin_stories import sample_stories
from storygpt.cli import one_line
from storygpt.files import refuse_pointers
from storygpt.readers import (
    KINDS,
    ROWS,
    UNPACK,
    arrow_rows,
    count_rows,
    kind_of,
    read_files,
    reading,
)
from storygpt.tokenizer import END_OF_TEXT

BUILTIN = ("builtin", "sample")
NUM_BUILTIN_STORIES = 20_000
LEFT_OUT_TEST = "test, as there is validation"
SPLIT_WORDS = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval"), "validation"
)
SHARD = re.compile(r"^(\d+[-_. ]+)+|([-_. ]*\d+([-_. ]of[-_. ]\d+([-_. ][0-9a-f]{16})?)?)+$")
NOTES = re.compile(
    r"(readme|licen[cs]e|requirements|changelog|copying)s?([-_. ].*)?|changes|copyright|notice|"
    r"authors|contribut(ors|ing)|citation"
)
SETTINGS = re.compile(r"(package(-lock)?|config|dataset_(infos?|dict)|state|meta)\.json")


class Stories(NamedTuple):
    """Stories by split (`validation` only where the source has one), None for a null; their count
    where it is known; what was not read, by reason; the commit on the Hub."""

    splits: dict[str, Iterator[str | None]]
    total: int | None = None
    left_out: dict[str, list[str]] = {}  # noqa: RUF012
    revision: str | None = None


def open_stories(
    dataset: str,
    text_column: str = "text",
    subset: str | None = None,
    revision: str | None = None,
    max_stories: int | None = None,
    seed: int = 0,
) -> Stories:
    """The stories of `dataset`: a Hub name, a folder, a file, or `builtin`.

    With `max_stories` a data set on the Hub is streamed, for callers that read no further than
    that. Raises InputError, also while the stories are read.
    """
    path = Path(dataset)
    local = dataset in BUILTIN or path.exists()
    if (local and revision) or (subset and (dataset in BUILTIN or path.is_file())):
        raise InputError(f"{dataset} has no subsets or revisions: leave out --subset, --revision")
    if dataset in BUILTIN:
        stories = sample_stories(NUM_BUILTIN_STORIES, seed=seed)
        return Stories({"train": stories}, NUM_BUILTIN_STORIES)
    if path.is_dir():
        return open_folder(path, text_column, subset)
    if path.exists():
        if not kind_of(path.name):
            raise InputError(
                f"{path} is of no kind this script reads ({', '.join(KINDS)}, all but the last "
                f"also {', '.join(UNPACK)}): check --dataset"
            )
        if not path.is_file():  # what came through a pipe could not be read a second time
            raise InputError(f"{path} is a pipe or device: write it to a file, and pass that")
        refuse_pointers([path])
        return Stories({"train": read_files([path], text_column)}, count_rows([path]))
    if kind_of(path.name):
        raise InputError(f"there is no file or folder {dataset}: check --dataset")
    return open_hub_dataset(dataset, text_column, subset, revision, max_stories is not None)


# --- Which files, which split ---


def split_of(name: str, folders: Iterable[str] = ()) -> str:
    """`train`, `validation` or `test`, by the words of a name without its endings, then of the
    folders it is in, the nearest first. Raises InputError where the name says two of them."""
    words = re.split(r"[\W_]+", SHARD.sub("", name.lower()))
    found = {SPLIT_WORDS[word] for word in (words[0], words[-1]) if word in SPLIT_WORDS}
    if len(found) > 1:
        shown = "/".join([*folders, name])
        raise InputError(f"{shown} names two splits ({words[0]}, {words[-1]}): rename it")
    nearest = (SPLIT_WORDS[f.lower()] for f in reversed([*folders]) if f.lower() in SPLIT_WORDS)
    return found.pop() if found else next(nearest, "train")


def choose_splits(name: str, found: dict[str, list]) -> tuple[dict[str, list], list]:
    """Which of what was `found` as train, validation and test are train and validation, and what
    is left out. Raises InputError where there is nothing to train on."""
    found, left_out = {split: parts for split, parts in found.items() if parts}, []
    if "validation" in found:
        left_out = found.pop("test", [])
    elif "test" in found:
        found["validation"] = found.pop("test")
    if "train" not in found:
        held_out = ", ".join(str(part) for part in found["validation"][:3])
        raise InputError(
            f"{name} has stories for validation alone ({held_out}): add some to train on, or pass "
            "one itself with --dataset to split it"
        )
    return found, left_out


def walk(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """All files below a folder by name, links followed, each file and folder once."""
    seen = set()

    def stop(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        for name in sorted([*folders, *names]):
            path = Path(root, name)
            shown = str(path.relative_to(folder))
            if name.startswith("."):
                left_out.setdefault("hidden", []).append(shown)
            elif not path.exists():
                raise InputError(f"{path} is a link to nothing: remove it, or bring back its file")
            elif (key := (path.stat().st_dev, path.stat().st_ino)) in seen or (
                path.is_symlink() and folder.resolve().is_relative_to(path.resolve())
            ):
                left_out.setdefault("another name of what is read", []).append(shown)
            elif not (path.is_file() or path.is_dir()):
                left_out.setdefault("of another kind", []).append(shown)
            else:
                seen.add(key)
                if path.is_file():
                    yield path
                continue
            if name in folders:
                folders.remove(name)
        folders.sort()


def find_files(folder: Path, left_out: dict[str, list[str]]) -> dict[str, list[Path]]:
    """The data files below a folder, by what their names say."""
    found, taken = {"train": [], "validation": [], "test": []}, {}
    for path in walk(folder, left_out):
        shown, kind = str(path.relative_to(folder)), kind_of(path.name)
        stem = path.name.lower().partition(kind)[0] if kind else path.stem.lower()
        if NOTES.fullmatch(stem) or SETTINGS.fullmatch(path.name.lower()):
            left_out.setdefault("notes by their name", []).append(shown)
        elif not kind:
            left_out.setdefault("of another kind", []).append(shown)
        elif path.suffix.lower() in UNPACK and path.with_suffix("").exists():
            left_out.setdefault("compressed copies", []).append(shown)
        else:
            taken[path] = kind
    if set(taken.values()) - {".txt"}:
        texts = [path for path, kind in taken.items() if kind == ".txt"]
        for path in texts:
            del taken[path]
            shown = str(path.relative_to(folder))
            left_out.setdefault(".txt beside structured files", []).append(shown)
    for path, kind in taken.items():
        stem = path.name[: path.name.lower().rindex(kind)]
        found[split_of(stem, path.relative_to(folder).parts[:-1])].append(path)
    return found


def saved_files(folder: Path) -> dict[str, list[Path]] | None:
    """The Arrow files of a folder that `datasets` saved (save_to_disk), as declared there."""
    parts, whole = {"train": folder}, folder / "dataset_dict.json"
    if whole.is_file():
        parts = {name: folder / name for name in json.loads(whole.read_bytes())["splits"]}
    elif not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    found = {"train": [], "validation": [], "test": []}
    for name, part in parts.items():
        files = json.loads((part / "state.json").read_bytes())["_data_files"]
        found[split_of(name)] += [part / file["filename"] for file in files]
    return found


def read_configs(folder: Path) -> dict[str, dict]:
    """The subsets by name that the head of a folder's README.md declares, where it does."""
    if not (folder / "README.md").is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        head = metadata_load(folder / "README.md") or {}
    except Exception:  # no YAML at its head: it is just a README
        return {}
    configs = {config["config_name"]: config for config in head.get("configs") or []}
    return {n: c for n, c in configs.items() if "data_files" in c or "data_dir" in c}


def declared_files(folder: Path, config: dict) -> Iterator[tuple[str, list[Path]]]:
    """(split, its files) as a subset of the README.md declares them."""
    declared = config["data_files"]
    if isinstance(declared, dict):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    elif isinstance(declared, str) or isinstance(declared[0], str):
        declared = [{"split": "train", "path": declared}]
    for part in declared:
        for path in [part["path"]] if isinstance(part["path"], str) else part["path"]:
            pattern, files = os.path.join(config.get("data_dir", ""), path), []
            if not (folder / pattern).is_file():
                files = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
            files = [folder / file for file in files or [pattern] if (folder / file).is_file()]
            if not files:
                raise InputError(f"{folder}/README.md declares {path}: there is no such file")
            yield split_of(part["split"]), files


def find_declared(
    folder: Path, subset: str | None, left_out: dict[str, list[str]]
) -> dict[str, list[Path]] | None:
    """The files of a folder by split where its README.md declares them, or else None."""
    found = {"train": [], "validation": [], "test": []}
    try:
        configs = read_configs(folder)
        if not configs and not subset:
            return None
        default = [n for n, c in configs.items() if c.get("default") or n == "default"]
        name = subset or (default or [*configs])[0]
        if name not in configs or not (subset or default or len(configs) == 1):
            listed = "no subsets in its README.md: leave out --subset"
            if configs:
                listed = f"the subsets {', '.join(configs)}: pass --subset with one"
            raise InputError(f"{folder} has {listed}")
        if "data_files" not in configs[name]:
            return find_files(folder / configs[name]["data_dir"], left_out)
        for split, files in declared_files(folder, configs[name]):
            found[split] += files
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/README.md declares its data in no way that is known") from error
    every = [path for paths in found.values() for path in paths]
    for path in every:
        if every.count(path) > 1:
            raise InputError(f"{folder}/README.md declares {path} twice: leave it in one split")
        if not kind_of(path.name):
            raise InputError(f"{folder}/README.md declares {path}, of no kind this script reads")
    rest = [path for path in walk(folder, left_out) if path not in set(every)]
    if rest := [str(path.relative_to(folder)) for path in rest if path.name != "README.md"]:
        left_out["not declared in README.md"] = rest
    return found


def open_folder(folder: Path, text_column: str, subset: str | None) -> Stories:
    """The stories below a folder."""
    left_out: dict[str, list[str]] = {}
    try:
        found = saved_files(folder)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{folder} is not whole as a saved data set: save it again") from error
    if found is None:
        found = find_declared(folder, subset, left_out)
    if found is None:
        found = find_files(folder, left_out)
    if not any(found.values()):
        raise InputError(
            f"{folder} holds no stories ({describe(left_out) or 'it is empty'}): "
            f"this script reads {', '.join(KINDS)}"
        )
    splits, tests = choose_splits(str(folder), found)
    if tests:
        left_out[LEFT_OUT_TEST] = [str(path.relative_to(folder)) for path in tests]
    paths = [path for paths in splits.values() for path in paths]
    refuse_pointers(paths)
    stories = {split: read_files(paths, text_column) for split, paths in splits.items()}
    return Stories(stories, count_rows(paths), left_out)


def describe(left_out: dict[str, list[str]]) -> str:
    """One line of what was not read, and why."""
    return "; ".join(
        f"{reason}: {', '.join(names[:4])}" + f" and {len(names) - 4} more" * (len(names) > 4)
        for reason, names in left_out.items()
    )


# --- The Hub ---


def quiet_datasets():
    """The `datasets` library, its warnings off: what goes wrong, this script says itself."""
    import datasets
    import huggingface_hub

    # A streamed data set would import PyTorch, which takes longer than to encode a small one.
    datasets.config.TORCH_AVAILABLE = False
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    return datasets


def find_commit(name: str, revision: str | None) -> str | None:
    """The commit that a data set on the Hub is at, or None where the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except HFValidationError as error:
        raise InputError(
            f"{name} is neither a file, a folder nor a data set's name on the Hub: "
            "pass --dataset owner/name, a path, or --dataset builtin"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}: check --revision") from error
    except HfHubHTTPError as error:
        raise InputError(
            f"the Hub does not give out {name} (HTTP {error.response.status_code}): check "
            "--dataset, or log in with `hf auth login` if it is private"
        ) from error
    except Exception:  # no connection
        return None


def open_hub_dataset(
    name: str, text_column: str, subset: str | None, revision: str | None, streaming: bool
) -> Stories:
    """The stories of a data set on the Hub, read by `datasets`.

    Downloads it, or takes it from the local cache where the Hub cannot be reached; with
    `streaming`, fetches no more than is read.
    """
    datasets = quiet_datasets()
    from huggingface_hub import constants

    commit = find_commit(name, revision)
    if commit is None:  # the cache may have it, and asking for it must not retry
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        streaming = streaming and commit is not None
        opened = datasets.load_dataset(name, subset, revision=commit, streaming=streaming)
    except Exception as error:
        if commit is None:
            raise InputError(
                f"the Hub cannot be reached to download {name}: check the network, or use the "
                "built-in stories with --dataset builtin"
            ) from error
        hint = "; --subset names one of several subsets" * isinstance(error, ValueError)
        raise InputError(f"cannot load {name}: {one_line(error)}{hint}") from error
    if commit is None:  # where datasets keeps what it has read of a commit
        commit = Path(next(iter(opened.values())).cache_files[0]["filename"]).parent.name
        if revision not in (None, commit):
            raise InputError(
                f"the Hub cannot be reached to download {name} at {revision}: check the network, "
                "or leave out --revision to take what was downloaded before"
            )
    found = {"train": [], "validation": [], "test": []}
    for split in opened:
        found[split_of(split)].append(split)
    splits, tests = choose_splits(name, found)

    def rows(part: str) -> Iterator[str | None]:
        where = f"{name}, split {part}"
        lines = opened[part].info.builder_name == "text"  # a row a line, whatever separates stories
        with reading(where):
            tables = opened[part].with_format("arrow").iter(ROWS)
            for _, value in arrow_rows(tables, text_column, where):
                if lines and value and END_OF_TEXT in value:
                    raise InputError(
                        f"{where} is a .txt with {END_OF_TEXT} between stories, which `datasets` "
                        f"cuts into lines: run `hf download {name} --repo-type dataset --local-dir "
                        "DIR` and pass --dataset DIR"
                    )
                yield value

    total = None
    if not streaming:
        total = sum(len(opened[part]) for parts in splits.values() for part in parts)
    stories = {s: chain.from_iterable(map(rows, parts)) for s, parts in splits.items()}
    return Stories(stories, total, {LEFT_OUT_TEST: tests} if tests else {}, commit)
