"""Where stories come from: the Hub, a folder, a file, or the built-in grammar.

Which files are read, and as which split, follows from their names alone, for a folder and for a
repo on the Hub by the same rules: those of docs/data.md.
"""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from config import InputError
from storygpt import hub
from storygpt.builtin_stories import sample_stories
from storygpt.cli import one_line, shorten
from storygpt.readers import (
    KINDS_READ,
    PACKED,
    TABLE_ROWS,
    NoColumn,
    arrow_stories,
    count_rows,
    kind_of,
    read_stories,
    reading,
)

BUILTIN = ("builtin", "sample")
NUM_BUILTIN_STORIES = 20_000
HIDDEN, OTHER_KIND, ANOTHER_NAME = "hidden", "of another kind", "another name of what is read"
LEFT_OUT_TEST = "test, as there is validation"
LEFT_OUT_TEXTS = ".txt beside structured files"
FEW_OF_MANY = 20  # a file in so many, or more, may be called "dev" or "test" for another reason
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "heldout"), "validation"
)
SPLIT_WORDS |= {f"{word}set": split for word, split in SPLIT_WORDS.items()}
WORD = re.compile(r"[^\W_]+")
# numbers of shards, versions and copies, at either end of a name without its endings; a number is
# never tried in parts (++), or one of thirty digits would take hours
SHARD = re.compile(
    r"^(\d+[-_. ]+)+|([-_. ]+v\d++|[-_. ]*\(\d+\)|([-_. ]+(part|shard|chunk))?[-_. ]*\d++"
    r"([-_. ]of[-_. ]\d++([-_. ][0-9a-f]{16})?)?)+$"
)
OF_SHARDS = re.compile(r"(.*?)\d+[-_. ]of[-_. ](\d+)", re.DOTALL)
# a file of the branch where the Hub keeps data sets as parquet: SUBSET/SPLIT/0000.parquet
CONVERTED = re.compile(r"[^/]+/[^/]+/\d{4}\.parquet")
NOTES = re.compile(
    r"(readme|licen[cs]e|requirements|changelog|copying)s?([-_. ].*)?|changes|copyright|notice|"
    r"authors|contribut(ors|ing)|citation"
)
SETTINGS = re.compile(
    r"(package(-lock)?|config|croissant|dataset(_infos?|_dict|-metadata)|state|meta)\.json"
)
WILDCARDS = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

UNKNOWN_README = "{}/README.md declares its data in no way that is known"

Found = dict[str, list[str]]  # names by split, or by the reason why they are not read


class Stories(NamedTuple):
    """Stories by split (`validation` only where the source has one), each a text or None for an
    empty row; their number where it is known; what was not read, by reason; the commit on the Hub;
    what the summary should say."""

    splits: dict[str, Iterator[str | None]]
    total: int | None = None
    left_out: Found = {}  # noqa: RUF012
    commit: str | None = None
    notes: list[str] = []  # noqa: RUF012


class Files(NamedTuple):
    """The files below `place`, a folder or a repo on the Hub at one commit, by their names, which
    have "/" between folders; `get` returns where one lies here. What is not read goes to
    `left_out`."""

    place: str
    names: list[str]
    get: Callable[[str], Path]
    left_out: Found
    commit: str | None = None


def open_stories(
    dataset: str,
    text_column: str = "text",
    subset: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Stories:
    """Opens the stories of `dataset`: a Hub name, a folder, a file, or `builtin`.

    Files on the Hub are downloaded as they are read. Raises InputError, also while the stories are
    read.
    """
    path = Path(dataset)
    if not dataset:
        raise InputError("--dataset is empty: pass a path, owner/name, or --dataset builtin")
    if "" in (subset, revision):  # of a shell's variable that is not set
        raise InputError("--subset or --revision is empty: leave it out, or pass a name")
    if dataset in BUILTIN and path.exists():
        raise InputError(
            f"{dataset} is the built-in stories, and something here is called so, too: pass "
            f"--dataset ./{dataset} to read that, or rename it"
        )
    local = dataset in BUILTIN or path.exists()
    if local and (revision or (subset and not path.is_dir())):
        raise InputError(f"{dataset} has no subsets or revisions: leave out --subset, --revision")
    if dataset in BUILTIN:
        stories = sample_stories(NUM_BUILTIN_STORIES, seed=seed)
        return Stories({"train": stories}, NUM_BUILTIN_STORIES)
    if path.is_dir():
        left_out = defaultdict(list)
        files = Files(str(path), walk(path, left_out), path.joinpath, left_out)
        return open_files(files, read_configs(files), subset=subset, text_column=text_column)
    if path.exists():
        return open_file(path, text_column)
    if kind_of(path.name):
        raise InputError(f"there is no file or folder {dataset}: check --dataset")
    return open_repo(dataset, revision=revision, subset=subset, text_column=text_column)


def open_file(path: Path, text_column: str) -> Stories:
    """Opens the stories of one file, whatever its name says of splits."""
    if not kind_of(path.name):
        raise InputError(f"{path} is of no kind this script reads ({KINDS_READ}): check --dataset")
    if not path.is_file():  # what came through a pipe could not be read a second time
        raise InputError(f"{path} is a pipe or device: write it to a file, and pass that")
    return Stories({"train": read_stories(path, str(path), text_column)}, count_rows([path]))


def open_repo(name: str, revision: str | None, subset: str | None, text_column: str) -> Stories:
    """Opens the stories of a data set on the Hub."""
    repo = hub.open_repo(name, "dataset", revision)
    files = Files(
        name,
        names=sorted(repo.files, key=walk_order),
        get=partial(hub.fetch, repo),
        left_out=defaultdict(list),
        commit=repo.commit,
    )
    data = [file for file in files.names if not is_hidden(file)]
    if revision == hub.PARQUET or (revision and all(map(CONVERTED.fullmatch, data))):
        folders = {file.split("/")[0] for file in data if "/" in file}
        configs = {folder: {"data_dir": folder} for folder in sorted(folders)}
    else:
        configs = read_configs(files)
    return open_files(files, configs, subset=subset, text_column=text_column)


def open_files(
    files: Files, configs: dict[str, dict], subset: str | None, text_column: str
) -> Stories:
    """Opens the stories of a folder or repo, of which a README.md declares `configs`."""
    left_out = files.left_out
    script = PurePosixPath(files.place).name + ".py"
    if files.commit and script in files.names and not configs:
        remedy = hub.other_form(files.place)
        raise InputError(f"{files.place} is for a script of its own to read, {script}: {remedy}")
    saved = {"dataset_dict.json"}, {"dataset_info.json", "state.json"}
    if not subset and any(names <= {*files.names} for names in saved):
        return open_saved(files, text_column)
    if configs or subset:
        found = find_declared(files, configs, subset)
    else:
        found = find_files(files.names, left_out)
    if not found:
        remedy = hub.other_form(files.place) if files.commit else f"this script reads {KINDS_READ}"
        reason = list_left_out(left_out) or "it is empty"
        raise InputError(f"{files.place} holds no stories ({reason}): {remedy}")
    splits, left_out[LEFT_OUT_TEST] = choose_splits(files.place, found)
    texts = len(left_out[LEFT_OUT_TEXTS])
    return Stories(
        splits={s: read_files(files, part, text_column, texts) for s, part in splits.items()},
        total=None
        if files.commit
        else count_rows([*map(files.get, chain.from_iterable(splits.values()))]),
        left_out={reason: names for reason, names in left_out.items() if names},
        commit=files.commit,
        notes=notes_on(splits, declared=bool(configs)),
    )


def read_files(files: Files, names: list[str], column: str, texts: int) -> Iterator[str | None]:
    """Reads the stories of files one after another, each when it is come to. `texts` .txt lie
    beside them and are not read. Raises InputError."""
    for name in names:
        where, path, came = f"{files.place}/{name}", files.get(name), False
        try:
            for story in read_stories(path, where, column):
                came = True
                yield story
        except InputError as error:
            if came or not texts:
                raise
            what = f"{where} has no column {column!r}" if isinstance(error, NoColumn) else error
            raise InputError(
                f"{what}; because of it {texts:,} .txt beside it are not read: move it out of "
                f"{files.place} if they are the stories"
            ) from error


def open_saved(files: Files, text_column: str) -> Stories:
    """Opens the stories of a folder that `datasets` saved (save_to_disk), as declared there."""
    import datasets

    paths = [files.get(name) for name in files.names]
    folder = paths[0].parents[files.names[0].count("/")]
    try:
        saved = datasets.load_from_disk(folder)
    except Exception as error:  # its own, and those of the layers below it
        raise InputError(
            f"{files.place} is not whole as a saved data set ({one_line(error)}): save it again"
        ) from error
    parts = saved if isinstance(saved, dict) else {"train": saved}
    found = defaultdict(list)
    for name in parts:
        found[split_of(name)].append(name)
    splits, tests = choose_splits(files.place, found)

    def stories(name: str) -> Iterator[str | None]:
        with reading(f"{files.place}, split {name}"):
            tables = parts[name].with_format("arrow").iter(TABLE_ROWS)
            yield from arrow_stories(tables, text_column, parts[name].column_names)

    return Stories(
        {split: chain.from_iterable(map(stories, names)) for split, names in splits.items()},
        sum(len(parts[name]) for names in splits.values() for name in names),
        {LEFT_OUT_TEST: tests} if tests else {},
        files.commit,
    )


# --- Which split ---


def split_of(name: str, folders: Iterable[str] = ()) -> str:
    """Returns `train`, `validation` or `test`, by the words of a name without its endings, then of
    the folders it is in, the nearest first. Raises InputError where the name says two of them."""
    words = WORD.findall(SHARD.sub("", name.lower()))
    found = {SPLIT_WORDS[word] for word in words[:1] + words[-1:] if word in SPLIT_WORDS}
    if len(found) > 1:
        shown = "/".join([*folders, name])
        raise InputError(f"{shown} names two splits ({words[0]}, {words[-1]}): rename it")
    around = [re.sub("^(split=|partial-)", "", folder.lower()) for folder in folders]
    nearest = (SPLIT_WORDS[folder] for folder in reversed(around) if folder in SPLIT_WORDS)
    return found.pop() if found else next(nearest, "train")


def choose_splits(place: str, found: Found) -> tuple[Found, list[str]]:
    """Returns which of what was `found` as train, validation and test are train and validation, and
    what is left out. Raises InputError where there is nothing to train on."""
    splits, left_out = dict(found), []
    if "validation" in splits:
        left_out = splits.pop("test", [])
    elif "test" in splits:
        splits["validation"] = splits.pop("test")
    if "train" not in splits:
        held_out = shorten(", ".join(splits["validation"]), 100)
        raise InputError(
            f"{place} has stories for validation alone ({held_out}): add some to train on, or pass "
            "one file itself with --dataset to split it"
        )
    return splits, left_out


def notes_on(splits: Found, declared: bool) -> list[str]:
    """Says what is odd about the names that became splits, by their words or as `declared`."""
    names = [*chain.from_iterable(splits.values())]
    shards = [match for match in map(OF_SHARDS.match, names) if match]
    notes = [
        f"{first}* lacks {int(number) - have:,} of its {int(number):,} files"
        for (first, number), have in Counter(match.groups() for match in shards).items()
        if have < int(number)
    ]
    if any("/partial-" in name for name in filter(CONVERTED.fullmatch, names)):
        notes += ["it is part of a data set: the Hub keeps no more of it as parquet"]
    if declared:
        return notes
    held_out = splits.get("validation", [])
    if 0 < FEW_OF_MANY * len(held_out) <= len(names):
        listed = shorten(", ".join(held_out))
        notes += [f"validation is {listed}, by its name, of {len(names):,} files"]
    words = {word for word, split in SPLIT_WORDS.items() if split != "train"}
    odd = [name for name in splits["train"] if words & {*WORD.findall(name.lower())}]
    if odd:
        notes += [f"train holds {shorten(', '.join(odd))}: docs/data.md says which words count"]
    return notes


# --- Which files ---


def is_hidden(name: str) -> bool:
    """Tells whether a file, or a folder it is in, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def walk(folder: Path, left_out: Found) -> list[str]:
    """Returns the names of all files below a folder, links followed, each file and folder once."""
    names, seen = [], set()

    def stop(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    root_place = folder.resolve()
    for root, folders, others in os.walk(folder, followlinks=True, onerror=stop):
        for name in sorted([*folders, *others]):
            path = Path(root, name)
            shown = path.relative_to(folder).as_posix()
            if is_hidden(name):
                reason = HIDDEN
            elif not path.exists():
                raise InputError(f"{path} is a link to nothing: remove it, or bring back its file")
            elif (place := path.resolve()) in seen or root_place.is_relative_to(place):
                reason = ANOTHER_NAME
            elif path.is_file() or path.is_dir():
                names += [shown] if path.is_file() else []
                if path.is_dir() or kind_of(name):  # else a link to it may say of what kind it is
                    seen.add(place)
                continue
            else:
                reason = OTHER_KIND
            left_out[reason].append(shown)
            if name in folders:
                folders.remove(name)
        folders.sort()
    return names


def walk_order(name: str) -> list[tuple[bool, str]]:
    """Sorts key by which names come as `walk` finds them: a folder's files before its folders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def find_data(names: list[str], left_out: Found) -> dict[str, str]:
    """Returns the kinds of the data files among `names`, by name; all else goes to `left_out`."""
    taken, everything = {}, {*names, *left_out[ANOTHER_NAME]}
    for name in names:
        path, kind = PurePosixPath(name), kind_of(name)
        stem = path.name.lower().partition(kind)[0] if kind else path.stem.lower()
        if is_hidden(name):
            left_out[HIDDEN].append(name)
        elif NOTES.fullmatch(stem) or SETTINGS.fullmatch(path.name.lower()):
            left_out["notes by their name"].append(name)
        elif not kind:
            left_out[OTHER_KIND].append(name)
        elif path.suffix.lower() in PACKED and name.removesuffix(path.suffix) in everything:
            left_out["compressed copies"].append(name)
        else:
            taken[name] = kind
    if {*taken.values()} - {".txt"}:
        left_out[LEFT_OUT_TEXTS] += [name for name, kind in taken.items() if kind == ".txt"]
        taken = {name: kind for name, kind in taken.items() if kind != ".txt"}
    return taken


def find_files(names: list[str], left_out: Found, below: str = "") -> Found:
    """Returns the data files below a folder by split, as their names say it."""
    found, inside, outside = defaultdict(list), [], left_out[f"outside of {below}"]
    for name in names:
        is_inside = PurePosixPath(name).is_relative_to(below)
        (inside if is_inside else outside).append(name)
    for name, kind in find_data(inside, left_out).items():
        *folders, file = PurePosixPath(name).relative_to(below).parts
        found[split_of(file[: file.lower().rindex(kind)], folders)].append(name)
    return found


def read_configs(files: Files) -> dict[str, dict]:
    """Returns the subsets by name that the head of a README.md declares, where it does."""
    if "README.md" not in files.names:
        return {}
    from huggingface_hub import metadata_load

    path = files.get("README.md")
    try:
        head = metadata_load(path) or {}
        configs = {str(config["config_name"]): config for config in head.get("configs") or []}
        declared = any("data_files" in c or "data_dir" in c for c in configs.values())
    except Exception as error:  # no YAML, or another's: without the word it is just a README
        if re.search(rb"^configs:", path.read_bytes(), re.MULTILINE):
            raise InputError(UNKNOWN_README.format(files.place)) from error
        return {}
    return configs if declared else {}


def match_files(names: list[str], pattern: str) -> list[str]:
    """Returns the names that a pattern of a README.md stands for."""
    pattern = posixpath.normpath(pattern)
    if pattern in names:
        return [pattern]
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    parts = [
        part if part.startswith("[") else WILDCARDS.get(part, re.escape(part)) for part in parts
    ]
    matches = re.compile("".join(parts).replace("[!", "[^")).fullmatch
    return [name for name in names if matches(name) and name != "README.md"]


def declared_files(files: Files, config: dict) -> Iterator[tuple[str, list[str]]]:
    """Yields (split, its files) as a subset of the README.md declares them."""
    declared, folder = config["data_files"], config.get("data_dir") or ""
    if isinstance(declared, dict):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    elif isinstance(declared, str) or isinstance(declared[0], str):
        declared = [{"split": "train", "path": declared}]
    for part in declared:
        for path in [part["path"]] if isinstance(part["path"], str) else part["path"]:
            matches = match_files(files.names, posixpath.join(folder, path))
            if not matches:
                raise InputError(f"{files.place}/README.md declares {path}: there is no such file")
            yield split_of(str(part["split"])), [*find_data(matches, defaultdict(list))] or matches


def find_declared(files: Files, configs: dict[str, dict], subset: str | None) -> Found:
    """Returns the files by split of a subset that is declared, the default one if none is named."""
    default = [name for name, c in configs.items() if c.get("default") or name == "default"]
    name = subset or (default or [*configs])[0]
    if name not in configs or not (subset or default or len(configs) == 1):
        listed = "no subsets in its README.md: leave out --subset"
        if configs:
            listed = f"the subsets {shorten(', '.join(configs))}: pass --subset with one"
        raise InputError(f"{files.place} has {listed}")
    config, found, readme = configs[name], defaultdict(list), f"{files.place}/README.md"
    try:
        if config.get("data_files") is None:
            below = posixpath.normpath(config.get("data_dir") or "")
            return find_files(files.names, files.left_out, below)
        for split, names in declared_files(files, config):
            found[split] += names
    except (AttributeError, IndexError, KeyError, TypeError, re.error) as error:
        raise InputError(UNKNOWN_README.format(files.place)) from error
    every = Counter(chain.from_iterable(found.values()))
    for name, times in every.items():
        if times > 1:
            raise InputError(f"{readme} declares {name} twice: leave it in one split")
        if not kind_of(name):
            raise InputError(f"{readme} declares {name}, of no kind this script reads")
    for name in files.names:
        if name not in every and name != "README.md":
            reason = HIDDEN if is_hidden(name) else "not declared in README.md"
            files.left_out[reason].append(name)
    return found


def list_left_out(left_out: Found) -> str:
    """Says in one line what was not read, and why."""
    parts = []
    for reason, names in left_out.items():
        more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
        parts += [f"{reason}: {shorten(', '.join(names[:4]), 100)}{more}"] if names else []
    return shorten("; ".join(parts), 480)
