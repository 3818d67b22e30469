import math

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import nats_of_windows
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from config import GenerationSettings, InputError
from storygpt.builtin_stories import sample_stories
from storygpt.generation import generate_ids
from storygpt.judging import copies, judge
from storygpt.judging.copies import CopySearch, chunks
from storygpt.judging.judge import collect_stories, judge_stories
from storygpt.judging.measures import (
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
    story_table,
    taken_over,
    well_formed,
    with_interval,
)
from storygpt.judging.story_losses import scored_windows, story_losses
from storygpt.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(512)
NAN = math.nan


def stories(*texts: str) -> list[Story]:
    return [
        Story(np.array(TOKENIZER.encode_ordinary(text), np.int64), text, True) for text in texts
    ]


def same(values: np.ndarray, expected: list[float]) -> bool:
    return np.allclose(values, expected, equal_nan=True)


# --- Each measure, on stories whose value is known ---


def test_what_is_a_sentence():
    text = 'Tom ran. "Look!" said Mia. "A cat!" She sat\nThen they left.'
    assert sentences(text) == [
        "Tom ran.", '"Look!" said Mia.', '"A cat!"', "She sat", "Then they left."
    ]  # fmt: skip
    assert sentences(" ") == []
    for text in (  # in other scripts
        "从前有一只猫。|它说：「走吧！」|真的吗？！|他们走了。",
        "एक बिल्ली थी। |वह खुश थी।",
        "كانت هناك قطة. |هل رأيتها؟ |نعم.",
    ):
        assert sentences(text.replace("|", "")) == text.replace(" |", "|").split("|")


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
    number, low, high = with_interval("well_formed", values, 7)
    assert (
        number == 0.5
        and low == pytest.approx(0.4, abs=0.03)
        and high == pytest.approx(0.6, abs=0.03)
    )
    assert with_interval("well_formed", values, 7) == [number, low, high]  # the same seed
    assert with_interval("returns", np.array([NAN]), 7) is None
    assert with_interval("length", np.array([1.0, 2.0, 90.0]), 7)[0] == 2  # the median
    assert with_interval("spread", np.arange(101.0), 7)[0] == 50


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
def test_copies_are_those_that_trying_all_finds(symbols, monkeypatch):
    rng = np.random.default_rng(symbols)
    train = rng.integers(symbols, size=3_000).astype("<u2")
    told = [rng.integers(symbols, size=size) for size in (0, 3, 40, 41, 90)]
    told += [np.concatenate((told[2], train[985:1030], told[3]))]  # a copy, across chunks' border
    train[1_500] = 0
    told += [train[1_480:1_500], train[1_501:1_520]]  # two short ones, that are not one
    search = CopySearch(told, LENGTHS)
    monkeypatch.setattr(copies, "CHUNK_TOKENS", 1_000)
    parts = list(chunks(train, overlap=200))
    assert [len(part) for part in parts] == [1_000, 1_200, 1_200]
    for part in parts:
        search.scan(part)
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


def test_a_training_split_shorter_than_a_run_has_no_copies():
    search = CopySearch([np.arange(30), np.array([], int)], LENGTHS)
    search.scan(np.arange(5, dtype="<u2"))
    assert same(search.share(12), [0, NAN]) and len(search.longest_run()) == 0


def test_a_set_shorter_than_a_run_has_no_copies():
    """As of one very short story, or of a model that ends at once."""
    for story in ([], [1], [1, 2, 3]):
        search = CopySearch([np.array(story, np.int64)], LENGTHS)
        search.scan(np.arange(100, dtype=np.uint16))
        assert search.longest == 0
        assert all(same(search.share(n), [0.0 if story else NAN]) for n in LENGTHS)


def test_no_copies_in_shuffled_text():
    rng = np.random.default_rng(1)
    train = np.array(TOKENIZER.encode_ordinary(" ".join(sample_stories(200))), "<u2")
    search = CopySearch([rng.permutation(train[:5_000])], LENGTHS)
    search.scan(train)
    assert search.share(12)[0] == 0 and search.longest == 0 and len(search.longest_run()) == 0


# --- Each story's loss ---


def per_story_nats(model, ids: list[int], start: int, context_length: int) -> float:
    """By transformers' own loss: a mean over the labels that are not -100."""
    stream, total, scored, first = [start, *ids], 0.0, 1, 0
    while scored < len(stream):
        # labels are shifted inside the model: a window of the context and one more
        window = stream[first : first + context_length + 1]
        labels = [-100 if first + i < scored else token for i, token in enumerate(window)]
        logits = model(torch.tensor([window[:-1]])).logits
        shifted = torch.tensor([labels[1:]])
        loss = model.loss_function(
            logits, None, vocab_size=model.config.vocab_size, shift_labels=shifted
        )
        total += loss.item() * int((shifted != -100).sum())
        scored = first + len(window)
        first += context_length // 2
    return total


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    )


def gpt_neo() -> GPTNeoForCausalLM:
    shape = {"vocab_size": 700, "max_position_embeddings": 128, "hidden_size": 32}
    layers = {"num_layers": 2, "num_heads": 2, "window_size": 16}
    return GPTNeoForCausalLM(
        GPTNeoConfig(**shape, **layers, attention_types=[[["global", "local"], 1]])
    )


@pytest.mark.parametrize("build", [gpt2, gpt_neo])
@torch.no_grad()
def test_each_story_alone_agrees_with_transformers(build):
    torch.manual_seed(0)
    model = build().eval()
    context_length = model.config.max_position_embeddings
    tokenizer = load_tokenizer(model.config.vocab_size)
    for parameter in model.parameters():  # far from uniform, so that windows matter
        parameter.data *= 3
    texts = [*sample_stories(4), "Hi.", "The end" * 200]
    stories = [np.array(tokenizer.encode_ordinary(text)) for text in texts]
    assert min(map(len, stories)) < context_length < max(map(len, stories)) / 3
    alone = {"context_length": context_length, "batch_size": 4}
    start = tokenizer.eot_token
    nats = story_losses(lambda idx: model(idx).logits, stories, end_of_text=start, **alone)
    expected = [per_story_nats(model, ids.tolist(), start, context_length) for ids in stories]
    assert nats == pytest.approx(expected, rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert nats.sum() / num_bytes == pytest.approx(sum(expected) / num_bytes, abs=1e-5)


@pytest.mark.parametrize("context_length", [1, 2, 5, 8, 40])
def test_every_token_of_a_story_is_scored_once(context_length):
    ids = np.arange(1, 30)
    scored = []
    for x, y in scored_windows(ids, 0, context_length):
        assert len(x) == len(y) <= context_length
        own = y != -100
        assert np.array_equal(x[own] + 1, y[own])
        if scored and context_length > 1:  # from half a context at least
            assert own.argmax() >= context_length // 2
        scored += y[own].tolist()
    assert scored == ids.tolist()
    assert list(scored_windows(ids[:0], 0, context_length)) == []


# --- The judge ---

ACCENTS = "Zoé saw a café. “Oh là là!” said Zoé."


def tokens_of(texts: list[str]) -> np.ndarray:
    """As a token file has them."""
    ids = [token for text in texts for token in [*TOKENIZER.encode_ordinary(text), 511]]
    return np.array(ids, "<u2")


def held_out(texts: list[str]) -> list[np.ndarray]:
    return [tokens_of([text])[:-1] for text in texts]


def test_the_judge_knows_what_it_is_shown(small, monkeypatch):
    model = small.model("long")
    whole = [read_story([*TOKENIZER.encode_ordinary(text), 511], TOKENIZER, 280)
             for text in small.validation]  # fmt: skip
    half = [text[: len(text) // 2] for text in small.validation]
    mixed = [a + b[len(a) :] for a, b in zip(half, small.validation[1:], strict=False)]
    known = TOKENIZER.encode_ordinary(small.train[5])
    sets = {
        "held-out": whole,
        "unended": [Story(story.ids, story.text, False) for story in whole],
        "mixed": stories(*mixed),
        "known": stories(small.train[5]),
        "of more bytes than letters": stories(ACCENTS, ""),  # the second has no loss
    }
    monkeypatch.setattr(copies, "CHUNK_TOKENS", 100)  # none holds a whole story
    told = judge_stories(
        sets, model, tokens_of(small.train), batch_size=16, builtin=True, seed=1337
    )
    columns, longest = told["columns"], told["longest_copy"]
    for title, ended, kept in (
        ("held-out", 1, 1), ("unended", 0, 0), ("mixed", 1, 0), ("known", 1, 1),
    ):  # fmt: skip
        assert (columns[title]["ends"][0], columns[title]["keeps"][0]) == (ended, kept), title
    assert columns["held-out"]["returns"][0] == 1 and columns["mixed"]["returns"][0] < 1
    assert longest["known"] == {"tokens": len(known), "text": small.train[5]}
    assert longest["held-out"]["tokens"] < 150 and columns["known"]["copied_25"][0] == 1
    assert longest["held-out"]["text"] in " ".join(small.train)
    for title, text in (("known", small.train[5]), ("of more bytes than letters", ACCENTS)):
        nats = nats_of_windows(model, TOKENIZER.encode_ordinary(text), context_length=280, step=280)
        bits = nats / math.log(2) / len(text.encode())
        assert columns[title]["loss"][0] == pytest.approx(bits, rel=1e-5), title


def test_names_are_looked_for_at_the_beginning_of_the_training_split(small, monkeypatch):
    sets = {"held-out": stories(*small.validation)}

    def returns_of(train: list[str]) -> list[float]:
        model, ids = small.model("long"), tokens_of(train)
        judged = judge_stories(sets, model, ids, batch_size=16, builtin=False, seed=1)
        return judged["columns"]["held-out"]["returns"]

    named, nameless = small.train, ["it rained. it was wet."] * 9
    monkeypatch.setattr(judge, "NAMES_FROM", len(tokens_of(named)))
    assert returns_of(named) == returns_of(named + nameless) is not None
    assert returns_of(nameless * 200 + named) is None


ASKED = {"temperature": 0.9, "top_k": 9, "top_p": 0.6}


def test_stories_are_generated_as_asked_and_from_held_out_openings(small):
    def collect(seed: int, **changes) -> dict[str, list[Story]]:
        settings = GenerationSettings(**{"max_new_tokens": 280} | ASKED | changes)
        real = held_out(small.validation)
        return collect_stories(
            small.model("long"), real, num_stories=5, settings=settings, seed=seed
        )

    sets = collect(5)
    assert list(sets) == ["told from nothing", "told from first sentences", "held-out"]
    texts = [story.text for story in sets["held-out"]]
    assert len({*texts}) == 5 and {*texts} <= {*small.validation}
    for told, text in zip(sets["told from first sentences"], texts, strict=True):
        opening = TOKENIZER.encode_ordinary(sentences(text)[0])
        assert told.ids[: len(opening)].tolist() == opening
    settings = GenerationSettings(max_new_tokens=280, **ASKED)
    rows = generate_ids(small.model("long"), [[511]] * 5, seed=5, settings=settings)
    expected = [read_story(row[1:], TOKENIZER, 280).ids.tolist() for row in rows]

    def ids(sets: dict) -> list[list[int]]:
        return [story.ids.tolist() for story in sets["told from nothing"]]

    assert ids(sets) == ids(collect(5)) == expected
    others = (collect(6), collect(5, temperature=2), collect(5, top_k=2), collect(5, top_p=1))
    assert all(ids(other) != expected for other in others)
    assert [story.text for story in others[0]["held-out"]] != texts


def test_a_story_that_is_white_space_as_far_as_the_context_goes_has_no_opening(small):
    model, settings = small.model("short"), GenerationSettings(max_new_tokens=64)
    real = held_out(["\n" * 70 + "Tom ran."])
    sets = collect_stories(model, real, num_stories=1, settings=settings, seed=1)
    assert sets["held-out"][0].text == "" and len(sets["told from first sentences"]) == 1
    train = tokens_of(small.train[:2])
    judged = judge_stories(sets, model, train, batch_size=16, builtin=True, seed=1)
    assert judged["columns"]["held-out"]["length"] == [0, 0, 0]


def test_a_story_of_one_sentence_is_not_told_to_its_end_by_its_opening(small):
    """Or the column would show the held-out story, however bad the model is."""
    model, settings = small.model("short"), GenerationSettings(max_new_tokens=64)
    text = "Tom and Mia and the dog and the cat ran and ran and ran."
    sets = collect_stories(model, held_out([text]), num_stories=1, settings=settings, seed=1)
    (told,), ids = sets["told from first sentences"], TOKENIZER.encode_ordinary(text)
    assert told.ids[: len(ids) // 2].tolist() == ids[: len(ids) // 2]
    assert told.ids[: len(ids)].tolist() != ids


def test_more_stories_than_are_held_out_cannot_be_compared(small):
    real, settings = held_out(small.validation), GenerationSettings()
    with pytest.raises(InputError, match="there are 12 held-out stories"):
        collect_stories(small.model("short"), real, num_stories=13, settings=settings, seed=1)


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


def shuffled(told: list[Story], split) -> list[Story]:
    """As many stories of as many sentences, or words, which are drawn from all stories."""
    parts = [split(story.text) for story in told]
    deck = [part for story in parts for part in story]
    deck = iter(np.random.default_rng(1).permutation(deck).tolist())
    texts = [" ".join(next(deck) for _ in story) for story in parts]
    pairs = zip(stories(*texts), told, strict=True)
    return [Story(story.ids, story.text, before.ended) for story, before in pairs]


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
        "sentences": shuffled(first, sentences),
        "words": shuffled(first, str.split),
    }
    train = np.array([token for story in ids[400:] for token in story])
    names, model = find_names(TOKENIZER.decode(train.tolist())), bigram_model(train)
    result = {}
    for title, told in sets.items():
        search = CopySearch([story.ids for story in told], LENGTHS)
        search.scan(train)
        ids = [story.ids for story in told]
        alone = {"end_of_text": end_of_text, "context_length": 512, "batch_size": 16}
        nats = story_losses(model, ids, **alone)
        values = read_measures(told, names)
        values |= {f"copied_{n}": search.share(n) for n in LENGTHS}
        values["loss"] = nats / [len(story.text.encode()) for story in told]
        result[title] = {name: with_interval(name, x, 1) for name, x in values.items()}
    return result


def apart(one: list[float], other: list[float]) -> bool:
    """Whether two intervals have nothing in common."""
    return one[1] > other[2] or other[1] > one[2]


def test_real_stories_are_like_other_real_stories(columns):
    assert [n for n, x in columns["held-out"].items() if apart(x, columns["other"][n])] == []


def test_shuffled_stories_are_not(columns):
    kept = set(ROWS) - {"ends", "length", "spread"}  # which say how long stories are
    kept -= {"keeps"}  # which knows the built-in stories alone
    found = {
        name
        for name, x in columns["held-out"].items()
        if apart(x, columns["sentences"][name]) or apart(x, columns["words"][name])
    }
    assert kept <= found, {n: {t: c[n] for t, c in columns.items()} for n in kept - found}
