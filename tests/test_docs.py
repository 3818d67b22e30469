"""What the documents say: their commands parse, and run where that is short; their links lead
somewhere; train.slurm goes on."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
import torch
from conftest import ROOT, python

import train
from config import PresetName, preset
from model import GPT
from storygpt import cli
from storygpt.builtin_stories import sample_stories
from storygpt.checkpoint import SkipInit
from storygpt.device import PEAK_FLOPS

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS.remove(ROOT / "docs/model_card.md")  # a template
MEASURED = sorted((ROOT / "experiments").glob("*.md"))  # those in results/ are of earlier code


def read(path) -> str:
    return path.read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each command line in a document: of its shell blocks, and in backticks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    spoken = re.findall(r"`((?:python|torchrun|sbatch|make) [^`]+)`", text)
    lines = "\n".join([*blocks, *spoken]).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        words = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();<>|&"):
                found, words = [*found, words], []
            else:
                words.append(word)
    return [words for words in found if words]


def script_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    """The script of this repo that a command starts, and the flags that are the script's."""
    if "docs/train.slurm" in words:
        return "train.py", words[words.index("docs/train.slurm") + 1 :]
    index = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return None if index is None else (words[index], words[index + 1 :])


def parse(name: str, flags: list[str], monkeypatch) -> None:
    """What the script would do with its flags first. SystemExit where they do not fit."""
    if name == "space/app.py":  # has packages and a parser of its own
        source = read(ROOT / name)
        known = re.findall(r'add_argument\(\s*"(--\w+)"', source)
        if not {flag for flag in flags if flag.startswith("--")} <= {*known}:
            sys.exit(2)
        return
    spec = importlib.util.spec_from_file_location("script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [name, *flags])
    cli.parse_flags(module.Arguments)


@pytest.mark.parametrize("path", [*DOCS, *MEASURED], ids=lambda path: path.name)
def test_commands_parse(path, monkeypatch):
    found = commands(read(path))
    started = [what for words in found if (what := script_and_flags(words))]
    assert started or {words[0] for words in found} <= {"make"}
    for name, flags in started:
        assert (ROOT / name).is_file(), name
        try:
            parse(name, flags, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{path.name}: {shlex.join([name, *flags])} ends with status {error.code}")


def test_a_flag_that_does_not_exist_would_be_found(monkeypatch):
    ((python, *words),) = commands("```sh\npython generate.py --prompts x\n```\n")
    assert python == "python"
    with pytest.raises(SystemExit):
        parse(*script_and_flags(words), monkeypatch)


def test_what_is_made_and_installed_is_there():
    targets = re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.M)
    named = [words for path in DOCS for words in commands(read(path))]
    made = {words[1] for words in named if words[0] == "make"}
    assert {"demo", "app", "test"} <= made <= {*targets}
    installed = [words[words.index("-r") + 1] for words in named if "-r" in words]
    assert installed and all((ROOT / name).is_file() for name in installed)


@pytest.mark.parametrize("make", ["make", "bmake"])
def test_an_environment_that_was_left_half_made_is_made_again(tmp_path, make):
    if not shutil.which(make):
        pytest.skip(f"there is no {make} here")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)  # what Debian's Python without venv leaves
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = [make, "-n", ".venv/requirements"]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "-m venv .venv" in planned.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("sys.version_info = (3, 10, 14)", "StoryGPT needs Python 3.11 or newer, up to 3.14"),
        ("sys.version_info = (3, 15, 0)", "StoryGPT needs Python 3.11 or newer, up to 3.14"),
        ('sys.platform, platform.machine = "darwin", lambda: "x86_64"', "no torch for Intel Macs"),
    ],
)
def test_a_python_without_torch_is_told_before_anything_is_made(place, says, tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    other = f"import platform, sys; {place}; exec(sys.argv[1])"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{other}' \"$2\"\n")
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", ".venv/requirements"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0 and says in made.stderr
    assert not (tmp_path / ".venv").exists()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python.rename(tmp_path / ".venv/bin/python")
    (tmp_path / ".venv/bin/pip").touch()
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0 and "remove it first" in made.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_a_clone_that_was_copied_installs_into_itself(tmp_path):
    """Its .venv/bin/pip still begins with the path of the Python that it comes from."""
    place = tmp_path / "a copy"
    (place / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, place)
    for name in ("pip", "python"):
        (place / ".venv/bin" / name).write_text(f'#!/bin/sh\necho "{name} $@" >> called\n')
        (place / ".venv/bin" / name).chmod(0o755)
    made = subprocess.run(["make", ".venv/requirements"], cwd=place, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    called = (place / "called").read_text().splitlines()
    assert called[-1].startswith("python -m pip install") and len(called) == 2


# --- The short ones, run ---

TOO_LONG = {"experiments/benchmark.py", "experiments/baselines.py", "space/app.py"}
# What makes each short, said last: a later flag wins.
SMALL = {
    "prepare_data.py": "--max_stories 80 --validation_fraction 0.2 --num_proc 1",
    "train.py": "--n_layer 1 --n_head 1 --n_embd 8 --batch_size 8 --gradient_accumulation_steps 1 "
    "--max_steps 2 --warmup_steps 1 --eval_interval 2 --eval_windows 2 --device cpu "
    "--dtype float32",
    "evaluate.py": "--num_stories 2",
    "generate.py": "--max_new_tokens 4",
}


def value(flags: list[str], name: str, default: str) -> str:
    return flags[flags.index(name) + 1] if name in flags else default


def is_short(words: list[str], world) -> bool:
    """Whether a command needs no GPU, Hub, hours or person, once SMALL has made it small.

    What it reads is there: a preset's stories may have been to come from the Hub.
    """
    if words[:2] == ["python", "-c"]:
        return True
    started = script_and_flags(words)
    if not started or {"torchrun", "sbatch", "--interactive"} & {*words} or started[0] in TOO_LONG:
        return False
    if any(word.startswith("/") for word in words):  # a notebook's own disk
        return False
    name, flags = started
    if name == "prepare_data.py":
        dataset = value(flags, "--dataset", "on the Hub")
        return dataset == "builtin" or (world / dataset).exists()
    if name == "upload_to_hf.py":
        return "--dry_run" in flags
    if name == "train.py" and "--preset" in flags:
        gpt, _ = preset(value(flags, "--preset", ""))
        meta = world / value(flags, "--data_dir", "data") / "meta.json"
        if not meta.exists() or json.loads(meta.read_text())["vocab_size"] != gpt.vocab_size:
            return False
    weights = value(flags, "--init_from", value(flags, "--checkpoint", "."))
    return (world / weights).exists()


def run_small(words: list[str], world, script) -> None:
    """Runs a command in `world`, where nothing is in its way."""
    if words[1] == "-c":
        result = python(*words[1:], cwd=world, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert result.returncode == 0, result.stderr
        return
    name, flags = script_and_flags(words)
    flags = [*flags, *SMALL.get(name, "").split()]
    if name == "train.py" and "--resume" not in flags:
        shutil.rmtree(world / value(flags, "--checkpoint_dir", "checkpoints"), ignore_errors=True)
    if name == "upload_to_hf.py":
        shutil.rmtree(world / value(flags, "--output_dir", ""), ignore_errors=True)
    result = script(name.replace("/", "."), *flags, cwd=world)
    done = (0, train.MORE_TO_DO) if "--max_hours" in flags else (0,)
    assert result.code in done, f"{shlex.join([name, *flags])}:\n{result.output}"


@pytest.fixture(scope="module")
def world(script, tmp_path_factory):
    """A folder with what documents take for granted: stories, prepared data, runs."""
    folder = tmp_path_factory.mktemp("world")
    story = "Tom had a red kite. Tom lost the kite, and Ann found it for Tom."
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join([story] * 80))
    for line in (
        "python prepare_data.py --dataset builtin",
        "python prepare_data.py --dataset builtin --preset demo --data_dir data/demo",
        "python train.py",
        "python train.py --preset demo --data_dir data/demo --checkpoint_dir checkpoints/demo",
        "python train.py --checkpoint_dir runs/a",
        "python train.py --checkpoint_dir runs/b --seed 2",
        "python upload_to_hf.py --repo_id you/StoryGPT --dry_run --output_dir published",
    ):
        run_small(line.split(), folder, script)
    return folder


@pytest.mark.parametrize(
    ("name", "least"),
    [("README.md", 9), ("docs/training.md", 13), ("docs/publishing.md", 3), ("docs/tour.md", 14)],
)
def test_short_commands_run(name, least, script, world, tmp_path):
    copied = shutil.copytree(world, tmp_path / "world")
    every = commands(read(ROOT / name))
    every = [words[words.index("python") :] for words in every if "python" in words]
    short = 0
    for words in every:
        if is_short(words, copied):
            run_small(words, copied, script)
            short += 1
    assert short >= least


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_what_make_runs_goes_where_it_went_before(script, world, tmp_path, monkeypatch):
    copied = shutil.copytree(world, tmp_path / "world")
    (copied / "checkpoints/demo/published/old").mkdir(parents=True)
    (copied / "space").mkdir()
    for name in ("Makefile", "requirements.txt", "space/requirements.txt"):
        shutil.copy(ROOT / name, copied / name)
    started = []
    for target in ("app", "demo"):
        make = ["make", "--dry-run", target]
        result = subprocess.run(make, cwd=copied, capture_output=True, text=True, check=True)
        for words in commands(f"```sh\n{result.stdout}```\n"):
            if words[0] == "rm":
                subprocess.run(words, cwd=copied, check=True)
            elif what := script_and_flags(words):
                name, flags = what
                started.append(name)
                if name in TOO_LONG:
                    parse(name, flags, monkeypatch)
                    continue
                result = script(name, *flags, *SMALL.get(name, "").split(), cwd=copied)
                assert result.code == 0, f"{shlex.join(words)}:\n{result.output}"
    app = ["upload_to_hf.py", "space/app.py"]  # the model is there already
    assert started == [*app, "prepare_data.py", "train.py", "evaluate.py", "generate.py"]


def test_python_in_the_documents_compiles():
    texts = [read(path) for path in DOCS if path.name != "tour.md"]  # which only quotes
    blocks = [b for text in texts for b in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)]
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "a document", "exec")


def test_larger_data_by_datatrove(script, tmp_path):
    if not (importlib.util.find_spec("datatrove") and importlib.util.find_spec("spacy")):
        pytest.skip("datatrove is not installed: pip install 'datatrove[io,processing]' spacy")
    (block,) = re.findall(
        r"^```python\n(from data.*?)^```", read(ROOT / "docs/data.md"), re.M | re.S
    )
    (tmp_path / "clean.py").write_text(block)
    (tmp_path / "raw").mkdir()
    stories = list(sample_stories(60))
    stories += [f"{story} The end." for story in stories[:20]] + ["Too short."]
    lines = [json.dumps({"text": story}) for story in stories]
    (tmp_path / "raw/stories.jsonl").write_text("\n".join(lines))
    result = python("clean.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = script("prepare_data.py", "--dataset", "clean", "--num_proc", 1, cwd=tmp_path)
    assert result.code == 0, result.output
    splits = json.loads((tmp_path / "data/meta.json").read_text())["splits"]
    assert sum(split["stories"] for split in splits.values()) == 60


def test_the_keys_of_evaluation_json_are_those_of_its_table(script, world, tmp_path):
    result = script(
        "evaluate.py", "--num_stories", 2, "--output", tmp_path / "evaluation.json", cwd=world
    )
    assert result.code == 0, result.output
    text = read(ROOT / "docs/publishing.md").split("### How its stories read")[1]
    first_cells = re.findall(r"^\| (.+?) \|", text.split("\n## ")[0], re.M)
    documented = re.findall(r"`(\w+)`", " ".join(first_cells))
    assert documented == [*json.loads((tmp_path / "evaluation.json").read_text())]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for path in [*DOCS, *sorted((ROOT / "experiments").rglob("*.md"))]:
        text = read(path)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            linked = path.parent / name if name else path
            assert linked.exists(), f"{path.name} links to {target}"
            if anchor:
                assert anchor in headings(read(linked)), target


def preset_rows(header: str) -> dict[str, list[str]]:
    """The cells of each preset's row in the table of training.md that begins with `header`."""
    table = read(ROOT / "docs/training.md").split(header)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {cells[0].split("`")[1]: cells[1:] for cells in rows}


def number(text: str) -> float:
    """The number that a cell begins with, in units of what follows it."""
    unit = {"G": 1e9, "M": 1e6}.get(text.split()[-1][0], 1)
    return unit * float(text.split()[0].replace(",", ""))


def test_the_table_of_sizes_is_that_of_the_presets_and_counts_as_the_model_does():
    rows = preset_rows("| preset | parameters ")
    assert {*rows} == {*get_args(PresetName)}
    for name, cells in rows.items():
        parameters, shape, vocab_size, context, mflops, tokens, recipe, memory = cells
        gpt, training = preset(name)
        training = training.filled_in(gpt.n_embd)
        assert shape == f"{gpt.n_layer} {gpt.n_head} {gpt.n_embd}"
        assert (number(vocab_size), number(context)) == (gpt.vocab_size, gpt.context_length)
        with SkipInit(), torch.device("meta"):
            model = GPT(gpt)
        assert number(parameters) == pytest.approx(model.num_parameters(), rel=0.01)
        assert 1e6 * number(mflops) == pytest.approx(model.flops_per_token(), rel=0.02)
        steps, tokens_a_step, in_all = re.split(" [×=] ", tokens)
        assert number(steps) == training.max_steps
        assert number(tokens_a_step) == training.windows_per_step * gpt.context_length
        assert number(in_all) == pytest.approx(number(steps) * number(tokens_a_step), rel=0.01)
        optimizer, rate = recipe.split()
        assert optimizer == f"`{training.optimizer}`"
        assert float(rate) == pytest.approx(training.learning_rate, rel=0.05)
        windows = training.batch_size * gpt.context_length
        least = 16 * model.num_parameters() + 20 * gpt.n_layer * gpt.n_embd * windows
        assert number(memory) == pytest.approx(least, rel=0.05, abs=5e6)


def test_the_hours_are_the_arithmetic_that_stands_below_them():
    names = {"T4": "Tesla T4", "RTX 4090": "NVIDIA GeForce RTX 4090"}
    names |= {"A100": "NVIDIA A100[- ](?!.*MIG).+", "H100": "NVIDIA H100( 80GB HBM3)?"}
    reached = {machine: 0.3 * PEAK_FLOPS[name] for machine, name in names.items()}
    reached |= {"RTX 3060": 0.3 * 25.5e12, "Mac, M1": 0.3 * 2.6e12, "two CPU cores": 0.2e12}
    (header,) = re.findall(r"^\| hours \| (.+) \|$", read(ROOT / "docs/training.md"), re.M)
    machines = header.split(" | ")
    assert {*machines} == {*reached}
    predicted = preset_rows("| hours ")
    assert {*predicted} == {*get_args(PresetName)}
    del predicted["demo"]  # measured
    for name, cells in predicted.items():
        gpt, training = preset(name)
        with SkipInit(), torch.device("meta"):
            flops = GPT(gpt).flops_per_token()
        tokens = training.max_steps * training.windows_per_step * gpt.context_length
        for machine, cell in zip(machines, cells, strict=True):
            hours = flops * tokens / reached[machine] / 3600
            if cell.startswith("< "):
                assert hours < float(cell.removeprefix("< "))
            elif cell:
                assert number(cell) == pytest.approx(hours, rel=0.07)


def test_the_hours_of_the_front_page_are_those_of_the_table():
    (header,) = re.findall(r"^\| hours \| (.+) \|$", read(ROOT / "docs/training.md"), re.M)
    machines, predicted = header.split(" | "), preset_rows("| hours ")
    rows = re.findall(r"^\| (.+?) \| `(\w+)`.*? \| ([\d., ]+) \| [\d.]+ \|$", read(DOCS[0]), re.M)
    assert len(rows) == 3
    for names, name, hours in rows:
        names = names.replace("free ", "").split(", ")
        assert hours.split(", ") == [predicted[name][machines.index(n)] for n in names]


def test_what_the_symptoms_quote_is_what_the_code_says():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("storygpt/*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(map(read, paths)))  # sentences of several lines
    text = read(ROOT / "docs/training.md").split("## Choosing")[0]
    seen = re.findall(r"^\| (?!you see)(.+?) \| .* \| .* \|$", text, re.M)
    quoted = [quote for cell in seen for quote in re.findall("`(.+?)`", cell)]
    assert len(quoted) >= 15
    for quote in quoted:
        for piece in quote.split("…"):
            assert piece.strip(" ()") in code, f"nothing says {quote}"


def test_the_picture_of_the_house_has_every_room():
    picture = read(ROOT / "docs/changing.md").split("```")[1]
    folder = ROOT / "storygpt"
    rooms = {p.stem for p in folder.glob("[a-z]*.py")} | {
        f"{p.parent.name}/" for p in folder.glob("*/__init__.py")
    }
    assert rooms <= {*re.findall(r"[a-z_]+/?", picture)}


# --- train.slurm, with stand-ins for Slurm's own commands ---


def start_job(folder, srun: str, *flags) -> subprocess.Popen:
    """docs/train.slurm in `folder`, where the shell lines `srun` stand for the training."""
    bodies = {
        "srun": f'echo "$@" > started\n{srun}',
        "scontrol": '[ "$1" = requeue ] && echo "$2" > requeued || echo node1',
    }
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"NUM_NODES": "1", "ID": "7", "NODELIST": "node1"}
    environment = {f"SLURM_JOB_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "docs/train.slurm", *flags]
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment)


@pytest.mark.parametrize(
    ("srun", "status", "requeued"),
    [
        ("exit 0", 0, True),  # --max_hours were over
        ("touch checkpoints/StoryGPT_final.pt", 0, False),
        ("exit 1", 1, False),  # a mistake
        ("echo >> checkpoints/metrics.jsonl; exit 1", 0, True),  # a process was lost
    ],
)
@pytest.mark.parametrize("flags", ["", "--checkpoint_dir runs/a", "--checkpoint-dir=runs/a"])
def test_a_job_is_queued_again_only_where_there_is_more_to_do(
    tmp_path, flags, srun, status, requeued
):
    folder = "runs/a" if flags else "checkpoints"
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "metrics.jsonl").write_text("1\n2\n")
    job = start_job(tmp_path, srun.replace("checkpoints", folder), *flags.split())
    assert job.wait(timeout=60) == status
    assert (tmp_path / "requeued").exists() == requeued
    assert "node1:20007" in (tmp_path / "started").read_text()


def test_a_job_that_is_signalled_lets_the_training_save_and_is_queued_again(tmp_path, monkeypatch):
    # exits as torchrun does after a signal, but not at once
    saving = "trap 'sleep 0.3; touch saved; exit 1' TERM; touch ready; while :; do sleep 0.1; done"
    job = start_job(tmp_path, saving, "--optimizer", "muon")
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "7\n"
    name, flags = script_and_flags((tmp_path / "started").read_text().split())
    assert "--resume" in flags and flags[-2:] == ["--optimizer", "muon"]
    parse(name, flags, monkeypatch)
