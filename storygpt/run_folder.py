"""A run and its folder: no other run writes there, nothing is overwritten, every file is whole."""

import errno
import math
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from config import MAY_CHANGE, GPTConfig, InputError, TrainingConfig
from storygpt.checkpoint import load_checkpoint, save_checkpoint
from storygpt.cli import warn
from storygpt.device import beside_training, has_room
from storygpt.files import BEST, FINAL, LATEST, METRICS, PLOT, take_lock, writing
from storygpt.metrics import append_metrics, read_metrics
from storygpt.record import origin_of

# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def goes_on(resumed: dict, gpt: GPTConfig, training: TrainingConfig, origin: dict | None) -> bool:
    """Tells whether the run in the folder goes on under these settings.

    It does not where they differ and no step is saved yet: nothing is lost by beginning anew.
    Raises InputError, with every setting that differs, where steps would be lost or the run was
    given weights to start from. `origin` is that of --init_from, where it was passed.
    """
    recipe = resumed["training_config"]
    before = asdict(resumed["gpt_config"]) | asdict(recipe)
    now = asdict(gpt) | asdict(training)
    may_change = MAY_CHANGE
    if recipe.windows_per_step == training.windows_per_step:  # the same ones, cut otherwise
        may_change |= {"batch_size", "gradient_accumulation_steps"}
    differences = [
        f"{name} was {before[name]} and is now {now[name]}"
        for name in before
        if name not in may_change and before[name] != now[name]
    ]
    started_from = origin_of(resumed) or {}
    if origin and origin["sha256"] != started_from.get("sha256"):
        was, now = started_from.get("checkpoint", "nothing"), origin["checkpoint"]
        differences.append(f"init_from was {was} and is now {now if now != was else 'changed'}")
    if differences and resumed["step"] == 0 and not started_from:
        return False
    if differences:
        raise InputError(
            f"--resume would change the run: {'; '.join(differences)}. "
            "Leave those flags out, and --preset, or pass another --checkpoint_dir without --resume"
        )
    return True


@dataclass
class Retry:
    """When to try again what could not be written: at the next step, and then every minute."""

    since: float = math.inf
    """When the first of the failures in a row was."""
    next: float = -math.inf

    @property
    def due(self) -> bool:
        return time.monotonic() >= self.next

    def note(self, error: InputError | None) -> None:
        """Takes note of how an attempt went, and says a line where it failed."""
        now = time.monotonic()
        if error is None:
            self.since, self.next = math.inf, -math.inf
            return
        first = self.since == math.inf
        self.since, self.next = (now, now) if first else (self.since, now + 60)
        warn(f"{error}. Trying again {'at the next step' if first else 'in a minute'}")


class RunFolder:
    """One run's checkpoints and metrics on disk."""

    def __init__(self, directory: Path):
        self.directory, self.metrics = directory, directory / METRICS
        # Not soft: a lock that is a file's existence would outlive a process that was killed.
        self.guard = FileLock(directory / ".lock", fallback_to_soft=False)
        self.made = [p for p in (directory, *directory.parents) if not p.exists()]
        self.writer = ThreadPoolExecutor(1)
        self.device = torch.device("cpu")
        """Where what is being saved is trained."""
        self.attempt: Future | None = None
        """The save that goes on in the background."""
        self.unsaved: dict[str, dict] = {}
        """Checkpoints that are not yet on disk, by file name. While an attempt goes on, only its
        thread touches this."""
        self.unwritten: list[dict] = []
        """Lines of metrics.jsonl that are not yet there."""
        self.saving, self.appending = Retry(), Retry()
        self.size = 0
        """Bytes of metrics.jsonl that are whole lines."""
        self.save_seconds = 0.0
        """What the last save took."""

    def lock(self) -> None:
        """Locks the folder, made if need be, before anything in it is looked at.

        Raises InputError where another process has it.
        """
        with writing(self.directory, "pass another --checkpoint_dir"):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                take_lock(
                    self.guard,
                    f"another process is training in {self.directory}: wait for it, or pass "
                    "another --checkpoint_dir",
                )
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                warn(f"{self.directory} is on a disk without locks: nothing keeps a second run out")

    def close(self) -> None:
        """Unlocks the folder, once nothing is written any more; where it was made for a run that
        never began, removes it."""
        self.writer.shutdown()
        locked = self.guard.is_locked  # else the folder is another run's
        self.guard.release()
        with suppress(OSError):
            if locked and self.made and {*os.listdir(self.directory)} <= {".lock"}:
                (self.directory / ".lock").unlink(missing_ok=True)  # Windows has none any more
                for path in self.made:
                    path.rmdir()

    def find(self, resume: bool) -> dict | None:
        """Returns the StoryGPT_latest.pt of the run to go on with, or None where a new one begins.

        Raises InputError where a new run would overwrite another, or one cannot be resumed.
        """
        weights = [FINAL, *(path.name for path in self.directory.glob("StoryGPT_step_*.pt"))]
        if not (self.directory / LATEST).exists():
            for path in (self.directory / name for name in (*weights, BEST, METRICS, PLOT)):
                if path.exists() and path.stat().st_size:
                    raise InputError(
                        f"{self.directory} already holds {path.name} of a run, but not the "
                        f"{LATEST} from which alone it can be resumed: put that back, or pass "
                        "another --checkpoint_dir"
                    )
            return None
        latest = self._load_latest()
        if resume:
            return latest
        # A run that has saved no step has nothing to lose; but one that was killed in its first
        # save may have left weights.
        if latest["step"] == 0 and not any((self.directory / name).exists() for name in weights):
            return None
        what = "a run: continue it with --resume, or"
        if latest["step"] == latest["training_config"].max_steps:
            what = "a finished run:"
        raise InputError(f"{self.directory} already holds {what} pass another --checkpoint_dir")

    def _load_latest(self) -> dict:
        """Returns what was saved to go on from. Raises InputError where it cannot be read."""
        try:
            checkpoint = load_checkpoint(self.directory / LATEST)
            if "dtype" not in checkpoint:  # nor anything else of `TrainState.resume_state`
                raise InputError("it holds weights alone, or is of an older version")
            return checkpoint
        except InputError as error:
            raise InputError(
                f"{self.directory} cannot be resumed ({error}): put a good {LATEST} there, or pass "
                f"another --checkpoint_dir, and --init_from to start from this run's {BEST}"
            ) from error

    def cut(self, step: int) -> list[dict]:
        """Clears away what is of later than `step`, and returns the metrics up to there.

        Raises InputError where metrics.jsonl is spoiled.
        """
        for path in self.directory.iterdir():  # of a process killed while it was saving
            if re.fullmatch(rf"\.(StoryGPT_\w+\.pt|{METRICS}|{PLOT})\.\w{{8}}\.tmp", path.name):
                path.unlink()
        # A run that saved no step begins anew: not even the line of step 0 is kept.
        metrics = read_metrics(self.metrics, -1 if step == 0 else step)
        with writing(self.metrics):
            self.metrics.touch()
        self.size = self.metrics.stat().st_size
        if step == 0:
            for name in (BEST, FINAL, PLOT):
                with suppress(OSError):  # what cannot go is in the way of a save, which says so
                    (self.directory / name).unlink()
        return metrics

    def append(self, entry: dict) -> None:
        """Adds a line to metrics.jsonl, now or when that can be written again."""
        self.unwritten.append(entry)
        if self.appending.due:
            self.appending.note(self._append())

    def _append(self) -> InputError | None:
        """Tries to write the lines that are not there yet; returns what that failed for."""
        if not self.unwritten:
            return None
        try:
            with writing(self.metrics):
                self.size = append_metrics(self.metrics, self.unwritten, self.size)
        except InputError as error:
            return error
        self.unwritten = []
        return None

    def save(self, names: list[str], checkpoint: dict, resume_state: dict) -> None:
        """Saves `checkpoint` under each of `names`; with `resume_state` added as LATEST.

        Writes in a thread, from a copy, while training goes on. Where a GPU has room for the copy
        it is made there, in a millisecond, and its way to the host is the thread's affair. Raises
        InputError where the weights are not finite.
        """
        weights = list(checkpoint["model_state_dict"].values())
        if not torch.stack([w.isfinite().all() for w in weights]).all():
            raise InputError(
                f"step {checkpoint['step']} has made weights that are not finite, which were not "
                f"saved; the last good checkpoint is {self.directory / LATEST}. Likely cause: too "
                "high a --learning_rate"
            )
        if self.attempt:
            self.saving.note(self._end_attempt())
        self.device = weights[0].device
        size = 3 * sum(weight.nbytes for weight in weights)  # with two averages of each
        place = self.device if has_room(self.device, 2 * size) else "cpu"  # ample, or not at all
        states = {
            name: checkpoint | resume_state if name == LATEST else checkpoint for name in names
        }
        states = copied(states, lambda tensor: tensor.to(place, copy=True), {})
        # LATEST comes last, as it names the best loss: BEST must be on disk before it.
        for name in names:
            self.unsaved.pop(name, None)  # an older one gives up its place in the order
            self.unsaved[name] = states[name]
        self._start_attempt()

    def keep_up(self) -> None:
        """Notices a save that has failed, and tries again when that is due."""
        if self.attempt and self.attempt.done():
            self.saving.note(self._end_attempt())
        elif not self.attempt and self.unsaved and self.saving.due:
            self._start_attempt()

    def failing_for(self, minutes: float) -> bool:
        """Tells whether nothing could be saved for so long."""
        return time.monotonic() >= self.saving.since + 60 * minutes

    def wait(self, minutes: float = 0) -> None:
        """Waits until all is on disk; where that fails, tries again for `minutes`, once at least.

        Raises InputError where it could not be written.
        """
        deadline, tried = time.monotonic() + 60 * minutes, False
        if self.unsaved and not self.attempt:
            self._start_attempt()
        while error := self._end_attempt() or self._append():
            if tried and time.monotonic() >= deadline:
                raise error
            if tried:
                warn(f"{error}. Trying again in a minute")
                time.sleep(min(60, max(0, deadline - time.monotonic())))
            tried = True
            self._start_attempt()
        self.saving.note(None)

    def _start_attempt(self) -> None:
        self.attempt = self.writer.submit(self._write)

    def _end_attempt(self) -> InputError | None:
        """Waits for the save that goes on, if one does, and returns what it failed for."""
        error = self.attempt.result() if self.attempt else None
        self.attempt = None
        return error

    def _write(self) -> InputError | None:
        """Tries to save what is not saved yet; returns what that failed for."""
        began = time.monotonic()
        with suppress(OSError), open(self.metrics, "r+b") as file:
            os.fsync(file.fileno())  # a checkpoint does not outlive its steps' metrics
        with beside_training(self.device):
            self.unsaved = copied(self.unsaved, Tensor.cpu, {})
        for name in list(self.unsaved):
            try:
                save_checkpoint(self.directory / name, self.unsaved[name])
            except InputError as error:
                return error
            del self.unsaved[name]
            self.save_seconds = time.monotonic() - began
        return None


def copied(value, copy: Callable[[Tensor], Tensor], copies: dict[tuple, Tensor]):
    """Returns a nested state with a `copy` of each of its tensors.

    What shares its memory, as tied weights do, shares it in the copy too: `copies` has those made.
    """
    if isinstance(value, dict):
        return {key: copied(part, copy, copies) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [copied(part, copy, copies) for part in value]
    if not torch.is_tensor(value):
        return value
    where = (value.data_ptr(), value.dtype, value.shape, value.stride())
    if where not in copies or not value.numel():
        copies[where] = copy(value.detach())
    return copies[where]
