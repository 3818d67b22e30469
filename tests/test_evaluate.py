import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import evaluate
from config import GPTConfig, TrainingConfig
from model import GPT
from storygpt import telling
from storygpt.builtin_stories import sample_stories
from storygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from storygpt.copies import read_chunks
from storygpt.losses import all_windows
from storygpt.measures import ROWS, Story, read_story, sentences, story_table
from storygpt.telling import tell_from
from storygpt.token_files import SplitWriter, data_fingerprint, install, load_meta
from storygpt.tokenizer import load_tokenizer


def test_every_token_is_a_target_once():
    for number in (5, 16, 17, 100, 161):
        tokens = np.arange(1, number + 1, dtype="<u2")
        targets = []
        for x, y in all_windows(tokens, 0, 16, 3):
            assert x.shape == y.shape and x.shape[1] <= 16
            assert np.array_equal(x + 1, y)  # 0, the end-of-text, comes before the first token
            targets += y.flatten().tolist()
        assert targets == tokens.tolist()


# --- A small model and small data, on which all of it is quick ---

TOKENIZER = load_tokenizer(512)
ACCENTS = "Zoé saw a café. “Oh là là!” said Zoé."


def write_data(folder, **stories: list[str]) -> dict:
    """Token files of the `train` and `validation` stories; returns their meta.json."""
    counts, scratch = {}, folder / "scratch"
    scratch.mkdir()
    for split, texts in stories.items():
        writer = SplitWriter(scratch / f"{split}.bin")
        ids = [token for text in texts for token in [*TOKENIZER.encode_ordinary(text), 511]]
        writer.write(np.array(ids, "<u2"))
        writer.count(len(texts), sum(len(text.encode()) for text in texts))
        counts[split] = writer.close()
    meta = {"vocab_size": 512, "end_of_text": 511, "dataset": "builtin", "splits": counts}
    install(scratch, folder, meta)
    return meta


def make_checkpoint(context_length: int) -> dict:
    """One with sharp random weights, so that what it reads matters."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "n_layer": 1, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(context_length=context_length, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weights = {"gpt_config": model.config, "model_state_dict": model.state_dict()}
    return weights | {"training_config": TrainingConfig(), "step": 7, "val_loss": 3.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    """60 stories and two models, one too short for a story."""
    folder, texts = tmp_path_factory.mktemp("small"), list(sample_stories(60, seed=3))
    meta = write_data(folder, train=texts[:48], validation=texts[48:])
    for name, context_length in (("short", 64), ("long", 280)):
        save_checkpoint(folder / f"{name}.pt", make_checkpoint(context_length))
    return SimpleNamespace(folder=folder, meta=meta, train=texts[:48], validation=texts[48:])


def load(small, name: str) -> GPT:
    model, _ = load_model(small.folder / f"{name}.pt")
    return model


@torch.no_grad()
def nats_of_windows(model: GPT, ids: list[int], step: int, keep: int) -> float:
    """Nats of `ids` after an end-of-text in float64: windows of the context that move by `step`,
    of which all but the first count their last `keep`."""
    stream, total, size = torch.tensor([511, *ids]), 0.0, model.config.context_length
    for end in range(size, size + len(ids), step):
        x, y = stream[end - size : end], stream[end - size + 1 : end + 1]
        losses = -model(x[None, : len(y)])[0][0].log_softmax(-1)[range(len(y)), y]
        total += losses[0 if end == size else size - keep :].sum().item()
        if end >= len(ids):
            break
    return total


@pytest.mark.parametrize("split", ["validation", "train"])
def test_losses_agree_with_float64(small, split):
    model, meta = load(small, "short"), load_meta(small.folder, 512)
    arguments = evaluate.Arguments(data_dir=small.folder, split=split, batch_size=5)
    report = evaluate.score(model, {"step": 7}, meta, arguments)
    model.double()
    stories = [TOKENIZER.encode_ordinary(text) for text in getattr(small, split)]
    stream = [token for story in stories for token in [*story, 511]]
    whole = nats_of_windows(model, stream, 64, 64)
    alone = sum(nats_of_windows(model, story, 32, 32) for story in stories)
    bits = math.log(2) * sum(len(text.encode()) for text in getattr(small, split))
    assert report["tokens"] == len(stream) and report["step"] == 7 and report["split"] == split
    for name, expected in (
        ("loss", whole / len(stream)),
        ("perplexity", math.exp(whole / len(stream))),
        ("bits_per_byte", whole / bits),
        ("story_bits_per_byte", alone / bits),
    ):
        assert report[name] == pytest.approx(expected, rel=1e-5), name


def test_the_judge_knows_what_it_is_shown(small, monkeypatch):
    model, meta = load(small, "long"), load_meta(small.folder, 512)
    whole = [read_story([*TOKENIZER.encode_ordinary(text), 511], TOKENIZER, 280)
             for text in small.validation]  # fmt: skip
    half = [text[: len(text) // 2] for text in small.validation]
    mixed = [a + b[len(a) :] for a, b in zip(half, small.validation[1:], strict=False)]
    known = TOKENIZER.encode_ordinary(small.train[5])
    sets = {
        "held-out": whole,
        "unended": [Story(story.ids, story.text, False) for story in whole],
        "mixed": [Story(np.array(TOKENIZER.encode_ordinary(t)), t, True) for t in mixed],
        "known": [Story(np.array(known), small.train[5], True)],
        "of more bytes than letters": [
            Story(np.array(TOKENIZER.encode_ordinary(ACCENTS)), ACCENTS, True),
            Story(np.array([], int), "", True),  # has no loss
        ],
    }
    # names are found in the first chunk; no later one holds a whole story
    monkeypatch.setattr(
        evaluate,
        "read_chunks",
        lambda path, overlap: read_chunks(path, overlap, 2**20 if overlap == 1 else 100),
    )
    arguments = evaluate.Arguments(data_dir=small.folder, num_stories=12)
    columns, longest = evaluate.judge(model, meta, sets, arguments)
    for title, ended, kept in (
        ("held-out", 1, 1), ("unended", 0, 0), ("mixed", 1, 0), ("known", 1, 1),
    ):  # fmt: skip
        assert (columns[title]["ends"][0], columns[title]["keeps"][0]) == (ended, kept), title
    assert columns["held-out"]["returns"][0] == 1 and columns["mixed"]["returns"][0] < 1
    assert longest["known"] == {"tokens": len(known), "text": small.train[5]}
    assert longest["held-out"]["tokens"] < 150 and columns["known"]["copied_25"][0] == 1
    assert longest["held-out"]["text"] in " ".join(small.train)
    for title, text in (("known", small.train[5]), ("of more bytes than letters", ACCENTS)):
        nats = nats_of_windows(model, TOKENIZER.encode_ordinary(text), 280, 280)
        bits = nats / math.log(2) / len(text.encode())
        assert columns[title]["loss"][0] == pytest.approx(bits, rel=1e-5), title


def test_stories_are_told_as_asked_and_beside_their_own_openings(small):
    meta = load_meta(small.folder, 512)
    asked = {"temperature": 0.9, "top_k": 9, "top_p": 0.6}

    def collect(seed: int, **changes) -> dict[str, list[Story]]:
        flags = {"data_dir": small.folder, "num_stories": 5, "seed": seed} | asked | changes
        return evaluate.collect(load(small, "long"), meta, TOKENIZER, evaluate.Arguments(**flags))

    sets = collect(5)
    assert list(sets) == ["told from nothing", "told from first sentences", "held-out"]
    held_out = [story.text for story in sets["held-out"]]
    assert len({*held_out}) == 5 and {*held_out} <= {*small.validation}
    for told, text in zip(sets["told from first sentences"], held_out, strict=True):
        opening = TOKENIZER.encode_ordinary(sentences(text)[0])
        assert told.ids[: len(opening)].tolist() == opening
    model = load(small, "long")
    expected = [
        read_story(ids, TOKENIZER, 280).ids.tolist()
        for ids in tell_from(model, [[]] * 5, 511, 5, *asked.values())
    ]

    def ids(sets: dict) -> list[list[int]]:
        return [story.ids.tolist() for story in sets["told from nothing"]]

    assert ids(sets) == ids(collect(5)) == expected
    others = (collect(6), collect(5, temperature=2), collect(5, top_k=2), collect(5, top_p=1))
    assert all(ids(other) != expected for other in others)
    assert [story.text for story in others[0]["held-out"]] != held_out


def test_a_story_that_is_white_space_as_far_as_the_context_goes_has_no_opening(small, tmp_path):
    meta = write_data(tmp_path, train=small.train[:2], validation=["\n" * 70 + "Tom ran."])
    arguments = evaluate.Arguments(data_dir=tmp_path, num_stories=1)
    sets = evaluate.collect(load(small, "short"), meta, TOKENIZER, arguments)
    assert sets["held-out"][0].text == "" and len(sets["told from first sentences"]) == 1
    columns, _ = evaluate.judge(load(small, "short"), meta, sets, arguments)
    assert columns["held-out"]["length"] == [0, 0, 0]


ASKED = {"temperature": 0.9, "top_k": 9, "top_p": 0.6, "seed": 5}


@pytest.fixture(scope="module")
def evaluated(small, script):
    """evaluate.json of the small model, and what was printed."""
    flags = ("--checkpoint", small.folder / "long.pt", "--data_dir", small.folder, "--controls")
    flags += ("--num_stories", 4, "--device", "cpu", "--output", small.folder / "a.json")
    flags += tuple(f"--{name}={value}" for name, value in ASKED.items())
    result = script("evaluate.py", *flags)
    assert result.code == 0, result.output
    return json.loads((small.folder / "a.json").read_text()), result.output


def test_what_is_printed_written_and_drawn(small, evaluated):
    report, output = evaluated
    assert (small.folder / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert list(report["columns"]) == [
        "told from nothing", "told from first sentences", "held-out",
        "sentences shuffled", "words shuffled",
    ]  # fmt: skip
    assert all(set(column) == set(ROWS) for column in report["columns"].values())
    assert story_table(report["columns"]) in output
    assert "longest run from train.bin, held-out:" in output
    printed = [float(n) for n in re.findall(r"^\w.*  ([\d.]+)(?: nats.*)?$", output, re.M)]
    numbers = [report[name] for name in ("loss", "perplexity", "bits_per_byte")]
    assert np.allclose(printed, numbers, rtol=1e-4)
    assert (report["data"], report["num_stories"]) == (data_fingerprint(small.meta), 4)
    assert {name: report[name] for name in ASKED} == ASKED


def test_evaluations_side_by_side(script, fails, evaluated, tmp_path):
    report, _ = evaluated
    other = report["columns"]["told from nothing"] | {"ends": [0.5, 0.25, 0.75], "returns": None}
    later = report | {"step": 4_000, "columns": report["columns"] | {"told from nothing": other}}
    for name, content in (("a", report), ("b", later)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command = ("experiments.stories.py", "--output", tmp_path / "c.png", tmp_path / "b.json")
    result = script(*command, tmp_path / "a.json")
    assert result.code == 0, result.output
    assert "| step 4,000 " in result.output and "| 50.0 (25.0–75.0) " in result.output
    assert "| held-out " in result.output and "| 100.0 (100.0–100.0) " in result.output
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    fails(*command, tmp_path / "b.json", says="a step of its own")


def test_what_is_drawn_of_evaluations_are_their_numbers(evaluated, tmp_path, monkeypatch):
    from experiments import stories

    report, _ = evaluated
    other = report["columns"]["told from nothing"] | {"ends": [0.5, 0.25, 0.75]}
    later = report | {"step": 4_000, "columns": report["columns"] | {"told from nothing": other}}
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    stories.draw([report, later], "step", "told from nothing", tmp_path / "c.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    first = report["columns"]["told from nothing"]["ends"][0]
    assert lines["told from nothing"].get_xydata().tolist() == [[7, 100 * first], [4_000, 50]]
    assert lines["held-out"].get_ydata().tolist() == [100, 100]


@pytest.mark.parametrize(("end", "ended"), [(511, 0), (114, 2)])
@torch.no_grad()
def test_prompts_of_different_lengths_go_side_by_side(end, ended, small):
    model = load(small, "short")
    prompts = [[], [5], list(range(40)), list(range(90))]  # the last is longer than the context
    told = tell_from(model, prompts, end, seed=1, temperature=0)
    assert sum(end in ids for ids in told) == ended
    for prompt, ids in zip(prompts, told, strict=True):
        start = torch.tensor([[end, *prompt[:63]]])
        alone = model.generate(start, 65 - start.size(1), temperature=0, end_of_text=end)
        alone = alone[0, 1:].tolist() if len(prompt) < 64 else prompt[:64]
        assert ids == alone + [end] * (64 - len(alone))


@torch.no_grad()
def test_no_batch_of_stories_repeats_another(small, monkeypatch):
    monkeypatch.setattr(telling, "AT_ONCE", 2)
    told = tell_from(load(small, "short"), [[]] * 4, 511, seed=1, temperature=1)
    assert len({tuple(ids) for ids in told}) == 4


def test_mistakes_are_named(fails, small, tmp_path):
    best = ("--checkpoint", small.folder / "short.pt")
    data = ("--data_dir", small.folder)
    fails("evaluate.py", "--checkpoint", tmp_path / "a.pt", says="there is no checkpoint")
    fails("evaluate.py", *best, "--data_dir", tmp_path, says="no prepared data")
    fails("evaluate.py", *best, *data, "--batch_size", 0, says="batch_size must")
    fails("evaluate.py", *best, *data, "--top_p", 0, says="top_p must")
    (tmp_path / "b.json").mkdir()
    for name in ("a.txt", "b.json"):
        fails("evaluate.py", *best, *data, "--output", tmp_path / name, says="is no .json file")
    nowhere = tmp_path / "no" / "a.json"
    fails("evaluate.py", *best, *data, "--output", nowhere, says="in a folder that exists")
    fails("evaluate.py", *best, *data, "--device", "abacus", says="is no device")
    fails("evaluate.py", *best, *data, "--num_stories", 9_999, says="held-out stories to compare")
    cut = shutil.copytree(small.folder, tmp_path / "cut")
    os.truncate(cut / "train.bin", 1_000)
    flags = ("--data_dir", cut, "--num_stories", 1)
    fails("evaluate.py", *best, *flags, says="train.bin has 1,000 bytes")
    broken = load_checkpoint(small.folder / "short.pt")
    broken["model_state_dict"]["ln_f.weight"][:] = 3e38  # finite, its products are not
    save_checkpoint(tmp_path / "broken.pt", broken)
    fails("evaluate.py", "--checkpoint", tmp_path / "broken.pt", *data, says="weights are broken")
