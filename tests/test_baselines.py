import json
import math
import re
import sys

import pytest
import torch
from conftest import nats_of_windows, python
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from config import InputError
from experiments import baselines
from experiments.baselines import Model, open_tokenizer, read_earlier, score
from storygpt.checkpoint import load_checkpoint
from storygpt.formats import tokenizer_files, write_folder
from storygpt.token_files import load_meta, load_tokens, split_stories
from storygpt.tokenizer import load_tokenizer


def gpt2(vocab_size: int, context_length: int) -> GPT2LMHeadModel:
    shape = {"n_positions": context_length, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape)).eval()


BASELINES = "experiments.baselines.py"  # as the fork server finds it


@pytest.fixture
def scores(monkeypatch, capsys):
    """scores(*flags) is what baselines.py prints, run here, where transformers is imported."""

    def run(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["baselines.py", *map(str, flags)])
        baselines.main()
        return capsys.readouterr().out

    return run


def lines(output: str) -> dict[str, list[str]]:
    """{model: its other cells} of the printed table."""
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    cells = [re.split(r" *\| *", row.strip("| ")) for row in rows]
    return {name: rest for name, *rest in cells[1:]}


def test_ours_and_theirs_side_by_side(script, scores, run_dir, data_dir, tmp_path):
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

    second = scores(tmp_path / "plain", *flags)
    written = json.loads(output.read_text())
    kept = written["models"]
    assert set(lines(second)) == set(kept) == {*found, str(tmp_path / "plain")}
    bits = [float(cells[-1].split()[0]) for cells in lines(second).values()]
    assert bits == sorted(bits)
    assert read_earlier(output, written["of"]) == kept
    for others in ({"num_stories": 4}, {"data": "other"}):  # no figures of other stories beside
        assert read_earlier(output, written["of"] | others) == {}
    meta = load_meta(data_dir, 512)
    stories = split_stories(load_tokens(data_dir, "validation", meta, 1), meta["end_of_text"])
    texts = [load_tokenizer(512).decode(stories[i * len(stories) // 5].tolist()) for i in range(5)]
    num_bytes = sum(len(text.encode()) for text in texts)
    for name, vocab_size in ((folder, 512), (tmp_path / "plain", 50257)):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), load_tokenizer(vocab_size)
        nats = sum(
            nats_of_windows(
                model, tokenizer.encode_ordinary(text), context_length=64, step=32,
                start=tokenizer.eot_token,
            )
            for text in texts
        )  # fmt: skip
        bits = nats / math.log(2) / num_bytes
        assert kept[str(name)]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
        low, high = kept[str(name)]["interval"]
        assert low < bits < high


def test_bits_are_counted_by_bytes():
    """Of a model that knows nothing of bytes: 8 bits for each."""
    texts = ["Zoé ran.", "“Là!”", "The end."]
    model = Model(0, 256, 4, 0, lambda text: [*text.encode()], lambda x: torch.zeros(*x.shape, 256))
    line = score(model, texts, 2)
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


def test_mistakes_are_named(scores, run_dir, data_dir, tmp_path):
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
        with pytest.raises(InputError, match=re.escape(says)):
            scores(*flags, "--data_dir", data_dir)


@pytest.mark.parametrize(
    ("name", "says"), [("baselines", "no model to score"), ("stories", "nothing to draw")]
)
def test_scripts_start_as_they_are_typed(name, says, data_dir):
    flags = ("--data_dir", data_dir) if name == "baselines" else ()
    result = python(f"experiments/{name}.py", *flags)
    assert result.returncode == 1 and says in result.stderr.splitlines()[-1], result.stderr
