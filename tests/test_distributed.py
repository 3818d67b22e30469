"""torchrun with gloo on one machine: the single process's numbers, and workers that die."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY

from config import InputError
from storygpt.checkpoint import load_checkpoint
from storygpt.distributed import Processes

FLAGS = [*TINY, "--gradient_accumulation_steps", "4", "--dropout", "0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(*arguments, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | environment, **output)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def losses_of(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines for key in ("train_loss", "val_loss") if key in line]


def assert_close(folder, reference) -> None:
    ours, theirs = losses_of(folder), losses_of(reference)
    assert len(ours) == len(theirs)
    assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) <= 1e-5
    ours, theirs = (
        load_checkpoint(f / "StoryGPT_final.pt")["model_state_dict"] for f in (folder, reference)
    )
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, atol=1e-4), name


@pytest.fixture(scope="module")
def single(script, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    result = script("train.py", *FLAGS, "--data_dir", data_dir, "--checkpoint_dir", folder)
    assert result.code == 0, result.output
    return folder


def test_muon_on_two_processes_does_what_it_does_on_one(script, data_dir, tmp_path):
    flags = ["train.py", *FLAGS, "--optimizer", "muon", "--data_dir", data_dir, "--checkpoint_dir"]
    result = script(*flags, tmp_path / "one")
    assert result.code == 0, result.output
    finish(torchrun("--standalone", "--nproc_per_node=2", *flags, tmp_path / "two"))
    one, two = (losses_of(tmp_path / name) for name in ("one", "two"))
    # orthogonalization rounds to bfloat16, so that a last bit of a gradient can become 0.4 %
    assert one == pytest.approx(two, rel=1e-3)


def test_two_processes_do_what_one_does_and_one_goes_on_where_two_stopped(
    script, data_dir, single, tmp_path
):
    flags = ["train.py", *FLAGS, "--data_dir", data_dir, "--checkpoint_dir"]
    two = torchrun("--standalone", "--nproc_per_node=2", *flags, tmp_path / "two")
    output = finish(two)
    assert output.count(" parameters on 2 × cpu") == 1
    assert output.count("done: ") == 1  # rank 0 alone prints
    assert_close(tmp_path / "two", single)

    # The whole run again, but stopped by a signal to the launcher and resumed by one process.
    stopped = tmp_path / "stopped"
    process = torchrun("--standalone", "--nproc_per_node=2", *flags, stopped, "--max_steps", "20")
    wait_for_steps(stopped, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    kept = load_checkpoint(stopped / "StoryGPT_latest.pt")["step"]
    assert kept >= 3
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", stopped)
    assert result.code == 0, result.output
    assert_close(stopped, single)


def wait_for_steps(folder, number: int) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def workers_of(launcher: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_killed_worker_comes_back_by_itself(data_dir, single, tmp_path):
    flags = ["train.py", *FLAGS, "--data_dir", data_dir, "--checkpoint_dir", tmp_path]
    process = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=3", *flags)
    for steps, worker in ((7, 1), (11, 0)):
        wait_for_steps(tmp_path, steps)
        os.kill(workers_of(process.pid)[worker], signal.SIGKILL)
    output = finish(process)
    assert output.count(" parameters on 2 × cpu") == 3
    assert "Traceback" not in output
    assert_close(tmp_path, single)


def test_two_launchers_meet_as_two_nodes_and_meet_again_after_a_death(data_dir, single, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["train.py", *FLAGS, "--data_dir", data_dir, "--checkpoint_dir", tmp_path]
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d"]
    nodes += ["--rdzv_id=tale", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first, second = (torchrun(*nodes, *flags, **own_store) for _ in range(2))
    wait_for_steps(tmp_path, 7)
    os.kill(*workers_of(first.pid), signal.SIGKILL)
    outputs = [finish(first), finish(second)]
    assert sum(output.count("done: ") for output in outputs) == 1
    assert_close(tmp_path, single)


def test_micro_batches_that_do_not_divide_are_named(data_dir, tmp_path):
    flags = ["train.py", *TINY, "--gradient_accumulation_steps", "3"]
    flags += ["--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    output = finish(torchrun("--standalone", "--nproc_per_node=2", *flags), code=1)
    errors = re.findall("error: gradient_accumulation_steps 3 does not divide among 2", output)
    assert len(errors) == 1
    assert not (tmp_path / "run").exists()


def test_gpus_that_are_not_there_or_cannot_meet_are_one_sentence(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 1, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"process 1 .* no GPU of its own: .*nproc_per_node=1"):
        Processes().meet(torch.device("cuda"))
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has NCCL, which is to be missing")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(InputError, match=r"NCCL could not start on cuda:0: .*NCCL_DEBUG=INFO"):
            Processes().meet(torch.device("cuda"))
    finally:
        signal.signal(signal.SIGTERM, handler)
