"""Files: their names, and writing them whole or not at all."""

import errno
import io
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from config import InputError

# A run's folder holds these, and StoryGPT_step_005000.pt for each step that --keep_interval keeps.
BEST, FINAL, LATEST = (f"StoryGPT_{name}.pt" for name in ("best", "final", "latest"))
METRICS, PLOT = "metrics.jsonl", "loss_plot.png"
EVALUATION = "evaluation.json"  # where the model card looks for what evaluate.py measured
META = "meta.json"  # of a data folder
ELSEWHERE = "pass another folder"


def step_name(step: int) -> str:
    """Names the file that `--keep_interval` keeps of `step`."""
    return f"StoryGPT_step_{step:06}.pt"


def remedy(error: OSError, or_else: str) -> str:
    """Says what mends an error of writing a file, and last what to do instead."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            mend = "free some space"
        case errno.EFBIG:
            mend = "allow larger files (`ulimit -f`)"
        case errno.EACCES | errno.EPERM:
            mend = "allow writing there, close what has it open"
        case errno.ENOENT | errno.EIO | errno.ENOTCONN | errno.ENODEV | errno.ESTALE:
            mend = "see that its folder and its disk are still there"
        case _:
            return or_else
    return f"{mend}, or {or_else}"


def cannot_write(path: Path, error: OSError, or_else: str, kept: bool = False) -> InputError:
    """Says that `path` could not be written and what mends that; `kept`: the file before it is."""
    reason = f"{path} cannot be written ({error.strerror or error})"
    if kept:
        reason += ", and the one before it is kept"
    return InputError(f"{reason}: {remedy(error, or_else)}")


@contextmanager
def writing(path: Path, or_else: str = ELSEWHERE) -> Iterator[None]:
    """Raises InputError where `path` could not be written, with what mends that."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, or_else) from error


def take_lock(lock, taken: str) -> None:
    """Takes a `filelock.FileLock`, which ends with this process, however that ends.

    Raises InputError, which says `taken`, where another process has it, and OSError on a disk
    without locks.
    """
    from filelock import Timeout  # where a lock is, it is imported; who only reads need not wait

    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(taken) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file, then renames it to `path`: no reader sees half a file.

    Raises InputError where the disk is full or the folder cannot be written; an older `path`
    stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error.__context__, KeyboardInterrupt | SystemExit):
            raise error.__context__ from None  # torch.save complains of the file a Ctrl-C cut short
        first = error
        while not isinstance(first, OSError) and first.__context__:
            first = first.__context__  # torch.save ends in an error of its own about it
        if isinstance(first, OSError):
            raise cannot_write(path, first, ELSEWHERE, kept=os.path.exists(path)) from error
        raise
    if os.name == "posix":  # the rename itself survives a power cut only once the folder is synced
        with suppress(OSError):  # not every file system can do that
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file of `data`, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(data))


def save_figure(figure, path: Path, dpi: int) -> None:
    """Writes a matplotlib figure as a PNG. Raises InputError as `write_atomically` does."""
    image = io.BytesIO()
    # without the version of matplotlib, so that the same picture is the same file
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    write_bytes(path, image.getvalue())


def refuse_pointer(path: Path) -> None:
    """Raises InputError where there is git's pointer to a large file instead of the file, or a web
    page about it, or it cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(60)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError(
            f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its folder"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path} is a web page, not the file: download the file itself")
