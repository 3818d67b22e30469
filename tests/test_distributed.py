"""Several processes with gloo on one machine: the numbers of one, and workers that die."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, losses_of, metrics_of

from config import GPTConfig, InputError
from model import GPT
from storygpt import cli
from storygpt.checkpoint import load_checkpoint
from storygpt.distributed import Processes, lost_a_process
from storygpt.kernels import compile_model, speed_up_training

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FLAGS = [*TINY, "--gradient_accumulation_steps", "4", "--dropout", "0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(*arguments, **environment) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | environment, **output)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(script, *flags, name="train.py", second=(), **environments: tuple[str, str]) -> list:
    """Two processes of a script as torchrun starts them, without the seconds of their imports.

    The `second`, as if on another node, has some flags of its own. Each keyword is an environment
    variable, with a value for each process.
    """
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["TORCHELASTIC_RESTART_COUNT"] = "0"
    return [
        script.start(
            name,
            *flags,
            *own,
            RANK=str(rank),
            LOCAL_RANK=local,
            **environment,
            **{key: values[rank] for key, values in environments.items()},
        )
        for rank, local, own in ((0, "0", ()), (1, "0" if second else "1", second))
    ]


def ended(processes: list) -> tuple[list[int], list[str]]:
    """The exit statuses and outputs of `ranks`, which are killed after a minute."""
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, [process.output.read_text() for process in processes]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def numbers_of(folder, *names: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[name] for line in lines for name in names if name in line]


def assert_close(folder, reference) -> None:
    for names, rel in ((("train_loss", "val_loss"), 1e-5), (("grad_norm",), 1e-4)):
        ours, theirs = numbers_of(folder, *names), numbers_of(reference, *names)
        assert ours == pytest.approx(theirs, rel=rel)
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
    codes, outputs = ended(ranks(script, *flags[1:], tmp_path / "two"))
    assert codes == [0, 0], outputs
    one, two = (numbers_of(tmp_path / n, "train_loss", "val_loss") for n in ("one", "two"))
    # orthogonalization rounds to bfloat16, so that a last bit of a gradient can become 0.4 %
    assert one == pytest.approx(two, rel=1e-3)


def test_two_processes_do_what_one_does_and_one_goes_on_where_two_stopped(
    script, data_dir, single, tmp_path
):
    flags = [*FLAGS, "--data_dir", data_dir, "--checkpoint_dir"]
    codes, (first, second) = ended(ranks(script, *flags, tmp_path / "two"))
    assert codes == [0, 0], first + second
    assert " parameters on 2 × cpu" in first and "done: " in first and not second.strip()
    assert_close(tmp_path / "two", single)
    codes, (first, _) = ended(ranks(script, *flags, tmp_path / "two"))
    assert codes == [1, 1] and "already holds a finished run" in first
    codes, (first, _) = ended(ranks(script, *flags, tmp_path / "late", "--max_hours", 1e-9))
    assert codes == [0, 0] and "continue with: " in first  # to torchrun 75 would be a death

    # The whole run again, but with a signal to one of the two, and resumed by one process.
    stopped = tmp_path / "stopped"
    processes = ranks(script, *flags, stopped)
    wait_for_steps(stopped, 3)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, outputs = ended(processes)
    assert codes == [143, 143], outputs  # both
    kept = load_checkpoint(stopped / "StoryGPT_latest.pt")["step"]
    assert 3 <= kept < 20
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", stopped)
    assert result.code == 0, result.output
    assert_close(stopped, single)


def test_a_second_ctrl_c_kills_no_process_of_torchrun():
    """A terminal sends it to all of them, and the launcher once more."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for launched in (True, False):
            signals = cli.listen_for_signals(launched)
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.stop == [signal.SIGINT]
            assert (signal.getsignal(signal.SIGINT) is signal.SIG_DFL) != launched
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
    killed, reached = [], 1
    for worker in (1, 0):
        while len(workers := workers_of(process.pid)) != 2 or {*workers} & {*killed}:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        wait_for_steps(tmp_path, reached + 3)  # of which those workers have made some
        os.kill(workers[worker], signal.SIGKILL)
        killed, reached = workers, (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
    output = finish(process)
    # Three starts; one more where a death is noticed twice, on a machine that is busy elsewhere.
    assert output.count(" parameters on 2 × cpu") in (3, 4)
    assert "Traceback" not in output
    assert_close(tmp_path, single)


def test_two_launchers_meet_as_two_nodes_and_meet_again_after_a_death(data_dir, single, tmp_path):
    port = free_port()
    flags = ["train.py", *FLAGS, "--data_dir", data_dir, "--checkpoint_dir", tmp_path]
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d"]
    nodes += ["--rdzv_id=tale", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first, second = (torchrun(*nodes, *flags, **own_store) for _ in range(2))
    wait_for_steps(tmp_path, 1)
    (worker,) = workers_of(first.pid)  # now: to look for it takes as long as some steps
    wait_for_steps(tmp_path, 7)
    os.kill(worker, signal.SIGKILL)
    outputs = [finish(first), finish(second)]
    assert sum(output.count("done: ") for output in outputs) == 1
    assert_close(tmp_path, single)


def test_windows_that_do_not_divide_among_processes_are_named(script, data_dir, tmp_path):
    flags = [*TINY, "--batch_size", "3", "--gradient_accumulation_steps", "3"]
    flags += ["--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    codes, (first, second) = ended(ranks(script, *flags))
    assert codes == [1, 1] and not second  # one speaks for both
    assert "error: the 9 windows of a step" in first and "among 2 processes" in first
    assert not (tmp_path / "run").exists()


def test_processes_share_the_windows_of_a_step_however_they_are_cut(script, data_dir, tmp_path):
    """A process has 6 windows of 12, in micro-batches of 4 and 2, where one has three of 4."""
    flags = [*TINY, "--dropout", 0, "--max_steps", 5, "--batch_size", 4, "--data_dir", data_dir]
    flags += ["--gradient_accumulation_steps", 3, "--checkpoint_dir"]
    result = script("train.py", *flags, tmp_path / "one")
    assert result.code == 0, result.output
    codes, outputs = ended(ranks(script, *flags, tmp_path / "two"))
    assert codes == [0, 0], outputs
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--learning_rate", "1e-3"], "rank 1 has learning_rate 0.001 where rank 0 has 0.003: "),
        (["--data_dir", "other"], "rank 1 has data "),
        (["--data_dir", "nowhere"], "on rank 1: no prepared data in nowhere"),
    ],
)
def test_processes_that_differ_do_not_begin(changes, says, script, flags, data_dir, tmp_path):
    if "other" in changes:  # one token is another
        other = Path(shutil.copytree(data_dir, tmp_path / "other"))
        tokens = (other / "train.bin").read_bytes()
        changed = bytes([tokens[0] ^ 1]) + tokens[1:]
        (other / "train.bin").write_bytes(changed)
        meta = (other / "meta.json").read_text()
        sums = [sha256(held).hexdigest() for held in (tokens, changed)]
        (other / "meta.json").write_text(meta.replace(*sums))
        changes = ["--data_dir", other]
    codes, outputs = ended(ranks(script, *flags, second=changes))
    assert codes == [1, 1], outputs
    assert all(f"error: {says}" in output for output in outputs), outputs
    assert not (tmp_path / "run").exists()


def test_a_folder_need_not_be_shared(script, data_dir, single, tmp_path):
    """The second node sees nothing of the first one's: it would have begun at step 0."""
    flags = [*FLAGS, "--data_dir", data_dir, "--checkpoint_dir", tmp_path / "run"]
    second = ["--checkpoint_dir", tmp_path / "nothing"]
    for more in (["--max_hours", 1e-9], ["--resume"]):
        codes, outputs = ended(ranks(script, *flags, *more, second=second))
        assert codes == [0, 0], outputs
    assert_close(tmp_path / "run", single)
    assert not (tmp_path / "nothing").exists()


def test_the_launcher_of_several_machines_is_named(monkeypatch):
    names = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    names |= {"MASTER_ADDR": "gpu1", "TORCHELASTIC_RUN_ID": "a tale"}
    names |= {"TORCHELASTIC_MAX_RESTARTS": 3, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    assert Processes().launcher == (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc_per_node=2 "
        "--max-restarts=3 --rdzv_backend=c10d --rdzv_id='a tale' --rdzv_endpoint=gpu1:29500"
    )


def test_another_torch_is_a_warning(monkeypatch, capsys):
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    processes = Processes()
    processes.store = torch.distributed.HashStore()
    processes.store.set("exchange 1 of 1", '"2.9.0"')
    processes.compare_torch()
    assert "rank 1 has torch 2.9.0 where rank 0 has" in capsys.readouterr().err


def test_gpus_that_are_not_there_or_cannot_meet_are_one_sentence(monkeypatch):
    names = {"RANK": 0, "LOCAL_RANK": 1, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"process 1 .* no GPU of its own: .*nproc_per_node=1"):
        Processes().own_device(torch.device("cuda"))
    if torch.distributed.is_nccl_available():
        pytest.skip("this torch has NCCL, which is to be missing")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(InputError, match=r"NCCL could not start on cuda:0: .*NCCL_DEBUG=INFO"):
            Processes().meet(torch.device("cuda", 0))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def one_of_one(port: int) -> dict[str, str]:
    return dict(zip(LAUNCHED, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))


def test_processes_that_cannot_meet_say_where_and_why(fails, flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        says = f"did not meet at 127.0.0.1:{port}: The server socket has failed to listen"
        fails("train.py", *flags, says=says, **one_of_one(port))
    fails("train.py", *flags, says=":99999: port must", **one_of_one(99999))
    says = "GLOO could not start on cpu: "  # an interface of another machine's
    fails("train.py", *flags, says=says, GLOO_SOCKET_IFNAME="eth9", **one_of_one(free_port()))


@pytest.mark.parametrize(
    ("says", "lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40763", True),
        ("[/gloo/transport/tcp/pair.cc:419] writev [127.0.0.1]:40763: Broken pipe", True),
        (r"[..\gloo\transport\uv\pair.cc:598] Connection closed by peer [127.0.0.1]:1", True),
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_gloo_says_of_a_process_that_is_gone_is_known(says, lost):
    assert lost_a_process(RuntimeError(says)) == lost


def test_a_restart_goes_on_with_no_other_run(script, fails, data_dir, copy_of_run):
    """Torchrun starts also those anew that were refused: the folder holds another run."""
    restarted = one_of_one(free_port()) | {"TORCHELASTIC_RESTART_COUNT": "1"}
    flags = ["--data_dir", data_dir, "--checkpoint_dir", copy_of_run, "--device", "cpu"]
    fails("train.py", *flags, says="n_layer was 2 and is now 10", **restarted)
    fails("train.py", *TINY, *flags, "--seed", 7, says="seed was 1337 and is now 7", **restarted)
    result = script("train.py", *TINY, *flags, **restarted)
    assert result.code == 0 and "resuming after step 20" in result.output, result.output


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


def test_a_scheduler_that_signals_all_processes_gets_its_checkpoint(flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train.py", *map(str, flags), "--max_steps", "5000"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **output)
    path = tmp_path / "run" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    for pid in [launcher.pid, *map(int, workers.stdout.split())]:
        os.kill(pid, signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert (
        "continue with: torchrun --standalone --nproc_per_node=2 --max-restarts=0 "
        f"{ROOT}/train.py --resume "
    ) in said
    last = metrics_of(tmp_path / "run")[-1]["step"]
    assert load_checkpoint(tmp_path / "run" / "StoryGPT_latest.pt")["step"] == last < 5000


def test_all_processes_start_from_the_same_weights(script, data_dir, single, tmp_path):
    start = ["--init_from", single / "StoryGPT_best.pt", "--max_steps", 6, "--eval_interval", 3]
    flags = [*FLAGS, *start, "--data_dir", data_dir, "--checkpoint_dir"]
    result = script("train.py", *flags, tmp_path / "one")
    assert result.code == 0, result.output
    codes, outputs = ended(ranks(script, *flags, tmp_path / "two"))
    assert codes == [0, 0], outputs
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(7))
    assert one[0]["val_loss"] < 6  # of one that knows nothing: ln 512 = 6.2
    for name in ("train_loss", "val_loss"):
        ours, theirs = ([line[name] for line in lines if name in line] for lines in (one, two))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_compiled_model_has_the_graph_and_dropout_of_one_process(monkeypatch):
    """DDP would split the graph by its buckets of 25 MB, each part with its own random numbers."""
    shape = {"vocab_size": 512, "context_length": 32, "n_layer": 4, "n_head": 4, "n_embd": 512}
    rows = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(1))
    compile_with, graphs, losses = torch.compile, [], {}

    def count(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_with(f, **how, backend=count))
    for name, value in zip(LAUNCHED, ("0", "0", "1", "127.0.0.1", str(free_port())), strict=True):
        monkeypatch.setenv(name, value)
    processes, cpu = Processes(), torch.device("cpu")
    processes.meet(cpu)
    for wrapped in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = GPT(GPTConfig(**shape)).train()
        speed_up_training(model, cpu)
        compiled = compile_model(model, True, cpu)
        graphs.clear()
        forward = processes.wrap(compiled, cpu) if wrapped else compiled
        losses[wrapped] = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            loss = forward(rows[:, :-1], rows[:, 1:])[1]
            loss.backward()
            losses[wrapped].append(loss.item())
        assert len(graphs) == 1
    processes.leave()
    assert losses[False] == losses[True]
