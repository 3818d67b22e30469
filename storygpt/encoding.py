"""Stories as token ids, whatever they hold: text that spells a special token, half a character,
miles of white space."""

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import tiktoken

from config import InputError
from storygpt.cli import one_line
from storygpt.tokenizer import END_OF_TEXT, load_tokenizer

# GPT-2's pattern takes white space before a word as one piece but for its last character, and at
# the end of the text as one piece.
WHITE_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_WHITE_SPACE = re.compile(rf"{WHITE_SPACE}{{1000,}}(?:(?={WHITE_SPACE})|\Z)")
OPENING_WORDS = 4
LONGEST_OPENING = 40  # characters
WITHOUT_SPACES = re.compile("[\u3005\u3040-\u30ff\u3400-\u9fff，、]{4}")  # Chinese, Japanese


class Encoded(NamedTuple):
    """Stories as one (tokens,) uint16 array, and of each story, (stories,): its tokens and UTF-8
    bytes as uint32, 16 bytes of hash as two uint64, (stories, 2), and a hash of its opening as
    uint64, 0 where it has none."""

    ids: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    hashes: np.ndarray
    openings: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Returns where each story begins among all ids, and where the last ends: (stories + 1,)
        int64."""
        return np.concatenate(([0], self.tokens.cumsum(dtype=np.int64)))


NO_STORIES = Encoded(
    ids=np.empty(0, "<u2"),
    tokens=np.empty(0, np.uint32),
    bytes=np.empty(0, np.uint32),
    hashes=np.empty((0, 2), np.uint64),
    openings=np.empty(0, np.uint64),
)


def concatenate(parts: Iterable[Encoded]) -> Encoded:
    """Returns the stories of all parts, in their order."""
    return Encoded._make(map(np.concatenate, zip(NO_STORIES, *parts, strict=True)))


def encode_stories(stories: list[str], vocab_size: int) -> Encoded:
    """Encodes each story, and puts an end-of-text behind it.

    Raises InputError for what cannot be encoded.
    """
    try:
        texts = [story.encode() for story in stories]
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but UTF-8 cannot
        whole = [s.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for s in stories]
        return encode_stories(whole, vocab_size)
    tokenizer = load_tokenizer(vocab_size)
    ids = encode_joined(stories, tokenizer)
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    return Encoded(
        ids=ids,
        tokens=np.diff(ends, prepend=-1).astype(np.uint32),
        bytes=np.array([len(text) for text in texts], np.uint32),
        hashes=hash_texts(texts, 16).reshape(-1, 2),
        openings=hash_texts([opening_of(story).encode() for story in stories], 8),
    )


def hash_texts(texts: list[bytes], size: int) -> np.ndarray:
    """Returns `size` bytes of hash of each text, all 0 where it is empty, as uint64."""
    hashes = [
        hashlib.blake2b(text, digest_size=size).digest() if text else bytes(size) for text in texts
    ]
    return np.frombuffer(b"".join(hashes), np.uint64)


def opening_of(story: str) -> str:
    """Returns a story's first four words, in a script without spaces four characters, without the
    punctuation behind them; "" where it has fewer or they are more than 40 characters."""
    words = story[: 2 * LONGEST_OPENING].split(maxsplit=OPENING_WORDS)[:OPENING_WORDS]
    if len(words) == OPENING_WORDS:
        opening = " ".join(words)
    elif words and WITHOUT_SPACES.match(words[0]):
        opening = words[0][:OPENING_WORDS]
    else:
        return ""
    opening = opening.rstrip(".,;:!?…\"'”’)，、")
    return opening if len(opening) <= LONGEST_OPENING else ""


def encode_joined(stories: list[str], tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Encodes stories with an end-of-text behind each: (tokens,) uint16."""
    if len(stories) > 1:  # in one call: a call a story is slower
        joined = END_OF_TEXT.join([*stories, ""])
        if joined.count(END_OF_TEXT) == len(stories):  # where a story spells it, it stays text
            with suppress(ValueError):
                return tokenizer.encode_to_numpy(joined, allowed_special={END_OF_TEXT}).astype(
                    "<u2"
                )
    end = np.array([tokenizer.eot_token], "<u2")
    parts = [part for story in stories for part in (encode_text(story, tokenizer), end)]
    return np.concatenate([NO_STORIES.ids, *parts])


def encode_text(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Encodes a text in which nothing is special: (tokens,) uint16.

    Raises InputError for what cannot be encoded.
    """
    try:
        with suppress(ValueError):
            return tokenizer.encode_to_numpy(text, disallowed_special=()).astype("<u2")
        return encode_between_white_space(text, tokenizer)
    except ValueError as error:
        raise InputError(
            f"the story that begins {text[:40]!r} cannot be encoded: {one_line(error)}"
        ) from error


def encode_between_white_space(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Encodes a text with more white space in a row than the engine that finds the pattern can go
    back over, about a million, by giving it the pieces that it would find there."""
    pieces, end = [], 0
    for match in LONG_WHITE_SPACE.finditer(text):
        pieces += [text[end : match.start()], match[0]]
        end = match.end()
    pieces.append(text[end:])
    ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate(ids).astype("<u2")
