"""A run and its folder: no other run writes there, nothing is overwritten, every file is whole."""

import errno
import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

from config import MAY_CHANGE, GPTConfig, InputError, TrainingConfig
from storygpt.checkpoint import load_checkpoint, save_checkpoint
from storygpt.files import BEST, FINAL, LATEST, METRICS, PLOT, writing
from storygpt.metrics import append_metrics, read_metrics
from storygpt.state import check_resumable

# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def check_same_data(resumed: dict, fingerprint: str, data_dir: Path) -> None:
    """Raises InputError where a resumed run was trained on other data than `data_dir` holds."""
    if resumed.get("data") != fingerprint:
        raise InputError(
            f"the data in {data_dir} is not what the run was trained on so far: pass its --data_dir"
        )


def check_same_run(
    resumed: dict, gpt: GPTConfig, training: TrainingConfig, origin: dict | None
) -> None:
    """Raises InputError with every setting in which these would change a resumed run.

    `origin` is that of --init_from, where it was passed.
    """
    before = asdict(resumed["gpt_config"]) | asdict(resumed["training_config"])
    now = asdict(gpt) | asdict(training)
    differences = [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in before
        if name not in MAY_CHANGE and before[name] != now[name]
    ]
    begun = resumed.get("init_from") or {}
    if origin and origin["sha256"] != begun.get("sha256"):
        was = begun.get("checkpoint", "nothing")
        differences.append(f"init_from was {was} and is now {origin['checkpoint']}")
    if differences:
        raise InputError(
            f"--resume would change the run: {'; '.join(differences)}. "
            "Leave those flags out, or pass another --checkpoint_dir without --resume"
        )


class Found(NamedTuple):
    """What there is in a run's folder."""

    what: Literal["nothing", "a run begun", "a run", "a finished run"]
    """A run begun has saved no step, but the settings it began with."""
    latest: dict | None
    """What StoryGPT_latest.pt holds, if there is one."""


class RunFolder:
    """One run's checkpoints and metrics on disk."""

    def __init__(self, directory: Path):
        self.directory = directory
        # Ends with its process, however that ends: a lock that is a file's existence would not.
        self.guard = FileLock(directory / ".lock", fallback_to_soft=False)
        self.made = [p for p in (directory, *directory.parents) if not p.exists()]
        self.writer, self.pending_save = ThreadPoolExecutor(1), Future()
        self.pending_save.set_result(None)

    def lock(self) -> None:
        """Locks the folder, made if need be, before anything in it is looked at.

        Raises InputError where another process has it.
        """
        with writing(self.directory, "pass another --checkpoint_dir"):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self.guard.acquire(blocking=False)
            except Timeout as error:
                raise InputError(
                    f"another process is training in {self.directory}: wait for it, or pass "
                    "another --checkpoint_dir"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"{self.directory} is on a disk without locks: nothing keeps a second run out",
                    file=sys.stderr,
                )

    def close(self) -> None:
        """Unlocks the folder; where it was made for a run that never began, removes it."""
        self.guard.release()
        with suppress(OSError):
            if self.made and os.listdir(self.directory) == [".lock"]:
                (self.directory / ".lock").unlink()
                for path in self.made:
                    path.rmdir()

    def look(self) -> Found:
        """Says what is in the folder. Raises InputError where it is neither empty nor a run that
        can go on."""
        kept = [FINAL, *(path.name for path in self.directory.glob("StoryGPT_step_*.pt"))]
        if not (self.directory / LATEST).exists():
            self._refuse([*kept, BEST, METRICS, PLOT])
            return Found("nothing", None)
        latest = self._load_latest()
        if latest["step"] == 0:
            self._refuse(kept)
            return Found("a run begun", latest)
        finished = latest["step"] == latest["training_config"].max_steps
        return Found("a finished run" if finished else "a run", latest)

    def _refuse(self, names: list[str]) -> None:
        """Raises InputError where there is one of the files that training would write over."""
        for path in (self.directory / name for name in names):
            if path.exists() and path.stat().st_size:
                raise InputError(
                    f"{self.directory} already holds {path.name} of a run, but not the {LATEST} "
                    "from which alone it can be resumed: put that back, or pass another "
                    "--checkpoint_dir"
                )

    def _load_latest(self) -> dict:
        """Returns what was saved to go on from. Raises InputError where it cannot be read."""
        try:
            checkpoint = load_checkpoint(self.directory / LATEST)
            check_resumable(checkpoint)
            return checkpoint
        except InputError as error:
            raise InputError(
                f"{self.directory} cannot be resumed ({error}): put a good {LATEST} there, or pass "
                f"another --checkpoint_dir, and --init_from to start from this run's {BEST}"
            ) from error

    def find(self, resume: bool) -> dict | None:
        """Returns the StoryGPT_latest.pt of the run to go on with, or None where a new one begins.

        Raises InputError where a new run would overwrite another.
        """
        found = self.look()
        if resume or found.latest is None:
            return found.latest
        if found.what == "a run begun":  # it has nothing to lose
            return None
        how = "" if found.what == "a finished run" else "continue it with --resume, or "
        raise InputError(
            f"{self.directory} already holds {found.what}: {how}pass another --checkpoint_dir"
        )

    def cut(self, step: int) -> list[dict]:
        """Clears away what is of later than `step`, and returns the metrics up to there.

        Raises InputError where metrics.jsonl is spoiled.
        """
        for path in self.directory.iterdir():  # of a process killed while it was saving
            if re.fullmatch(rf"\.(StoryGPT_\w+\.pt|{METRICS}|{PLOT})\.\w{{8}}\.tmp", path.name):
                path.unlink()
        # a run that saved no step begins anew: not even the line of step 0 is kept
        metrics = read_metrics(self.directory / METRICS, step or -1)
        (self.directory / METRICS).touch()
        for name in (BEST, PLOT) if step == 0 else ():
            (self.directory / name).unlink(missing_ok=True)
        return metrics

    def append(self, entry: dict) -> None:
        """Adds a line to metrics.jsonl. Raises InputError where it cannot be written."""
        path = self.directory / METRICS
        with writing(path, "free some space, and go on with --resume"):
            append_metrics(path, entry)

    def save(self, names: list[str], checkpoint: dict, resume: dict) -> None:
        """Saves `checkpoint` under each of `names`; with `resume` added as StoryGPT_latest.pt.

        Writes in a thread, from a copy, while training goes on. Raises InputError where the
        weights are not finite, and where the save before this one has failed.
        """
        self.wait()
        finite = [w.isfinite().all() for w in checkpoint["model_state_dict"].values()]
        if not torch.stack(finite).all():
            raise InputError(
                f"step {checkpoint['step']} has made weights that are not finite, which were not "
                f"saved; the last good checkpoint is {self.directory / LATEST}. Likely cause: too "
                "high a --learning_rate"
            )
        checkpoint = on_cpu(checkpoint)
        resume = on_cpu(resume) if LATEST in names else {}
        self.pending_save = self.writer.submit(self._write, names, checkpoint, resume)

    def _write(self, names: list[str], checkpoint: dict, resume: dict) -> None:
        with open(self.directory / METRICS, "rb") as file:
            os.fsync(file.fileno())  # a checkpoint never outlives its steps' metrics
        for name in names:
            whole = checkpoint | resume if name == LATEST else checkpoint
            save_checkpoint(self.directory / name, whole)

    def wait(self) -> None:
        """Waits until what was saved is on disk. Raises InputError where that failed."""
        self.pending_save.result()


def on_cpu(value):
    """A copy of a nested state, its tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [on_cpu(part) for part in value]
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value
