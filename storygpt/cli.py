"""What the scripts share: flags out of dataclasses, and mistakes answered in one sentence.

Torch takes seconds to load, and a Ctrl-C in the middle of that would end in a traceback from within
it. So a script that is run, not one that is imported, calls `end_quietly_on_interrupt` above its
other imports.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from config import InputError, TrainingConfig
from storygpt.files import BEST

DEFAULT_CHECKPOINT = Path("checkpoints") / BEST
STARTED = time.monotonic()
# What the machine is to blame for, of all that CUDA calls an error.
GPU_FAILURES = "busy or unavailable|unspecified launch failure|ECC|timed out|unknown error"


def end_quietly_on_interrupt() -> None:
    """Has Ctrl-C end the process without a word, until `run` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may ignore it
        signal.signal(signal.SIGINT, _exit_130)


def _exit_130(*_) -> None:
    os._exit(130)


def parse_flags(arguments: type, default=None, **options):
    """Parses the command line into the dataclass `arguments`; `options` are tyro.cli's.

    Flags are the field names, of nested dataclasses too, with underscores; their help is the
    field docstrings. Exits with status 2 where they do not fit.
    """
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(arguments, default=default, use_underscores=True, config=config, **options)


def usable_cpus() -> int:
    """Returns how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def progress_bar(leave: bool = True, **options):
    """Makes a tqdm bar that redraws itself in a terminal, but rarely where a log keeps it all.

    One that is not to `leave` a line behind comes only where it takes longer than a second.
    """
    from tqdm import tqdm

    seldom = 0.2 if sys.stderr.isatty() else 30
    return tqdm(leave=leave, delay=0 if leave else 1, mininterval=seldom, **options)


def warn(text: str) -> None:
    """Prints a line on stderr, above a progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def shorten(text: str, most: int = 200) -> str:
    """Leaves out the middle of a text of more than `most` characters."""
    half = most // 2 - 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def one_line(error: Exception) -> str:
    """Returns what an exception says, on one line and shortened; its kind where it says nothing."""
    return shorten(" ".join(str(error).split())) or type(error).__name__


def first_line(error: Exception) -> str:
    """Returns the first line of what an exception says: torch adds others of its own."""
    return str(error).strip().partition("\n")[0]


def printable(text: str) -> str:
    """Returns text without the characters by which it could give orders to a terminal."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def command_line(script: str, launcher: str = "python", **flags) -> str:
    """Writes `python SCRIPT --flag value ...` as a shell takes it; Windows' knows no single
    quotes."""
    words = [script]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return f"{launcher} {join(words)}"


class OwnMistake(InputError):
    """What one process alone may run into: of torchrun's, no other one speaks for it."""


class Signals(NamedTuple):
    """The signals that have come, by what they ask for."""

    stop: list[int]
    """Ctrl-C, SIGTERM, SIGHUP or Windows' Ctrl-Break: to save and end."""
    save: list[int]
    """SIGUSR1: to save and go on."""


def listen_for_signals(launched: bool) -> Signals:
    """Returns lists that take the signals from here on, but for those that this process was
    started to ignore: SIGHUP by nohup, Ctrl-C by a shell's `&`.

    A second Ctrl-C ends the process at once; but not a process that torchrun has `launched`, whose
    launcher passes on what a terminal or a scheduler has sent to all of them already.
    """
    signals = Signals(stop=[], save=[])

    def request_stop(number, frame) -> None:
        signals.stop.append(number)
        if number == signal.SIGINT and not launched:
            signal.signal(number, signal.SIG_DFL)

    handlers = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"), request_stop)
    handlers["SIGUSR1"] = lambda number, frame: signals.save.append(number)
    for name, handler in handlers.items():
        number = getattr(signal, name, None)  # no system has all of them
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    return signals


class _Unfailing:
    """A stream whose reader may leave and whose disk may fill without an error here."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def never_stop_for_output() -> None:
    """Lets what cannot be printed from here on be lost, and nothing else with it."""
    sys.stdout = _Unfailing(sys.stdout)  # as `run` does with stderr


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether the machine or the GPU had no memory, for which torch has many words."""
    said = str(error)
    full = "out of memory" in said or "_ALLOC_FAILED" in said  # torch, the driver; cuBLAS
    on_cpu = "alloc" in said and "memory" in said
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and (full or on_cpu))


def advice_on_memory(config: TrainingConfig, micro_batch: int | None = None) -> OwnMistake:
    """Says how a run that did not fit into memory, `micro_batch` windows at a time, goes on with
    less of it."""
    micro_batch = micro_batch or config.batch_size
    size = next((n for n in range(micro_batch - 1, 0, -1) if micro_batch % n == 0), None)
    if size is None:
        less = "pass a smaller --context_length, --n_layer or --n_embd"
    else:
        less = (
            f"the same run in less: --batch_size {size} "
            f"--gradient_accumulation_steps {config.windows_per_step // size} --resume"
        )
    return OwnMistake(f"there is not enough memory; {less}")


def run(main: Callable[[], None]) -> None:
    """Calls `main` as a script's body: no traceback for what the user can mend or meant to do."""
    if signal.getsignal(signal.SIGINT) is _exit_130:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # what the terminal or file cannot show is replaced
            stream.reconfigure(errors="replace")
    sys.stderr = _Unfailing(sys.stderr)  # a bar that cannot be shown ends nothing
    try:
        main()
        sys.stdout.flush()  # here, where a full disk still has a sentence
    except InputError as error:
        fail(str(error), shared=not isinstance(error, OwnMistake))
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        drop_output()
        sys.exit(1)
    except OSError as error:
        place = error.filename or "while reading or writing"
        fail(f"{error.strerror or error}: {place}")
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            fail("there is not enough memory for this: pass smaller numbers")
        if re.match(f"(CUDA|HIP) error: .*({GPU_FAILURES})", str(error)):
            fail(
                f"the GPU has failed ({first_line(error)}): another program may have it, which "
                "nvidia-smi shows; then do the same again, a run with --resume"
            )
        raise


def drop_output() -> None:
    """Sends what is left in stdout's buffer nowhere: Python would try again, and complain, as it
    ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, shared: bool = False) -> None:
    """Ends the script with one sentence and status 1.

    Where it is `shared`, one of a node's processes under torchrun says it for all.
    """
    with contextlib.suppress(ValueError):  # closed
        try:
            sys.stdout.flush()
        except OSError:  # full
            drop_output()
    local_rank = os.environ.get("LOCAL_RANK", "0")
    muted = shared and "RANK" in os.environ and local_rank.isdigit() and int(local_rank) > 0
    sys.exit(1 if muted else f"error: {shorten(message, 490)}")  # whatever is quoted there
