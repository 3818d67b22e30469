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
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePath

from config import InputError
from storygpt.cli import one_line, shorten
from storygpt.files import refuse_pointer
from storygpt.tokenizer import END_OF_TEXT

BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
START_OF_TEXT = "<|startoftext|>"  # a separator's other half, which some write before each story
TABLE_ROWS = 100  # rows of a table in memory at once
CHUNK = 2**20  # characters of a file, or bytes of a table, read at once
JSON_WHITE_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# Other columns may hold numbers of any length.
DECODER = json.JSONDecoder(strict=False, parse_int=float)


class NoColumn(InputError):
    """A file, or a row of it, lacks the text column."""

    def __init__(self, where: str, column: str, columns: Iterable):
        listed = shorten(", ".join(map(str, columns)))
        super().__init__(
            f"{where} has no column {column!r}: pass --text_column with one of {listed}"
        )


def place_of(name: str, names: list[str], missing: NoColumn) -> int:
    """Returns where a column is among a table's. Raises InputError where there are two of it, and
    `missing` where it is not there."""
    if name not in names:
        raise missing
    if names.count(name) > 1:
        raise InputError(f"it has two columns {name!r}: rename one")
    return names.index(name)


@contextmanager
def reading(where) -> Iterator[None]:
    """Says in one sentence what is wrong with the file `where`, whatever library finds it."""
    try:
        yield
    except InputError as error:
        error.args = (f"{where}: {error}",)
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: save it as UTF-8") from error
    except Exception as error:  # each library raises exceptions of its own
        raise InputError(f"cannot read {where}: {one_line(error)}") from error


# --- Text files ---


def open_zstandard(path: Path, mode: str) -> io.BufferedIOBase:
    """Opens a .zst file, also one of `zstd --long`."""
    try:
        from compression import zstd
    except ImportError:  # before Python 3.14
        from backports import zstd

    return zstd.open(path, mode, options={zstd.DecompressionParameter.window_log_max: 31})


PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstandard}


@contextmanager
def open_text(path: Path, newline: str | None = "") -> Iterator[io.TextIOWrapper]:
    """Opens a text file, unpacked where its name says it is packed; its mark tells UTF-16."""
    raw = PACKED.get(path.suffix.lower(), open)(path, "rb")
    with raw, io.BufferedReader(raw) as file:
        start = file.peek(4)[:4]
        if b"\0" in start and not start.startswith(tuple(BOMS)):
            raise InputError("it is UTF-16 without a byte-order mark: save it as UTF-8")
        encoding = next((BOMS[bom] for bom in BOMS if start.startswith(bom)), "utf-8-sig")
        yield io.TextIOWrapper(file, encoding, errors="surrogatepass", newline=newline)


def text_stories(path: Path, column: str) -> Iterator[str]:
    """Yields the stories of a .txt file, which `<|endoftext|>` separates wherever it stands."""
    rest = ""
    with open_text(path, newline=None) as file:
        while chunk := file.read(max(CHUNK, len(rest))):  # grows with the story: linear in all
            if "\0" in chunk:
                raise InputError("it holds NUL characters, which no text does: is it a .txt?")
            *stories, rest = (rest + chunk).split(END_OF_TEXT)
            for story in stories:
                yield from divide(story)
    if rest.strip():
        yield from divide(rest)


def divide(story: str) -> Iterator[str]:
    """Yields what lies between two `<|endoftext|>`: one story, or each that `<|startoftext|>`
    begins."""
    before, *others = story.split(START_OF_TEXT)
    if before.strip() or not others:
        yield before.strip("\n")
    for other in others:
        yield other.strip("\n")


# --- JSON ---


def text_in(row, column: str, where: str) -> str | None:
    """Returns the text of `column` in a JSON object; `a.b` is the field b of a where there is no
    `a.b`."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type_name(row)}, not an object with {column!r}")
    value = row
    for name in [column] if column in row else column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise NoColumn(where, column, row)
        value = value[name]
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{where}: column {column!r} holds {type_name(value)}, not text")


def type_name(value) -> str:
    """Returns what a value of JSON is called there."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "text" if isinstance(value, str) else "a number")


def jsonl_stories(path: Path, column: str) -> Iterator[str | None]:
    """Yields the stories of a file with a JSON object a line."""
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            line = line.strip("\ufeff \t\r\n")
            if line:
                try:
                    row = DECODER.decode(line)
                except ValueError as error:
                    raise InputError(f"row {number} is not JSON: {one_line(error)}") from error
                yield text_in(row, column, f"row {number}")


class JSONStream:
    """A file of JSON, decoded value by value, so that only one is in memory at a time."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.at = file, "", 0

    def peek(self) -> str:
        """Returns the next character that is not white space, empty at the end."""
        while True:
            self.at = JSON_WHITE_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_on():
                return ""

    def read_on(self) -> bool:
        """Reads more of the file behind what is still to be taken; tells whether there was any."""
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        if more:
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def take(self, character: str) -> bool:
        found = self.peek() == character
        self.at += found
        return found

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise ValueError(f"not JSON: {self.peek()!r} where {character!r} belongs")

    def value(self):
        """Decodes the next value, reading on until it is whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # a number might go on: 1 is the start of 1e+2
                if end + 2 < len(self.text) or not self.read_on():
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string")
                if not unfinished and error.pos < len(self.text) - 20:
                    raise
                if not self.read_on():
                    raise

    def items(self) -> Iterator:
        """Yields the values of a list, one at a time."""
        self.expect("[")
        if self.take("]"):
            return
        yield self.value()
        while not self.take("]"):
            self.expect(",")
            yield self.value()

    def fields(self) -> Iterator[tuple[str, Iterator]]:
        """Yields the keys of an object, each with the items of its list; other values are passed
        over, as is what the caller leaves of a list."""
        self.expect("{")
        if self.take("}"):
            return
        while True:
            key = self.value()
            self.expect(":")
            items = self.items() if self.peek() == "[" else iter([self.value()][:0])
            yield key, items
            deque(items, maxlen=0)
            if self.take("}"):
                return
            self.expect(",")


def key_of_rows(stream: JSONStream, column: str) -> str | None:
    """Finds the key of the list that holds a .json file's rows; None where they are its own values.

    The first value decides: an object without the column stands for its one list whose objects
    have it.
    """
    if stream.peek() != "{":
        return None
    names, lists, inside = {column, column.split(".")[0]}, [], []
    for key, items in stream.fields():
        if key in names:
            return None
        first = next(items, None)
        if isinstance(first, dict):
            inside.append(first)
            lists += [key] if names & first.keys() else []
    if len(lists) > 1:
        raise InputError(f"it has the lists {shorten(', '.join(lists))}: leave one in a file")
    if inside and not lists:
        raise NoColumn("row 1", column, inside[0])
    return lists[0] if lists else None


def json_rows(stream: JSONStream, key: str | None) -> Iterator:
    """Yields the items of the lists under `key`; without one, the file's objects and the items of
    its lists."""
    while character := stream.peek():
        if key is not None:
            keys = []
            for found, items in stream.fields():
                keys.append(found)
                if found == key:
                    yield from items
            if key not in keys:
                raise InputError(f"it has an object without {key!r}, where the first has its rows")
        elif character == "[":
            yield from stream.items()
        else:
            yield stream.value()


def json_stories(path: Path, column: str) -> Iterator[str | None]:
    """Yields the stories of a .json file, which is read up to two times: where its rows are is
    known only at the end of its first value."""
    with open_text(path) as file:
        key = key_of_rows(JSONStream(file), column)
    with open_text(path) as file:
        for number, row in enumerate(json_rows(JSONStream(file), key), 1):
            yield text_in(row, column, f"row {number}")


# --- Tables ---


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, fields) of each row; a field in quotes may go on over lines."""
    rows = csv.reader(lines, strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} is not CSV: {error}") from error


def tsv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, fields) of each line: all between its tabs, without quotes around all of it."""
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\r\n").split("\t")
        for place, field in enumerate(fields):
            inner = field[1:-1]
            if field == f'"{inner}"' and '"' not in inner.replace('""', ""):
                fields[place] = inner.replace('""', '"')
        yield number, fields if line.strip("\r\n") else []


def likely_separator(header: str, column: str, expected: str) -> str:
    """Returns what seems to separate the fields of a header: `expected`, unless only another has
    the column, or more than one field."""

    def rank(separator: str) -> tuple:
        fields = [field.strip('" \r\n') for field in header.split(separator)]
        own = separator == expected
        return column in fields, own and len(fields) > 1, len(fields), own

    return max(",;\t|", key=rank)


def table_stories(path: Path, column: str) -> Iterator[str]:
    """Yields the stories of a .csv or .tsv file: never a null, whatever word they hold."""
    csv.field_size_limit(2**31 - 1)
    separator, rows_of = ("\t", tsv_rows) if kind_of(path.name) == ".tsv" else (",", csv_rows)
    with open_text(path) as file:
        first = file.readline()
        if not first:
            return
        other = likely_separator(first, column, separator)
        if other != separator:
            raise InputError(
                f"it has {other!r} between its fields: save it with {separator!r} there"
            )
        rows = rows_of(chain([first], file))
        _, header = next(rows)
        place = place_of(column, header, NoColumn("it", column, header))
        for line, row in rows:
            if row and len(row) != len(header):
                raise InputError(
                    f"line {line} has {len(row)} fields where the header has {len(header)}: a "
                    "field with a separator or a line break needs quotation marks, and a .csv"
                )
            if row:
                yield row[place]


def arrow_stories(tables: Iterable, column: str, columns: list[str]) -> Iterator[str | None]:
    """Yields the texts of Arrow tables or record batches, with some of the `columns` or all.

    Raises InputError for a column of no text.
    """
    import pyarrow as pa
    from pyarrow import compute

    number, missing = 0, NoColumn("it", column, columns)
    for table in tables:
        values = table.to_struct_array()
        for field in [column] if column in table.schema.names else column.split("."):
            names = values.type.names if pa.types.is_struct(values.type) else []
            values = compute.struct_field(values, place_of(field, names, missing))
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if kind in (pa.string(), pa.large_string(), pa.string_view()):
            # as bytes, because nobody has checked that they are UTF-8
            values = values.cast(kind).cast(pa.large_binary())
        elif values.null_count < len(values):
            row = number + 1 + values.is_valid().index(True).as_py()
            raise InputError(f"row {row}: column {column!r} holds {kind}, not text")
        for value in values:
            yield str(value.as_buffer(), "utf-8", "surrogatepass") if value.is_valid else None
        number += len(values)


def parquet_stories(path: Path, column: str) -> Iterator[str | None]:
    """Yields the stories of a .parquet file."""
    import pyarrow
    from pyarrow import parquet

    # Page by page, and no more rows at once than about a megabyte. A page can be large, and other
    # pools of memory would keep it when it is done with.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as file:
        meta = file.metadata
        size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        rows = min(max(CHUNK * meta.num_rows // (size or 1), 1), TABLE_ROWS)
        batches = file.iter_batches(rows, columns=[column], use_threads=False)
        yield from arrow_stories(batches, column, file.schema_arrow.names)


def count_rows(paths: list[Path]) -> int | None:
    """Counts the rows of all files, where they are tables that know it."""
    if any(path.suffix.lower() != ".parquet" for path in paths):
        return None
    from pyarrow import parquet

    total = 0
    for path in paths:
        refuse_pointer(path)
        with reading(path):
            total += parquet.read_metadata(path).num_rows
    return total


# --- Files of every kind ---

READERS: dict[str, Callable[[Path, str], Iterator[str | None]]] = {
    ".txt": text_stories,
    ".jsonl": jsonl_stories,
    ".json": json_stories,
    ".csv": table_stories,
    ".tsv": table_stories,
    ".parquet": parquet_stories,
}
KINDS_READ = f"{', '.join(READERS)}; all but .parquet also packed as {', '.join(PACKED)}"


def kind_of(name: str) -> str:
    """Returns the kind of a data file by its name, a key of READERS; empty for all others."""
    name = name.lower()
    unpacked = name.removesuffix(next((end for end in PACKED if name.endswith(end)), ""))
    kind = PurePath(unpacked).suffix
    return kind if kind in READERS and (unpacked == name or kind != ".parquet") else ""


def read_stories(path: Path, where: str, column: str) -> Iterator[str | None]:
    """Yields the text column of a file, which messages call `where`: text, or None for a null.

    Raises InputError for anything else.
    """
    with reading(where):
        refuse_pointer(path)
        yield from READERS[kind_of(path.name)](path, column)
