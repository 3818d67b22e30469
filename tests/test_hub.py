"""What is said to the Hub, on a loopback Hub spoken to by the real client: data sets, and what its
refusals mean. Publishing is in test_upload_to_hf.py."""

import json
import os
import re
from pathlib import Path

import pytest
from hub_server import Fault, Hub, Repo
from story_files import LONG, jsonl, parquet, put, txt

NAME = "you/stories"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "data/train-00000-of-00002.parquet": parquet(LONG[:4]),
    "data/train-00001-of-00002.parquet": parquet(LONG[4:8]),
    "data/validation-00000-of-00001.parquet": parquet(LONG[8:]),
}
SPLITS = {"train": LONG[:8], "validation": LONG[8:]}
OLDER = {
    "README.md": b"---\nlicense: other\n---\n",
    "data/train-00000-of-00001.parquet": parquet(["Old.", "Older."]),
    "data/validation-00000-of-00001.parquet": parquet(["Oldest."]),
}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def reads(script, hub, tmp_path):
    """reads(dataset="you/stories", most=None, cache="hf", subset=..., revision=..., HF_X=...) is
    what open_stories gave, with .requests it made and its .output; its one sentence where it fails.
    """

    class Read(dict):
        requests: list[str]
        output: str

    def run(dataset: str = NAME, most: int | None = None, cache: str = "hf", **keywords):
        environment = {name: keywords.pop(name) for name in [*keywords] if name.startswith("HF_")}
        environment = hub.environment(tmp_path / cache) | environment
        hub.requests.clear()
        flags = (json.dumps({"dataset": dataset} | keywords), json.dumps(most))
        done = script("read_stories.py", *flags, **environment)
        assert "Traceback" not in done.output, done.output
        *said, last = done.output.splitlines()
        found = Read(json.loads(last)) if done.code == 0 else Read(error=last)
        assert done.code == 0 or (last.startswith("error: ") and len(last) <= 500), done.output
        found.requests, found.output = [*hub.requests], "\n".join(said)
        return found

    return run


# --- One commit, and no file twice ---


def test_a_data_set_is_read_at_one_commit_and_each_file_asked_for_once(reads, hub):
    repo = hub.add(f"datasets/{NAME}", FILES)
    asked = requests_for(repo, FILES)
    first = reads()
    assert first["commit"] == repo.sha() and first["splits"] == SPLITS
    assert sorted(first.requests) == sorted(asked)
    again = reads()
    assert again["splits"] == SPLITS and again.requests == asked[:2]
    pinned = reads(revision=repo.sha())
    assert pinned["splits"] == SPLITS and pinned.requests == []


def test_no_more_shards_are_fetched_than_are_read(reads, hub):
    hub.add(f"datasets/{NAME}", FILES)
    found = reads(most=3)
    assert found["splits"] == {"train": LONG[:3], "validation": LONG[8:11]}
    fetched = [r.rpartition("/")[2] for r in found.requests if r.startswith("GET /datasets/")]
    assert fetched == [
        "README.md",
        "train-00000-of-00002.parquet",
        "validation-00000-of-00001.parquet",
    ]


def test_offline_the_last_commit_seen_is_read_whole_or_not_at_all(reads, hub):
    offline = {"HF_HUB_OFFLINE": "1"}
    repo = hub.add(f"datasets/{NAME}", OLDER)
    assert "the cache does not have it whole" in reads(**offline)["error"]
    reads()
    repo.commits.append(FILES)
    found = reads(**offline)
    assert found["commit"] == repo.sha(1) and found["splits"]["train"] == ["Old.", "Older."]
    assert found.requests == [] and f"at commit {repo.sha(1)} from the cache" in found.output
    reads(most=3)
    error = reads(**offline)["error"]
    assert "the cache does not have you/stories/data/train-00001-of-00002.parquet" in error
    assert f"of commit {repo.sha()}" in error
    assert reads(most=3, **offline)["splits"]["train"] == LONG[:3]
    assert reads(revision=repo.sha(1), **offline)["splits"]["validation"] == ["Oldest."]
    assert "does not have it whole" in reads(revision="v1", **offline)["error"]


def test_a_hub_that_cannot_be_reached_is_one_sentence_or_the_cache(reads, hub):
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    error = reads(**closed)["error"]
    assert "(ConnectError): check the network and run the same command again" in error
    assert error.endswith("--dataset builtin needs no network")
    repo = hub.add(f"datasets/{NAME}", FILES)
    reads()
    found = reads(**closed)
    assert (found["splits"], found["commit"]) == (SPLITS, repo.sha())
    assert f"at commit {repo.sha()} from the cache (ConnectError)" in found.output


def requests_for(repo: Repo, files) -> list[str]:
    """What a client asks for that has nothing of this commit."""
    where = f"/datasets/{NAME}/resolve/{repo.sha()}"
    return [
        f"GET /api/datasets/{NAME}",
        f"GET /api/datasets/{NAME}/revision/main",
        f"GET /api/datasets/{NAME}/tree/{repo.sha()}",
        *(f"{method} {where}/{name}" for name in files for method in ("HEAD", "GET")),
    ]


@pytest.mark.parametrize("what", ["lost", 503])
@pytest.mark.parametrize("number", range(5))
def test_whatever_request_fails_no_other_commit_is_read(what, number, reads, hub):
    """Where an older commit is in the cache, whole; each request for the list in turn."""
    repo = hub.add(f"datasets/{NAME}", OLDER)
    reads()
    repo.commits.append(FILES)
    request = requests_for(repo, FILES)[number]
    hub.faults = [Fault(f"^{re.escape(request)}$", what, retry_after=0)]
    found = reads()
    assert hub.faults[0].times == 0 and found["commit"] == repo.sha(), found
    assert found["splits"] == SPLITS


@pytest.mark.parametrize("what", ["lost", "cut", 503])
def test_downloads_may_fail_once_each(what, reads, hub):
    repo = hub.add(f"datasets/{NAME}", FILES)
    requests = requests_for(repo, FILES)[5:]
    hub.faults = [Fault(f"^{re.escape(r)}$", what, retry_after=0) for r in requests]
    found = reads()
    assert [fault.times for fault in hub.faults] == [0] * 6
    assert (found["splits"], found["commit"]) == (SPLITS, repo.sha())


def test_a_hub_in_trouble_for_long_is_one_sentence_or_the_cache(reads, hub):
    repo = hub.add(f"datasets/{NAME}", OLDER)
    hub.faults = [Fault("GET /api", 503, times=99, retry_after=0)]
    assert "(HTTP 503): the Hub has trouble" in reads()["error"]
    hub.faults = [Fault("GET /api", 429, times=99, retry_after=3600)]
    assert "(HTTP 429): the Hub asks for a pause" in reads()["error"]
    hub.faults = []
    reads()
    repo.commits.append(FILES)
    hub.faults = [Fault("GET /api", 500, times=99, retry_after=0)]
    found = reads()
    assert found["commit"] == repo.sha(1) and found["splits"]["validation"] == ["Oldest."]
    assert "from the cache (HTTP 500): the Hub has trouble" in found.output
    assert found.output.count("HTTP 500: trying again in 0 s") == 2


def test_a_stream_that_keeps_breaking_is_said_and_comes_to_its_end(reads, hub):
    hub.add(f"datasets/{NAME}", FILES)
    hub.faults = [Fault("GET /datasets/.*train-00000", "cut", times=4)]
    found = reads()
    assert found["splits"] == SPLITS and hub.faults[0].times == 0
    assert found.output.count("Trying to resume download") == 4


def test_a_file_that_the_cache_holds_cut_short_is_fetched_again(reads, hub, tmp_path):
    """A machine that went down, or a disk that filled, can leave part of a file there."""
    hub.add(f"datasets/{NAME}", {"README.md": b"", "a.jsonl": jsonl(LONG).encode()})
    reads()
    (path,) = (tmp_path / "hf").rglob("a.jsonl")
    path.write_bytes(jsonl(LONG[:4]).encode())  # whole lines: a reader would notice nothing
    assert "the cache does not have you/stories/a.jsonl" in reads(HF_HUB_OFFLINE="1")["error"]
    found = reads()
    assert found["splits"] == {"train": LONG} and path.read_bytes() == jsonl(LONG).encode()
    assert reads(HF_HUB_OFFLINE="1")["splits"] == {"train": LONG}


# --- The same rules as for a folder ---

KINDS = {
    "other columns, packed, notes": {
        "README.md": "Stories.",
        "LICENSE.txt": "You may.",
        ".gitattributes": "*",
        "a.jsonl": jsonl(LONG[:4]),
        "deep/b.jsonl.gz": b"\x1f\x8b",
        "deep/b.jsonl": jsonl(LONG[4:], n=1),
        "pictures/c.png": b"PNG",
        "old.txt": "A.",
    },
    "folders behind files, in order": {
        name: jsonl([name])
        for name in ("b.jsonl", "a/2.jsonl", "a/10.jsonl", "a/a/0.jsonl", "B.jsonl")
    },
    "texts": {"TinyStories-train.txt": txt(LONG[:8]), "TinyStories-valid.txt": txt(LONG[8:])},
    "test is validation": {"train.csv": "text\nA.\n", "sub/test.csv": "text\nB.\n"},
    "a word of a folder": {"x/val/0.jsonl": jsonl(["V."]), "x/0.jsonl": jsonl(["T."])},
    "no stories": {"README.md": "Stories.", "a.md": "hm"},
    "validation alone": {"val.jsonl": jsonl(LONG)},
    "no column": {"a.csv": "title,n\nAlice,1\n"},
    "metadata": {"a.csv": "title,n\nAlice,1\n", "1.txt": "A.", "2.txt": "B."},
    "not text": {"a.jsonl": '{"text": "A"}\n{"text": 3}\n'},
    "not UTF-8": {"a.txt": b"Caf\xe9\n"},
    "declared": {
        "README.md": "---\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n"
        "  - split: train\n    path: en/*.jsonl\n  - split: test\n    path: en/more/*\n"
        "- config_name: fr\n  data_dir: fr\n---\n",
        "en/val.jsonl": jsonl(LONG[:6]),
        "en/more/a.jsonl": jsonl(LONG[6:]),
        "fr/a.jsonl": jsonl(["Un chat."]),
    },
    "subset to name": {
        "README.md": "---\nconfigs:\n- config_name: en\n  data_files: en/*\n"
        "- config_name: fr\n  data_files: fr/*\n---\n",
        "en/a.csv": "text\nA.\n",
    },
    "declared by a pattern": {
        "README.md": "---\nconfigs:\n- config_name: en\n  data_files: '**'\n---\n",
        ".gitattributes": "*",
        "LICENSE.txt": "You may.",
        "a.jsonl": jsonl(LONG),
    },
    "declared and not there": {
        "README.md": "---\nconfigs:\n- config_name: en\n  data_files: en/*\n---\n",
        "a.csv": "text\nA.\n",
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_a_repo_is_read_as_the_folder_of_its_files_is(name, reads, hub, tmp_path):
    files = {k: v if isinstance(v, bytes) else v.encode() for k, v in KINDS[name].items()}
    folder = put(tmp_path / "folder", files)
    hub.add(f"datasets/{NAME}", files)
    there, here = reads(), reads(str(folder))
    if "error" in here:
        shared = here["error"].replace(str(folder), NAME).replace("error: ", "")
        assert there["error"].split(": ")[1] == shared.split(": ")[0], (there, here)
    else:
        assert (there["splits"], there["left_out"]) == (here["splits"], here["left_out"])
        assert here["commit"] is None
    if name == "declared":
        assert reads(subset="fr")["splits"] == {"train": ["Un chat."]}


def test_a_folder_that_datasets_saved_and_uploaded_is_read(reads, hub, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {"train": LONG[:8], "validation": LONG[8:]}
    saved = datasets.DatasetDict(
        {split: datasets.Dataset.from_dict({"text": part}) for split, part in parts.items()}
    )
    saved.save_to_disk(tmp_path / "saved")
    paths = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    files = {path.relative_to(tmp_path / "saved").as_posix(): path.read_bytes() for path in paths}
    repo = hub.add(f"datasets/{NAME}", files)
    found = reads()
    assert found["splits"] == SPLITS and found["commit"] == repo.sha()


def test_what_is_not_read_there_may_be_read_as_parquet(reads, hub):
    repo = hub.add(f"datasets/{NAME}", {"stories.py": b"", "train.csv": b"text\nWrong.\n"})
    error = reads()["error"]
    assert "is for a script of its own to read, stories.py: download it" in error
    repo.branches["refs/convert/parquet"] = {
        "default/train/0000.parquet": parquet(LONG[:6]),
        "default/train/0001.parquet": parquet(LONG[6:8]),
        "default/partial-validation/0000.parquet": parquet(LONG[8:]),
        "french/train/0000.parquet": parquet(["Un chat."]),
    }
    assert reads()["error"].endswith(
        "pass --revision refs/convert/parquet, where the Hub keeps it as parquet"
    )
    found = reads(revision="refs/convert/parquet")
    assert found["splits"] == SPLITS and found["commit"] == repo.at("refs/convert/parquet")[0]
    found = reads(revision="refs/convert/parquet", subset="french")
    assert found["splits"] == {"train": ["Un chat."]}
    commit = found["commit"]  # which meta.json keeps: the same stories once more
    assert reads(revision=commit, subset="french")["splits"] == {"train": ["Un chat."]}
    assert reads(revision=commit)["splits"] == SPLITS
    repo.commits.append({"stories.zip": b"PK"})
    assert "holds no stories (of another kind: stories.zip): pass --revision" in reads()["error"]


def test_a_name_that_has_moved_is_followed_also_offline(reads, hub):
    repo = hub.add(f"datasets/{NAME}", FILES)
    hub.moved["stories"] = NAME
    found = reads("stories")
    assert (found["splits"], found["commit"]) == (SPLITS, repo.sha())
    assert reads("stories", HF_HUB_OFFLINE="1")["splits"] == SPLITS


# --- Models ---


def test_a_model_is_had_at_one_commit_without_what_nobody_reads(script, hub, tmp_path):
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "notes.md": b"", "a/config.json": b"1"}
    weights = {"model.safetensors": b"new", "pytorch_model.bin": b"old"}
    repo = hub.add("models/you/model", files | weights)
    older = {"pytorch_model.bin": b"old", "model.fp16.safetensors": b"of no use"}
    hub.add("models/you/older", files | older)

    def download(name: str, **environment) -> tuple[dict[str, bytes], str, str]:
        """The files, the name of their folder, and what was said."""
        result = script("fetch_model.py", name, **hub.environment(tmp_path / "hf") | environment)
        assert result.code == 0, result.output
        folder = Path(result.output.splitlines()[-1])
        return {p.name: p.read_bytes() for p in folder.iterdir()}, folder.name, result.output

    had = {"config.json": b"{}", "tokenizer.json": b"{}"}
    assert download("you/model")[:2] == (had | {"model.safetensors": b"new"}, repo.sha())
    assert download("you/older")[0] == had | {"pytorch_model.bin": b"old"}
    first = repo.sha()
    repo.commits.append(files | {"model.safetensors": b"newer"})
    assert download("you/model", HF_HUB_OFFLINE="1")[1] == first
    hub.faults = [Fault("GET /api", 503, times=99, retry_after=0)]
    found, commit, said = download("you/model")
    assert found["model.safetensors"] == b"new" and commit == first
    assert f"taking you/model at commit {first} from the cache (HTTP 503)" in said
    hub.faults = [Fault("GET /api", 503, retry_after=0)]
    assert download("you/model")[:2] == (had | {"model.safetensors": b"newer"}, repo.sha())


# --- Refusals ---


def test_what_the_hub_refuses_is_said_in_its_kind(reads, hub, tmp_path):
    repo = hub.add(f"datasets/{NAME}", FILES)
    hub.add("datasets/you/private", FILES, private=True)
    nobody = {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "none")}
    for says, arguments in (
        (
            "(HTTP 401): the Hub does not know this token, or no such repo",
            {"dataset": "you/none"} | nobody,
        ),
        ("(HTTP 401): the Hub does not know this token", {"dataset": "you/private"} | nobody),
        ("(HTTP 401): the Hub does not know this token", {"HF_TOKEN": "hf_expired"}),
        ("the Hub token has characters that no token has", {"HF_TOKEN": "hf_abc…"}),
        ("(HTTP 404): there is no such repo", {"dataset": "you/none"}),
        ("(HTTP 404): there is no such revision: check its name", {"revision": "gone"}),
        ("(HTTP 404): there is no such revision", {"revision": "0" * 40}),
        ("neither a file nor a folder here, nor a name on the Hub", {"dataset": "~/no/such"}),
        ("(HF_ENDPOINT is localhost): begin it with https://", {"HF_ENDPOINT": "localhost"}),
    ):
        found = reads(**arguments)
        assert says in found["error"] and "again in" not in found.output, says
    for status, says in (
        (402, "(HTTP 402): planned"),  # the Hub's own words
        (403, "(HTTP 403): the token may not do that: give it permission at "),
        (418, "(HTTP 418): planned"),
    ):
        hub.faults = [Fault("GET /api", status)]
        assert says in reads()["error"]
    repo.gated = True
    assert "ask for access on its page on the Hub" in reads(cache="new")["error"]


@pytest.mark.skipif(os.name != "posix", reason="needs a full device")
def test_a_cache_that_cannot_be_written_is_named(reads, hub, tmp_path):
    hub.add(f"datasets/{NAME}", FILES)
    (tmp_path / "a file").write_text("")
    error = reads(cache="a file/hf")["error"]
    assert "free some space" not in error
    assert "set HF_HOME to a folder elsewhere" in error and str(tmp_path / "a file") in error
    hub.add(f"datasets/{NAME}", {k: v for k, v in FILES.items() if k != "README.md"})
    assert "set HF_HOME to a folder elsewhere" in reads(cache="a file/hf")["error"]
    assert reads().output == ""
