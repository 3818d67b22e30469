"""From a file to the texts of its one column, a row at a time.

No type is guessed: a value is text, or null, or a mistake that is named with its file and row.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from config import InputError
from storygpt.cli import one_line
from storygpt.tokenizer import END_OF_TEXT

KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
UNPACK = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": None}  # None: by pyarrow
BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ROWS = 100  # rows of a table in memory at once
CHUNK = 2**20  # characters of a file, or bytes of a table, read at once
# Other columns may hold numbers of any length.
DECODER = json.JSONDecoder(strict=False, parse_int=float)


def kind_of(name: str) -> str:
    """The kind of a data file by its name, one of KINDS; empty for all others."""
    name = name.lower()
    unpacked = name.removesuffix(next((end for end in UNPACK if name.endswith(end)), ""))
    kind = PurePath(unpacked).suffix
    return kind if kind in KINDS and (unpacked == name or kind != ".parquet") else ""


@contextmanager
def reading(path) -> Iterator[None]:
    """Says in one sentence what is wrong with `path`, whatever library finds it."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except Exception as error:  # each library raises exceptions of its own
        raise InputError(f"cannot read {path}: {one_line(error)}") from error


@contextmanager
def open_text(path: Path, newline: str | None = "") -> Iterator[io.TextIOWrapper]:
    """A text file, unpacked where its name says it is packed; a byte-order mark tells UTF-16."""
    packed = path.suffix.lower()
    if packed == ".zst":
        import pyarrow

        raw = pyarrow.CompressedInputStream(str(path), "zstd")
    else:
        raw = UNPACK.get(packed, open)(path, "rb")
    with raw, io.BufferedReader(raw) as file:
        start = file.peek(4)[:4]
        if b"\0" in start and not start.startswith(tuple(BOMS)):
            raise InputError(f"{path} is UTF-16 without a byte-order mark: save it as UTF-8")
        encoding = next((BOMS[bom] for bom in BOMS if start.startswith(bom)), "utf-8-sig")
        yield io.TextIOWrapper(file, encoding, errors="surrogatepass", newline=newline)


def text_rows(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """The stories of a .txt file, which `<|endoftext|>` separates wherever it stands."""
    number, rest = 0, ""
    with open_text(path, newline=None) as file:
        while chunk := file.read(max(CHUNK, len(rest))):  # grows with the story: linear in all
            *stories, rest = (rest + chunk).split(END_OF_TEXT)
            for story in stories:
                number += 1
                yield number, story.strip("\n")
    if rest.strip():
        yield number + 1, rest.strip("\n")


def value_in(row, column: str, where: str):
    """The value of `column` in a JSON object; `a.b` is the field b of a where there is no `a.b`."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type_name(row)}, not an object with {column!r}")
    if column in row:
        return row[column]
    value = row
    for name in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise no_column(where, column, row)
        value = value[name]
    return value


def no_column(where, column: str, columns: Iterable) -> InputError:
    return InputError(
        f"{where} has no column {column!r}: pass --text_column with one of "
        + ", ".join(map(str, columns))
    )


def jsonl_rows(path: Path, column: str) -> Iterator[tuple[int, object]]:
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            line = line.strip("\ufeff \t\r\n")
            if line:
                try:
                    row = DECODER.decode(line)
                except ValueError as error:
                    raise InputError(f"{path}, row {number} is not JSON: {error}") from error
                yield number, value_in(row, column, f"{path}, row {number}")


class JSONStream:
    """A file of JSON, decoded value by value, so that only one is in memory at a time."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.at = file, "", 0

    def peek(self) -> str:
        """The next character that is not white space, empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n\ufeff":
                    return self.text[self.at]
                self.at += 1
            self.text, self.at = self.file.read(CHUNK), 0
            if not self.text:
                return ""

    def take(self, character: str) -> bool:
        found = self.peek() == character
        self.at += found
        return found

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise ValueError(f"not JSON: {self.peek()!r} where {character!r} belongs")

    def value(self):
        self.peek()
        while True:
            value, error = None, None
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end + 2 < len(self.text):  # a number might go on: 1 is the start of 1e+2
                    self.at = end
                    return value
            except json.JSONDecodeError as failure:
                error, unfinished = failure, failure.msg.startswith("Unterminated string")
                if not unfinished and failure.pos < len(self.text) - 20:
                    raise
            more = self.file.read(max(CHUNK, len(self.text) - self.at))
            if not more and error:
                raise error
            if not more:
                self.at = end
                return value
            self.text, self.at = self.text[self.at :] + more, 0

    def items(self) -> Iterator:
        """The values of a list, one at a time."""
        self.expect("[")
        if self.take("]"):
            return
        yield self.value()
        while not self.take("]"):
            self.expect(",")
            yield self.value()

    def fields(self) -> Iterator[str]:
        """The keys of an object, each before the caller takes its value."""
        self.expect("{")
        if self.take("}"):
            return
        while True:
            yield self.value()
            if self.take("}"):
                return
            self.expect(",")


def has_column(row, column: str) -> bool:
    return isinstance(row, dict) and (column in row or column.split(".")[0] in row)


def json_objects(stream: JSONStream, column: str) -> Iterator:
    """The rows of a .json file: of a list, at the top or under one key, or one after another."""
    while stream.peek():
        if stream.peek() != "{":
            yield from stream.items()
            continue
        row, lists, inside = {}, [], []
        for key in stream.fields():
            stream.expect(":")
            if column in row or stream.peek() != "[":
                row[key] = stream.value()
                continue
            row[key], items = [], stream.items()
            first = next(items, None)
            if isinstance(first, dict):
                inside.append(first)
            if has_column(first, column):
                lists.append(key)
                if len(lists) > 1:
                    raise ValueError(f"it has the lists {', '.join(lists)}: leave one in a file")
                yield first
                yield from items
            deque(items, maxlen=0)
        if not lists:  # where it has no text either, the columns to choose from are the list's
            yield row if has_column(row, column) or not inside else inside[0]


def json_rows(path: Path, column: str) -> Iterator[tuple[int, object]]:
    with open_text(path) as file:
        for number, row in enumerate(json_objects(JSONStream(file), column), 1):
            yield number, value_in(row, column, f"{path}, row {number}")


def csv_rows(path: Path, column: str) -> Iterator[tuple[int, str | None]]:
    """The fields of a .csv or .tsv file: never a null, whatever word they hold."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if kind_of(path.name) == ".tsv" else ","
    with open_text(path) as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if header is None:  # an empty file
                return
            if column not in header:
                if len(header) == 1 and (others := set(",;\t|").intersection(header[0])):
                    raise InputError(
                        f"{path} has {min(others)!r} between its fields: save it with "
                        f"{delimiter!r} there, as {kind_of(path.name)} has it"
                    )
                raise no_column(path, column, header)
            if header.count(column) > 1:
                raise InputError(f"{path} has two columns {column!r}: rename one")
            place = header.index(column)
            for row in rows:
                if len(row) > len(header) or (row and len(row) <= place):
                    raise InputError(
                        f"{path}, line {rows.line_num} has {len(row)} fields where the header has "
                        f"{len(header)}: put quotation marks around fields that hold a comma, a "
                        "tab or a line break"
                    )
                if row:
                    yield rows.line_num, row[place]
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num} is not CSV: {error}") from error


def arrow_rows(
    tables: Iterable, column: str, name, columns: list[str] | None = None
) -> Iterator[tuple[int, str | None]]:
    """The texts of Arrow tables or record batches, with all their `columns` or some of them.

    Raises InputError for a column of no text.
    """
    import pyarrow as pa
    from pyarrow import compute

    number = 0
    for table in tables:
        values = table
        for field in [column] if column in table.schema.names else column.split("."):
            if values is table and field in table.schema.names:
                values = table[field]
            elif (
                values is not table
                and pa.types.is_struct(values.type)
                and values.type.get_field_index(field) >= 0
            ):
                values = compute.struct_field(values, field)
            else:
                raise no_column(name, column, columns or table.schema.names)
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        text_types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if any(is_text(kind) for is_text in text_types):
            # as bytes, because nobody has checked that they are UTF-8
            values = values.cast(kind).cast(pa.large_binary())
        elif values.null_count == len(values):
            values = pa.nulls(len(values), pa.large_binary())
        else:
            row = number + 1 + values.is_valid().index(True).as_py()
            raise InputError(f"{name}, row {row}: column {column!r} holds {kind}, not text")
        for value in values:
            number += 1
            valid = value.is_valid
            yield number, str(value.as_buffer(), "utf-8", "surrogatepass") if valid else None


def parquet_rows(path: Path, column: str) -> Iterator[tuple[int, str | None]]:
    import pyarrow
    from pyarrow import parquet

    # Page by page, and no more rows at once than about a megabyte. A page can be large, and other
    # pools of memory would keep it when it is done with.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
        meta = file.metadata
        size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        rows = min(max(CHUNK * meta.num_rows // (size or 1), 1), ROWS)
        batches = file.iter_batches(rows, columns=[column], use_threads=False)
        yield from arrow_rows(batches, column, path, file.schema_arrow.names)


def saved_rows(path: Path, column: str) -> Iterator[tuple[int, str | None]]:
    """The texts of an Arrow file that `datasets` wrote."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as batches:
        slices = (b.slice(i, ROWS) for b in batches for i in range(0, b.num_rows, ROWS))
        yield from arrow_rows(slices, column, path)


READERS: dict[str, Callable] = {
    ".txt": text_rows,
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": saved_rows,
}


def read_files(paths: list[Path], column: str) -> Iterator[str | None]:
    """The values of the text column in all files: text or None. Raises InputError for others."""
    for path in paths:
        read = READERS[kind_of(path.name) or path.suffix]
        with reading(path):
            for number, value in read(path, column):
                if value is not None and type(value) is not str:
                    held = f"column {column!r} holds {type_name(value)}"
                    raise InputError(f"{path}, row {number}: {held}, not text")
                yield value


def type_name(value) -> str:
    """What a value of JSON is called there."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "text" if isinstance(value, str) else "a number")


def count_rows(paths: list[Path]) -> int | None:
    """The rows of all files, where they are tables that know it."""
    if not all(path.suffix.lower() == ".parquet" for path in paths):
        return None
    from pyarrow import parquet

    total = 0
    for path in paths:
        with reading(path):
            total += parquet.read_metadata(path).num_rows
    return total
