import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, python
from hub_server import Fault, Hub
from story_files import jsonl, parquet, put

import prepare_data
from config import InputError, PresetName, preset
from prepare_data import (
    batched,
    encode_in_parallel,
    find_duplicates,
    hold_out,
    kept_stories,
    read_ids,
    start_workers,
    submit,
)
from storygpt import cli
from storygpt.encoding import NO_STORIES, encode_stories
from storygpt.token_files import load_meta, load_tokens
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
    """prepared(dataset, data_dir, **flags) is what prepare_data.py prints, without the seconds that
    its worker processes take to start: threads encode. Raises as it does."""

    def run(dataset, data_dir, **flags) -> str:
        flags = {"dataset": str(dataset), "data_dir": data_dir, "num_proc": 2} | flags

        @contextmanager
        def threads(num_proc: int):
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


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_preset_prepares_what_train_wants(name, prepared, fails, tmp_path, monkeypatch):
    """The command that train.py names is run, but on few stories."""
    path, out = put(tmp_path, {"a.jsonl": jsonl(STORIES)}) / "a.jsonl", tmp_path / "out"
    flags = ("--preset", name, "--data_dir", out, "--checkpoint_dir", tmp_path / "run")
    said = fails("train.py", *flags, "--device", "cpu", says="no prepared data")
    python, script, *words = shlex.split(said.split("`")[1])
    assert [python, script, *words[-2:]] == ["python", "prepare_data.py", "--preset", name]
    monkeypatch.setattr("sys.argv", [script, *words, "--dataset", str(path)])
    prepared(**vars(cli.parse_flags(prepare_data.Arguments)))
    assert load_meta(out, None)["vocab_size"] == preset(name)[0].vocab_size
    fails("train.py", *flags, "--device", "cpu", says="too few for one window")


def test_a_vocabulary_that_is_passed_goes_before_the_presets(script, tmp_path):
    put(tmp_path, {"a.jsonl": jsonl(STORIES)})
    flags = ("--dataset", tmp_path / "a.jsonl", "--data_dir", tmp_path / "out", "--num_proc", 1)
    for preset_and_size, size in (((), 50257), (("--preset", "3m", "--vocab_size", 300), 300)):
        assert script("prepare_data.py", *flags, *preset_and_size).code == 0
        assert load_meta(tmp_path / "out", None)["vocab_size"] == size


def test_no_more_stories_are_read_than_are_taken_and_empty_ones_do_not_count():
    stories, skipped = iter(["", "A.", None, "\ufeffB.", "C.", " "]), Counter()
    assert [*islice(kept_stories(stories, skipped), 2)] == ["A.", "B."] and skipped["empty"] == 2
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


def test_long_runs_of_stories_are_read_whole_and_in_parts(tmp_path):
    """Longer than what is read at once, with gaps before, between and behind."""
    rng = np.random.default_rng(0)
    lengths = np.full(3_500, 1_000, np.uint32)
    ids = rng.integers(50_000, size=(3_500, 1_000)).astype("<u2")
    ids.tofile(tmp_path / "all.ids")
    keep = np.ones(3_500, bool)
    keep[[0, 2_500, 2_501, 3_499]] = False  # runs of 2,499 and 997 stories
    encoded = NO_STORIES._replace(tokens=lengths)
    with open(tmp_path / "all.ids", "rb") as file:
        parts = [*read_ids(file, encoded, keep)]
    assert np.array_equal(np.concatenate(parts), ids[keep].ravel())
    assert max(map(len, parts)) < 2_000_000


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
    with Hub() as hub:
        repo = hub.add(
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
        assert f"roneneldan/TinyStories at commit {repo.sha()}" in result.output
        assert "test, as there is validation: data/test-00000-of-00001.parquet" in result.output
        assert read(tmp_path / "out", "train") == naive(STORIES[:200])
        assert read(tmp_path / "out", "validation") == naive(STORIES[200:])
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        assert (meta["dataset"], meta["subset"]) == ("roneneldan/TinyStories", None)
        assert meta["revision"] == repo.sha()
        before = files_in(tmp_path / "out")
        hub.faults = [Fault("HEAD .*train-00001", 404, times=99)]  # one of its shards is gone
        flags = ("--data_dir", tmp_path / "out")
        environment["HF_HOME"] = str(tmp_path / "another")
        fails("prepare_data.py", *flags, says="train-00001-of-00002.parquet of", **environment)
        assert files_in(tmp_path / "out") == before

    # From here on without a network: what was downloaded is enough.
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = script("prepare_data.py", "--data_dir", tmp_path / "again", **environment)
    assert result.code == 0, result.output
    assert files_in(tmp_path / "again") == before
    closed = environment | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "new")}
    fails("prepare_data.py", *flags, says="the cache does not have it whole", **closed)


def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_openings_are_those_of_the_train_stories(prepared, tmp_path):
    begin = ["Once upon a time, there was", "One day, a  little\ngirl went", "It was a “cold” day"]
    train = [f"{begin[0]} {i}." for i in range(50)] + [f"{begin[1]} {i}." for i in range(30)]
    train += [f"Once upon a time {i}." for i in range(11)] + [f"{begin[2]} {i}." for i in range(3)]
    train += ["This one alone is so."] + ["Too short."] * 100
    train += ["Incomprehensibilities notwithstanding, everybody went."] * 5
    for split, stories in (("train", train), ("val", ["Never seen in train."] * 900)):
        put(tmp_path / "in", {f"{split}.jsonl": jsonl(stories)})
    for vocab_size in (300, 50257):
        prepared(tmp_path / "in", tmp_path / "out", vocab_size=vocab_size)
        meta = json.loads((tmp_path / "out" / "meta.json").read_text())
        assert meta["openings"] == [
            ["Once upon a time", round(61 / 97, 4)],
            ["One day, a little", round(30 / 97, 4)],
            ["It was a “cold", round(3 / 97, 4)],
        ]


def test_a_story_that_is_there_three_times_gives_no_opening(prepared, tmp_path):
    """It is one story all the same, and perhaps a private one."""
    stories = [f"{i} begins as no other does, and ends so." for i in range(90)]
    put(tmp_path, {"a.jsonl": jsonl(stories + ["Anna Maria Smith lives at 7 Elm Street."] * 3)})
    prepared(tmp_path / "a.jsonl", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["openings"] == []


def test_openings_are_at_most_five_and_count_what_is_left_of_train(prepared, tmp_path):
    stories = [f"{'abcdefgh'[i % 8]} b c d {i}" for i in range(800)] + ["z b c d 1"] * 200
    put(tmp_path, {"a.jsonl": jsonl(stories)})
    prepared(tmp_path / "a.jsonl", tmp_path / "out", deduplicate=True, seed=3)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    left = stories_of(read(tmp_path / "out", "train"))
    shares = Counter(" ".join(story.split()[:4]) for story in left)
    assert meta["openings"] == [[o, round(n / len(left), 4)] for o, n in shares.most_common(5)]
    assert len({share for _, share in meta["openings"]}) > 1


def test_the_built_in_stories_have_openings(data_dir):
    assert json.loads((data_dir / "meta.json").read_text())["openings"] == [
        ["This is the story", 1]
    ]


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
        hashes = encode_stories(validation + train, 300).hashes
        held_out = np.arange(len(hashes)) < len(validation)
        once, repeated, in_train = find_duplicates(hashes, held_out)
        firsts = [s not in train[:i] and s not in validation for i, s in enumerate(train)]
        assert once.tolist() == [False] * len(validation) + firsts
        assert repeated == len(train) - len(set(train))
        assert in_train == sum(story in set(train) for story in validation)


def test_a_validation_split_of_one_story_is_noted(prepared, tmp_path):
    put(tmp_path / "in", {"train.jsonl": jsonl(["A.", "B."]), "val.jsonl": jsonl(["C."])})
    note = "note: validation is a single story"
    assert note in prepared(tmp_path / "in", tmp_path / "out")
    put(tmp_path / "in", {"val.jsonl": jsonl(["C.", "D."])})
    said = prepared(tmp_path / "in", tmp_path / "out")
    assert note not in said and "train is a single story" not in said
    put(tmp_path / "lines", {"train.txt": "A.\nB.\n", "val.txt": "C.\nD.\n"})
    assert "note: train is a single story" in prepared(tmp_path / "lines", tmp_path / "out")
    (tmp_path / "in" / "val.jsonl").unlink()  # one is held out, which nobody meant
    assert note not in prepared(tmp_path / "in", tmp_path / "out")
    put(tmp_path / "parts", {"1.txt": "A.\nB.\n", "2.txt": "C.\nD.\n"})
    assert "note: train is a single story" in prepared(tmp_path / "parts", tmp_path / "out")


def test_stories_that_keep_a_separator_as_text_are_noted(prepared, tmp_path):
    """As where a .txt was made a table of its lines."""
    rows = ["A.", "<|endoftext|>", "B.", "C.<|endoftext|>D.", "", "E."]
    put(tmp_path, {"a.jsonl": jsonl(rows), "b.txt": "A.<|endoftext|>B."})
    note = "note: stories that hold <|endoftext|> as text"
    assert f"{note}: 2; take it out" in prepared(tmp_path / "a.jsonl", tmp_path / "out")
    assert note not in prepared(tmp_path / "b.txt", tmp_path / "out")


def test_the_command_that_mends_a_folder_makes_the_same_files_again(
    prepared, tmp_path, monkeypatch
):
    rows = "".join(json.dumps({"story": story}) + "\n" for story in STORIES * 2)
    path, out = put(tmp_path, {"a.jsonl": rows}) / "a.jsonl", tmp_path / "out"
    few = {"max_stories": 400, "validation_fraction": 0.1, "seed": 0, "deduplicate": True}
    for flags in ({"text_column": "story"}, {"text_column": "story", "vocab_size": 300} | few):
        prepared(path, out, **flags)
        before = files_in(out)
        (out / "validation.bin").unlink()
        with pytest.raises(InputError) as error:
            load_tokens(out, "validation", load_meta(out, None))
        _, script, *words = shlex.split(str(error.value).split("`")[1])
        monkeypatch.setattr("sys.argv", [script, *words])
        prepared(**vars(cli.parse_flags(prepare_data.Arguments)))
        assert files_in(out) == before and ("--seed" in words) == ("seed" in flags)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_bar_that_cannot_be_shown_ends_nothing(tmp_path):
    """The disk of a log that has filled, or a reader who has left."""
    put(tmp_path, {"a.jsonl": jsonl(["A.", "B."])})
    command = [sys.executable, "prepare_data.py", "--dataset", str(tmp_path / "a.jsonl")]
    command += ["--num_proc", "1", "--data_dir", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0 and b"written to" in done.stdout
    assert load_meta(tmp_path / "out", None)["splits"]["train"]["stories"] == 1


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
    with start_workers(3) as pool:
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

    with start_workers(1) as pool:
        for number, size, most in ((30_000, 2, 10_000), (300, 2**17, 5 * 2**20)):
            read, written, ahead = 0, 0, []
            for part in encode_in_parallel(batched(stories(number, size)), pool, 300, num_proc=1):
                ahead.append(read - written)
                written += int(part.bytes.sum())
                assert len(part.tokens) == len(part.hashes) == (part.ids == 299).sum()
            assert written == read == number * size
            assert max(ahead) <= most


def test_a_worker_that_fails_or_dies_is_one_sentence():
    with pytest.raises(InputError, match="pass a smaller --num_proc"), start_workers(1) as pool:
        with pytest.raises(InputError, match="a worker failed to encode"):
            list(encode_in_parallel([[None]], pool, 300, 1))
        for worker in active_children():
            worker.kill()  # as Linux does where memory runs out
        list(encode_in_parallel([["A."]] * 3, pool, 300, 1))


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing is held back")
def test_a_ctrl_c_while_a_worker_is_started_waits_and_is_not_lost():
    started = []

    class Pool:
        def submit(self, function) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # whatever thread takes it, this one hears of it
            started.append(function)

    done = threading.Event()
    other = threading.Thread(target=done.wait)  # as a progress bar has one
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            submit(Pool(), print)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's `&` starts it
        submit(Pool(), print)
        signal.signal(signal.SIGINT, handler)
    finally:
        done.set()
        other.join()
    assert started == [print, print] and handler is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_no_more_processes_start_than_there_is_work():
    with start_workers(8) as pool:
        (encoded,) = encode_in_parallel([["A."]], pool, 300, 8)
        assert encoded.tokens.tolist() == [3]
        assert len(active_children()) == 1


def test_where_no_process_can_be_had_this_one_encodes(script, tmp_path):
    """Without semaphores, as in a container without /dev/shm; without descriptors for a worker."""
    stories = put(tmp_path, {"a.jsonl": jsonl(STORIES)}) / "a.jsonl"
    run = (
        "import os, resource, sys, multiprocessing.context as context, prepare_data\n"
        "from storygpt import cli\n"
        "def none(*arguments): raise PermissionError(13, 'Permission denied')\n"
        "if sys.argv.pop(1) == 'semaphores': context.SpawnContext.Lock = none\n"
        "else: context.SpawnProcess.start = none\n"
        "cli.run(prepare_data.main)"
    )
    flags = ("--dataset", stories, "--num_proc", "2", "--data_dir")
    done = python("-c", run, "semaphores", *flags, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no worker processes can be had (" in done.stderr
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sum(split["stories"] for split in meta["splits"].values()) == 300
    done = python("-c", run, "processes", *flags, tmp_path / "none")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no more processes can be started (Permission denied): pass a smaller" in done.stderr


def test_num_proc_is_the_cpus_that_may_be_used():
    run = "import os, prepare_data; print(prepare_data.Arguments().num_proc)"
    assert int(python("-c", run).stdout) == min(len(os.sched_getaffinity(0)), 16)
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {run}"
    assert int(python("-c", one).stdout) == 1


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
        (["--dataset", "~/no/such/folder"], "neither a file nor a folder here"),
        ([], "--dataset builtin"),
    ):
        fails("prepare_data.py", *flags, "--num_proc", 1, "--data_dir", out, says=says, **closed)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == old, flags


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
@pytest.mark.parametrize("step", ["a folder", "away", "in"])
def test_the_old_preparation_survives_what_stops_the_last_move(
    step, name, prepared, tmp_path, monkeypatch
):
    """A folder, or a file that nobody may rename: in use (Windows), another user's (a sticky
    directory), a mount of its own; and a new file that cannot be put in its place."""
    put(tmp_path, {"a.jsonl": jsonl(["A.", "B."]), "b.jsonl": jsonl(["C.", "D.", "E."])})
    out = tmp_path / "out"
    prepared(tmp_path / "a.jsonl", out)
    if step == "a folder":
        (out / name).unlink()
        put(out, {f"{name}/x": "x"})
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    replace = os.replace

    def refuse(source, target):
        if Path(source if step == "away" else target) == out / name and (
            step == "away" or not Path(source).name.startswith("old-")
        ):
            raise PermissionError(13, "Permission denied", str(source))
        return replace(source, target)

    if step != "a folder":
        monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(InputError, match=r"cannot be replaced .*, and what was there is kept") as e:
        prepared(tmp_path / "b.jsonl", out)
    assert str(out / name) in str(e.value)
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    shutil.rmtree(out / name, ignore_errors=True)
    if step == "a folder":
        prepared(tmp_path / "b.jsonl", out)
        meta = json.loads((out / "meta.json").read_text())
        assert sum(split["stories"] for split in meta["splits"].values()) == 3


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_run_leaves_the_old_files(number, script, fails, tmp_path):
    stories, tmp_path = tmp_path / "stories.txt", tmp_path / "data"
    tmp_path.mkdir()
    (tmp_path / "meta.json").write_text("old")
    stories.write_text(("Tom had a red kite. " * 50 + "\n<|endoftext|>\n") * 40_000)  # for seconds
    process = script.start("prepare_data.py", "--dataset", stories, "--data_dir", tmp_path)
    while not list(tmp_path.glob(".prepare/stories.ids")):
        assert process.is_alive()
        time.sleep(0.001)
    if number == signal.SIGKILL:  # until then nobody else writes there
        flags = ["--dataset", "builtin", "--num_proc", 1, "--data_dir", tmp_path]
        fails("prepare_data.py", *flags, says="another process is writing to")
        assert process.is_alive()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    started = [*map(int, children.read_text().split())] if children.exists() else []
    if number == signal.SIGINT:  # a terminal sends it to all of them
        for worker in started:
            os.kill(worker, number)
    os.kill(process.pid, number)
    process.join(30)
    until = time.monotonic() + 20
    while any(map(is_running, started)):  # whatever ended their parent
        assert time.monotonic() < until
        time.sleep(0.05)
    if number in (signal.SIGKILL, signal.SIGHUP):  # what it left is swept up by the next run
        assert (tmp_path / "meta.json").read_text() == "old"
        stories.write_text("A.<|endoftext|>B.")
        assert script("prepare_data.py", "--dataset", stories, "--data_dir", tmp_path).code == 0
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"meta.json", "train.bin", "validation.bin"}
        return
    assert process.exitcode == 128 + number
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("meta.json", "old")]
    assert "Traceback" not in process.output.read_text()


def test_real_tinystories(tinystories, real_data):
    for split, number in (("train", 3_428_647), ("validation", 117_926)):
        files = sorted((tinystories / "data").glob(f"{split}-*.parquet"))
        stories = [s for f in files for s in pq.read_table(f)["text"].to_pylist()]
        expected = np.array(naive(stories), "<u2")
        assert len(expected) == number
        assert (real_data / f"{split}.bin").read_bytes() == expected.tobytes()


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
