"""docs/tour.md and what it leads through: quotations that stand in their files, values that every
machine has, experiments/tour.py, and the notebook."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import image

from config import GPTConfig
from model import GPT

TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
SCRIPT = "experiments.tour.py"  # as the fork server finds it
PICTURES = [f"tour_{name}.png" for name in ("tokens", "attention", "surprise", "training")]


# --- What the tour says ---


def quotations(text: str) -> list[tuple[list[str], str]]:
    """Each quoted piece of code, and the files of the line above it, one of which it is from."""
    found, files = [], []
    for part in re.split(r"^(```\w*\n.*?^```\n)", text, flags=re.M | re.S):
        if part.startswith("```python\n"):
            found.append((files, part.removeprefix("```python\n").removesuffix("```\n")))
        elif part.strip():
            named = re.findall(r"\[`([\w/]+\.py)`\]\(\.\./\1\)", part.rstrip().splitlines()[-1])
            files = [] if part.startswith("```") else named
    return found


def test_quoted_code_stands_in_its_file():
    quoted = quotations(TOUR)
    assert len(quoted) >= 13
    for files, code in quoted:
        assert files, f"no file is named above\n{code}"
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in files]
        assert any(code in text for text in texts), f"no longer in {files}:\n{code}"
        assert 2 <= len(code.splitlines()) <= 15


def test_code_that_is_no_longer_there_would_be_found():
    """The reader of the document above, on a small one."""
    named = "[`model.py`](../model.py), the loss:\n\n"
    text = f"Words.\n\n{named}```python\nx = 1\n```\n```python\ny = 2\n```\n\n```text\n1\n```\n"
    assert quotations(text) == [(["model.py"], "x = 1\n"), (["model.py"], "y = 2\n")]
    assert quotations("```text\n1\n```\n\n```python\nx = 1\n```\n") == [([], "x = 1\n")]


def test_pictures_are_small():
    for name in PICTURES:
        assert f"({name})" in TOUR
        assert (ROOT / "docs" / name).stat().st_size < 100_000


# --- experiments/tour.py ---


@pytest.fixture(scope="module")
def demo(script, tmp_path_factory):
    """The demo's data and, in the same shape but for its width, a run of two steps."""
    folder = tmp_path_factory.mktemp("demo")
    data = ("--data_dir", folder / "data")
    prepare = ("--dataset", "builtin", "--vocab_size", 4096, "--num_proc", 1)
    result = script("prepare_data.py", *prepare, *data)
    assert result.code == 0, result.output
    short = "--preset demo --n_layer 2 --n_head 2 --n_embd 16 --max_steps 2 --warmup_steps 1"
    short = f"{short} --eval_interval 2 --eval_windows 8 --device cpu".split()
    result = script("train.py", *short, *data, "--checkpoint_dir", folder / "run")
    assert result.code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def printed(script, demo) -> str:
    flags = ("--checkpoint", demo / "run/StoryGPT_best.pt", "--data_dir", demo / "data")
    result = script(SCRIPT, *flags, "--output_dir", demo / "pictures")
    assert result.code == 0, result.output
    return result.output.replace(str(demo / "data"), "data/demo")


def test_values_that_do_not_depend_on_the_model_are_the_readers(printed):
    before_training, _ = TOUR.split("## 5. ")
    blocks = re.findall(r"^```text\n(.*?)^```", before_training, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 8
    assert not [line for line in lines if line not in printed.splitlines()]


def test_the_loss_and_the_hero_are_the_models_own(printed, demo):
    from experiments.tour import all_heads
    from storygpt.checkpoint import load_model
    from storygpt.tokenizer import load_tokenizer

    model, _ = load_model(demo / "run/StoryGPT_best.pt")
    tokenizer = load_tokenizer(4096)
    story = next(line for line in printed.splitlines() if line.startswith("This is the story"))
    ids = [4095, *tokenizer.encode(story), 4095]
    loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1].item()
    assert f"mean of -ln p over {len(ids) - 1} tokens: {loss:.3f} nats" in printed

    name = tokenizer.encode(" Frank")
    places = [i for i in range(len(ids)) if ids[i : i + len(name)] == name]
    last = places[-1]  # in the model's own ids, which an end-of-text leads
    logits = model(torch.tensor([ids[:last]]))[0][0, -1]
    logit, token = logits.max(-1)
    likeliest = tokenizer.decode([token.item()]).replace(" ", "␣")
    p = logits.softmax(-1).max()
    assert f"{likeliest:>9} logit {logit:6.2f}  p {p:7.2%}" in printed
    before = [i - 1 + j for i in places[:-1] for j in range(len(name))]
    shares = {
        share: (head, layer)
        for layer, heads in enumerate(all_heads(model, ids[1:last]), 1)
        for head, share in enumerate(heads[:, -1, before].sum(-1).tolist(), 1)
    }
    head, layer = shares[max(shares)]
    where = f"at ␣Then head {head} of layer {layer} takes {max(shares):.0%} from where"
    assert f"before the last Frank: {where}" in printed
    like = re.findall(r"^ *(\S+) is like (\S+)", printed, re.M)
    assert len(like) == 10 and all(own != nearest for own, nearest in like)


def test_pictures_are_drawn(printed, demo):
    for name in PICTURES:
        assert np.ptp(image.imread(demo / "pictures" / name)[..., :3]) > 0.5


def test_a_small_context_and_any_row_will_do(script, run_dir, data_dir, tmp_path):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir)
    result = script(SCRIPT, *flags, "--row", 7, "--output_dir", tmp_path / "new")
    assert result.code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(PICTURES)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    norms = [entry["grad_norm"] for entry in map(json.loads, lines) if entry["step"]]
    over = sum(norm > 1 for norm in norms)
    assert f"{over} of 20 steps had a norm over 1: clipped" in result.output and over != 10


@torch.no_grad()
def test_the_weights_shown_are_those_of_the_models_own_attention():
    from experiments.tour import all_heads

    torch.manual_seed(0)
    model, ids = GPT(GPTConfig(64, 16, 2, 2, 16)).eval(), [3, 1, 4, 1, 5, 9, 2, 6]
    for parameter in model.parameters():  # sharp, so that what they read matters
        parameter.add_(0.3 * torch.randn_like(parameter))
    heads, inputs = all_heads(model, ids), []
    for block in model.h:
        block.attn.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model(torch.tensor([ids]))
    for weights, block, x in zip(heads, model.h, inputs, strict=True):
        q, k, v = block.attn.heads(x)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
        torch.testing.assert_close(weights @ v[0], y)


def test_a_hero_is_a_whole_word_and_the_last_story_may_be_cut_by_a_row():
    from experiments.tour import find_story
    from storygpt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(512)
    texts = ["Then Tom ran.", "Once a boy, Tom, sat. Tomorrow Tom will run.", "It was a day."]
    ids = [[*tokenizer.encode_ordinary(text), 511] for text in texts]
    tokens = np.array([token for story in ids for token in story], "<u2")
    story = find_story(tokens, tokens[3:9], tokenizer, 64)
    assert (story.start, story.ids, story.hero) == (len(ids[0]), ids[1][:-1], "Tom")
    assert ["".join(story.pieces[i] for i in place).strip(" ,") for place in story.named] == [
        "Tom"
    ] * 2
    assert find_story(tokens, tokens[-4:], tokenizer, 64) is None  # no story begins there


def test_what_is_wrong_is_one_sentence(fails, run_dir, data_dir, tmp_path):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path)
    fails(SCRIPT, "--checkpoint", tmp_path / "no.pt", *flags, says="there is no checkpoint")
    run = ("--checkpoint", run_dir / "StoryGPT_best.pt")
    fails(SCRIPT, *run, *flags, "--row", 8, says="row 8 is over 7")
    moved = shutil.copy(run_dir / "StoryGPT_best.pt", tmp_path)
    fails(
        SCRIPT,
        "--checkpoint",
        moved,
        *flags,
        says="metrics.jsonl: pass the --checkpoint of a run's",
    )


# --- The notebook ---

NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text(encoding="utf-8"))
SMALL = """
PRESET = "demo"
DATASET, STORIES = "builtin", 400
STEPS = 60
CHECKPOINTS = "checkpoints/tour"
"""


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_notebook_holds_no_outputs():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert 6 <= len(cells) <= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("place", ["docs", "clone", "zip", "folder", "nowhere"])
def test_the_notebook_finds_the_code_beside_it_in_a_clone_or_in_a_zip(place, tmp_path, monkeypatch):
    """Its first cell as IPython runs it, but for what pip would install."""
    reason = "ipykernel is not installed: pip install -r requirements-dev.txt"
    ipython = pytest.importorskip("IPython.core.inputtransformer2", reason=reason)
    code = next(source(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    (constant,) = re.findall(r'^REPOSITORY = "(.+)"$', code, re.M)
    repository = tmp_path / "a" / "StoryGPT-main"
    (repository / "docs").mkdir(parents=True)
    (repository / "train.py").touch()
    git = ["git", "-C", repository, "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "A repo"]):
        subprocess.run([*git, *command], check=True)
    addresses = {"clone": repository, "zip": f"{repository}.zip"}
    addresses["folder"] = repository.parent  # as Kaggle unpacks a zip that is uploaded there
    address = addresses.get(place, tmp_path / "nowhere")
    shutil.make_archive(str(repository), "zip", tmp_path / "a", "StoryGPT-main")

    class Shell:
        def system(self, command: str) -> None:
            subprocess.run(command.format(**names), shell=True, check=False)

        def run_line_magic(self, *words: str) -> None:
            assert words == ("pip", "install --quiet -r requirements.txt")

    names = {"get_ipython": Shell}
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("GIT_TERMINAL_PROMPT", "1")
    monkeypatch.chdir(repository / "docs" if place == "docs" else tmp_path)
    code = ipython.TransformerManager().transform_cell(code.replace(constant, str(address)))
    if place == "nowhere":
        with pytest.raises(AssertionError, match="change that address to your repo's"):
            exec(code, names)
        assert os.environ["GIT_TERMINAL_PROMPT"] == "0"  # or Kaggle's cell would wait for ever
        return
    exec(code, names)
    assert Path("train.py").exists()
    monkeypatch.chdir(repository / "docs" if place == "docs" else tmp_path)
    exec(code, names)  # a notebook that is opened again begins where it began before
    assert Path("train.py").exists()


def test_the_notebook_runs(tmp_path):
    """As on Colab, but for the clone: beside its docs/ lies the repo, and its numbers are small."""
    for package in ("nbconvert", "ipykernel"):
        if not find_spec(package):
            pytest.skip(f"{package} is not installed: pip install -r requirements-dev.txt")
    for name in ("config.py", "model.py", "storygpt", "experiments", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("prepare_data", "train", "generate"):
        (tmp_path / f"{name}.py").symlink_to(ROOT / f"{name}.py")
    notebook = json.loads(json.dumps(NOTEBOOK))
    (cell,) = (c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    named = set(re.findall(r"^([A-Z_, ]+) = ", source(cell), re.M))
    assert named == set(re.findall(r"^([A-Z_, ]+) = ", SMALL, re.M))
    cell["source"] = SMALL
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/tour.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
    result = subprocess.run(
        [*command, "--output", "told.ipynb", tmp_path / "docs/tour.ipynb"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "docs/told.ipynb").read_text())
    outputs = [out for c in told["cells"] for out in c.get("outputs", [])]
    text = "".join("".join(out.get("text", "")) for out in outputs)
    assert "done: best val_loss" in text and "error" not in text.lower()
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 4
