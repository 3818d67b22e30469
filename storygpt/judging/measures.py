"""How stories read, in numbers that need no judge: taken in the same way of generated stories and
of as many real ones, they show what a model has not learned.

A measure takes the stories of a set and gives a (stories,) float64 array, NaN for a story that it
says nothing of. A row of the table is one number of that array, with an interval from resampling
the stories (Efron, 1979).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tiktoken

from storygpt.tokenizer import story_text

DISTINCT_WORDS = 50  # of each story: the longer a text, the smaller its share of distinct n-grams
LENGTHS = (12, 25)  # tokens, of runs that count as copied
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Story:
    """A story as far as the context goes: (tokens,) int64 ids without end-of-text, and whether it
    ended. The text of one that did not leaves out the sentence in which it was cut."""

    ids: np.ndarray
    text: str
    ended: bool


def read_story(ids: Sequence[int], tokenizer: tiktoken.Encoding, most: int) -> Story:
    """Makes a story of `ids`, cut to `most` tokens; it ended where an end-of-text is among them."""
    ids = [int(i) for i in ids[:most]]
    ended = tokenizer.eot_token in ids
    ids = ids[: ids.index(tokenizer.eot_token)] if ended else ids
    text = story_text(tokenizer, ids)
    if not ended and len(sentences(text)) > 1:
        text = text[: text.rindex(sentences(text)[-1])]
    return Story(np.array(ids, np.int64), text.strip(), ended)


SENTENCE_END = re.compile(
    r"""(?<=[.!?।؟۔])\s+|(?<=[.!?]["”'])\s+(?![a-z])|\n+"""
    r"""|(?<=[。！？])\s*(?![\s」』”’。！？])|(?<=[。！？][」』”’])\s*"""  # nothing stands between
)


def sentences(text: str) -> list[str]:
    """Splits a text into sentences. `"Look!" said Tom.` is one: after a quotation a small letter
    goes on."""
    return [part for part in SENTENCE_END.split(text.strip()) if part]


def words(text: str) -> list[str]:
    """Splits a text into words, in small letters and without punctuation."""
    return re.findall(r"\w[\w'’]*", text.lower())


# --- Measures ---


def ends(stories: Sequence[Story]) -> np.ndarray:
    """Returns 1 for a story that ended within the context."""
    return np.array([story.ended for story in stories], float)


def length(stories: Sequence[Story]) -> np.ndarray:
    """Counts the words."""
    return np.array([len(words(story.text)) for story in stories], float)


def distinct(stories: Sequence[Story], n: int) -> np.ndarray:
    """Returns the share of distinct ones among the n-grams of words of all stories (Li et al.,
    2016, arXiv:1510.03055), of which each gives its first DISTINCT_WORDS; shorter ones give none.

    A story's value is the mean of 1 / (occurrences in the set) over its n-grams: stories have
    equally many, so that the mean of their values is that share.
    """
    beginnings = [words(story.text)[:DISTINCT_WORDS] for story in stories]
    grams = [n_grams(text, n) if len(text) == DISTINCT_WORDS else [] for text in beginnings]
    count = Counter(gram for story in grams for gram in story)
    return np.array([mean(1 / count[gram] for gram in story) for story in grams])


def said_again(stories: Sequence[Story]) -> np.ndarray:
    """Returns the share of a story's 3-grams of words that it has said before."""
    grams = [n_grams(words(story.text), 3) for story in stories]
    return np.array([1 - len(set(each)) / len(each) if each else math.nan for each in grams])


def n_grams(text: list[str], n: int) -> list[tuple[str, ...]]:
    """Returns the runs of `n` words, one from each word that so many begin with."""
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def well_formed(stories: Sequence[Story]) -> np.ndarray:
    """Returns the share of a story's sentences that begin with a capital and end in a mark."""
    form = re.compile(r"""["“']?[A-Z].*[.!?]["”']?""", re.DOTALL)
    split = [sentences(story.text) for story in stories]
    return np.array([mean(form.fullmatch(part) is not None for part in parts) for parts in split])


def find_names(text: str) -> set[str]:
    """Finds the words that `text` writes with a capital inside sentences more often than not."""
    capital = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
    small = Counter(re.findall(r"\b[a-z]+", text))
    return {word for word, count in capital.items() if count > small[word.lower()]}


class Named(NamedTuple):
    """The names in a story's first two sentences, in its last third, and between them."""

    first: list[str]
    between: list[str]
    last: list[str]


def named(story: Story, names: set[str]) -> Named:
    """Finds where a story says which of `names`; none in one of fewer than three sentences."""
    parts = sentences(story.text)
    if len(parts) < 3:
        return Named([], [], [])
    last = len(parts) - len(parts) // 3

    def within(start: int, end: int) -> list[str]:
        said = re.findall(r"\w+", " ".join(parts[start:end]))
        return [word for word in said if word in names]

    return Named(within(0, 2), within(2, last), within(last, len(parts)))


def returns(stories: Sequence[Story], names: set[str]) -> np.ndarray:
    """Returns 1 where somebody named in the first two sentences is named in the last third; says
    nothing of a story that begins without a name."""

    def value(said: Named) -> float:
        return float(not {*said.first}.isdisjoint(said.last)) if said.first else math.nan

    return np.array([value(named(story, names)) for story in stories])


def taken_over(stories: Sequence[Story], names: set[str]) -> np.ndarray:
    """Returns 1 where the commonest name of the last third was not there before; says nothing of a
    story that has no name there."""

    def value(said: Named) -> float:
        if not said.last:
            return math.nan
        commonest = Counter(said.last).most_common(1)[0][0]  # of several the first
        return float(commonest not in said.first + said.between)

    return np.array([value(named(story, names)) for story in stories])


def mean(values: Iterable[float]) -> float:
    """Returns the mean; NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# --- Rows ---


def middle_half(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the third quartile less the first."""
    low, high = np.percentile(values, (25, 75), axis=axis)
    return high - low


@dataclass(frozen=True)
class Row:
    """A line of the table: what it says, in which unit, and what it takes of the values."""

    label: str
    unit: str = "%"
    statistic: Callable = np.mean


# The first three say how long stories are, the others how they read: shuffling a story's sentences
# or words changes those.
ROWS = {
    "ends": Row("stories that end within the context"),
    "length": Row("length, median", "words", np.median),
    "spread": Row("length, middle half", "words", middle_half),
    **{f"distinct_{n}": Row(f"distinct {n}-grams of words") for n in (1, 2, 3)},
    "said_again": Row("3-grams of words said before in the story"),
    **{f"copied_{n}": Row(f"tokens in runs of {n} or more from train.bin") for n in LENGTHS},
    "well_formed": Row("sentences with a capital and a mark"),
    "returns": Row("a name of the opening comes back at the end"),
    "taken_over": Row("a new name takes over at the end"),
    "loss": Row("the model's own loss", "bits a byte"),
    "keeps": Row("hero and object kept to the end"),
}


def read_measures(stories: Sequence[Story], names: set[str]) -> dict[str, np.ndarray]:
    """Takes the measures that need the stories alone: {name of the row: (stories,) values}."""
    return {
        "ends": ends(stories),
        "length": length(stories),
        "spread": length(stories),
        **{f"distinct_{n}": distinct(stories, n) for n in (1, 2, 3)},
        "said_again": said_again(stories),
        "well_formed": well_formed(stories),
        "returns": returns(stories, names),
        "taken_over": taken_over(stories, names),
    }


def with_interval(name: str, values: np.ndarray, seed: int) -> list[float] | None:
    """Returns the number of the row `name` and both ends of its 95 % interval, from NUM_RESAMPLES
    sets of stories drawn with replacement; None where no story has a value."""
    values, statistic = values[np.isfinite(values)], ROWS[name].statistic
    if not len(values):
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(NUM_RESAMPLES, len(values)))
    low, high = np.percentile(statistic(values[draws], axis=1), (2.5, 97.5))
    return [round(float(x), 6) for x in (statistic(values, axis=0), low, high)]


def story_table(columns: dict[str, dict[str, list[float] | None]]) -> str:
    """Writes {title of a column: {name of a row: its numbers}} as a Markdown table."""
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for name, row in ROWS.items():
        if any(name in column for column in columns.values()):
            cells = [cell(row, column.get(name)) for column in columns.values()]
            lines.append([f"{row.label}, {row.unit}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def cell(row: Row, numbers: list[float] | None) -> str:
    """Writes `93.5 (89.0–97.0)`."""
    if numbers is None:
        return "–"
    scale, digits = {"%": (100, 1), "words": (1, 0)}.get(row.unit, (1, 3))
    value, low, high = (f"{scale * number:.{digits}f}" for number in numbers)
    return f"{value} ({low}–{high})"
