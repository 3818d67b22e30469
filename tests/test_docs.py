"""What the documents say: their commands parse, their links lead somewhere, train.slurm goes on."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from storygpt import cli

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS.remove(ROOT / "docs/model_card.md")  # a template


def commands(text: str) -> list[list[str]]:
    """The words of each command line in a document: of its shell blocks, and in backticks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    spoken = re.findall(r"`((?:python|torchrun|sbatch) [^`]+)`", text)
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
        source = (ROOT / name).read_text(encoding="utf-8")
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


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_parse(path, monkeypatch):
    found = commands(path.read_text(encoding="utf-8"))
    started = [what for words in found if (what := script_and_flags(words))]
    assert started or not found
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


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for path in [*DOCS, *sorted((ROOT / "experiments").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            linked = path.parent / name if name else path
            assert linked.exists(), f"{path.name} links to {target}"
            if anchor:
                assert anchor in headings(linked.read_text(encoding="utf-8")), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


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
        ("mkdir -p checkpoints; touch checkpoints/StoryGPT_final.pt", 0, False),
        ("exit 1", 1, False),
    ],
)
def test_a_job_is_queued_again_only_where_there_is_more_to_do(tmp_path, srun, status, requeued):
    assert start_job(tmp_path, srun).wait(timeout=60) == status
    assert (tmp_path / "requeued").exists() == requeued


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
