"""Which files are read, as which split, and what stories come of them: each kind of input that
people really have is made here, and read by the rules of docs/data.md."""

import gzip
import os

import pytest
from story_files import LONG, csv, jsonl, parquet, put, read, refused, txt

from config import InputError
from storygpt.builtin_stories import sample_stories
from storygpt.sources import list_left_out, match_files, open_stories, split_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5ab5\nsize 2227753162\n"


def left_out(path) -> dict[str, list[str]]:
    return open_stories(str(path)).left_out


# --- Which files ---


def test_what_is_no_data_is_left_out_and_named(tmp_path):
    notes = ["LICENSE.txt", "LICENCE-data.txt", "requirements-dev.txt", "README.txt", "Notice.txt"]
    notes += ["package.json", "croissant.json", "dataset-metadata.json"]
    put(tmp_path, dict.fromkeys([*notes, ".hidden.jsonl", ".git/x.txt"], "You may."))
    put(tmp_path, {"data/b.parquet.gz": gzip.compress(parquet(LONG))})
    put(tmp_path, {"data/a.jsonl": jsonl(LONG), "b.zip": b"PK", "old.txt": "A."})
    put(tmp_path, {"data/a.jsonl.gz": gzip.compress(jsonl(LONG).encode())})
    (tmp_path / "c.jsonl").symlink_to("data/a.jsonl")
    (tmp_path / "data" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert read(tmp_path) == {"train": LONG}
    assert left_out(tmp_path) == {
        "hidden": [".git", ".hidden.jsonl"],
        "notes by their name": sorted(notes),
        "of another kind": ["pipe.jsonl", "b.zip", "data/b.parquet.gz"],
        ".txt beside structured files": ["old.txt"],
        "another name of what is read": ["data/a.jsonl", "data/up"],
        "compressed copies": ["data/a.jsonl.gz"],
    }


def test_a_link_may_say_of_what_kind_a_file_is(tmp_path):
    """As where files are named by their sums, and links name them."""
    blobs = {"blobs/1f": jsonl(LONG[:6]), "blobs/2e": jsonl(LONG[6:]), "refs/main": "c1"}
    put(tmp_path, blobs | {"snapshots/c1/README.md": "Stories."})
    for link, blob in {"c1/a.jsonl": "1f", "c1/b.jsonl": "2e", "c1/c.jsonl": "2e"}.items():
        (tmp_path / "snapshots" / link).symlink_to(f"../../blobs/{blob}")
    assert read(tmp_path) == {"train": LONG}
    assert left_out(tmp_path) == {
        "another name of what is read": ["snapshots/c1/c.jsonl"],
        "of another kind": ["blobs/1f", "blobs/2e", "refs/main"],
        "notes by their name": ["snapshots/c1/README.md"],
    }


def test_structured_files_of_all_kinds_are_read_together(tmp_path):
    put(
        tmp_path,
        # the first only begins like the name of a note
        {
            "authors_a.jsonl": jsonl(LONG[:4]),
            "b.csv": csv(LONG[4:8]),
            "c.parquet": parquet(LONG[8:]),
        },
    )
    assert read(tmp_path) == {"train": LONG}


def test_a_clone_without_large_files(tmp_path):
    put(tmp_path, {"TinyStories-train.txt": POINTER, "TinyStories-valid.txt": POINTER})
    refused(tmp_path, "Git LFS pointer", "`git lfs pull`")
    refused(tmp_path / "TinyStories-train.txt", "`git lfs pull`")
    put(tmp_path, {"data/train-00000-of-00002.parquet": POINTER})
    refused(tmp_path, "Git LFS pointer", "`git lfs pull`")
    put(tmp_path, {"data/train-00000-of-00002.parquet": parquet(LONG[:4])})
    put(tmp_path, {"data/train-00001-of-00002.parquet": parquet(LONG[4:8])})
    put(tmp_path, {"data/validation-00000-of-00001.parquet": parquet(LONG[8:])})
    assert read(tmp_path) == {"train": LONG[:8], "validation": LONG[8:]}


@pytest.mark.parametrize("name", ["a [x] b", "c::d", "e*f", "~g", " h "])
def test_paths_are_read_as_they_are(name, tmp_path, monkeypatch):
    put(tmp_path / name, {f"{name}.jsonl": jsonl(LONG)})
    monkeypatch.chdir(tmp_path)
    assert read(name) == read(f"{name}/{name}.jsonl") == {"train": LONG}


def test_folders_without_stories_are_named(tmp_path):
    refused(put(tmp_path / "a", {"b.md": "hm"}), "holds no stories (of another kind: b.md)")
    put(tmp_path / "a", dict.fromkeys(["c.md", "d.md", "e.md", "f.md", "g.md"], "hm"))
    refused(tmp_path / "a", "b.md, c.md, d.md, e.md and 2 more)")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "it is empty")
    refused(put(tmp_path / "c", {"val.jsonl": jsonl(LONG)}), "validation alone")
    assert read(tmp_path / "c" / "val.jsonl") == {"train": LONG}
    refused(tmp_path / "none.jsonl", "there is no file or folder")
    (tmp_path / "device.txt").symlink_to(os.devnull)
    refused(tmp_path / "device.txt", "is a pipe or device")
    put(tmp_path / "d", {"a.jsonl": jsonl(LONG)})
    (tmp_path / "d" / "gone.jsonl").symlink_to("nowhere")
    refused(tmp_path / "d", "a link to nothing")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(tmp_path):
    put(tmp_path, {"a.jsonl": jsonl(LONG), "b/c.jsonl": jsonl(LONG)})
    (tmp_path / "b").chmod(0)
    refused(tmp_path, "cannot be read")
    (tmp_path / "b").chmod(0o700)
    (tmp_path / "a.jsonl").chmod(0)
    refused(tmp_path, "Permission denied")


# --- Which split ---


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("stories", "train"),
        ("train", "train"),
        ("TinyStories-valid", "validation"),
        ("TinyStoriesV2-GPT4-train", "train"),
        ("train_sft", "train"),
        ("test-00000-of-00001", "test"),
        ("stories-test-00000-of-00001-0123456789abcdef", "test"),
        ("00001_val", "validation"),
        ("dev.3", "validation"),
        ("VALIDATION", "validation"),
        ("eval_1_2", "validation"),
        ("test2", "test"),
        ("stories.test", "test"),
        ("more_test_stories", "train"),
        ("invalid_ones", "train"),
        ("latest", "train"),
        ("devil", "train"),
        ("1-of-2", "train"),
        ("val/part-0", "validation"),
        ("Test/a/stories", "test"),
        ("test/train", "train"),
        ("train/my_test", "test"),
        ("test/dev/a", "validation"),
        ("validation_set/a", "train"),
        ("stories_valid_v2", "validation"),
        ("stories_v2.1_test", "test"),
        ("valid-v3-00000-of-00001", "validation"),
        ("dev2", "validation"),
        ("v2", "train"),
        ("split=validation/part-0", "validation"),
        ("default/partial-test/0000", "test"),
        ("training", "train"),
        ("my_testing", "test"),
        ("evaluation/a", "validation"),
        ("stories-valid (1)", "validation"),
        ("stories_val(2)", "validation"),
        ("stories_val_part1", "validation"),
        ("stories-test-shard_00003", "test"),
        ("stories_dev_chunk2", "validation"),
        ("val_part-00001-of-00010", "validation"),
        ("part-00001", "train"),
        ("my_test_department1", "train"),
        ("Stories_VAL_Part1", "validation"),
        ("stories [val]", "validation"),
        ("holdout/a", "validation"),
        ("trainset", "train"),
        ("my_valset", "validation"),
        ("testset/a", "test"),
        ("onset", "train"),
        ("00001", "train"),
        # as Spark names them: no number is tried in parts, which would take hours
        (f"{'1234567890' * 5}-c000", "train"),
        (f"test-of-{'1234567890' * 5}x", "test"),
    ],
)
def test_the_split_follows_from_the_name(path, split):
    *folders, name = path.split("/")
    assert split_of(name, folders) == split


def test_a_name_with_two_splits_is_refused():
    with pytest.raises(InputError, match=r"a/train_val names two splits \(train, val\): rename it"):
        split_of("train_val", ["a"])


def test_test_is_validation_only_where_nothing_else_is(tmp_path):
    put(tmp_path, {"data/train.txt": txt(LONG[:8]), "data/test.txt": txt(LONG[8:])})
    assert read(tmp_path) == {"train": LONG[:8], "validation": LONG[8:]}
    put(tmp_path, {"val.txt": txt(["A."])})
    assert read(tmp_path) == {"train": LONG[:8], "validation": ["A."]}
    assert left_out(tmp_path) == {"test, as there is validation": ["data/test.txt"]}


def test_what_is_train_in_spite_of_a_word_in_its_name_is_noted(tmp_path):
    names = ("validation_set/a", "a.val.en", "more_test_stories", "invalid_ones", "train/evaluate")
    put(tmp_path, {f"{name}.jsonl": jsonl(LONG) for name in names})
    (note,) = open_stories(str(tmp_path)).notes
    said = "train holds a.val.en.jsonl, more_test_stories.jsonl, validation_set/a.jsonl: docs/data"
    assert note.startswith(said)


def test_what_the_hub_converted_in_part_is_noted(tmp_path):
    put(tmp_path, {"default/partial-train/0000.parquet": parquet(LONG[:8])})
    put(tmp_path, {"default/test/0000.parquet": parquet(LONG[8:])})
    assert read(tmp_path) == {"train": LONG[:8], "validation": LONG[8:]}
    (note,) = open_stories(str(tmp_path)).notes
    assert note.startswith("it is part of a data set")
    put(tmp_path / "own", {"a/partial-drafts/b.jsonl": jsonl(LONG)})  # somebody's own folder
    assert not open_stories(str(tmp_path / "own")).notes


def test_shards_that_are_missing_are_noted(tmp_path):
    """Of a download that broke off, or an upload."""
    names = ["a/train-00000-of-00003", "a/train-00002-of-00003", "b/train-1-of-2", "b/train-2-of-2"]
    names += ["val-00000-of-00012-0123456789abcdef"]
    put(tmp_path, {f"{name}.jsonl": jsonl(LONG) for name in names})
    assert open_stories(str(tmp_path)).notes == [
        "val-* lacks 11 of its 12 files",
        "a/train-* lacks 1 of its 3 files",
    ]


def test_shards_of_one_name_in_two_folders_are_all_read(tmp_path):
    put(tmp_path, {"a/train-00000-of-00001.jsonl": jsonl(LONG[:6])})
    put(tmp_path, {"b/train-00000-of-00001.jsonl": jsonl(LONG[6:])})
    assert read(tmp_path) == {"train": LONG}


# --- What declares its splits ---


def test_folders_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train, rest = (
        datasets.Dataset.from_dict({"text": t, "n": [1] * len(t)}) for t in (LONG, ["V."])
    )
    train.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == {"train": LONG}
    train.select([3, 1]).save_to_disk(tmp_path / "some")
    assert read(tmp_path / "some") == {"train": [LONG[3], LONG[1]]}
    parts = {"train": train.select(range(5)), "train_more": train.select(range(5, 12))}
    splits = datasets.DatasetDict(parts | {"val": rest, "test": rest})
    splits.save_to_disk(tmp_path / "all")
    assert read(tmp_path / "all") == {"train": LONG, "validation": ["V."]}
    assert left_out(tmp_path / "all") == {"test, as there is validation": ["test"]}
    datasets.DatasetDict({"train_test": rest}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="train_test names two splits"):
        read(tmp_path / "both")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    refused(tmp_path / "one", "not whole as a saved data set", "data-00001-of-00002.arrow")
    (tmp_path / "all" / "train" / "state.json").write_text("{")
    refused(tmp_path / "all", "not whole as a saved data set")


README = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
  - split: test
    path: [held_out/train.jsonl]
- config_name: fr
  data_dir: fr
  data_files: "**"
- config_name: de
  data_dir: de
---
# Stories
"""


def test_a_readme_that_declares_its_splits_is_followed(tmp_path):
    put(tmp_path, {"README.md": README, "en/val.jsonl": jsonl(LONG[:6]), "z.jsonl": jsonl(["Z."])})
    put(tmp_path, {"held_out/train.jsonl": jsonl(LONG[6:]), "fr/a/b.csv": csv(["Un chat."])})
    put(tmp_path, {"de/a.jsonl": jsonl(["Ein Hund."]), "de/dev.jsonl": jsonl(["Eine Katze."])})
    assert read(tmp_path, subset="en") == {"train": LONG[:6], "validation": LONG[6:]}
    assert read(tmp_path, subset="fr") == {"train": ["Un chat."]}
    assert read(tmp_path, subset="de") == {"train": ["Ein Hund."], "validation": ["Eine Katze."]}
    others = open_stories(str(tmp_path), subset="en").left_out["not declared in README.md"]
    assert others == ["z.jsonl", "de/a.jsonl", "de/dev.jsonl", "fr/a/b.csv"]
    refused(tmp_path, "has the subsets en, fr, de: pass --subset with one")
    refused(tmp_path, "has the subsets en, fr, de", subset="it")
    put(tmp_path, {"README.md": README.replace("name: en\n", "name: en\n  default: true\n")})
    assert read(tmp_path)["train"] == LONG[:6]
    put(tmp_path, {"README.md": README.replace("**", "*.txt")})
    refused(tmp_path, "declares *.txt: there is no such file", subset="fr")
    put(tmp_path, {"README.md": README.replace("[held_out/train.jsonl]", "en/*")})
    refused(tmp_path, "val.jsonl twice", subset="en")
    for head in ("configs: 3", "configs:\n- config_name: en\n  data_files: 'en/[z-a]*.jsonl'"):
        put(tmp_path, {"README.md": f"---\n{head}\n---\n"})
        refused(tmp_path, "in no way that is known")
    put(tmp_path, {"README.md": README.replace("name: en", "name: 2012")})
    assert read(tmp_path, subset="2012")["train"] == LONG[:6]
    put(tmp_path, {"README.md": README.replace("split: train", "split: 2012")})
    assert read(tmp_path, subset="en")["train"] == LONG[:6]


def declaring(*configs: str) -> str:
    return "---\nconfigs:\n" + "".join(f"- {{{config}}}\n" for config in configs) + "---\n"


def test_a_pattern_stands_for_data_files_alone(tmp_path):
    beside = ("LICENSE.txt", "README.md", "stats.png", "config.json", "a.jsonl.gz", ".a.jsonl")
    put(tmp_path, {f"data/{name}": "You may." for name in beside} | {"data/a.jsonl": jsonl(LONG)})
    for pattern in ("data/*", "**"):
        put(tmp_path, {"README.md": declaring(f"config_name: a, data_files: '{pattern}'")})
        assert read(tmp_path) == {"train": LONG}
        listed = left_out(tmp_path)["not declared in README.md"]
        assert listed == sorted(f"data/{name}" for name in beside if name != ".a.jsonl")
    put(tmp_path, {"README.md": declaring("config_name: a, data_files: data/LICENSE.txt")})
    assert read(tmp_path) == {"train": ["You may."]}
    put(tmp_path, {"README.md": declaring("config_name: a, data_files: 'data/*.png'")})
    refused(tmp_path, "declares data/stats.png, of no kind this script reads")


def test_a_subset_that_declares_no_files_is_the_whole_folder(tmp_path):
    put(tmp_path, {"en/a.jsonl": jsonl(LONG[:6]), "fr/a.jsonl": jsonl(LONG[6:])})
    french = "config_name: fr, data_files: 'fr/*'"
    for whole in ("config_name: default", "config_name: all, default: true, data_dir: null"):
        put(tmp_path, {"README.md": declaring(whole, french)})
        assert read(tmp_path) == {"train": LONG}
        assert read(tmp_path, subset="fr") == {"train": LONG[6:]}


def test_a_subset_is_not_passed_over(tmp_path):
    put(tmp_path, {"a.jsonl": jsonl(LONG), "saved/dataset_dict.json": "{}"})
    refused(tmp_path / "saved", "no subsets in its README.md: leave out --subset", subset="fr")
    for flag in ("subset", "revision"):
        with pytest.raises(InputError, match=f"--{flag}.* is empty"):
            read(tmp_path, **{flag: ""})


def test_a_readme_that_declares_nothing_is_a_note(tmp_path):
    put(tmp_path, {"README.md": "---\n: [ bad\n---\n", "a.jsonl": jsonl(LONG)})
    assert read(tmp_path) == {"train": LONG}
    refused(tmp_path, "no subsets in its README.md", subset="en")
    put(tmp_path, {"README.md": "---\nlicense: a: b\nconfigs:\n- data_files: a.jsonl\n---\n"})
    refused(tmp_path, "README.md declares its data in no way that is known")
    (tmp_path / "README.md").unlink()
    for name in ("builtin", tmp_path / "a.jsonl"):
        refused(name, "leave out --subset", subset="en")
    refused(tmp_path, "leave out --subset, --revision", revision="main")


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("a.csv", "a.csv"),
        ("./en/*.csv", "en/a.csv"),
        ("**", "a.csv en/a.csv en/b/c.csv en/b/d[1].csv"),
        ("en/**", "en/a.csv en/b/c.csv en/b/d[1].csv"),
        ("**/c.csv", "en/b/c.csv"),
        ("**/a.csv", "a.csv en/a.csv"),
        ("en/b/[a-c].csv", "en/b/c.csv"),
        ("en/b/[!a-b].csv", "en/b/c.csv"),
        ("en/b/d[1].csv", "en/b/d[1].csv"),
        ("en/?.csv", "en/a.csv"),
        ("en", ""),
    ],
)
def test_patterns_of_a_readme_stand_for_names(pattern, files):
    names = ["README.md", "a.csv", "en/a.csv", "en/b/c.csv", "en/b/d[1].csv"]
    assert " ".join(match_files(names, pattern)) == files


@pytest.mark.parametrize("name", ["builtin", "sample"])
def test_a_folder_called_like_the_built_in_stories_is_asked_about(name, tmp_path, monkeypatch):
    monkeypatch.chdir(put(tmp_path, {f"{name}/a.jsonl": jsonl(LONG)}))
    refused(name, f"pass --dataset ./{name} to read that")
    assert read(f"./{name}") == {"train": LONG}


def test_an_empty_dataset_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(put(tmp_path, {"a.jsonl": jsonl(LONG)}))
    refused("", "--dataset is empty")
    assert read(".") == {"train": LONG}


def test_files_of_one_inode_number_are_told_apart(tmp_path, monkeypatch):
    """Network drives make the numbers up, and the same one for two files."""
    put(tmp_path, {"a.jsonl": jsonl(LONG[:6]), "b.jsonl": jsonl(LONG[6:])})
    (tmp_path / "c.jsonl").symlink_to("b.jsonl")
    stat = os.stat

    def made_up(*arguments, **keywords):
        found = stat(*arguments, **keywords)
        return os.stat_result((found[0], 7, 7, *found[3:]))

    monkeypatch.setattr("os.stat", made_up)
    assert read(tmp_path) == {"train": LONG}
    assert left_out(tmp_path) == {"another name of what is read": ["c.jsonl"]}


@pytest.mark.parametrize("name", ["metadata.csv", "log.jsonl", "titles.json"])
def test_metadata_beside_many_texts_is_not_taken_for_the_stories(name, tmp_path):
    """The layout of PG-19 and of mirrors of Gutenberg."""
    data = {"metadata.csv": "id,title\n1,Alice\n", "titles.json": '[{"title": "Alice"}]'}
    put(tmp_path, {name: data.get(name, '{"title": "Alice"}\n')})
    put(tmp_path, {f"train/{i}.txt": story for i, story in enumerate(LONG)})
    refused(tmp_path, name, "has no column 'text'; because of it 12 .txt beside")
    put(tmp_path, {name: '"Alice" by Carroll, 1865\n'})  # is nothing that its name says
    refused(tmp_path, name, "because of it 12 .txt beside it are not read: move it out of")
    (tmp_path / name).unlink()
    assert sorted(read(tmp_path)["train"]) == sorted(LONG)


def test_a_validation_split_that_one_name_among_many_made_is_noted(tmp_path):
    put(tmp_path, {f"{i}.txt": txt(LONG) for i in range(38)} | {"the dev.txt": txt(LONG)})
    put(tmp_path, {"final test.txt": txt(LONG)})
    (note,) = open_stories(str(tmp_path)).notes
    assert note == "validation is the dev.txt, by its name, of 39 files"
    (tmp_path / "1.txt").unlink()
    (tmp_path / "2.txt").unlink()
    (tmp_path / "the dev.txt").unlink()
    (note,) = open_stories(str(tmp_path)).notes
    assert note == "validation is final test.txt, by its name, of 37 files"
    put(tmp_path, {"data/train-00000-of-00001.txt": txt(LONG), "val.txt": txt(LONG)})
    (tmp_path / "final test.txt").unlink()
    for i in range(21):
        (tmp_path / f"{i}.txt").unlink(missing_ok=True)
    assert open_stories(str(tmp_path)).notes == []


def test_no_line_grows_with_what_lies_there(tmp_path):
    put(tmp_path, {f"{i}{'x' * 200}.md": "hm" for i in range(500)} | {"a.jsonl": jsonl(LONG)})
    line = list_left_out(left_out(tmp_path))
    assert len(line) < 300 and line.endswith(" and 496 more")


def test_the_built_in_stories_are_those_of_the_seed():
    for seed in (0, 3):
        stories = open_stories("builtin", seed=seed)
        told = [next(stories.splits["train"]) for _ in range(3)]
        assert told == list(sample_stories(3, seed)) and stories.total == 20_000
