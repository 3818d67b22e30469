"""Files of stories, as people have them, for the tests of what reads them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config import InputError
from storygpt.sources import open_stories

LONG = [f"Story {i} tells of a cat.\n\nIt had {i} hats." for i in range(12)]
SHORT = [f"Story {i} tells of a cat." for i in range(12)]


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


def refused(path, *says: str, **keywords) -> None:
    with pytest.raises(InputError) as error:
        read(path, **keywords)
    for words in (str(path), *says):
        assert words in str(error.value), error.value


def txt(stories) -> str:
    return "".join(f"{story}\n<|endoftext|>\n" for story in stories)


def jsonl(stories, **others) -> str:
    return "".join(json.dumps({"text": story} | others) + "\n" for story in stories)


def csv(stories, separator: str = ",") -> str:
    rows = ('"{}"'.format(story.replace('"', '""')) + f"{separator}1\n" for story in stories)
    return f"text{separator}n\n" + "".join(rows)


def parquet(stories, kind=None, **others) -> bytes:
    texts = stories if isinstance(stories, pa.Array) else pa.array(stories, kind)
    columns = {"text": texts} | {name: [value] * len(texts) for name, value in others.items()}
    pq.write_table(pa.table(columns), buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()
