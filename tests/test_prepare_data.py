import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hub_server import Fault, Hub, Repo

from prepare_data import encode_in_parallel, encode_stories, split_batches, start_workers
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


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_every_file_type_holds_out_a_share_and_loses_nothing(kind, script, tmp_path):
    path = write(tmp_path, kind, STORIES)
    flags = ("--dataset", path, "--data_dir", tmp_path / "out", "--validation_fraction", 0.1)
    result = script("prepare_data.py", *flags, "--num_proc", 2)
    assert result.code == 0, result.output
    train, validation = read(tmp_path / "out", "train"), read(tmp_path / "out", "validation")
    held_out = stories_of(validation)
    expected = [s for s in STORIES if s not in held_out]
    assert len(held_out) == 30 and "<|endoftext|>" not in "".join(held_out[:1])
    assert train == naive(expected)
    assert sorted(expected + held_out) == sorted(STORIES)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] == len(train)
    assert meta["splits"]["train"]["stories"] == 270
    assert meta["splits"]["validation"]["bytes"] == sum(len(s.encode()) for s in held_out)
    assert (meta["vocab_size"], meta["end_of_text"]) == (50257, 50256)


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
            },
        )
        environment = hub.environment(tmp_path / "hf")
        hub.faults = [Fault("GET .*train-00000", "cut")]
        result = script("prepare_data.py", "--data_dir", tmp_path / "out", **environment)
        assert result.code == 0, result.output
        assert hub.faults[0].times == 0  # cut in the middle, and downloaded to its end
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


def test_a_folder_of_text_files_has_tinystories_layout(script, tmp_path):
    folder = tmp_path / "txt"
    folder.mkdir()
    (folder / "TinyStories-train.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    (folder / "TinyStories-valid.txt").write_text("Three.\n<|endoftext|>\n")
    result = script("prepare_data.py", "--dataset", folder, "--data_dir", tmp_path / "out")
    assert result.code == 0, result.output
    assert read(tmp_path / "out", "train") == naive(["One.", "Two."])
    assert read(tmp_path / "out", "validation") == naive(["Three."])


def test_output_does_not_depend_on_the_number_of_processes(script, tmp_path):
    files = []
    for num_proc in (1, 3):
        out = tmp_path / str(num_proc)
        flags = ("--dataset", "sample", "--vocab_size", 512, "--num_proc", num_proc)
        assert script("prepare_data.py", *flags, "--data_dir", out).code == 0
        files.append([(out / n).read_bytes() for n in ("train.bin", "validation.bin", "meta.json")])
    assert files[0] == files[1]


@pytest.mark.parametrize("splits", [["train"], ["train", "validation"]])
def test_stories_are_read_only_a_little_ahead_of_those_written(splits):
    read = 0

    def batches():
        nonlocal read
        for _ in range(30):
            read += 1000
            yield ["A."] * 1000

    written, ahead = 0, []
    with start_workers(1, 300) as pool:
        stories = split_batches({split: batches() for split in splits}, 0.01, seed=0)
        for _, count, (ids, kept, _) in encode_in_parallel(stories, pool, 300, num_proc=1):
            assert count == kept == len(ids) / 3
            ahead.append(read - written)
            written += count
    assert written == read == 30_000 * len(splits)
    assert max(ahead) <= 5_000


@pytest.mark.parametrize("spelled", ["", "<|endoftext|>", "a <|endoftext|>b", "<|endoftext|"])
def test_stories_that_spell_end_of_text_are_encoded_as_text(spelled):
    stories = ["One.", spelled, "|>", "endoftext|> two", None, "three <"]
    kept = [story for story in stories if story]
    ids, count, num_bytes = encode_stories(stories, 50257)
    assert ids.tolist() == naive(kept) and ids.dtype == "<u2"
    assert (count, num_bytes) == (len(kept), sum(len(story.encode()) for story in kept))


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    ids, count, num_bytes = encode_stories(["a \ud800 b"], 50257)
    assert load_tokenizer().decode(ids[:-1].tolist()) == "a \ufffd b"
    assert (count, num_bytes) == (1, len("a \ufffd b".encode()))


def test_mistakes_are_named_and_leave_the_old_files(fails, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old = {"train.bin": b"old", "validation.bin": b"old", "meta.json": b"old"}
    for name, content in old.items():
        (out / name).write_bytes(content)
    table = write(tmp_path, "parquet", STORIES)
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n\n")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "notes.doc").write_text("hm")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    for flags, says, environment in (
        (["--dataset", table, "--text_column", "body"], "has no column 'body'", {}),
        (["--dataset", tmp_path / "empty.txt"], "has no stories for the train split", {}),
        (["--dataset", tmp_path / "latin.txt"], "is not UTF-8", {}),
        (["--dataset", tmp_path / "broken.jsonl"], "cannot", {}),
        (["--dataset", tmp_path / "broken.parquet"], "cannot", {}),
        (["--dataset", tmp_path / "notes.doc"], "is of no kind this script reads", {}),
        (["--dataset", tmp_path / "missing.txt"], "there is no file or folder", {}),
        (["--dataset", "no such name"], "neither a file, a folder nor", closed),
        ([], "--dataset builtin", closed),
        (["--vocab_size", 70_000], "pass --vocab_size with 257 to 50257", {}),
        (["--dataset", "sample", "--validation_fraction", 1], "not between 0 and 1", {}),
        (["--dataset", "sample", "--num_proc", 0], "num_proc 0 is below 1", {}),
    ):
        fails("prepare_data.py", *flags, "--data_dir", out, says=says, **environment)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == old, flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_the_old_files(number, script, tmp_path):
    stories, tmp_path = tmp_path / "stories.txt", tmp_path / "data"
    tmp_path.mkdir()
    (tmp_path / "meta.json").write_text("old")
    stories.write_text(("Tom had a red kite. " * 50 + "\n<|endoftext|>\n") * 100_000)  # for seconds
    process = script.start("prepare_data.py", "--dataset", stories, "--data_dir", tmp_path)
    while not list(tmp_path.glob(".prepare-*/train.bin")):
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(30)
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
def test_memory_does_not_grow_with_the_stories(tmp_path):
    code = "import prepare_data; prepare_data.main(); print(open('/proc/self/status').read())"
    story = "One day, a cat named Tom saw a big red ball in the park. " * 18  # 1 kB
    peaks = []
    for number in (5_000, 100_000):
        path, out = tmp_path / f"{number}.parquet", tmp_path / str(number)
        with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
            for _ in range(number // 1_000):
                writer.write_table(pa.table({"text": [story] * 1_000}))
        command = [sys.executable, "-c", code, "--dataset", path, "--data_dir", out]
        status = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status.stdout)[1]) / 1_000)
    assert peaks[1] < peaks[0] + 50  # MB, of 100 MB of stories
