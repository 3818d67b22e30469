"""A run and its folder: no other run writes there, nothing is overwritten, every file is whole."""

import errno
import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

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


class RunFolder:
    """One run's checkpoints and metrics on disk."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.writer, self.pending_save = ThreadPoolExecutor(1), Future()
        self.pending_save.set_result(None)

    def unfinished(self) -> dict | None:
        """The checkpoint to go on from; None where no step was ever saved.

        Raises InputError where a run's checkpoint is gone or damaged.
        """
        latest = self.directory / LATEST
        if not latest.exists() and (held := self.held()):
            raise InputError(
                f"{self.directory} has {held} but not {LATEST}, from which alone a run can be "
                "resumed: put it back, or pass another --checkpoint_dir"
            )
        checkpoint = self.load_latest() if latest.exists() else None
        return checkpoint if checkpoint and checkpoint["step"] else None

    def load_latest(self) -> dict:
        """What was saved to go on from. Raises InputError where it cannot be read."""
        try:
            checkpoint = load_checkpoint(self.directory / LATEST)
            check_resumable(checkpoint)
            return checkpoint
        except InputError as error:
            raise InputError(
                f"{self.directory} cannot be resumed ({error}): put a good {LATEST} there, or pass "
                f"another --checkpoint_dir, and --init_from to start from this run's {BEST}"
            ) from error

    def check_same_run(
        self, resumed: dict, gpt: GPTConfig, training: TrainingConfig, origin: dict | None
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
                f"--resume would change the run in {self.directory}: {'; '.join(differences)}. "
                "Leave those flags out, or pass another --checkpoint_dir without --resume"
            )

    def check_unused(self) -> None:
        """Raises InputError where a new run would overwrite another."""
        if held := self.held():
            raise InputError(
                f"{self.directory} already holds a run ({held}): continue it with --resume, or "
                "pass another --checkpoint_dir"
            )

    def held(self) -> str | None:
        """The name of a file that a run has left here, or None.

        The first checkpoint of a run that never came to save a step holds nothing, and its metrics
        tell of nothing that is there.
        """
        latest = self.directory / LATEST
        names = [FINAL, *(p.name for p in self.directory.glob("StoryGPT_step_*.pt"))]
        if not latest.exists():
            names += [BEST, METRICS, PLOT]
        elif self.load_latest()["step"]:
            return LATEST
        paths = [self.directory / name for name in names]
        return next((path.name for path in paths if path.exists() and path.stat().st_size), None)

    def open(self, step: int) -> list[dict]:
        """Locks the folder, made if need be, and returns the metrics up to `step`.

        Raises InputError where another process has it, or metrics.jsonl is spoiled.
        """
        # Ends with its process, however that ends: a lock that is a file's existence would not.
        self.lock = FileLock(self.directory / ".lock", fallback_to_soft=False)
        with writing(self.directory, "pass another --checkpoint_dir"):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(blocking=False)
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
        for path in self.directory.iterdir():  # of a process killed while it was saving
            if re.fullmatch(rf"\.(StoryGPT_\w+\.pt|{METRICS}|{PLOT})\.\w{{8}}\.tmp", path.name):
                path.unlink()
        # a run that saved no step begins anew: not even the line of step 0 is kept
        metrics = read_metrics(self.directory / METRICS, step or -1)
        (self.directory / METRICS).touch()
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
