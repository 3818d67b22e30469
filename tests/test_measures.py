import math

import numpy as np
import pyarrow.parquet
import pytest
import torch

from storygpt.builtin_stories import sample_stories
from storygpt.copies import CopySearch, read_chunks
from storygpt.losses import story_losses
from storygpt.measures import (
    LENGTHS,
    ROWS,
    Story,
    distinct,
    find_names,
    length,
    read_measures,
    read_story,
    returns,
    said_again,
    sentences,
    shuffle_sentences,
    shuffle_words,
    story_table,
    summarize,
    taken_over,
    well_formed,
)
from storygpt.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(512)
NAN = math.nan


def stories(*texts: str) -> list[Story]:
    return [Story(np.array(TOKENIZER.encode_ordinary(text)), text, True) for text in texts]


def same(values: np.ndarray, expected: list[float]) -> bool:
    return np.allclose(values, expected, equal_nan=True)


# --- Each measure, on stories whose value is known ---


def test_what_is_a_sentence():
    text = 'Tom ran. "Look!" said Mia. "A cat!" She sat\nThen they left.'
    assert sentences(text) == [
        "Tom ran.", '"Look!" said Mia.', '"A cat!"', "She sat", "Then they left."
    ]  # fmt: skip
    assert sentences(" ") == []


def test_a_story_ends_where_it_says_so_or_where_the_context_does():
    ids = TOKENIZER.encode_ordinary("Tom ran. Mia sat down.")
    whole = read_story([*ids, TOKENIZER.eot_token, 5], TOKENIZER, len(ids) + 1)
    assert whole.ended and whole.text == "Tom ran. Mia sat down." and whole.ids.tolist() == ids
    cut = read_story([*ids, TOKENIZER.eot_token], TOKENIZER, len(ids) - 1)
    assert not cut.ended and cut.text == "Tom ran." and cut.ids.tolist() == ids[:-1]
    again = TOKENIZER.encode_ordinary("Tom sat down. He ate. Tom sat down.")
    assert read_story(again, TOKENIZER, len(again) - 1).text == "Tom sat down. He ate."
    assert read_story(ids[:2], TOKENIZER, 9).text == TOKENIZER.decode(
        ids[:2]
    )  # nothing else to say
    empty = read_story([TOKENIZER.eot_token], TOKENIZER, 9)
    assert empty.ended and empty.text == "" and len(empty.ids) == 0


def test_length_counts_words():
    assert same(length(stories("Tom's dog ran.", "", '"No!" - he said.')), [3, 0, 3])


def test_distinct_is_the_share_over_all_stories():
    one, other = " ".join(map(str, range(50))), " ".join(map(str, range(25, 75)))
    values = distinct(stories(one + " more", other, "too short"), 1)
    assert np.nanmean(values) == pytest.approx(75 / 100) and np.isnan(values[2])
    pairs = distinct(stories("a b " * 25, one), 2)  # a b, b a, and 49 of the other story
    assert np.nanmean(pairs) == pytest.approx((2 + 49) / 98)


def test_said_again():
    assert same(said_again(stories("a b c d. A b c d!", "a b c d", "a b")), [2 / 6, 0, NAN])


def test_well_formed():
    good = 'Tom ran. "Who is it?" he said. "Me!"'
    values = well_formed(stories(good, "tom ran. He sat", "Tom ran. it rained.", ""))
    assert same(values, [1, 0, 1 / 2, NAN])


def test_names_are_capitals_inside_sentences():
    text = "One day, Tom met Rose and Mr. Bear. A rose is red, a bear is a bear. Then I sat by Tom."
    assert find_names(text) == {"Tom"} | {"Mr"}  # rose and bear are words, Then begins a sentence


def test_characters():
    told = stories(
        "Tom ran. Mia sat. He fell. She saw. He got up. Tom was glad.",  # Tom comes back
        "Tom ran. Mia sat. He fell. Ben saw. Ben ran. Ben met Tom.",  # Ben was there before
        "Tom ran. He sat. He fell. He saw. Sam came. Sam said to Tom that Sam sat.",  # Sam was not
        "A boy ran. It rained. He fell. He saw. He got up. He was glad.",
        "Tom ran. Tom sat.",
    )
    names = {"Tom", "Mia", "Ben", "Sam"}
    assert same(returns(told, names), [1, 1, 1, NAN, NAN])
    assert same(taken_over(told, names), [0, 0, 1, NAN, NAN])
    assert same(returns(stories("Tom ran. He sat. Mia came."), names), [0])


def test_intervals():
    values = np.array([0.0, 1.0] * 50 + [NAN])
    number, low, high = summarize("well_formed", values, 7)
    assert (
        number == 0.5
        and low == pytest.approx(0.4, abs=0.03)
        and high == pytest.approx(0.6, abs=0.03)
    )
    assert summarize("well_formed", values, 7) == [number, low, high]  # the same seed
    assert summarize("returns", np.array([NAN]), 7) is None
    assert summarize("length", np.array([1.0, 2.0, 90.0]), 7)[0] == 2  # the median
    assert summarize("spread", np.arange(101.0), 7)[0] == 50


def test_table():
    columns = {"told": {"ends": [0.5, 0.25, 0.75], "loss": None}, "real": {"ends": [1, 1, 1]}}
    lines = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in story_table(columns).splitlines()
    ]
    assert lines[0] == ["", "told", "real"]
    assert lines[2] == [f"{ROWS['ends'].label}, %", "50.0 (25.0–75.0)", "100.0 (100.0–100.0)"]
    assert lines[3] == ["the model's own loss, bits a byte", "–", "–"] and len(lines) == 4


# --- Copies ---


def longest_match(told: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The tokens that stand in train from each told position, by trying all: (told,)."""
    reach = np.zeros((len(told) + 1, len(train) + 1), int)
    for i in reversed(range(len(told))):
        reach[i, :-1] = (told[i] == train) * (1 + reach[i + 1, 1:])
    return reach[:-1].max(1)


@pytest.mark.parametrize("symbols", [3, 50])
def test_copies_are_those_that_trying_all_finds(tmp_path, symbols):
    rng = np.random.default_rng(symbols)
    train = rng.integers(symbols, size=3_000).astype("<u2")
    told = [rng.integers(symbols, size=size) for size in (0, 3, 40, 41, 90)]
    told += [np.concatenate((told[2], train[985:1030], told[3]))]  # a copy, across chunks' border
    train[1_500] = 0
    told += [train[1_480:1_500], train[1_501:1_520]]  # two short ones, that are not one
    train.tofile(tmp_path / "train.bin")
    search = CopySearch(told)
    chunks = list(read_chunks(tmp_path / "train.bin", 200, 1_000))
    assert [len(chunk) for chunk in chunks] == [1_000, 1_200, 1_200]
    for chunk in chunks:
        search.scan(chunk)
    reach = [longest_match(ids, train) for ids in told]
    for n in LENGTHS:
        shares = []
        for r in reach:
            covered = np.zeros(len(r), bool)
            for i in np.flatnonzero(r >= n):
                covered[i : i + n] = True
            shares.append(covered.mean() if len(r) else NAN)
        assert same(search.share(n), shares)
    assert search.longest == max(r.max() for r in reach if len(r)) >= 45
    run = search.longest_run()
    assert any((train[i : i + len(run)] == run).all() for i in range(len(train) - len(run) + 1))


def test_no_copies_in_shuffled_text(tmp_path):
    rng = np.random.default_rng(1)
    train = np.array(TOKENIZER.encode_ordinary(" ".join(sample_stories(200))), "<u2")
    search = CopySearch([rng.permutation(train[:5_000])])
    search.scan(train)
    assert search.share(12)[0] == 0 and search.longest == 0 and len(search.longest_run()) == 0


@pytest.mark.parametrize(("shuffle", "split"), [(shuffle_sentences, sentences),
                                                (shuffle_words, str.split)])  # fmt: skip
def test_shuffled_stories_are_of_as_many_parts_and_end_as_before(shuffle, split):
    told = [*stories("Tom ran. Mia sat down. Tom fell.", "It rained. He slept.")]
    told.append(Story(told[0].ids, "Ben saw it.", False))
    dealt = shuffle(told, TOKENIZER, 1)
    for one, other in zip(told, dealt, strict=True):
        assert len(split(one.text)) == len(split(other.text)) and one.ended == other.ended
        assert TOKENIZER.decode(other.ids.tolist()) == other.text
    before, after = (sorted(part for story in each for part in split(story.text))
                     for each in (told, dealt))  # fmt: skip
    assert before == after and [s.text for s in told] != [s.text for s in dealt]


# --- All rows: what they tell apart ---


def grammar(number: int, folder) -> list[str]:
    return list(sample_stories(number, seed=1))


def real(number: int, folder) -> list[str]:
    path = next(iter(sorted(folder.rglob("train*.parquet"))))
    return pyarrow.parquet.read_table(path)["text"][:number].to_pylist()


def bigram_model(ids: np.ndarray):
    """What has learned which token follows which, as `story_losses` takes a model."""
    counts = np.full((512, 512), 0.01)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    logits = torch.from_numpy(np.log(counts))
    return lambda idx: logits[idx]


@pytest.fixture(scope="module", params=[grammar, real])
def columns(request):
    """All rows of two sets of 200 real stories, and of the first one shuffled."""
    folder = request.getfixturevalue("tinystories") if request.param is real else None
    texts = request.param(2_400, folder)
    end_of_text = TOKENIZER.eot_token
    ids = [[*TOKENIZER.encode_ordinary(text), end_of_text] for text in texts]
    first, second = (
        [read_story(i, TOKENIZER, 512) for i in part] for part in (ids[:200], ids[200:400])
    )
    sets = {
        "held-out": first,
        "other": second,
        "sentences": shuffle_sentences(first, TOKENIZER, 1),
        "words": shuffle_words(first, TOKENIZER, 1),
    }
    train = np.array([token for story in ids[400:] for token in story])
    names, model = find_names(TOKENIZER.decode(train.tolist())), bigram_model(train)
    result = {}
    for title, told in sets.items():
        search = CopySearch([story.ids for story in told])
        search.scan(train)
        nats = story_losses(model, [s.ids for s in told], end_of_text, 512, 16, torch.device("cpu"))
        values = read_measures(told, names)
        values |= {f"copied_{n}": search.share(n) for n in LENGTHS}
        values["loss"] = nats / [len(story.text.encode()) for story in told]
        result[title] = {name: summarize(name, x, 1) for name, x in values.items()}
    return result


def apart(one: list[float], other: list[float]) -> bool:
    """Whether two intervals have nothing in common."""
    return one[1] > other[2] or other[1] > one[2]


def test_real_stories_are_like_other_real_stories(columns):
    assert [n for n, x in columns["held-out"].items() if apart(x, columns["other"][n])] == []


def test_shuffled_stories_are_not(columns):
    kept = {name for name, row in ROWS.items() if row.told_apart} - {"keeps"}
    found = {
        name
        for name, x in columns["held-out"].items()
        if apart(x, columns["sentences"][name]) or apart(x, columns["words"][name])
    }
    assert kept <= found, {n: {t: c[n] for t, c in columns.items()} for n in kept - found}
