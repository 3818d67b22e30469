"""Script: a race over seconds: the same shape on the same tokens, by our recipes and by nanoGPT.

Each run is a process of its own, one after the other: our train.py, or that of a checkout of
nanoGPT, unchanged. Shape, batch, warm-up and a cosine to a tenth of the peak are the same for all;
the rest is as each comes (ours in bfloat16 where the machine has it; nanoGPT without biases, on a
CPU in float32). The cosine has to end with the seconds, so a few steps tell first how many those
hold, or, where there are learning rates to choose from, how many a quarter of the seconds holds.

A point of the curves is a checkpoint, scored after its run on every token held out. An interrupted
race goes on: a run that has ended is not made again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import contextlib
import json
import math
import pickle
import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import get_args

import torch
import tyro
from filelock import FileLock
from matplotlib.figure import Figure
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from config import GPTConfig, InputError, OptimizerName, TrainingConfig, check_whole, preset
from model import GPT
from storygpt.checkpoint import load_model
from storygpt.device import use_device
from storygpt.files import save_figure, step_name, take_lock, write_bytes, writing
from storygpt.losses import exact_loss
from storygpt.token_files import bits_per_byte, data_fingerprint, load_meta, load_tokens

OUR_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
POINTS = 10  # of a curve: checkpoints of a run, evenly spread
FEW_STEPS, MORE_STEPS = 20, 200  # tell the speed, the more the better where there is time
SECONDS = "seconds.json"  # of the checkpoints of a run that has ended
SHARED = ("batch_size", "device")  # by all runs of a race, beside the model
SHAPE = ("n_layer", "n_head", "n_embd", "dropout")  # what all call the same


@dataclass(frozen=True)
class Arguments:
    """Race our recipes and nanoGPT: the loss that each reaches in the same seconds."""

    gpt: tyro.conf.FlagConversionOff[GPTConfig] = field(default_factory=lambda: preset("3m")[0])
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote."""
    output_dir: Path = Path("checkpoints/race")
    """Folder for the picture, race.png, and the checkpoints of all runs."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT; without one it does not take part."""
    seconds: float = 1800
    """Seconds of a run, from the start of its process to its last checkpoint."""
    optimizers: tuple[OptimizerName, ...] = get_args(OptimizerName)
    """Our recipes to race."""
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Peaks that AdamW, ours and nanoGPT's, tries for a quarter of the seconds each, to race at the
    best. Muon takes its default."""
    seeds: tuple[int, ...] = (1337,)
    """Our seeds; those after the first are for the winner. nanoGPT's is 1337 whatever one does."""
    batch_size: int = 8
    """Windows of context_length tokens in a step."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""


@dataclass(frozen=True)
class Contender:
    """Whoever races: a train.py, the flags that it alone has, and the loss of a checkpoint."""

    name: str
    script: Path
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    own_flags: Callable[[int, int, int, Path], dict]  # of steps, points, seed, folder
    score: Callable[[Path], float]


@dataclass(frozen=True)
class Run:
    """A run that has ended. The lists have an entry for each of its checkpoints."""

    contender: Contender
    learning_rate: float
    seed: int
    steps: list[int]
    seconds: list[float]  # since the start of its process
    checkpoints: list[Path]

    @property
    def losses(self) -> list[float]:
        return [self.contender.score(path) for path in self.checkpoints]

    @property
    def last_loss(self) -> float:
        return self.contender.score(self.checkpoints[-1])

    @property
    def seconds_a_step(self) -> float:
        """From the first checkpoint to the last: without the start-up, with the saves."""
        return (self.seconds[-1] - self.seconds[0]) / (self.steps[-1] - self.steps[0])

    def steps_in(self, seconds: float) -> int:
        """Returns how many steps, a multiple of POINTS, fit into `seconds` after a start-up."""
        start_up = self.seconds[0] - self.steps[0] * self.seconds_a_step
        return POINTS * max(1, int((seconds - start_up) / self.seconds_a_step / POINTS))


# --- The contenders; `score` takes a model ---


def our_recipe(arguments: Arguments, score: Callable, optimizer: OptimizerName) -> Contender:
    """Returns one of ours."""
    default = TrainingConfig(optimizer=optimizer).filled_in(arguments.gpt.n_embd).learning_rate
    return Contender(
        name=f"StoryGPT, {optimizer}",
        script=OUR_SCRIPT,
        learning_rates=arguments.learning_rates if optimizer == "adamw" else (default,),
        seeds=arguments.seeds,
        own_flags=lambda steps, points, seed, folder: {
            **asdict(arguments.gpt),
            "optimizer": optimizer,
            "max_steps": steps,
            "warmup_steps": warm_up(steps),
            "eval_interval": steps,
            "eval_windows": arguments.batch_size,
            "keep_interval": steps // points,
            "seed": seed,
            "data_dir": arguments.data_dir.resolve(),
            "checkpoint_dir": folder,
        },
        score=cache(lambda path: score(load_model(path, arguments.device)[0])),
    )


def nanogpt(arguments: Arguments, score: Callable) -> Contender:
    """Returns nanoGPT, its data beside the runs."""
    checkout, data = arguments.nanogpt.resolve(), arguments.output_dir.resolve() / "nanogpt_data"
    data.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        (data / name).unlink(missing_ok=True)  # the same data may have moved
        (data / name).symlink_to((arguments.data_dir / f"{split}.bin").resolve())
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": arguments.gpt.vocab_size}))

    # what it could not do there
    on_cpu = {} if arguments.device.startswith("cuda") else {"compile": False, "dtype": "float32"}

    def load(path: Path) -> nn.Module:
        """Opens a checkpoint in nanoGPT's own code: its GELU is the exact one, ours is GPT-2's."""
        theirs = runpy.run_path(str(checkout / "model.py"))
        checkpoint = torch.load(path, map_location=arguments.device, weights_only=True)
        with contextlib.redirect_stdout(None):
            model = theirs["GPT"](theirs["GPTConfig"](**checkpoint["model_args"]))
        consume_prefix_in_state_dict_if_present(checkpoint["model"], "_orig_mod.")  # compiled
        model.load_state_dict(checkpoint["model"])
        model.config.context_length = model.config.block_size  # what exact_loss asks for
        return model.to(arguments.device).eval()

    return Contender(
        name="nanoGPT, adamw",
        script=checkout / "train.py",
        learning_rates=arguments.learning_rates,
        seeds=(1337,),
        own_flags=lambda steps, points, seed, folder: {
            "block_size": arguments.gpt.context_length,
            "max_iters": steps,
            "lr_decay_iters": steps,
            "warmup_iters": warm_up(steps),
            "eval_interval": steps // points,  # when it saves
            "eval_iters": 1,
            "dataset": data,
            "out_dir": folder,
            **on_cpu,
        },
        score=cache(lambda path: score(load(path))),
    )


def warm_up(steps: int) -> int:
    return min(50, steps // 4)


def train(
    arguments: Arguments,
    contender: Contender,
    learning_rate: float,
    seed: int,
    steps: int,
    points: int,
) -> Run:
    """Trains for so many steps with so many checkpoints, unless that was done before.

    Raises InputError where it fails.
    """
    name = f"{contender.name}, rate {learning_rate:g}, seed {seed}, {steps} steps, {points} kept"
    folder = arguments.output_dir.resolve() / name
    kept = range(steps // points, steps + 1, steps // points)
    run = Run(
        contender=contender,
        learning_rate=learning_rate,
        seed=seed,
        steps=list(kept),
        seconds=[],
        checkpoints=[folder / step_name(step) for step in kept],
    )
    if (folder / SECONDS).exists():
        return replace(run, seconds=json.loads((folder / SECONDS).read_text()))
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    flags = {
        **{name: getattr(arguments.gpt, name) for name in SHAPE},
        "batch_size": arguments.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": learning_rate,
        "min_lr": learning_rate / 10,
        "device": arguments.device,
        **contender.own_flags(steps, points, seed, folder),
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    started, last_line = time.time(), ""
    with subprocess.Popen(
        [sys.executable, "-u", contender.script, *words],
        cwd=contender.script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout:
                last_line = line.strip() or last_line
                # nanoGPT has saved before it tells of a step; at the next save it would overwrite.
                if (told := re.match(r"iter (\d+):", line)) and (folder / "ckpt.pt").exists():
                    (folder / "ckpt.pt").rename(folder / step_name(int(told[1])))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise InputError(f"the run in {folder} ended with {process.returncode}: {last_line}")
    seconds = [path.stat().st_mtime - started for path in run.checkpoints]
    print(f"{name}: {seconds[-1]:.0f} s", flush=True)
    write_bytes(folder / SECONDS, json.dumps(seconds).encode())
    return replace(run, seconds=seconds)


def open_folder(arguments: Arguments, meta: dict) -> None:
    """Makes the folder, and notes there what all runs share. Raises InputError where it holds
    another race."""
    shared = asdict(arguments.gpt) | {name: getattr(arguments, name) for name in SHARED}
    note = json.dumps(shared | {"data": data_fingerprint(meta)}, indent=1).encode()
    path = arguments.output_dir / "race.json"
    if not any(arguments.output_dir.glob("*")):
        with writing(arguments.output_dir, "pass another --output_dir"):
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write_bytes(path, note)
    elif not path.exists() or path.read_bytes() != note:
        raise InputError(f"{arguments.output_dir} holds another race: pass another --output_dir")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises InputError where another process races in the folder: it would lose its runs."""
    lock = FileLock(folder / ".lock", fallback_to_soft=False)
    with contextlib.suppress(OSError):  # a disk without locks
        busy = f"another race is going on in {folder}: wait for it, or pass another --output_dir"
        take_lock(lock, busy)
    try:
        yield
    finally:
        lock.release()


def table(runs: list[Run], counts: dict) -> str:
    """Returns a Markdown row for each run; `counts` are meta.json's of the validation split."""
    titles = ("run", "learning rate", "seed", "steps", "seconds", "loss", "bits a byte", "s a step")
    rows = [titles, ["---"] * len(titles)]
    for run in runs:
        loss = run.last_loss
        row = [run.contender.name, f"{run.learning_rate:.2g}", f"{run.seed}", f"{run.steps[-1]:,}"]
        row += [f"{run.seconds[-1]:,.0f}", f"{loss:.3f}", f"{bits_per_byte(loss, counts):.3f}"]
        rows.append([*row, f"{run.seconds_a_step:.3f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Draws loss over seconds, a colour for each contender."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, names = figure.subplots(), [run.contender.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        label = f"{name}: {run.last_loss:.2f}"
        axes.plot(run.seconds, run.losses, f".-C{names.index(name)}", label=label)
    axes.set(xlabel="seconds since its start", ylabel="validation loss (nats a token)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=120)


def race(arguments: Arguments, contenders: list[Contender]) -> list[Run]:
    """Returns a run of the seconds asked for each contender, then those of the winner's seeds."""
    shorter = []
    for contender in contenders:
        run = partial(train, arguments, contender, seed=contender.seeds[0], points=2)
        quarter, tried = arguments.seconds / 4, [run(contender.learning_rates[0], steps=FEW_STEPS)]
        if tried[0].steps_in(quarter) > MORE_STEPS:
            tried = [run(contender.learning_rates[0], steps=MORE_STEPS)]
        if len(contender.learning_rates) > 1:
            steps = max(tried[0].steps[-1], tried[0].steps_in(quarter))
            tried = [run(learning_rate, steps=steps) for learning_rate in contender.learning_rates]
        shorter.append(min(tried, key=lambda run: run.last_loss))

    def whole(short: Run, seed: int) -> Run:
        run = partial(train, arguments, short.contender, short.learning_rate, seed)
        return run(steps=short.steps_in(arguments.seconds), points=POINTS)

    runs = [whole(short, short.seed) for short in shorter]
    _, best = min(zip(runs, shorter, strict=True), key=lambda pair: pair[0].last_loss)
    return runs + [whole(best, seed) for seed in best.contender.seeds[1:]]


def main() -> None:
    arguments = cli.parse_flags(Arguments)
    arguments = replace(arguments, device=str(use_device(arguments.device)))
    gpt = arguments.gpt
    check_whole("batch_size", arguments.batch_size, 1)
    if not 0 < arguments.seconds < math.inf:
        raise InputError(f"seconds must be above 0, not {arguments.seconds}")
    contenders_named = arguments.optimizers or arguments.nanogpt
    if not (contenders_named and arguments.learning_rates and arguments.seeds):
        raise InputError("pass one or more of --optimizers, of --learning_rates and of --seeds")
    for name in ("train.py", "model.py", "configurator.py"):
        if arguments.nanogpt and not (arguments.nanogpt / name).exists():
            raise InputError(f"{arguments.nanogpt} is no checkout of nanoGPT: it has no {name}")
    meta = load_meta(arguments.data_dir, gpt.vocab_size)
    open_folder(arguments, meta)
    tokens = load_tokens(arguments.data_dir, "validation", meta, gpt.context_length)

    def score(model: nn.Module) -> float:
        loss = exact_loss(model, tokens, meta["end_of_text"], arguments.batch_size)
        return loss if math.isfinite(loss) else math.inf

    contenders = [our_recipe(arguments, score, optimizer) for optimizer in arguments.optimizers]
    with alone_in(arguments.output_dir):
        if arguments.nanogpt:
            contenders.append(nanogpt(arguments, score))
        runs = race(arguments, contenders)
    picture = arguments.output_dir / "race.png"
    size = f"{GPT(gpt).num_parameters() / 1e6:.1f}M parameters"
    tokens_per_step = arguments.batch_size * gpt.context_length
    draw(runs, f"{size}, {tokens_per_step:,} tokens a step, on {arguments.device}", picture)
    print(table(runs, meta["splits"]["validation"]))
    print(f"\nthe curves are in {picture}")


if __name__ == "__main__":
    cli.run(main)
