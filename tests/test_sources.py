"""Which files are read, as which split, and what stories come of them: each kind of input that
people really have is made here, and read by the rules of docs/data.md."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config import InputError
from storygpt.builtin_stories import sample_stories
from storygpt.readers import JSONStream
from storygpt.sources import open_stories, split_of

LONG = [f"Story {i} tells of a cat.\n\nIt had {i} hats." for i in range(12)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:5ab5\nsize 2227753162\n"


def put(folder, files: dict[str, str | bytes]):
    """Writes files by name; text as UTF-8, in which half surrogate pairs may stand."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"))
    return folder


def read(path, column: str = "text", **keywords) -> dict[str, list]:
    stories = open_stories(str(path), column, **keywords)
    return {split: list(rows) for split, rows in stories.splits.items()}


def left_out(path) -> dict[str, list[str]]:
    return open_stories(str(path)).left_out


def refused(path, *says: str, **keywords) -> None:
    with pytest.raises(InputError) as error:
        read(path, **keywords)
    for words in (str(path), *says):
        assert words in str(error.value), error.value


def txt(stories) -> str:
    return "".join(f"{story}\n<|endoftext|>\n" for story in stories)


def jsonl(stories, **others) -> str:
    return "".join(json.dumps({"text": story} | others) + "\n" for story in stories)


def csv(stories, delimiter: str = ",") -> str:
    rows = ('"{}"'.format(story.replace('"', '""')) + f"{delimiter}1\n" for story in stories)
    return f"text{delimiter}n\n" + "".join(rows)


def parquet(stories, kind=None, **others) -> bytes:
    texts = stories if isinstance(stories, pa.Array) else pa.array(stories, kind)
    columns = {"text": texts} | {name: [value] * len(texts) for name, value in others.items()}
    pq.write_table(pa.table(columns), buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()


# --- Which files ---


WAYS = {
    "stories.txt": txt(LONG),
    "stories.jsonl": jsonl(LONG),
    "stories.json": json.dumps([{"text": story, "n": 1} for story in LONG]),
    "lines.json": jsonl(LONG),
    "under_a_key.json": json.dumps({"n": [1], "data": [{"text": s} for s in LONG]}, indent=1),
    "after_other_lists.json": json.dumps({"by": [{"n": 1}], "data": [{"text": s} for s in LONG]}),
    "lines_with_lists.json": "".join(json.dumps({"by": [{"n": 1}], "text": s}) for s in LONG),
    "stories.csv": csv(LONG),
    "stories.tsv": csv(LONG, "\t"),
    "stories.parquet": parquet(LONG, n=1),
    "STORIES.JSONL": jsonl(LONG),
    "stories.txt.gz": gzip.compress(txt(LONG).encode()),
    "stories.tsv.bz2": bz2.compress(csv(LONG, "\t").encode()),
    "stories.json.xz": lzma.compress(jsonl(LONG).encode()),
    "stories.jsonl.zst": pa.compress(jsonl(LONG).encode(), "zstd", asbytes=True),
    "Stories.Txt.GZ": gzip.compress(txt(LONG).encode()),
    "two_parts.jsonl.gz": gzip.compress(b"".join([jsonl(LONG[:5]).encode()]))
    + gzip.compress(jsonl(LONG[5:]).encode()),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_kind_of_file_gives_the_same_stories(name, tmp_path):
    put(tmp_path, {name: WAYS[name]})
    assert read(tmp_path / name) == read(tmp_path) == {"train": LONG}


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_packed_file_that_is_cut_or_not_packed_is_named(ending, tmp_path):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(
        ending, lambda data: pa.compress(data, "zstd", asbytes=True)
    )
    data = pack(os.urandom(2000).hex().encode())
    put(tmp_path, {f"cut.txt.{ending}": data[:-9], f"plain.txt.{ending}": txt(LONG)})
    refused(tmp_path / f"cut.txt.{ending}", "cannot read")
    refused(tmp_path / f"plain.txt.{ending}", "cannot read")


def test_what_is_no_data_is_left_out_and_named(tmp_path):
    notes = ["LICENSE.txt", "LICENCE-data.txt", "requirements-dev.txt", "README.txt", "Notice.txt"]
    put(
        tmp_path, dict.fromkeys([*notes, "package.json", ".hidden.jsonl", ".git/x.txt"], "You may.")
    )
    put(tmp_path, {"data/b.parquet.gz": gzip.compress(parquet(LONG))})
    put(tmp_path, {"data/a.jsonl": jsonl(LONG), "b.zip": b"PK", "old.txt": "A."})
    put(tmp_path, {"data/a.jsonl.gz": gzip.compress(jsonl(LONG).encode())})
    (tmp_path / "c.jsonl").symlink_to("data/a.jsonl")
    (tmp_path / "data" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert read(tmp_path) == {"train": LONG}
    assert left_out(tmp_path) == {
        "hidden": [".git", ".hidden.jsonl"],
        "notes by their name": sorted([*notes, "package.json"]),
        "of another kind": ["b.zip", "pipe.jsonl", "data/b.parquet.gz"],
        ".txt beside structured files": ["old.txt"],
        "another name of what is read": ["data/a.jsonl", "data/up"],
        "compressed copies": ["data/a.jsonl.gz"],
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
    assert "test/data-00000-of-00001.arrow" in left_out(tmp_path / "all").popitem()[1]
    datasets.DatasetDict({"train_test": rest}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="train_test names two splits"):
        read(tmp_path / "both")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    refused(tmp_path / "one", "data-00001-of-00002.arrow")
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
    put(tmp_path, {"README.md": "---\nconfigs: 3\n---\n"})
    refused(tmp_path, "in no way that is known")


def test_a_readme_that_declares_nothing_is_a_note(tmp_path):
    put(tmp_path, {"README.md": "---\n: [ bad\n---\n", "a.jsonl": jsonl(LONG)})
    assert read(tmp_path) == {"train": LONG}
    refused(tmp_path, "no subsets in its README.md", subset="en")
    for name in ("builtin", tmp_path / "a.jsonl"):
        refused(name, "leave out --subset", subset="en")
    refused(tmp_path, "leave out --subset, --revision", revision="main")


def test_the_built_in_stories_are_those_of_the_seed():
    for seed in (0, 3):
        stories = open_stories("builtin", seed=seed)
        told = [next(stories.splits["train"]) for _ in range(3)]
        assert told == list(sample_stories(3, seed)) and stories.total == 20_000


# --- Rows ---


def test_other_columns_may_change_type_appear_and_vanish(tmp_path):
    put(
        tmp_path / "jsonl", {"a.jsonl": jsonl(LONG[:4], n=None), "b.jsonl": jsonl(LONG[4:8], n="x")}
    )
    put(tmp_path / "jsonl", {"c.jsonl": jsonl(LONG[8:11], n=[{"text": 3}]) + '{"text": "B", "n": '})
    with open(tmp_path / "jsonl" / "c.jsonl", "a") as file:
        file.write("9" * 5000 + ', "m": NaN}\n')  # more digits than Python takes for a number
    put(tmp_path / "jsonl", {"d.json": '[{"text": "C", "n": [{"text": "D"}]}, {"text": "E"}]'})
    put(tmp_path / "jsonl", {"e.json": '{"text": "F", "n": [{"text": "G"}]}'})
    assert read(tmp_path / "jsonl") == {"train": [*LONG[:11], "B", "C", "E", "F"]}
    put(
        tmp_path / "csv",
        {"a.csv": "text\nA.\n", "b.csv": "n,text\n1,B.\n", "c.csv": "text,n\nC.\n"},
    )
    assert read(tmp_path / "csv") == {"train": ["A.", "B.", "C."]}
    put(
        tmp_path / "pq",
        {"a.parquet": parquet(LONG[:6], n=1), "b.parquet": parquet(LONG[6:], n="x")},
    )
    assert read(tmp_path / "pq") == {"train": LONG}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", '{"text": "A"}\n\n{"text": 3}\n', "row 3: column 'text' holds a number"),
        ("a.jsonl", '{"text": true}\n', "row 1: column 'text' holds true or false"),
        ("a.jsonl", '{"text": "A"}\n{"story": "B"}\n', "row 2 has no column 'text'"),
        ("a.jsonl", '"A"\n', "row 1 is text, not an object"),
        ("a.jsonl", '{"text": "A"}\n{"text": \n', "row 2 is not JSON"),
        ("a.jsonl", '{"text": "A", "n": ' + "[" * 100_000, "cannot read"),
        ("a.json", '[{"text": "A"}, {"text": ["x"]}]', "row 2: column 'text' holds a list"),
        ("a.json", '{"text": ["A", "B"]}', "row 1: column 'text' holds a list"),
        ("a.json", '{"train": [{"text": "A"}], "test": [{"text": "B"}]}', "lists train, test"),
        ("a.json", '["A", "B"]', "row 1 is text, not an object"),
        ("a.json", '{"data": [{"body": "A"}]}', "pass --text_column with one of body"),
        ("a.json", '[{"text": "A"},]', "cannot read"),
        ("a.json", '[{"text": "A"}', "cannot read"),
        ("a.csv", "text,n\nA,1\n\nB,2,3\n", "line 4 has 3 fields where the header has 2"),
        ("a.csv", "n,text\n1,A\n2\n", "line 3 has 1 fields where the header has 2"),
        ("a.csv", 'text\n"A\nB\n', "is not CSV"),
        ("a.csv", 'text\n"A" said Tom\n', "line 2 is not CSV"),
        ("a.csv", "text;n\nA;1\n", "has ';' between its fields: save it with ',' there"),
        ("a.tsv", "text,n\nA,1\n", r"has ',' between its fields: save it with '\t' there"),
        ("a.csv", "text,text\nA,B\n", "two columns 'text'"),
        ("a.txt", b"caf\xe9\n", "is not UTF-8"),
        ("a.txt", "Tom.".encode("utf-16-le"), "without a byte-order mark"),
        ("a.parquet", parquet([None] * 250 + [3]), "row 251: column 'text' holds int64, not text"),
        ("a.parquet", parquet([b"A"]), "row 1: column 'text' holds binary, not text"),
        ("a.parquet", b"PAR1 but no more", "cannot read"),
    ],
)
def test_values_that_are_no_text_are_named_with_file_and_row(name, data, says, tmp_path):
    refused(put(tmp_path, {name: data}) / name, says)


def test_nulls_are_told_from_words(tmp_path):
    words = ["NA", "null", "None", "nan", ""]
    put(tmp_path, {"a.csv": csv(words), "b.jsonl": jsonl([None, "A."])})
    put(
        tmp_path,
        {"c.parquet": parquet([None, "", "NA"]), "d.parquet": parquet([None, None], pa.int64())},
    )
    assert read(tmp_path) == {"train": [*words, None, "A.", None, "", "NA", None, None]}


def test_csv_fields_may_hold_anything(tmp_path):
    stories = ['A, "b"\r\nc', "x" * 200_000, "nul\0", 'He said "hi"', "tab\there"]
    put(tmp_path, {"a.csv": csv(stories), "b.tsv": csv(stories, "\t"), "empty.csv": ""})
    put(tmp_path, {"c.csv": 'text\nHe said "hi".\n'})
    assert read(tmp_path) == {"train": [*stories, *stories, 'He said "hi".']}


def test_byte_order_marks_and_other_encodings(tmp_path):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        for name, data in (("a.txt", txt(LONG)), ("b.csv", csv(LONG)), ("c.jsonl", jsonl(LONG))):
            put(tmp_path, {name: data.encode(encoding)})
            assert read(tmp_path / name) == {"train": LONG}, (encoding, name)
    put(tmp_path, {"d.txt": b"\xfe\xff" + "Aé.<|endoftext|>B.".encode("utf-16-be")})
    assert read(tmp_path / "d.txt") == {"train": ["Aé.", "B."]}


def test_half_surrogate_pairs_are_no_reason_to_refuse(tmp_path):
    story = "A \ud800 b."
    offsets = pa.py_buffer(np.array([0, 8, 10], "<i4").tobytes())
    data = pa.py_buffer(b"A \xed\xa0\x80 b.C.")
    table = parquet(pa.Array.from_buffers(pa.string(), 2, [None, offsets, data]))
    put(
        tmp_path,
        {"a.jsonl": jsonl([story, "C."]), "b.jsonl": f'{{"text": "{story}"}}\n{{"text": "C."}}\n'},
    )
    put(tmp_path, {"c.csv": f"text\n{story}\nC.\n", "d.txt": f"{story}<|endoftext|>C."})
    put(tmp_path, {"e.parquet": table, "f.json": json.dumps([{"text": story}, {"text": "C."}])})
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == {"train": [story, "C."]}, path.name


def test_end_of_text_separates_wherever_it_stands(tmp_path):
    whole = "<|endoftext|>\nA.<|endoftext|>B.\r\nb.\n\n<|endoftext|>\n  <|endoftext|>\n"
    whole += " C <|endo text. \n"
    put(tmp_path, {"a.txt": whole, "b.txt": "", "c.txt": "\n\n"})
    assert read(tmp_path) == {"train": ["", "A.", "B.\nb.", "  ", " C <|endo text. "]}


@pytest.mark.parametrize("size", [1, 2, 5, 7, 50])
def test_text_and_json_are_read_the_same_in_pieces_of_any_size(size, tmp_path, monkeypatch):
    monkeypatch.setattr("storygpt.readers.CHUNK", size)
    rows = [
        {"n": -12.5, "text": 'a "b" \\ ]}<|endoftext|>', "m": {"x": [1, {"y": None}]}},
        {"text": ""},
    ]
    put(
        tmp_path,
        {"a.txt": txt(LONG), "b.json": json.dumps({"n": [10, -2.5, 1e20], "rows": rows}, indent=3)},
    )
    assert read(tmp_path / "a.txt") == {"train": LONG}
    assert read(tmp_path / "b.json") == {"train": [row["text"] for row in rows]}
    with open(tmp_path / "b.json") as file:
        assert JSONStream(file).value() == {"n": [10, -2.5, 1e20], "rows": rows}
    put(tmp_path, {"b.json": '[{"text": "A"}, {"text": "B"'})
    refused(tmp_path / "b.json", "cannot read")


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_columns_of_every_kind_of_text(kind, tmp_path):
    table = pa.array(LONG).cast(kind)
    put(tmp_path, {"a.parquet": parquet(table)})
    assert read(tmp_path) == {"train": LONG}


def test_a_text_column_may_be_a_nested_field(tmp_path):
    rows = [{"story": {"text": "A.", "n": 1}}, {"story": None}, {"story": {"text": None, "n": 2}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    put(tmp_path, {"b.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    put(tmp_path, {"c.jsonl": '{"story.text": "B."}\n', "d.csv": "story.text\nC.\n"})
    pq.write_table(pa.table({"story.text": ["D."]}), tmp_path / "e.parquet")
    expected = ["A.", None, None, "A.", None, None, "B.", "C.", "D."]
    assert read(tmp_path, "story.text") == {"train": expected}
    for name in ("a.parquet", "b.jsonl"):
        refused(tmp_path / name, "no column 'story.body'", "story", column="story.body")


def test_jsonl_with_blank_lines_and_odd_line_ends(tmp_path):
    stories = ["A\u2028b\x85c", "tab\tand\rreturn"]
    put(tmp_path, {"a.jsonl": "\n\ufeff" + jsonl(stories).replace("\n", "\r\n\r\n")})
    put(tmp_path, {"b.jsonl": '{"text": "raw\ttab\rreturn"}\n \n{"text": "A\u2028b"}'})
    assert read(tmp_path) == {"train": [*stories, "raw\ttab\rreturn", "A\u2028b"]}
