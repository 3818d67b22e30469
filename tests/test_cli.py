import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, metrics_of, wait_for_step

from storygpt.checkpoint import load_checkpoint
from storygpt.cli import command_line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_training_goes_on_without_output_and_other_scripts_say_so(flags, tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", *map(str, flags)]
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full).returncode == 0
        assert len(metrics_of(tmp_path / "run")) == 20
        command = [sys.executable, "generate.py", "--interactive", "--checkpoint"]
        command = "echo Tom | " + shlex.join([*command, str(tmp_path / "run" / "StoryGPT_best.pt")])
        told = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, shell=True, cwd=ROOT, **told)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr and "No space left" in done.stderr


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("raise KeyboardInterrupt", 130, ""),
        ("raise io.UnsupportedOperation('not seekable')", 1, "error: not seekable: while"),
        ("raise MemoryError", 1, "error: there is not enough memory"),
        ("raise RuntimeError('CUDA error: out of memory')", 1, "error: there is not enough memory"),
        ("raise RuntimeError('CUBLAS_STATUS_ALLOC_FAILED')", 1, "error: there is not enough"),
        ("raise RuntimeError('CUDA error: ECC error\\nmore')", 1, "error: the GPU has failed ("),
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


def test_what_may_be_a_fault_of_ours_on_a_gpu_keeps_its_traceback():
    body = "raise RuntimeError('CUDA error: device-side assert triggered')"
    program = f"from storygpt import cli\ndef main():\n    {body}\ncli.run(main)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


@pytest.mark.parametrize(("kind", "told"), [("InputError", False), ("OwnMistake", True)])
def test_a_process_tells_what_happened_to_it_alone(kind, told):
    """A full GPU's process was silent, and the others named its output for the reason."""
    body = f"raise cli.{kind}('no memory')"
    program = f"from storygpt import cli\ndef main():\n    {body}\ncli.run(main)"
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and ("error: no memory" in done.stderr) == told


def test_closed_output_ends_no_run(flags, tmp_path):
    command = shlex.join([sys.executable, "train.py", *map(str, flags)])
    assert subprocess.run(f"{command} >&- 2>&-", shell=True, cwd=ROOT).returncode == 0
    assert len(metrics_of(tmp_path / "run")) == 20


def test_printed_commands_work_when_pasted_anywhere(script, data_dir, tmp_path):
    folder = tmp_path / "new" / "a run; with 'quotes'"
    folder.mkdir(parents=True)
    flags = [*TINY, "--max_steps", "60", "--checkpoint_dir", ".", "--data_dir"]
    process = script.start("train.py", *flags, os.path.relpath(data_dir, folder), cwd=folder)
    wait_for_step(process, folder, 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    command = re.search(r"continue with: python (.*)", process.output.read_text())[1]
    words = subprocess.run(f"printf '%s\\n' {command}", shell=True, capture_output=True, text=True)
    path, *flags = words.stdout.splitlines()
    assert path == str(ROOT / "train.py")
    done = script("train.py", *flags, cwd=tmp_path)
    assert done.code == 0, done.output
    assert metrics_of(folder)[-1]["step"] == 60


def test_a_command_is_printed_as_windows_shells_take_it(monkeypatch):
    monkeypatch.setattr("os.name", "nt")
    command = command_line(r"C:\my train.py", resume=True, data_dir=r"D:\tales")
    monkeypatch.undo()
    assert command == r'python "C:\my train.py" --resume --data_dir D:\tales'


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


def test_a_run_that_a_shell_has_ignore_ctrl_c_goes_on_after_one(flags, tmp_path):
    """As `&` does in a script: the Ctrl-C is meant for another program."""
    command = ["bash", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, "train.py"]
    flags = [*map(str, flags), "--max_steps", "100", "--eval_interval", "100"]
    process = subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert len(metrics_of(tmp_path / "run")) == 100


def test_sigusr1_saves_and_goes_on(script, flags, tmp_path):
    flags = [*flags, "--save_minutes", 60, "--max_steps", 200, "--eval_interval", 200]
    process = script.start("train.py", *flags)
    wait_for_step(process, tmp_path / "run", 5)
    os.kill(process.pid, signal.SIGUSR1)
    path = tmp_path / "run" / "StoryGPT_latest.pt"
    while (saved := load_checkpoint(path)["step"]) == 0:
        assert process.is_alive(), process.output.read_text()
    assert saved < 200
    process.join(60)
    assert process.exitcode == 0, process.output.read_text()
    assert len(metrics_of(tmp_path / "run")) == 200


def test_an_ignored_ctrl_c_stays_ignored():
    """A shell has what it puts into the background ignore it: it is meant for another program."""
    body = "from storygpt import cli; import os; cli.run(lambda: os.kill(os.getpid(), 2))"
    command = ["bash", "-c", 'trap "" INT; "$0" -c "$1"', sys.executable, body]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
