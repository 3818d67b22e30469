"""Runs as strangers have them: leftovers, schedulers, terminals, disks; each a public report."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, python

from config import GPTConfig, InputError, TrainingConfig
from model import GPT
from storygpt import checkpoint as checkpoint_module
from storygpt import cli
from storygpt.checkpoint import load_checkpoint, save_checkpoint
from storygpt.files import BEST, FINAL, LATEST, write_atomically
from storygpt.log import start_tracker
from storygpt.run_folder import RunFolder
from storygpt.tokenizer import load_tokenizer

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder) -> list[float]:
    return [line.get("train_loss") for line in metrics_of(folder)]


@pytest.fixture
def flags(data_dir, tmp_path) -> list:
    return [*TINY, "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]


@pytest.fixture
def copy_of_run(run_dir, tmp_path):
    """A finished run of 20 steps that a test may spoil."""
    subprocess.run(["cp", "-r", run_dir, tmp_path / "run"], check=True)
    return tmp_path / "run"


# --- What a launcher left or did not say ---


def test_a_leftover_world_size_changes_nothing(script, flags, run_dir, tmp_path):
    result = script("train.py", *flags, WORLD_SIZE="2", LOCAL_RANK="1")
    assert result.code == 0, result.output
    assert losses_of(tmp_path / "run") == losses_of(run_dir)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (dict.fromkeys(LAUNCHED, "x"), "no numbers in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_PORT"),
        (dict.fromkeys(LAUNCHED, "3") | {"LOCAL_RANK": "0"}, "RANK 3 is not below WORLD_SIZE 3"),
    ],
)
def test_a_launcher_that_says_half_is_named(environment, says, fails, flags):
    fails("train.py", *flags, says=says, **environment)


def test_the_second_node_tells_its_mistake_too(script, flags):
    environment = dict(zip(LAUNCHED, ("1", "0", "2", "127.0.0.1", "1"), strict=True))
    for local_rank, heard in (("0", True), ("1", False)):
        environment["LOCAL_RANK"] = local_rank
        result = script("train.py", *flags, "--device", "tpu", **environment)
        assert result.code == 1 and ("is no device" in result.output) == heard


# --- metrics.jsonl, leftovers, two runs in one folder ---


def test_a_byte_order_mark_loses_no_metrics(script, copy_of_run, data_dir):
    path = copy_of_run / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + before + b'{"step": 21, "tok')  # and half a line
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", copy_of_run)
    assert result.code == 0, result.output
    assert path.read_bytes() == before


# The last is of a step that may come, but not here.
LINES = ["", "{}", "3", "[1]", "not JSON", '{"step": 9, "tokens": 1, "train_loss": 3.0}']


@pytest.mark.parametrize("line", LINES)
def test_a_spoiled_line_is_named_and_the_file_untouched(line, fails, copy_of_run, data_dir):
    path = copy_of_run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], line, *lines[6:]]) + "\n")
    before = path.read_bytes()
    flags = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", copy_of_run]
    fails("train.py", *flags, says="line 7 of ")
    assert path.read_bytes() == before


def test_missing_metrics_are_said(script, copy_of_run, data_dir):
    (copy_of_run / "metrics.jsonl").unlink()
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", copy_of_run)
    assert result.code == 0 and "metrics.jsonl is missing" in result.output


def test_metrics_without_checkpoints_count_as_a_run(fails, flags, copy_of_run):
    for path in copy_of_run.glob("*.pt"):
        path.unlink()
    before = {path: path.read_bytes() for path in copy_of_run.iterdir()}
    fails("train.py", *flags, says="already holds a run (metrics.jsonl)")
    fails("train.py", *flags, "--resume", says="from which alone a run can be resumed")
    assert {path: path.read_bytes() for path in copy_of_run.iterdir()} == before


@pytest.mark.parametrize("name", [BEST, FINAL, "StoryGPT_step_000005.pt"])
def test_weights_alone_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(InputError, match=f"already holds a run .{name}."):
        RunFolder(tmp_path).check_unused()


def test_a_checkpoint_that_cannot_be_resumed_is_named_with_what_mends_it(fails, flags, copy_of_run):
    for data, says in (
        (b"", "is damaged"),
        ((copy_of_run / "StoryGPT_best.pt").read_bytes(), "holds weights alone"),
    ):
        (copy_of_run / "StoryGPT_latest.pt").write_bytes(data)
        for more in ([], ["--resume"]):
            said = fails("train.py", *flags, *more, says="or pass another --checkpoint_dir")
            assert says in said


def test_two_runs_in_one_folder(script, fails, flags, tmp_path):
    first = script.start("train.py", *flags, "--max_steps", "2000")
    while not (tmp_path / "run" / "StoryGPT_latest.pt").exists():
        assert first.is_alive(), first.output.read_text()
        time.sleep(0.01)
    fails("train.py", *flags, "--max_steps", "2000", "--resume", says="another process is training")
    os.kill(first.pid, signal.SIGKILL)  # the lock dies with its process
    first.join()
    result = script("train.py", *flags, "--max_steps", "20", "--resume")
    assert "another process" not in result.output


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    """A stand-in for such a disk: flock answers as one does."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert RunFolder(tmp_path).open(0) == []
    assert "disk without locks" in capsys.readouterr().err


# --- Saving while training goes on ---


@pytest.fixture
def saving(tmp_path):
    """A run's folder whose writer is held up until `saving.go()`, and a checkpoint for it."""
    folder, hold = RunFolder(tmp_path), Event()
    folder.open(0)
    folder.writer.submit(hold.wait, 60)
    weights = GPT(GPTConfig(vocab_size=300, context_length=8, n_layer=1, n_head=1, n_embd=8))
    checkpoint = {"gpt_config": weights.config, "training_config": TrainingConfig(), "step": 1}
    checkpoint |= {"val_loss": 1.0, "model_state_dict": weights.state_dict()}
    yield SimpleNamespace(folder=folder, checkpoint=checkpoint, go=hold.set)
    hold.set()
    folder.lock.release()


def test_a_save_is_of_the_moment_it_was_asked_for(saving, tmp_path):
    """Training writes into the same weights and averages while the writer is at work."""
    weights, average = saving.checkpoint["model_state_dict"], torch.ones(3)
    before = {name: weight.clone() for name, weight in weights.items()}
    saving.folder.save([LATEST], saving.checkpoint, {"optimizer": [{"exp_avg": average}]})
    for tensor in (*weights.values(), average):
        tensor.detach().fill_(7.0)
    saving.go()
    saving.folder.wait()
    saved = load_checkpoint(tmp_path / LATEST)
    assert torch.equal(saved["optimizer"][0]["exp_avg"], torch.ones(3))
    for name, weight in before.items():
        assert torch.equal(saved["model_state_dict"][name], weight), name


@pytest.mark.parametrize("then", ["save", "wait"])
def test_a_save_that_failed_is_told_at_the_next_and_at_the_end(then, saving, tmp_path):
    (tmp_path / BEST).mkdir()  # in the way
    saving.go()
    saving.folder.save([BEST], saving.checkpoint, {})
    with pytest.raises(InputError, match=f"{BEST} cannot be written"):
        if then == "save":
            saving.folder.save([LATEST], saving.checkpoint, {})
        else:
            saving.folder.wait()
    assert not (tmp_path / LATEST).exists()


def test_weights_that_are_not_finite_are_not_saved(saving, tmp_path):
    saving.checkpoint["model_state_dict"]["ln_f.bias"][3] = float("nan")
    with pytest.raises(InputError, match="weights that are not finite"):
        saving.folder.save([LATEST], saving.checkpoint, {})
    saving.go()
    saving.folder.wait()
    assert not (tmp_path / LATEST).exists()


def test_only_our_own_leftovers_go(script, flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()  # of one killed before it saved anything
    mine = [tmp_path / "run" / name for name in (".notes.tmp", ".StoryGPT_ideas.txt.tmp")]
    ours = tmp_path / "run" / ".StoryGPT_latest.pt.abcd_123.tmp"
    for path in (*mine, ours):
        path.write_text("x")
    assert script("train.py", *flags).code == 0
    assert all(path.exists() for path in mine) and not ours.exists()


# --- Divergence and memory ---


def test_what_is_not_finite_is_never_saved(fails, flags, tmp_path):
    for steps, interval in (("1", "1"), ("12", "1"), ("12", "20")):
        these = [*flags, "--max_steps", steps, "--warmup_steps", "0", "--eval_interval", interval]
        these += ["--learning_rate", "1e30", "--grad_clip", "0"]
        fails("train.py", *these, says="no step was saved")
        assert not (tmp_path / "run" / "StoryGPT_best.pt").exists()
        latest = load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")
        assert latest["step"] == 0
        assert all(w.isfinite().all() for w in latest["model_state_dict"].values())


def test_a_run_that_made_no_step_stops_no_other(fails, script, flags, tmp_path):
    """A limited address space that suffices for set-up, not for so large a batch."""
    large = [*flags, "--batch_size", "20000", "--gradient_accumulation_steps", "3"]
    code = (
        "import resource, runpy, sys, torch\n"
        "so_far = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (so_far + 3_500_000_000,) * 2)\n"
        f"sys.argv = ['train.py', *{[str(flag) for flag in large]!r}]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    result = python("-c", code)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "--batch_size 10000 --gradient_accumulation_steps 6" in result.stderr
    result = script("train.py", *flags, "--resume")  # the corrected command
    assert result.code == 0 and "starting a new run" in result.output, result.output


@pytest.mark.parametrize(
    ("size", "less"),
    [(15, "--batch_size 5 --gradient_accumulation_steps 9"),
     (2, "--batch_size 1 --gradient_accumulation_steps 6"),
     (1, "pass a smaller --context_length")],
)  # fmt: skip
def test_the_same_run_in_less_memory_is_named_for_any_batch(size, less):
    recipe = TrainingConfig(batch_size=size, gradient_accumulation_steps=3)
    assert less in str(cli.advice_on_memory(recipe))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--n_layer", "1000", "--n_embd", "65536"], "pass a smaller --n_layer or --n_embd"),
        (["--batch_size", "2000000000"], "pass a smaller --batch_size"),
        (["--batch_size", "99999999999999999999"], "is over 2147483647"),
        (["--seed", str(2**64)], f"is over {2**63 - 1}"),
        (["--max_hours", "nan"], "max_hours must be above 0"),
        (["--max_hours", "0"], "max_hours must be above 0"),
        (["--save_minutes", "inf"], "save_minutes must be a number of at least 0"),
        (["--keep_interval", "-1"], "keep_interval must be a whole number of at least 0"),
    ],
)
def test_numbers_that_no_machine_holds_are_named_before_any_work(changes, says, fails, flags):
    fails("train.py", *flags, *changes, says=says, timeout=30)


# --- Terminals, disks ---


def test_what_decorates_ends_no_run(flags, tmp_path):
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_that_is_not_there",
        "PYTHONIOENCODING": "ascii:strict",
    }
    result = python("train.py", *flags, env=environment)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert len(metrics_of(tmp_path / "run")) == 20
    best = ("--checkpoint", tmp_path / "run" / "StoryGPT_best.pt", "--max_new_tokens", 5)
    told = python("generate.py", *best, "--prompt", "日本 é", env=environment)
    assert told.returncode == 0 and "Traceback" not in told.stderr, told.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_training_goes_on_without_output_and_other_scripts_say_so(flags, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", *map(str, flags)]
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full).returncode == 0
        assert len(metrics_of(tmp_path / "run")) == 20
        command = [sys.executable, "generate.py", "--interactive", "--checkpoint"]
        command = shlex.join([*command, str(tmp_path / "run" / "StoryGPT_best.pt")]) + " <&-"
        told = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, shell=True, cwd=ROOT, **told)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr and "No space left" in done.stderr


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("raise KeyboardInterrupt", 130, ""),
        ("raise io.UnsupportedOperation('not seekable')", 1, "error: not seekable: while"),
        ("raise RuntimeError('Connection closed by peer')", 1, "error: lost another process"),
        ("raise MemoryError", 1, "error: there is not enough memory"),
        ("[print('x' * 9999) for _ in range(99)]", 1, ""),  # its reader leaves after a line
        ("sys.stdin.read()", 0, ""),
    ],
)
def test_a_script_ends_without_a_traceback(body, code, says):
    program = f"import io, sys\nfrom storygpt import cli\ndef main():\n    {body}\ncli.run(main)"
    pipe = '"$0" -c "$1" <&- | head -n 1 > /dev/null; exit ${PIPESTATUS[0]}'
    command = ["bash", "-c", pipe]
    done = subprocess.run(
        [*command, sys.executable, program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.startswith(says) and done.stderr.count("\n") == bool(says), done.stderr


def test_closed_output_ends_no_run(flags, tmp_path):
    command = shlex.join([sys.executable, "train.py", *map(str, flags)])
    assert subprocess.run(f"{command} >&- 2>&-", shell=True, cwd=ROOT).returncode == 0
    assert len(metrics_of(tmp_path / "run")) == 20


def test_a_disk_that_syncs_no_folders_and_sets_no_modes_gets_its_file(tmp_path, monkeypatch):
    """A stand-in for CIFS and FUSE, which this machine has not."""
    sync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    def refused(*_) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint_module.os, "fsync", of_files_only)
    monkeypatch.setattr(checkpoint_module.os, "chmod", refused)
    # Beside its target: a rename does not lead from one disk to another.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    write_atomically(tmp_path / "a", lambda file: file.write(b"whole"))
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_another_precision_on_resume_is_said(script, flags, data_dir, tmp_path):
    """As when `auto` was bfloat16 on the first machine and float16 here, told by its own file."""
    flags = [*flags, "--dtype", "auto"]
    process = script.start("train.py", *flags, "--max_steps", "60", "--eval_interval", "60")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics_of(tmp_path / "run"):
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    latest = load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")
    scale = torch.amp.GradScaler("cpu").state_dict()
    latest |= {"dtype": "float16", "scaler_state_dict": scale}
    save_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt", latest)
    command = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    result = script("train.py", *command)
    assert result.code == 0 and "this run was in float16 and goes on in" in result.output


# --- Signals and commands ---


def test_a_scheduler_that_signals_all_processes_gets_its_checkpoint(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train.py", *map(str, flags), "--max_steps", "5000"]
    launcher = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    path = tmp_path / "run" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    for pid in [launcher.pid, *map(int, workers.stdout.split())]:
        os.kill(pid, signal.SIGTERM)
    launcher.communicate(timeout=60)
    last = metrics_of(tmp_path / "run")[-1]["step"]
    assert load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["step"] == last < 5000


def test_printed_commands_work_when_pasted(script, data_dir, tmp_path):
    folder = tmp_path / "new" / "a run; with 'quotes'"
    flags = [*TINY, "--max_steps", "60", "--data_dir", data_dir, "--checkpoint_dir", folder]
    process = script.start("train.py", *flags)
    while not (folder / "metrics.jsonl").exists() or not metrics_of(folder):
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    command = re.search(r"continue with: python (.*)", process.output.read_text())[1]
    done = subprocess.run(f"{sys.executable} {command}", shell=True, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert metrics_of(folder)[-1]["step"] == 60


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("train", "libtorch_cpu"),
        ("evaluate", "libtorch_cpu"),
        ("generate", "libtorch_cpu"),
        ("upload_to_hf", "libtorch_cpu"),
        ("prepare_data", "_multiarray_umath"),
    ],
)
def test_ctrl_c_while_libraries_load_is_quiet(name, library, tmp_path):
    """Sent when the first large library has been mapped, in the middle of the imports."""
    command = [sys.executable, f"{name}.py"]
    if name == "upload_to_hf":
        command += ["--repo_id", "a/b", "--dry_run", "--output_dir", str(tmp_path / "a")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **output)
    while process.poll() is None:
        with open(f"/proc/{process.pid}/maps") as maps:
            if library in maps.read():
                break
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output


def test_an_ignored_ctrl_c_stays_ignored():
    """A shell has what it puts into the background ignore it: it is meant for another program."""
    body = "from storygpt import cli; import os; cli.run(lambda: os.kill(os.getpid(), 2))"
    command = ["bash", "-c", 'trap "" INT; "$0" -c "$1"', sys.executable, body]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


# --- What people do every day ---


def test_resume_starts_where_there_is_nothing_and_continues_where_there_is(
    script, flags, run_dir, tmp_path
):
    for stop in (True, False):
        process = script.start("train.py", *flags, "--resume")
        if stop:
            while (
                not (tmp_path / "run" / "metrics.jsonl").exists()
                or len((tmp_path / "run" / "metrics.jsonl").read_bytes()) < 2
            ):
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        said = process.output.read_text()
        assert ("starting a new run" in said) == stop and ("resuming after step" in said) != stop
        assert "this run was in" not in said
    assert losses_of(tmp_path / "run") == losses_of(run_dir)


def test_max_hours_says_that_there_is_more(script, flags, tmp_path):
    flags += ["--max_steps", "3", "--warmup_steps", "1", "--resume", "--max_hours", "1e-9"]
    for step in (1, 2, 3):  # one is made however little time there is: a chain of jobs ends
        result = script("train.py", *flags)
        assert result.code == (75 if step < 3 else 0), result.output
        assert ("continue with: python train.py --resume" in result.output) == (step < 3)
        assert ("done: best val_loss" in result.output) == (step == 3)
        assert metrics_of(tmp_path / "run")[-1]["step"] == step
        assert load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["step"] == step


def test_weights_are_kept_and_stories_told_over_training(script, flags, tmp_path):
    result = script("train.py", *flags, "--keep_interval", "5")
    assert result.code == 0, result.output
    kept = sorted(path.name for path in (tmp_path / "run").glob("StoryGPT_step_*.pt"))
    assert kept == [f"StoryGPT_step_{n:06}.pt" for n in (5, 10, 15, 20)]
    losses = {line["step"]: line.get("val_loss", math.inf) for line in metrics_of(tmp_path / "run")}
    for name in kept:  # no step has the loss of an earlier one
        checkpoint = load_checkpoint(tmp_path / "run" / name)
        assert name == f"StoryGPT_step_{checkpoint['step']:06}.pt"
        assert checkpoint["val_loss"] == losses[checkpoint["step"]]
    samples = [line["sample"] for line in metrics_of(tmp_path / "run") if line.get("sample")]
    assert len(samples) == 2
    assert all(len(load_tokenizer(512).encode_ordinary(sample)) <= 65 for sample in samples)
    assert re.search(r"tokens/s with saves and evaluations, [\d.]+ GB", result.output)


def test_after_twenty_steps_it_says_how_long(script, flags):
    result = script("train.py", *flags, "--max_steps", "30")
    assert re.search(r"about \d+:\d\d:\d\d to go at [\d,]+ tokens/s, [\d.]+ GB", result.output)


def test_a_tracker_gets_every_step_and_goes_on_when_resumed(script, flags, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    folder = str(tmp_path / "trackio")
    flags = [*flags, "--tracker", "trackio"]
    result = script("train.py", *flags, TRACKIO_DIR=folder, HF_HUB_OFFLINE="1")
    assert result.code == 0, result.output
    assert list((tmp_path / "trackio").rglob("*.db"))


def test_a_tracker_that_is_not_there_or_fails(fails, flags, tmp_path, monkeypatch, capsys):
    if find_spec("wandb") is None:
        fails("train.py", *flags, "--tracker", "wandb", says="pip install wandb")
    (tmp_path / "wandb.py").write_text(  # one that breaks in mid-run
        "class Run:\n"
        "    def log(self, entry, step): raise ConnectionError('gone')\n"
        "def init(name, **settings):\n"
        "    if 'offline' in name: raise ConnectionError('no network')\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="--tracker wandb cannot start: no network"):
        start_tracker("wandb", {}, "id", tmp_path / "offline")
    track = start_tracker("wandb", {}, "id", tmp_path)
    track({"step": 1})
    track({"step": 2})
    assert capsys.readouterr().err.count("wandb has failed and is off: gone") == 1


# --- Starting from weights that exist ---


def test_init_from_then_resume_is_the_run_left_alone(script, data_dir, run_dir, tmp_path):
    flags = [*TINY, "--data_dir", data_dir, "--init_from", "StoryGPT_best.pt"]
    flags += ["--learning_rate", "0.001", "--min_lr", "0.0001"]
    result = script("train.py", *flags, "--checkpoint_dir", tmp_path / "whole", cwd=run_dir)
    assert result.code == 0, result.output
    start = metrics_of(tmp_path / "whole")[0]
    known = load_checkpoint(run_dir / "StoryGPT_best.pt")
    assert start["step"] == 0 and start["val_loss"] == pytest.approx(known["val_loss"], rel=1e-6)
    assert start["init_from"]["checkpoint"] == str(run_dir / "StoryGPT_best.pt")
    assert (tmp_path / "whole" / "loss_plot.png").exists()

    process = script.start(
        "train.py", *flags, "--checkpoint_dir", tmp_path / "stopped", cwd=run_dir
    )
    path = tmp_path / "stopped" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.is_alive(), process.output.read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    flags += ["--resume", "--checkpoint_dir", tmp_path / "stopped"]  # the same command, requeued
    result = script("train.py", *flags, cwd=run_dir)
    assert result.code == 0, result.output
    assert losses_of(tmp_path / "stopped")[1:] == losses_of(tmp_path / "whole")[1:]
    ours, theirs = (
        load_checkpoint(tmp_path / name / "StoryGPT_final.pt") for name in ("stopped", "whole")
    )
    assert ours["init_from"] == theirs["init_from"] == start["init_from"]
    for name, weight in theirs["model_state_dict"].items():
        assert torch.equal(ours["model_state_dict"][name], weight), name


def test_init_from_takes_the_shape_and_refuses_another(script, fails, data_dir, run_dir, tmp_path):
    flags = ["--data_dir", data_dir, "--init_from", run_dir / "StoryGPT_best.pt", "--device", "cpu"]
    flags += ["--checkpoint_dir", tmp_path / "run", "--batch_size", "2", "--eval_iters", "2"]
    for changes, says in (
        (["--n_layer", "3"], "has n_layer 2, not 3"),
        (["--context_length", "65"], "has context_length 64, not 65"),
        (["--vocab_size", "600"], "has vocab_size 512, not 600"),
        (["--init_from", "gpt2"], "a Hub id, owner and name, as in openai-community/gpt2"),
        (["--init_from", "runs/none.pt"], "there is no runs/none.pt to start from"),
    ):
        fails("train.py", *flags, *changes, says=says)
    flags += ["--context_length", "32", "--dropout", "0", "--max_steps", "2", "--warmup_steps", "0"]
    flags += ["--grad_clip", "0", "--learning_rate"]
    fails("train.py", *flags, "1e30", says="a gradient norm of")  # and leaves a step 0 behind
    result = script("train.py", *flags, "1")  # too high as well: nothing is better than the start
    assert result.code == 0, result.output
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]
    assert load_checkpoint(tmp_path / "run" / "StoryGPT_best.pt")["step"] == 0
    made = load_checkpoint(tmp_path / "run" / "StoryGPT_final.pt")
    assert made["gpt_config"].context_length == 32 and made["gpt_config"].n_layer == 2
    assert made["model_state_dict"]["wpe.weight"].shape == (32, 32)
    # Resumed, it keeps its own shape; it began with these weights, whatever they are called now.
    flags = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    shutil.copy(run_dir / "StoryGPT_best.pt", tmp_path / "moved.pt")
    result = script("train.py", *flags, "--init_from", tmp_path / "moved.pt")
    assert result.code == 0, result.output
    begun = load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["init_from"]
    assert begun["checkpoint"] == str(run_dir / "StoryGPT_best.pt")
    other = tmp_path / "run" / "StoryGPT_final.pt"
    fails("train.py", *flags, "--init_from", other, says=f"init_from was {run_dir}")
