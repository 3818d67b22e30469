"""What the scripts share: flags out of dataclasses, and mistakes answered in one sentence."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from config import InputError

DEFAULT_CHECKPOINT = Path("checkpoints/StoryGPT_best.pt")  # here, where no torch is imported


def parse_flags(arguments: type, default=None):
    """The command line as an instance of the dataclass `arguments`.

    Flags are the field names, of nested dataclasses too, with underscores; their help is the
    field docstrings. Exits with status 2 and one sentence for flags that do not fit.
    """
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(arguments, default=default, use_underscores=True, config=config)
    except SystemExit as error:
        if error.code:
            # tyro draws a box: a title, the message, a rule, and hints
            message = box.getvalue().split("\n", 1)[-1].split("─" * 8)[0]
            message = " ".join(message.replace("│", " ").split())
            message = re.sub(r"^Error parsing [\w.]+: (?=\w+ )", "", message)
            script = os.path.basename(sys.argv[0])
            print(f"error: {message}; see python {script} --help", file=sys.stderr)
        raise


def progress_bar(**options):
    """A tqdm bar that redraws itself in a terminal, and rarely where a log file keeps each line."""
    from tqdm import tqdm

    return tqdm(mininterval=0.2 if sys.stderr.isatty() else 30, **options)


def run(main: Callable[[], None]) -> None:
    """Calls `main` as a script's body: no traceback for what the user can mend or meant to do."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":  # torchrun's other processes say the same
            sys.exit(1)
        sys.exit(f"error: {error}")
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output (`| head`) has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        sys.exit(
            f"error: {error.strerror or error}: {error.filename or 'while reading or writing'}"
        )
    except RuntimeError as error:  # gloo has no type of its own for a peer that is gone
        if "RANK" not in os.environ or " by peer" not in str(error):
            raise
        sys.exit("error: lost another process of this run; what ended it is in that one's output")
    except KeyboardInterrupt:
        sys.exit(130)
