import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import python
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from config import InputError
from experiments.baselines import Model, open_tokenizer, read_earlier, score
from storygpt.builtin_stories import sample_stories
from storygpt.checkpoint import load_checkpoint
from storygpt.formats import tokenizer_files, write_folder
from storygpt.losses import story_losses, story_windows
from storygpt.token_files import load_meta, load_tokens, split_stories
from storygpt.tokenizer import load_tokenizer


def per_story_nats(model, ids: list[int], start: int, context_length: int) -> float:
    """The same by transformers' own loss: a mean over the labels that are not -100."""
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


def gpt2(vocab_size: int, context_length: int):
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=context_length, n_embd=32, n_layer=2, n_head=2
    )
    return GPT2LMHeadModel(config).eval()


def gpt_neo(vocab_size: int, context_length: int):
    config = GPTNeoConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context_length,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
    )
    return GPTNeoForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "vocab_size", "context_length"), [(gpt2, 300, 48), (gpt_neo, 700, 128)]
)
def test_each_story_alone_agrees_with_transformers(build, vocab_size, context_length):
    torch.manual_seed(0)
    model, tokenizer = build(vocab_size, context_length), load_tokenizer(vocab_size)
    for parameter in model.parameters():  # far from uniform, so that windows matter
        parameter.data *= 3
    texts = [*sample_stories(4), "Hi.", "The end" * 200]
    stories = [np.array(tokenizer.encode_ordinary(text)) for text in texts]
    assert min(map(len, stories)) < context_length < max(map(len, stories)) / 3
    alone = (tokenizer.eot_token, context_length)
    nats = story_losses(lambda idx: model(idx).logits, stories, *alone, 4, torch.device("cpu"))
    with torch.no_grad():
        expected = [per_story_nats(model, ids.tolist(), *alone) for ids in stories]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert nats == pytest.approx(expected, rel=1e-5)
    assert nats.sum() / num_bytes == pytest.approx(sum(expected) / num_bytes, abs=1e-5)


@pytest.mark.parametrize("context_length", [1, 2, 5, 8, 40])
def test_every_token_of_a_story_is_scored_once(context_length):
    ids = np.arange(1, 30)
    scored = []
    for x, y in story_windows(ids, 0, context_length):
        assert len(x) == len(y) <= context_length
        own = y != -100
        assert np.array_equal(x[own] + 1, y[own])
        if scored and context_length > 1:  # from half a context at least
            assert own.argmax() >= context_length // 2
        scored += y[own].tolist()
    assert scored == ids.tolist()
    assert list(story_windows(ids[:0], 0, context_length)) == []


# --- The script ---

BASELINES = "experiments.baselines.py"  # as the fork server finds it


def lines(output: str) -> dict[str, list[str]]:
    """{model: its other cells} of the printed table."""
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    cells = [re.split(r" *\| *", row.strip("| ")) for row in rows]
    return {name: rest for name, *rest in cells[1:]}


def test_ours_and_theirs_side_by_side(script, run_dir, data_dir, tmp_path):
    ours, folder, output = run_dir / "StoryGPT_best.pt", tmp_path / "theirs", tmp_path / "b.json"
    folder.mkdir()
    write_folder(folder, load_checkpoint(ours))
    torch.manual_seed(0)
    gpt2(50257, 64).save_pretrained(tmp_path / "plain")  # brings no tokenizer
    flags = ("--data_dir", data_dir, "--num_stories", 5, "--output", output, "--device", "cpu")
    offline = {"HF_HUB_OFFLINE": "1"}
    first = script(BASELINES, ours, folder, "somebody/else", *flags, **offline)
    assert first.code == 0, first.output
    found = lines(first.output)
    assert len(found) == 2 and found[str(ours)] == found[str(folder)]
    assert f"experiments/baselines.py --data_dir {data_dir} " in first.output
    assert first.output.strip().endswith(" somebody/else")

    second = script(BASELINES, tmp_path / "plain", *flags, **offline)
    assert second.code == 0, second.output
    written = json.loads(output.read_text())
    kept = written["models"]
    assert set(lines(second.output)) == set(kept) == {*found, str(tmp_path / "plain")}
    bits = [float(cells[-1].split()[0]) for cells in lines(second.output).values()]
    assert bits == sorted(bits)
    assert read_earlier(output, written["of"]) == kept
    for others in ({"num_stories": 4}, {"data": "other"}):  # no figures of other stories beside
        assert read_earlier(output, written["of"] | others) == {}
    meta = load_meta(data_dir, 512)
    stories = split_stories(load_tokens(data_dir, "validation", meta, 1), meta["end_of_text"])
    texts = [load_tokenizer(512).decode(stories[i * len(stories) // 5].tolist()) for i in range(5)]
    theirs, gpt2_tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(50257)
    with torch.no_grad():
        nats = [
            per_story_nats(theirs, load_tokenizer(512).encode_ordinary(t), 511, 64) for t in texts
        ]
    bits = sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert kept[str(folder)]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    low, high = kept[str(folder)]["interval"]
    assert low < bits < high
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        nats = [per_story_nats(plain, gpt2_tokenizer.encode_ordinary(t), 50256, 64) for t in texts]
    bits = sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert kept[str(tmp_path / "plain")]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)


def test_bits_are_counted_by_bytes():
    """Of a model that knows nothing of bytes: 8 bits for each."""
    texts = ["Zoé ran.", "“Là!”", "The end."]
    model = Model(0, 256, 4, 0, lambda text: [*text.encode()], lambda x: torch.zeros(*x.shape, 256))
    line = score(model, texts, 2, torch.device("cpu"))
    assert [line["bits_per_byte"], *line["interval"]] == pytest.approx([8, 8, 8])


def test_a_tokenizer_that_adds_tokens_adds_none_to_a_story(tmp_path):
    files = tokenizer_files(512, 64)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 511)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "Tom had a kite."
    start, encode = open_tokenizer(str(tmp_path), 512)
    assert start == 511 and encode(text) == load_tokenizer(512).encode_ordinary(text)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"][0] == 511  # it does add
    with pytest.raises(InputError, match="has no tokenizer that transformers can load"):
        open_tokenizer(str(tmp_path / "none"), 512)


def test_mistakes_are_named(fails, run_dir, data_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    gpt2(300, 64).save_pretrained(tmp_path / "untold")
    (tmp_path / "b.json").write_text("{}")
    best = run_dir / "StoryGPT_best.pt"
    for flags, says in (
        ((tmp_path / "none.pt",), "there is no checkpoint"),
        ((tmp_path / "empty",), "transformers cannot load"),
        ((tmp_path / "untold",), "has no tokenizer that transformers can load"),
        ((best, "--output", tmp_path / "b.json"), "is not one that baselines.py wrote"),
        ((best, "--output", tmp_path / "b.txt"), "no .json file"),
    ):
        fails(BASELINES, *flags, "--data_dir", data_dir, says=says)


@pytest.mark.parametrize(
    ("name", "says"), [("baselines", "no model to score"), ("stories", "nothing to draw")]
)
def test_scripts_start_as_they_are_typed(name, says, data_dir):
    flags = ("--data_dir", data_dir) if name == "baselines" else ()
    result = python(f"experiments/{name}.py", *flags)
    assert result.returncode == 1 and says in result.stderr.splitlines()[-1], result.stderr
