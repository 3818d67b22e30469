"""Fixtures: tiny prepared data, a tiny trained run, and scripts run as a user runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A shell starts what it puts into the background with Ctrl-C ignored, which scripts would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("PYTHONUNBUFFERED", None)  # users have none, and output fails elsewhere without
os.environ["OMP_NUM_THREADS"] = "1"  # bit-identical runs, and no contest for the cores

import numpy as np  # noqa: E402
import torch  # noqa: E402

from config import GPTConfig, TrainingConfig  # noqa: E402
from model import GPT  # noqa: E402
from storygpt.builtin_stories import sample_stories  # noqa: E402
from storygpt.checkpoint import load_model, save_checkpoint  # noqa: E402
from storygpt.token_files import install, write_split  # noqa: E402
from storygpt.tokenizer import load_tokenizer  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# A model that trains in seconds, as flags of train.py.
TINY = (
    "--vocab_size 512 --context_length 64 --n_layer 2 --n_head 2 --n_embd 32 --dropout 0.1 "
    "--batch_size 4 --gradient_accumulation_steps 2 --warmup_steps 4 --max_steps 20 "
    "--learning_rate 0.003 --min_lr 0.0003 --eval_interval 10 --eval_windows 16 --save_minutes 0 "
    "--device cpu --dtype float32"
).split()


def _run_main(script: str, flags: list[str], output: str, environment: dict, cwd: str) -> None:
    """Body of the forked child: a fresh `python script.py flags` but for the imports."""
    os.chdir(cwd)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *flags]
    # a test run that a shell put into the background was started with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or by nohup with that ignored
    os.fsync = lambda descriptor: None  # nobody cuts the power
    if "HF_ENDPOINT" in environment:  # a Hub on loopback is as ready at once as after a pause
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(seconds if seconds > 60 else 0.01)
    import importlib

    from storygpt import cli

    cli.run(importlib.import_module(script.removesuffix(".py")).main)


class Scripts:
    """Runs scripts in children of a server that has torch imported already: 20 times faster."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["preload"])

    def start(self, script: str, *flags, cwd: Path = ROOT, **environment):
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        flags = [str(flag) for flag in flags]
        process = self.context.Process(
            target=_run_main, args=(script, flags, str(output), environment, str(cwd))
        )
        process.start()
        process.output = output
        return process

    def __call__(self, script: str, *flags, timeout: float = 120, **keywords):
        process = self.start(script, *flags, **keywords)
        process.join(timeout)
        hung = process.is_alive()
        if hung:
            process.kill()
            process.join()
        output = process.output.read_text(encoding="utf-8", errors="replace")
        assert not hung, f"{script} {flags} did not end in {timeout} s:\n{output}"
        return SimpleNamespace(code=process.exitcode, output=output)


# Files that set up much for all of their tests: begun at once, so that no second worker does too.
COSTLY = ("test_space.py", "test_upload_to_hf.py", "test_docs.py", "test_formats.py")


def pytest_collection_modifyitems(items):
    """Puts the tests of COSTLY files first."""
    items.sort(key=lambda item: item.path.name not in COSTLY)


def pytest_terminal_summary(terminalreporter):
    """Prints what tests counted (record_property), which pytest would keep to itself."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script("train.py", *flags) -> .code and .output (both streams)."""
    path = os.environ.get("PYTHONPATH", "")
    # for the fork server's imports
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), path])
    return Scripts(tmp_path_factory.mktemp("output"))


@pytest.fixture
def fails(script):
    """fails("train.py", *flags, says="...") asserts one sentence, a status, and no traceback.
    Returns the sentence."""

    def check(name: str, *flags, says: str, **keywords) -> str:
        result = script(name, *flags, **keywords)
        assert result.code not in (0, None), result.output
        assert "Traceback" not in result.output, result.output
        if result.code == 2:  # the command line's library draws a box
            errors = [" ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())]
        else:
            errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.output
        assert says in errors[0], errors[0]
        return errors[0]

    return check


def python(*arguments, timeout: float = 300, **keywords) -> subprocess.CompletedProcess:
    """`python ...` in the repo, exactly as typed in a shell."""
    command = [sys.executable, *(str(argument) for argument in arguments)]
    keywords = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": timeout} | keywords
    return subprocess.run(command, **keywords)


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, which is strict JSON."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=no_json) for line in lines]


def no_json(name: str):
    raise ValueError(f"{name} is no JSON")


def wait_for_step(process, folder: Path, step: int) -> None:
    """Waits until a run that a test has started has written the line of that step."""
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.002)


def losses_of(folder) -> list[float]:
    """The train loss of every step of a run."""
    return [line.get("train_loss") for line in metrics_of(folder)]


def entries(number: int, first: int = 1) -> list[dict]:
    """Lines of metrics.jsonl: a loss that falls, evaluated every fifth step, best at the tenth."""
    lines = []
    for step in range(first, first + number):
        line = {"step": step, "tokens": 1_000 * step, "train_loss": 5 / step}
        line |= {"tokens_per_second": 500.0, "epoch": step / 100}
        if step % 5 == 0:
            line["val_loss"] = 2 + abs(step - 10) / 10
        lines.append(line)
    return lines


SMALL = GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=8)


def new_checkpoint(**changes) -> dict:
    """What save_checkpoint takes, of a SMALL model with seeded weights."""
    torch.manual_seed(0)
    return {
        "gpt_config": SMALL,
        "training_config": TrainingConfig(),
        "model_state_dict": GPT(SMALL).state_dict(),
        "step": 7,
        "val_loss": 1.5,
    } | changes


@pytest.fixture
def flags(data_dir, tmp_path) -> list:
    """The flags of a new tiny run in tmp_path / "run"."""
    return [*TINY, "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]


@pytest.fixture
def copy_of_run(run_dir, tmp_path) -> Path:
    """A finished run of 20 steps that a test may spoil."""
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def set_up(data_dir, tmp_path, monkeypatch):
    """set_up(*flags) -> what `train.py` trains with, of a new tiny run in tmp_path / "run"."""
    import train
    from storygpt.cli import parse_flags
    from storygpt.distributed import Processes
    from storygpt.run_folder import RunFolder

    folders = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()

    def made(*flags):
        paths = ["--data_dir", str(data_dir), "--checkpoint_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *paths, *flags])
        for folder in folders:
            folder.close()
        first, _ = parse_flags(train.FirstFlags, return_unknown_args=True, add_help=False)
        processes, folder = Processes(), RunFolder(first.checkpoint_dir)
        folders.append(folder)
        return train.set_up(train.find_run(first, processes, folder), processes, folder)

    yield made
    for folder in folders:
        folder.close()
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data_dir(script, tmp_path_factory) -> Path:
    """Of the built-in stories 4,800, and 200 held out, in a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("data")
    flags = ("--dataset", "sample", "--max_stories", 5000, "--validation_fraction", 0.04)
    flags += ("--vocab_size", 512, "--data_dir", folder, "--num_proc", 2)
    result = script("prepare_data.py", *flags)
    assert result.code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def run_dir(script, data_dir, tmp_path_factory) -> Path:
    """The checkpoint folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    result = script("train.py", *TINY, "--data_dir", data_dir, "--checkpoint_dir", folder)
    assert result.code == 0, result.output
    return folder


def write_data(folder: Path, **stories: list[str]) -> dict:
    """Token files of the `train` and `validation` stories in a vocabulary of 512; returns what
    their meta.json says."""
    counts, scratch, tokenizer = {}, folder / "scratch", load_tokenizer(512)
    scratch.mkdir()
    for split, texts in stories.items():
        ids = [token for text in texts for token in [*tokenizer.encode_ordinary(text), 511]]
        counts[split] = write_split(
            scratch / f"{split}.bin",
            [np.array(ids, "<u2")],
            stories=len(texts),
            num_bytes=sum(len(text.encode()) for text in texts),
        )
    meta = {"vocab_size": 512, "end_of_text": 511, "dataset": "builtin", "splits": counts}
    install(scratch, folder, meta)
    return meta


def sharp_checkpoint(context_length: int) -> dict:
    """One with sharp random weights, so that what it reads matters."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "n_layer": 1, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(context_length=context_length, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weights = {"gpt_config": model.config, "model_state_dict": model.state_dict()}
    return weights | {"training_config": TrainingConfig(), "step": 7, "val_loss": 3.0}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """60 stories and two models, `short` and `long`: one is too short for a story."""
    folder, texts = tmp_path_factory.mktemp("small"), list(sample_stories(60, seed=3))
    meta = write_data(folder, train=texts[:48], validation=texts[48:])
    for name, context_length in (("short", 64), ("long", 280)):
        save_checkpoint(folder / f"{name}.pt", sharp_checkpoint(context_length))
    return SimpleNamespace(
        folder=folder,
        meta=meta,
        train=texts[:48],
        validation=texts[48:],
        model=lambda name: load_model(folder / f"{name}.pt")[0],
    )


@torch.no_grad()
def nats_of_windows(
    model, ids: list[int], context_length: int, step: int, start: int = 511
) -> float:
    """Nats of `ids` after `start`, by windows of the context that move by `step`: the first counts
    whole, each other its last `step`."""
    stream, total = torch.tensor([start, *ids]), 0.0
    for end in range(context_length, context_length + len(ids), step):
        x, y = stream[end - context_length : end], stream[end - context_length + 1 : end + 1]
        losses = -model(x[None, : len(y)])[0][0].log_softmax(-1)[range(len(y)), y]
        total += losses[0 if end == context_length else context_length - step :].sum().item()
        if end >= len(ids):
            break
    return total


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A folder of real TinyStories, which the repo does not carry."""
    folder = os.environ.get("TINYSTORIES_DIR")
    if not folder:
        pytest.skip("TINYSTORIES_DIR names no folder with TinyStories")
    return Path(folder)


@pytest.fixture(scope="session")
def real_data(script, tinystories, tmp_path_factory) -> Path:
    """Those, prepared in GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("real")
    result = script("prepare_data.py", "--dataset", tinystories, "--data_dir", folder)
    assert result.code == 0, result.output
    return folder


@pytest.fixture(scope="session", params=[50257, 4096])
def storyteller(request, tmp_path_factory) -> tuple[GPT, dict]:
    """A model that has learnt twenty stories by heart, so that no two tokens are nearly tied.

    It learns with the stories' own tokens and one more, whose embedding all others then get.
    """
    size = request.param
    tokenizer = load_tokenizer(size)
    stories = [tokenizer.encode_ordinary(text)[:110] for text in sample_stories(20, seed=3)]
    rows = torch.full((20, 112), tokenizer.eot_token)
    for row, story in zip(rows, stories, strict=True):
        row[: len(story)] = torch.tensor(story)
    told, rows = rows.unique(return_inverse=True)
    shape = {"context_length": 128, "n_layer": 2, "n_head": 2, "n_embd": 48, "dropout": 0.0}
    shape |= {"bias": size == 4096, "init_std": 0.1}
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=len(told) + 1, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    state_dict = model.state_dict()
    embedding = state_dict["wte.weight"][-1].repeat(size, 1)
    embedding[told] = state_dict["wte.weight"][:-1]
    state_dict |= dict.fromkeys(("wte.weight", "lm_head.weight"), embedding)
    model = GPT(GPTConfig(vocab_size=size, **shape)).eval()
    model.load_state_dict(state_dict)
    checkpoint = {
        "gpt_config": model.config,
        "training_config": TrainingConfig(),
        "model_state_dict": model.state_dict(),
        "step": 80,
        "val_loss": loss.item(),
    }
    return model, checkpoint


def prompts(size: int) -> list[tuple[str, list[int]]]:
    """Twenty beginnings of 4 to 23 tokens, as text and as ids."""
    tokenizer = load_tokenizer(size)
    cut = [
        tokenizer.encode_ordinary(text)[: 4 + i]
        for i, text in enumerate(sample_stories(20, seed=3))
    ]
    return [(tokenizer.decode(ids), ids) for ids in cut]
