"""Stories as ids, whatever they hold."""

import random

import numpy as np
import pytest

from config import InputError
from storygpt.encoding import LONG_WHITE_SPACE, encode_stories, encode_text, opening_of
from storygpt.tokenizer import load_tokenizer


def naive(stories: list[str], vocab_size: int = 50257) -> list[int]:
    tokenizer = load_tokenizer(vocab_size)
    return [t for s in stories for t in [*tokenizer.encode_ordinary(s), vocab_size - 1]]


def stories_of(ids: list[int]) -> list[str]:
    text = load_tokenizer().decode(ids).split("<|endoftext|>")
    assert text.pop() == ""
    return text


@pytest.mark.parametrize("spelled", ["", "<|endoftext|>", "a <|endoftext|>b", "<|endoftext|"])
def test_stories_that_spell_end_of_text_are_encoded_as_text(spelled):
    stories = ["One.", spelled, "|>", "endoftext|> two", None, "three <"]
    kept = [story for story in stories if story]
    encoded = encode_stories(kept, 50257)
    assert encoded.ids.tolist() == naive(kept) and encoded.ids.dtype == "<u2"
    assert encoded.tokens.tolist() == [len(naive([story])) for story in kept]
    assert encoded.bytes.tolist() == [len(story.encode()) for story in kept]
    assert len({tuple(pair) for pair in encoded.hashes.tolist()}) == len(set(kept))


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    encoded = encode_stories(["a \ud800 b", "\ud83d\ude00"], 50257)
    assert stories_of(encoded.ids.tolist()) == ["a \ufffd b", "😀"]
    assert encoded.bytes.tolist() == [len("a \ufffd b".encode()), 4]


WHITE = " \t\n\v\f\r\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"


@pytest.mark.parametrize("before", ["", "a", "a\x1c", "!"])
@pytest.mark.parametrize("after", ["", "b", "\x1d", " ", "'s", "\n", "7"])
def test_white_space_is_cut_where_the_pattern_cuts_it(before, after):
    tokenizer, rng = load_tokenizer(), random.Random(0)
    for length in (999, 1000, 1001, 5000):
        text = before + "".join(rng.choices(WHITE, k=length)) + after + " end. " + " " * length
        pieces = [text[m.start() : m.end()] for m in LONG_WHITE_SPACE.finditer(text)]
        # the blanks between, of which the last leads the word behind, and those at the end
        between = length + (after in ("", " ", "\n")) + (after in (" ", "\n"))
        assert list(map(len, pieces)) == [between - 1] * (between > 1000) + [length + 1] * (
            length >= 999
        )
        refuses = Refusing(tokenizer, len(text))
        assert encode_text(text, refuses).tolist() == tokenizer.encode_ordinary(text)


class Refusing:
    """A tokenizer that gives up on text of one length, as tiktoken does at a million spaces."""

    def __init__(self, tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def encode_to_numpy(self, text: str, **keywords) -> np.ndarray:
        if len(text) == self.length:
            raise ValueError("Max stack size exceeded for backtracking")
        return self.tokenizer.encode_to_numpy(text, **keywords)


def test_a_million_spaces_are_encoded_rightly():
    space = " " * 10**6
    stories = ["Tom", f"Once{space}upon\n", "a time", f"{space}x{space}"]
    encoded = encode_stories(stories, 50257)
    assert encoded.tokens.sum() == len(encoded.ids) and len(encoded.tokens) == 4
    assert stories_of(encoded.ids.tolist()) == stories
    piece = load_tokenizer().encode_ordinary(space[1:])  # all but the space that belongs to "upon"
    words = [load_tokenizer().encode_ordinary(word) for word in ("Once", " upon\n")]
    start = len(naive(stories[:1]))
    assert encoded.ids[start : start + encoded.tokens[1]].tolist() == [
        *words[0],
        *piece,
        *words[1],
        50256,
    ]


def test_what_cannot_be_encoded_is_one_sentence():
    refuses = Refusing(load_tokenizer(), len("Once upon"))
    with pytest.raises(InputError, match="that begins 'Once upon' cannot be encoded: Max"):
        encode_text("Once upon", refuses)


@pytest.mark.parametrize(
    ("story", "opening"),
    [
        ("Once upon a time, there was a cat.", "Once upon a time"),
        ("  One day,\n a little girl", "One day, a little"),
        ("Tom, Ann and Bob.", "Tom, Ann and Bob"),
        ('"No," said the “fox”. He', '"No," said the “fox'),
        ("Too short a", ""),
        ("", ""),
        (" " * 100 + "Once upon a time", ""),
        ("Internationalization notwithstanding they went", ""),
        ("a" * 34 + " b c d e", "a" * 34 + " b c d"),
        ("a" * 35 + " b c d e", ""),
        ("a" * 500, ""),
        ("从前，有一个叫莉莉的小女孩。她喜欢玩。", "从前，有"),
        ("  有一天，莉莉去公园 玩。", "有一天"),
        ("むかしむかし、あるところに", "むかしむ"),
        ("昔々、あるところに", "昔々、あ"),
        ("莉莉。她", ""),
        ("「你好」 莉莉说", ""),
    ],
)
def test_an_opening_is_four_words_or_chinese_characters_of_at_most_forty_letters(story, opening):
    assert opening_of(story) == opening
    (hashed,) = encode_stories([story or "x"], 300).openings
    assert (hashed != 0) == bool(opening)


def test_equal_openings_have_equal_hashes():
    stories = ["Once upon a time, he", "Once upon  a time! She", "Once upon a day we"]
    hashes = encode_stories(stories, 50257).openings
    assert hashes[0] == hashes[1] != hashes[2] and hashes.dtype == np.uint64
