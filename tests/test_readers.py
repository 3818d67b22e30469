"""What stories come of a file of each kind: the right rows, and one sentence for the wrong ones."""

import bz2
import gzip
import json
import lzma
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from story_files import LONG, csv, jsonl, parquet, put, read, refused, txt

from storygpt.readers import JSONStream

WAYS = {
    "stories.txt": txt(LONG),
    "stories.jsonl": jsonl(LONG),
    "stories.json": json.dumps([{"text": story, "n": 1} for story in LONG]),
    "lines.json": jsonl(LONG),
    "under_a_key.json": json.dumps({"n": [1], "data": [{"text": s} for s in LONG]}, indent=1),
    "after_other_lists.json": json.dumps({"by": [{"n": 1}], "data": [{"text": s} for s in LONG]}),
    "lines_with_lists.json": "".join(json.dumps({"by": [{"n": 1}], "text": s}) for s in LONG),
    "stories.csv": csv(LONG),
    "stories.parquet": parquet(LONG, n=1),
    "STORIES.JSONL": jsonl(LONG),
    "stories.txt.gz": gzip.compress(txt(LONG).encode()),
    "stories.csv.bz2": bz2.compress(csv(LONG).encode()),
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


def test_files_of_zstd_long_are_read(tmp_path):
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    from storygpt.readers import open_zstandard

    module = sys.modules.get("compression.zstd") or sys.modules["backports.zstd"]
    options = {module.CompressionParameter.window_log: 28}
    data = module.compress(jsonl(LONG).encode(), options=options)
    put(tmp_path, {"a.jsonl.zst": data + data})  # two frames
    assert read(tmp_path) == {"train": LONG * 2}
    with open_zstandard(tmp_path / "a.jsonl.zst", "rb") as file:
        assert file.read() == jsonl(LONG * 2).encode()


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
        {"a.csv": "text\nA.\n", "b.csv": "n,text\n1,B.\n", "c.csv": "text,n\nC.,\n"},
    )
    assert read(tmp_path / "csv") == {"train": ["A.", "B.", "C."]}
    put(
        tmp_path / "pq",
        {"a.parquet": parquet(LONG[:6], n=1), "b.parquet": parquet(LONG[6:], n="x")},
    )
    assert read(tmp_path / "pq") == {"train": LONG}


def arrow_file(table: pa.Table) -> bytes:
    pq.write_table(table, buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()


TWO_COLUMNS = arrow_file(pa.Table.from_arrays([pa.array(["A."]), pa.array([1])], ["text", "text"]))


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
        ("a.json", '{"data": [{"text": "A"}]}{"text": "B"}', "an object without 'data'"),
        ("a.json", '{"text": "A"}{"data": [{"text": "B"}]}', "row 2 has no column 'text'"),
        ("a.json", '{"train": [{"text": "A"}], "test": [{"text": "B"}]}', "lists train, test"),
        ("a.json", '["A", "B"]', "row 1 is text, not an object"),
        ("a.json", '{"data": [{"body": "A"}]}', "pass --text_column with one of body"),
        ("a.json", '[{"text": "A"},]', "cannot read"),
        ("a.json", '[{"text": "A"}', "cannot read"),
        ("a.csv", "text,n\nA,1\n\nB,2,3\n", "line 4 has 3 fields where the header has 2"),
        ("a.csv", "n,text\n1,A\n2\n", "line 3 has 1 fields where the header has 2"),
        ("a.csv", 'text\n"A\nB\n', "is not CSV"),
        ("a.csv", 'text\n"A" said Tom\n', "line 2 is not CSV"),
        ("a.csv", "text,n\nA\n", "line 2 has 1 fields where the header has 2"),
        ("a.csv", "text,n\nTom ran.\nHe fell.,1\n", "line 2 has 1 fields where the header has 2"),
        ("a.csv", "text;n\nA;1\n", "has ';' between its fields: save it with ',' there"),
        ("a.csv", '\ufeff"n";"text"\n1;"A"\n', "has ';' between its fields"),
        ("a.csv", "n|text\n1|A\n", "has '|' between its fields"),
        ("a.csv", "n;body\n1;A\n", "has ';' between its fields"),
        ("a.csv", "n,body\n1;A\n", "has no column 'text'"),
        ("a.tsv", "body\nA\n", "has no column 'text'"),
        ("a.csv", "n;a, b;text\n1;2;A\n", "has ';' between its fields"),
        ("a.csv", '"n";"a,b";"text"\n1;2;A\n', "has ';' between its fields"),
        ("a.tsv", "text,n\nA,1\n", r"has ',' between its fields: save it with '\t' there"),
        ("a.csv", "text,text\nA,B\n", "two columns 'text'"),
        ("a.txt", b"caf\xe9\n", "is not UTF-8"),
        ("a.txt", "Tom ran." + "\0" * 20 + "The end.", "holds NUL characters"),
        ("a.txt", "Tom.".encode("utf-16-le"), "without a byte-order mark"),
        ("a.parquet", parquet([None] * 250 + [3]), "row 251: column 'text' holds int64, not text"),
        ("a.parquet", parquet([b"A"]), "row 1: column 'text' holds binary, not text"),
        ("a.parquet", b"PAR1 but no more", "cannot read"),
        ("a.parquet", TWO_COLUMNS, "it has two columns 'text': rename one"),
        ("a.txt", "\n<!DOCTYPE html>\n<html>", "is a web page, not the file"),
        ("a.txt", "<html>\r\n<head><title>404 Not Found", "is a web page, not the file"),
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
    put(tmp_path, {"a.csv": csv(stories), "empty.csv": ""})
    put(tmp_path, {"c.csv": 'text\nHe said "hi".\n'})
    assert read(tmp_path) == {"train": [*stories, 'He said "hi".']}


def test_tsv_is_read_as_it_is_written(tmp_path):
    fields = {
        "Ann sat.": "Ann sat.",
        '"Ann sat."': "Ann sat.",
        '"He said ""hi"", twice."': 'He said "hi", twice.',
        '"Come here, said Tom.': '"Come here, said Tom.',  # a quote that nobody closed
        'Bob said, come."': 'Bob said, come."',
        '"Come," said Tom, "now"': '"Come," said Tom, "now"',
        '"': '"',
        '""': "",
        '"""': '"""',
        '"x' + "y" * 200_000: '"x' + "y" * 200_000,
        "": "",
        "a \\t b": "a \\t b",
    }
    rows = "".join(f"{i}\t{field}\r\n" for i, field in enumerate(fields))
    put(tmp_path, {"a.tsv": "id\ttext\r\n" + rows, "b.tsv": 'text\n\n"A.\nB."', "empty.tsv": ""})
    assert read(tmp_path) == {"train": [*fields.values(), '"A.', 'B."']}
    put(tmp_path, {"c.tsv": 'id\ttext\n1\tA.\n2\t"B.\n\nC."\n'})
    refused(tmp_path / "c.tsv", "line 5 has 1 fields where the header has 2")


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


def test_start_of_text_is_the_other_half_of_a_separator(tmp_path):
    start, end = "<|startoftext|>", "<|endoftext|>"
    put(tmp_path, {"a.txt": "".join(f"{start}{story}{end}\n" for story in LONG)})
    put(tmp_path, {"b.txt": f"{start}\nA.\n{end}\n\n{start}\nB.\n{end}\n{end}C.{end}"})
    put(tmp_path, {"c.txt": f"{start}A.{start}\nB.\n"})  # by itself
    assert read(tmp_path) == {"train": [*LONG, "A.", "B.", "", "C.", "A.", "B."]}
    put(tmp_path, {"a.jsonl": jsonl([f"{start}A.{end}"])})
    assert read(tmp_path) == {"train": [f"{start}A.{end}"]}


JSON_FILES = {
    "an inner list before the object's own text": (
        '{"entities": [{"label": "PER", "text": "Tom"}], "text": "Tom ran."}\n'
        '{"text": "Ann sat.", "entities": [{"text": "Ann"}]}'
    ),
    "one object": '{"by": [{"text": "Tom"}], "n": 1, "text": "Tom ran."}{"text": "Ann sat."}',
    "lists one after another": '[{"text": "Tom ran."}]\n[]\n[{"text": "Ann sat."}]',
    "a list under a key": '{"n": [[]], "rows": [{"text": "Tom ran."}, {"text": "Ann sat."}]}',
    "such objects one after another": (
        '{"rows": [{"text": "Tom ran."}]}{"other": [1], "rows": [{"text": "Ann sat."}]}{"rows": []}'
    ),
}


@pytest.mark.parametrize("size", [3, 2**20])
@pytest.mark.parametrize("name", JSON_FILES)
def test_the_rows_of_a_json_file_are_where_its_first_value_says(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr("storygpt.readers.CHUNK", size)
    put(tmp_path, {"a.json": JSON_FILES[name]})
    assert read(tmp_path) == {"train": ["Tom ran.", "Ann sat."]}


LONG_ONES = {
    "a.csv": ",".join(f"column {i}" for i in range(5_000)) + "\n",
    "a.tsv": "x" * 10_000 + "\n",
    "a.jsonl": json.dumps({f"column {i}": 1 for i in range(5_000)}),
    "a.json": json.dumps({f"list {i}": [{"text": "A"}] for i in range(5_000)}),
    "b.json": '{"text": ' + "x" * 10_000,
    "README.md": "---\nconfigs:\n"
    + "".join(f"- config_name: subset{i}\n  data_files: a.csv\n" for i in range(900))
    + "---\n",
}


@pytest.mark.parametrize("name", LONG_ONES)
def test_no_sentence_grows_with_what_a_file_holds(name, fails, tmp_path):
    path = put(tmp_path / "in", {name: LONG_ONES[name]}) / name.replace("README.md", "")
    flags = ("--dataset", path, "--data_dir", tmp_path / "out", "--num_proc", 1)
    assert len(fails("prepare_data.py", *flags, says=str(path))) <= 500


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
