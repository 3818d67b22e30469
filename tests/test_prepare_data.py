import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub_server import Fault, Hub, Repo

import prepare_data
from config import InputError
from prepare_data import (
    LONG_WHITE_SPACE,
    Encoded,
    batched,
    copy_stories,
    encode_in_parallel,
    encode_stories,
    encode_text,
    find_duplicates,
    hold_out,
    kept_stories,
    start_workers,
)
from storygpt.token_files import SplitWriter
from storygpt.tokenizer import load_tokenizer

STORIES = [f"Story {i} is about a cat.\n\nIt has {i} tails — and a hat." for i in range(300)]
STORIES[7] = "It said <|endoftext|> aloud. 👩‍👩‍👧‍👦"


def naive(stories: list[str], vocab_size: int = 50257) -> list[int]:
    tokenizer = load_tokenizer(vocab_size)
    return [t for s in stories for t in [*tokenizer.encode_ordinary(s), vocab_size - 1]]


def read(folder, split: str) -> list[int]:
    return np.fromfile(folder / f"{split}.bin", dtype="<u2").tolist()


def stories_of(ids: list[int], vocab_size: int = 50257) -> list[str]:
    text = load_tokenizer(vocab_size).decode(ids).split("<|endoftext|>")
    assert text.pop() == ""
    return text


def write(folder, kind: str, stories: list[str]):
    path = folder / f"stories.{kind}"
    if kind == "txt":
        path.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": s}) + "\n" for s in stories))
    elif kind == "csv":
        rows = "".join('"{}"\n'.format(s.replace('"', '""')) for s in stories)
        path.write_text("text\n" + rows, encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": stories, "title": stories}), path)
    return path


@pytest.fixture
def prepared(monkeypatch, capsys):
    """prepared(dataset, folder, **flags) is what prepare_data.py prints, without the seconds that
    its worker processes take to start: threads encode. Raises as it does."""

    def run(dataset, folder, **flags) -> str:
        flags = {"dataset": str(dataset), "data_dir": folder, "num_proc": 2} | flags

        @contextmanager
        def threads(num_proc: int, vocab_size: int):
            assert num_proc == flags["num_proc"]
            with ThreadPoolExecutor(num_proc) as pool:
                yield pool

        monkeypatch.setattr(prepare_data, "start_workers", threads)
        capsys.readouterr()
        prepare_data.prepare(prepare_data.Arguments(**flags))
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_every_file_type_holds_out_a_share_and_loses_nothing(kind, prepared, tmp_path):
    stories = [s for s in STORIES if kind != "txt" or "<|endoftext|>" not in s]
    path = write(tmp_path, kind, stories)
    out = tmp_path / "new" / "out"
    prepared(path, out, validation_fraction=0.1, seed=len(kind))
    train, validation = read(out, "train"), read(out, "validation")
    held_out = stories_of(validation)
    drawn = np.flatnonzero(hold_out(len(stories), 0.1, len(kind), ""))
    assert len(held_out) == 30 and held_out == [stories[i] for i in drawn]
    assert validation == naive(held_out)
    assert train == naive([s for s in stories if s not in held_out])
    meta = json.loads((out / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] == len(train)
    assert meta["splits"]["train"]["stories"] == len(stories) - 30
    assert meta["splits"]["validation"]["bytes"] == sum(len(s.encode()) for s in held_out)
    assert (meta["vocab_size"], meta["end_of_text"]) == (50257, 50256)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stories", [["A.", "B."], ["", "A.", "  ", None, "B.", "", "C."]])
def test_empty_stories_are_never_the_ones_held_out(stories, seed, prepared, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    said = prepared(path, tmp_path / "out", seed=seed)
    train, validation = (stories_of(read(tmp_path / "out", s)) for s in ("train", "validation"))
    assert (
        len(validation) == 1 and sorted(train + validation) == ["A.", "B.", "C."][: len(train) + 1]
    )
    assert f"{len(stories) - len(train) - 1} empty stories skipped" in said


def test_no_more_stories_are_read_than_are_taken_and_empty_ones_do_not_count():
    stories, skipped = iter(["", "A.", None, "\ufeffB.", "C.", " "]), Counter()
    assert [*kept_stories(stories, 2, skipped)] == ["A.", "B."] and skipped["empty"] == 2
    assert [*stories] == ["C.", " "]


@pytest.mark.parametrize(("number", "fraction", "held_out"), [
    (2, 0.01, 1), (3, 0.9, 2), (1000, 0.01, 10), (150, 0.01, 2), (10, 0.5, 5),
    (30_000, 0.001, 30), (2_000_000, 1e-6, 2), (1000, 1e-12, 1), (1000, 0.9999, 999),
])  # fmt: skip
def test_the_share_held_out_is_exact(number, fraction, held_out):
    drawn = [hold_out(number, fraction, seed, "x") for seed in range(5)]
    assert [d.sum() for d in drawn] == [held_out] * 5
    assert number == 2 or len({d.tobytes() for d in drawn}) > 1
    assert (hold_out(number, fraction, 3, "x") == drawn[3]).all()


def test_long_runs_of_stories_are_copied_whole(tmp_path):
    """Longer than what is read at once, with gaps before, between and behind."""
    rng = np.random.default_rng(0)
    lengths = np.full(3_500, 1_000, np.uint32)
    ids = rng.integers(50_000, size=(3_500, 1_000)).astype("<u2")
    ids.tofile(tmp_path / "all.ids")
    keep = np.ones(3_500, bool)
    keep[[0, 2_500, 2_501, 3_499]] = False  # runs of 2,499 and 997 stories
    sizes = rng.integers(1, 5_000, 3_500).astype(np.uint32)
    encoded = Encoded(ids[:0].ravel(), lengths, sizes, np.empty((3_500, 2), np.uint64))
    writer = SplitWriter(tmp_path / "train.bin")
    with open(tmp_path / "all.ids", "rb") as file:
        copy_stories(file, encoded, keep, writer)
    counts = writer.close()
    assert np.array_equal(np.fromfile(tmp_path / "train.bin", "<u2"), ids[keep].ravel())
    assert (counts["stories"], counts["tokens"]) == (3_496, 3_496_000)
    assert counts["bytes"] == sizes[keep].sum()


def test_splits_are_taken_as_found_and_empty_stories_counted(script, tmp_path):
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    train, validation = ["A.", "", None, "  \n ", "B."], ["C."]
    pq.write_table(pa.table({"story": train[:3]}), data / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"story": train[3:]}), data / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"story": validation}), data / "validation-00000-of-00001.parquet")
    flags = ("--dataset", tmp_path / "set", "--data_dir", tmp_path / "out", "--vocab_size", 300)
    result = script("prepare_data.py", *flags, "--text_column", "story")
    assert result.code == 0, result.output
    assert read(tmp_path / "out", "train") == naive(["A.", "B."], 300)
    assert read(tmp_path / "out", "validation") == naive(["C."], 300)
    assert "3 empty stories skipped" in result.output


def test_the_default_data_set_comes_from_the_hub(script, fails, tmp_path):
    def parquet(stories: list[str]) -> bytes:
        pq.write_table(pa.table({"text": stories}), file := io.BytesIO())
        return file.getvalue()

    with Hub() as hub:
        hub.add(
            "datasets/roneneldan/TinyStories",
            {
                "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
                "data/train-00000-of-00002.parquet": parquet(STORIES[:100]),
                "data/train-00001-of-00002.parquet": parquet(STORIES[100:200]),
                "data/validation-00000-of-00001.parquet": parquet(STORIES[200:]),
                "data/test-00000-of-00001.parquet": parquet(["Not read."]),
            },
        )
        environment = hub.environment(tmp_path / "hf")
        hub.faults = [Fault("GET .*train-00000", "cut")]
        result = script("prepare_data.py", "--data_dir", tmp_path / "out", **environment)
        assert result.code == 0, result.output
        assert hub.faults[0].times == 0  # cut in the middle, and downloaded to its end
        assert "not read: test, as there is validation: test" in result.output
        assert read(tmp_path / "out", "train") == naive(STORIES[:200])
        assert read(tmp_path / "out", "validation") == naive(STORIES[200:])
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        assert meta["dataset"] == "roneneldan/TinyStories"
        hub.repos["datasets/you/private"] = Repo(private=True)
        nobody = environment | {"HF_TOKEN": ""}
        flags = ("--dataset", "you/private", "--data_dir", tmp_path / "other")
        fails("prepare_data.py", *flags, says="does not give out you/private (HTTP 401)", **nobody)

    # From here on without a network: what was downloaded is enough.
    result = script("prepare_data.py", "--data_dir", tmp_path / "again", **environment)
    assert result.code == 0, result.output
    assert read(tmp_path / "again", "train") == naive(STORIES[:200])


def shard(tag: str, number: int = 500) -> bytes:
    rng = random.Random(tag)  # that packs badly, so that a shard is longer than one request
    table = pa.table({"text": [f"{tag} {i}: {rng.randbytes(60).hex()}" for i in range(number)]})
    pq.write_table(table, file := io.BytesIO())
    return file.getvalue()


def test_subsets_revisions_and_parts_of_a_data_set_on_the_hub(script, fails, tmp_path):
    head = """configs:
- config_name: en
  default: true
  data_files: en/train-*
- config_name: fr
  data_files:
  - split: train
    path: fr/train-*
  - split: test
    path: fr/test-*
"""
    files = {f"en/train-{i:05}-of-00008.parquet": shard(f"en{i}") for i in range(8)}
    files |= {
        "fr/train-00000-of-00001.parquet": shard("fr", 20),
        "README.md": f"---\n{head}---\n".encode(),
    }
    files |= {"fr/test-00000-of-00001.parquet": shard("test", 10)}
    with Hub() as hub:
        repo = hub.add("datasets/you/stories", files)
        first = repo.sha()
        repo.commits.append(files | {"en/train-00000-of-00008.parquet": shard("new")})
        hub.add("datasets/you/text", {"train.txt": b"One.\n\nEnd.\n<|endoftext|>\nTwo.\n"})

        def prepared(out: str, *flags, **environment) -> tuple[dict, list[str], set[str]]:
            """meta.json, the train stories, and the files that were fetched in part or whole."""
            hub.requests.clear()
            flags = ("--dataset", "you/stories", "--data_dir", tmp_path / out, *flags)
            environment = hub.environment(tmp_path / out) | environment
            result = script("prepare_data.py", *flags, "--num_proc", 1, **environment)
            assert result.code == 0, result.output
            meta = json.loads((tmp_path / out / "meta.json").read_text())
            got = {r.rpartition("/")[2] for r in hub.requests if "GET" in r and ".parquet" in r}
            return meta, stories_of(read(tmp_path / out, "train")), got

        meta, train, fetched = prepared("part", "--max_stories", 100)
        assert fetched == {"train-00000-of-00008.parquet"}
        assert len(train) == 99 and train[0].startswith("new")
        assert (meta["revision"], meta["subset"]) == (repo.sha(), None)

        meta, train, fetched = prepared("old", "--max_stories", 300, "--revision", first)
        assert fetched == {"train-00000-of-00008.parquet"}
        assert len(train) == 297 and train[0].startswith("en0") and meta["revision"] == first

        meta, train, fetched = prepared("fr", "--subset", "fr")
        assert fetched == {"train-00000-of-00001.parquet", "test-00000-of-00001.parquet"}
        assert len(train) == 20 and meta["splits"]["validation"]["stories"] == 10
        assert (meta["revision"], meta["subset"]) == (repo.sha(), "fr")

        flags = ("--dataset", "you/stories", "--data_dir", tmp_path / "fr")
        before = {p.name: p.read_bytes() for p in (tmp_path / "fr").glob("*.*")}
        environment = hub.environment(tmp_path / "fr")
        fails(
            "prepare_data.py",
            *flags,
            "--subset",
            "it",
            says="Available: ['en', 'fr']",
            **environment,
        )
        fails(
            "prepare_data.py",
            *flags,
            "--revision",
            "gone",
            says="no revision 'gone'",
            **environment,
        )
        text = ("--dataset", "you/text", "--data_dir", tmp_path / "fr", "--num_proc", 1)
        fails("prepare_data.py", *text, says="run `hf download you/text --repo-type", **environment)
        hub.faults = [Fault("GET .*train-00005", 404, times=99)]  # one of its shards is gone
        fails("prepare_data.py", *flags, says="cannot load you/stories", **environment)
        assert {p.name: p.read_bytes() for p in (tmp_path / "fr").glob("*.*")} == before

    # Without a network, what was downloaded of that commit, and of no other.
    flags = ("--dataset", "you/stories", "--subset", "fr", "--data_dir", tmp_path / "again")
    assert script("prepare_data.py", *flags, **environment).code == 0
    assert json.loads((tmp_path / "again" / "meta.json").read_text())["revision"] == repo.sha()
    fails("prepare_data.py", *flags, "--revision", first, says="cannot be reached", **environment)


def test_duplicates_are_counted_and_dropped_where_asked(prepared, tmp_path):
    train, validation = ["A.", "B.", "A.", "C.", "B.", "A. "], ["B.", "D.", "B."]
    for split, stories in (("train", train), ("dev", validation)):
        rows = "".join(json.dumps({"text": story}) + "\n" for story in stories)
        (tmp_path / f"{split}.jsonl").write_text(rows)
    for deduplicate, left in ((False, train), (True, ["A.", "C.", "A. "])):
        said = prepared(tmp_path, tmp_path / "out", deduplicate=deduplicate)
        assert stories_of(read(tmp_path / "out", "train")) == left
        assert stories_of(read(tmp_path / "out", "validation")) == validation
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        assert meta["duplicates"] == {"in train": 2, "validation in train": 2}
        assert meta["splits"]["train"]["stories"] == len(left)
        assert meta["splits"]["train"]["bytes"] == sum(map(len, left))
        assert "2 train stories repeat another, 2 validation stories are in train" in said
        assert ("dropped from train" in said) == deduplicate
        ids = [token for split in meta["splits"] for token in read(tmp_path / "out", split)]
        size = sum(map(len, [*left, *validation])) / len(ids)
        assert f"{size:.2f} bytes a token, {len({*ids})} distinct ids" in said
    (tmp_path / "train.jsonl").write_text('{"text": "D."}\n')
    with pytest.raises(InputError, match="leave out --deduplicate"):
        prepared(tmp_path, tmp_path / "out", deduplicate=True)


def test_duplicates_agree_with_sets_of_the_stories_themselves():
    rng = random.Random(0)
    for sizes in ((0, 5), (5, 0), (40, 7), (300, 300)):
        train, validation = (
            [str(rng.randrange(1 + sum(sizes) // 2)) for _ in range(n)] for n in sizes
        )
        keep, repeated, in_train = find_duplicates(
            *(encode_stories(stories, 300).hashes for stories in (train, validation))
        )
        firsts = [s not in train[:i] and s not in validation for i, s in enumerate(train)]
        assert keep.tolist() == firsts
        assert repeated == len(train) - len(set(train))
        assert in_train == sum(story in set(train) for story in validation)


def test_what_was_not_read_is_said_in_one_line(prepared, tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "A."}\n')
    for name in ("LICENSE.txt", "old.txt", "x.zip"):
        (tmp_path / name).write_text("B.")
    said = prepared(tmp_path, tmp_path / "out")
    (line,) = [line for line in said.splitlines() if line.startswith("not read: ")]
    for name in ("test.jsonl", "LICENSE.txt", "old.txt", "x.zip"):
        assert name in line


def test_output_does_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(prepare_data, "BATCH", 10)
    with start_workers(3, 512) as pool:
        parts = [*encode_in_parallel(batched(STORIES), pool, 512, num_proc=3)]
    assert len(parts) == 30
    assert np.concatenate([part.ids for part in parts]).tolist() == naive(STORIES, 512)
    assert [len(batch) for batch in batched(["x" * 2**18] * 10)] == [4, 4, 2]  # by characters


def test_stories_are_read_only_a_little_ahead_of_those_written():
    read = 0

    def stories(number: int, size: int):
        nonlocal read
        for _ in range(number):
            read += size
            yield (" responsibility" * size)[:size]  # few tokens for its length

    with start_workers(1, 300) as pool:
        for number, size, most in ((30_000, 2, 10_000), (300, 2**17, 5 * 2**20)):
            read, written, ahead = 0, 0, []
            for part in encode_in_parallel(batched(stories(number, size)), pool, 300, num_proc=1):
                ahead.append(read - written)
                written += int(part.bytes.sum())
                assert len(part.tokens) == len(part.hashes) == (part.ids == 299).sum()
            assert written == read == number * size
            assert max(ahead) <= most


@pytest.mark.parametrize("spelled", ["", "<|endoftext|>", "a <|endoftext|>b", "<|endoftext|"])
def test_stories_that_spell_end_of_text_are_encoded_as_text(spelled):
    stories = ["One.", spelled, "|>", "endoftext|> two", None, "three <"]
    kept = [story for story in stories if story]
    encoded = encode_stories(kept, 50257)
    assert encoded.ids.tolist() == naive(kept) and encoded.ids.dtype == "<u2"
    assert encoded.tokens.tolist() == [len(naive([story])) for story in kept]
    assert encoded.bytes.tolist() == [len(story.encode()) for story in kept]
    assert len({tuple(pair) for pair in encoded.hashes.tolist()}) == len(set(kept))


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    encoded = encode_stories(["a \ud800 b", "\ud83d\ude00"], 50257)
    assert stories_of(encoded.ids.tolist()) == ["a \ufffd b", "😀"]
    assert encoded.bytes.tolist() == [len("a \ufffd b".encode()), 4]


WHITE = " \t\n\v\f\r\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"


@pytest.mark.parametrize("before", ["", "a", "a\x1c", "!"])
@pytest.mark.parametrize("after", ["", "b", "\x1d", " ", "'s", "\n", "7"])
def test_white_space_is_cut_where_the_pattern_cuts_it(before, after):
    tokenizer, rng = load_tokenizer(), random.Random(0)
    for length in (999, 1000, 1001, 5000):
        text = before + "".join(rng.choices(WHITE, k=length)) + after + " end. " + " " * length
        pieces = [text[m.start() : m.end()] for m in LONG_WHITE_SPACE.finditer(text)]
        # the blanks between, of which the last leads the word behind, and those at the end
        between = length + (after in ("", " ", "\n")) + (after in (" ", "\n"))
        assert list(map(len, pieces)) == [between - 1] * (between > 1000) + [length + 1] * (
            length >= 999
        )
        refuses = Refusing(tokenizer, len(text))
        assert encode_text(text, refuses).tolist() == tokenizer.encode_ordinary(text)


class Refusing:
    """A tokenizer that gives up on text of one length, as tiktoken does at a million spaces."""

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def encode_to_numpy(self, text: str, **keywords) -> np.ndarray:
        if len(text) == self.length:
            raise ValueError("Max stack size exceeded for backtracking")
        return self.tokenizer.encode_to_numpy(text, **keywords)


def test_a_million_spaces_are_encoded_rightly():
    space = " " * 10**6
    stories = ["Tom", f"Once{space}upon\n", "a time", f"{space}x{space}"]
    encoded = encode_stories(stories, 50257)
    assert encoded.tokens.sum() == len(encoded.ids) and len(encoded.tokens) == 4
    assert stories_of(encoded.ids.tolist()) == stories
    piece = load_tokenizer().encode_ordinary(space[1:])  # all but the space that belongs to "upon"
    words = [load_tokenizer().encode_ordinary(word) for word in ("Once", " upon\n")]
    start = len(naive(stories[:1]))
    assert encoded.ids[start : start + encoded.tokens[1]].tolist() == [
        *words[0],
        *piece,
        *words[1],
        50256,
    ]


def test_what_cannot_be_encoded_is_one_sentence():
    with pytest.raises(
        InputError, match="the story that begins 'Once upon' cannot be encoded: Max"
    ):
        encode_text("Once upon", Refusing(load_tokenizer(), len("Once upon")))
    with (
        pytest.raises(InputError, match="pass a smaller --num_proc"),
        start_workers(1, 300) as pool,
    ):
        with pytest.raises(InputError, match="a worker failed to encode"):
            list(encode_in_parallel([[None]], pool, 300, 1))
        for worker in active_children():
            worker.kill()  # as Linux does where memory runs out
        list(encode_in_parallel([["A."]] * 3, pool, 300, 1))


def test_mistakes_are_named_and_leave_the_old_files(prepared, fails, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old = {"train.bin": b"old", "validation.bin": b"old", "meta.json": b"old"}
    for name, content in old.items():
        (out / name).write_bytes(content)
    table = write(tmp_path, "parquet", STORIES)
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n\n")
    (tmp_path / "one.txt").write_text("One story.\n\nWith two paragraphs.\n")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "notes.doc").write_text("hm")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}

    def check(says: str, **flags) -> None:
        with pytest.raises(InputError, match=re.escape(says)):
            prepared(flags.pop("dataset", "builtin"), out, **flags)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == old, flags

    for dataset, says in (
        (tmp_path / "empty.txt", "has no stories for the train split"),
        (tmp_path / "one.txt", "one story alone"),
        (tmp_path / "latin.txt", "is not UTF-8"),
        (tmp_path / "broken.jsonl", "row 2 is not JSON"),
        (tmp_path / "broken.parquet", "cannot"),
        (tmp_path / "notes.doc", "is of no kind this script reads"),
        (tmp_path / "missing.txt", "there is no file or folder"),
    ):
        check(says, dataset=dataset)
    check("has no column 'body'", dataset=table, text_column="body")
    check("one story alone", dataset=table, max_stories=1)
    check("max_stories must be a whole number of at least 1, not 0", max_stories=0)
    check("not between 0 and 1", validation_fraction=math.nan)
    check("not between 0 and 1", validation_fraction=1)
    check("leave out --subset", dataset=table, subset="en")
    check("pass --vocab_size with 257 to 50257", vocab_size=70_000)
    check("num_proc must be a whole number of at least 1, not 0", num_proc=0)
    check("num_proc 1000000 is over 1000", num_proc=1_000_000)
    check("seed must be a whole number of at least 0, not -1", seed=-1)
    with pytest.raises(InputError, match=r"cannot be written .* pass another --data_dir"):
        prepared("builtin", out / "meta.json", max_stories=50)
    for flags, says in (
        (["--dataset", "~/no/such/folder"], "neither a file, a folder nor"),
        ([], "--dataset builtin"),
    ):
        fails("prepare_data.py", *flags, "--num_proc", 1, "--data_dir", out, says=says, **closed)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == old, flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_run_leaves_the_old_files(number, script, fails, tmp_path):
    stories, tmp_path = tmp_path / "stories.txt", tmp_path / "data"
    tmp_path.mkdir()
    (tmp_path / "meta.json").write_text("old")
    stories.write_text(("Tom had a red kite. " * 50 + "\n<|endoftext|>\n") * 40_000)  # for seconds
    process = script.start("prepare_data.py", "--dataset", stories, "--data_dir", tmp_path)
    while not list(tmp_path.glob(".prepare-*/train.ids")):
        assert process.is_alive()
        time.sleep(0.001)
    if number == signal.SIGKILL:  # until then nobody else writes there
        flags = ["--dataset", "builtin", "--num_proc", 1, "--data_dir", tmp_path]
        fails("prepare_data.py", *flags, says="another process is writing to")
        assert process.is_alive()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if number == signal.SIGINT and workers.exists():  # a terminal sends it to all of them
        for worker in map(int, workers.read_text().split()):
            os.kill(worker, number)
    os.kill(process.pid, number)
    process.join(30)
    if number == signal.SIGKILL:  # what it left is swept up by the next run
        assert (tmp_path / "meta.json").read_text() == "old"
        stories.write_text("A.<|endoftext|>B.")
        assert script("prepare_data.py", "--dataset", stories, "--data_dir", tmp_path).code == 0
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"meta.json", "train.bin", "validation.bin"}
        return
    assert process.exitcode == 128 + number
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("meta.json", "old")]
    assert "Traceback" not in process.output.read_text()


def test_real_tinystories(script, tinystories, tmp_path):
    result = script("prepare_data.py", "--dataset", tinystories, "--data_dir", tmp_path)
    assert result.code == 0, result.output
    for split, number in (("train", 3_428_647), ("validation", 117_926)):
        files = sorted((tinystories / "data").glob(f"{split}-*.parquet"))
        stories = [s for f in files for s in pq.read_table(f)["text"].to_pylist()]
        expected = np.array(naive(stories), "<u2")
        assert len(expected) == number
        assert (tmp_path / f"{split}.bin").read_bytes() == expected.tobytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "number", "length", "text"),
    [
        ("parquet", 80_000, 1, " One day, a cat named Tom saw a big red ball in the park."),
        # long words are few tokens, and so the quicker
        ("jsonl", 1_000, 100, " responsibility understanding international communication"),
        ("txt", 1_000, 100, " responsibility understanding international communication"),
    ],
)
def test_memory_grows_neither_with_the_stories_nor_with_their_length(
    kind, number, length, text, tmp_path
):
    code = "import prepare_data; prepare_data.main(); print(open('/proc/self/status').read())"
    story = text * 18  # 1 kB
    peaks = []
    for count, times in ((2_000, 1), (number, length)):  # about 100 MB
        path, out = tmp_path / f"{count}.{kind}", tmp_path / str(count)
        if kind == "parquet":
            with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
                for _ in range(count * times // 1_000):
                    group = pa.table({"text": [story * times] * (1_000 // times)})
                    writer.write_table(group)
        else:
            row = json.dumps({"text": story * times}) + "\n"
            row = row if kind == "jsonl" else story * times + "<|endoftext|>"
            with open(path, "w") as file:
                file.writelines(row for _ in range(count))
        command = [sys.executable, "-c", code, "--dataset", path, "--data_dir", out]
        status = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status.stdout)[1]) / 1_000)
    assert peaks[1] < peaks[0] + 35  # MB
