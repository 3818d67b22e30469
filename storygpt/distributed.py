"""The processes of a run: one, or as many as torchrun starts."""

import json
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import InputError
from storygpt.cli import OwnMistake, first_line, warn

Stop = Literal["signal", "time"]  # what a run is stopped for before its last step


def lost_a_process(error: BaseException) -> bool:
    """Tells whether another process of this run is gone: gloo has no error of its own for that."""
    said = str(error).replace("\\", "/")  # a path of gloo's own, on Windows too
    gloo = isinstance(error, RuntimeError) and "gloo/transport" in said
    return isinstance(error, dist.DistError) or gloo


def disagreement(answers: list[dict]) -> str | None:
    """Says what went wrong or differs in the `answers` of `Processes.together`, by rank."""
    for rank, answer in enumerate(answers):
        if answer["mistake"]:
            return f"on rank {rank}: {answer['mistake']}" if rank else answer["mistake"]
    ours = answers[0]["same"]
    for rank, answer in enumerate(answers):
        theirs = answer["same"]
        differences = [
            f"{name} {theirs[name]} where rank 0 has {ours[name]}"
            for name in ours
            if theirs[name] != ours[name]
        ]
        if differences:
            return (
                f"rank {rank} has {', '.join(differences)}: start all processes with the same "
                "flags, on the same data"
            )
    return None


def ranks() -> tuple[int, int, int]:
    """Returns RANK, LOCAL_RANK and WORLD_SIZE as the launcher has set them. Raises InputError where
    its variables are not all there, or no numbers."""
    numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    names = (*numbers, "MASTER_ADDR", "MASTER_PORT")
    if lacking := [name for name in names if not os.environ.get(name)]:
        problem = f"RANK is set, as a launcher does, without {', '.join(lacking)}"
    elif wrong := [n for n in (*numbers, "MASTER_PORT") if not os.environ[n].isdigit()]:
        problem = f"RANK is set, as a launcher does, and no numbers in {', '.join(wrong)}"
    else:
        rank, local_rank, world_size = (int(os.environ[name]) for name in numbers)
        if rank < world_size:
            return rank, local_rank, world_size
        problem = f"RANK {rank} is not below WORLD_SIZE {world_size}"
    raise InputError(f"{problem}: start with torchrun, or `unset RANK`")


class Processes:
    """This process among the others: its rank, how they meet, and what they do together."""

    def __init__(self):
        """Raises InputError as `ranks` does."""
        self.launched = "RANK" in os.environ  # a WORLD_SIZE alone is a leftover
        self.exchanges = 0
        self.rank, self.local_rank, self.world_size = ranks() if self.launched else (0, 0, 1)

    @property
    def restarted(self) -> bool:
        """Whether torchrun has started this process anew, because one of them had died."""
        return self.launched and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    @property
    def launcher(self) -> str:
        """What a shell takes to start a script on as many processes again, on each machine."""
        known = os.environ
        if not self.launched or "TORCHELASTIC_RUN_ID" not in known:
            return "python"  # another launcher's command is unknown to us
        size = int(known.get("LOCAL_WORLD_SIZE", "1"))
        restarts = known.get("TORCHELASTIC_MAX_RESTARTS", "0")
        flags = f"--nproc_per_node={size} --max-restarts={restarts}"
        if size == self.world_size:
            return f"torchrun --standalone {flags}"
        store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
        return (
            f"{store}={known.get(store, '0')} torchrun --nnodes={self.world_size // size} {flags} "
            f"--rdzv_backend=c10d --rdzv_id={shlex.quote(known['TORCHELASTIC_RUN_ID'])} "
            f"--rdzv_endpoint={known['MASTER_ADDR']}:29500"
        )

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes and prints."""
        return self.rank == 0

    def own_windows(self, windows: int) -> range:
        """Returns which of a step's `windows` are this process's.

        Raises InputError where they do not divide among the processes.
        """
        if windows % self.world_size:
            raise InputError(
                f"the {windows} windows of a step (batch_size × gradient_accumulation_steps) do "
                f"not divide among {self.world_size} processes: make them a multiple"
            )
        size = windows // self.world_size
        return range(self.rank * size, (self.rank + 1) * size)

    # --- Before they train: what each brings, told through a store that needs no device ---

    @cached_property
    def store(self) -> dist.Store:
        """Where processes leave what others look for; the first use waits for all of them.

        Raises InputError where they do not meet: a port that is taken, an address that is not ours.
        """
        # While a process waits for the others, a handler in Python would not get its turn.
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        try:
            store, _, _ = next(dist.rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise OwnMistake(
                f"the processes did not meet at {place}: {first_line(error)}"
            ) from error
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives a restart: the addresses in it are of dead workers.
            return dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        return store

    def exchange(self, value) -> list:
        """Returns what each process gives here, by rank: anything that JSON can say."""
        if not self.launched:
            return [value]
        self.exchanges += 1
        names = [f"exchange {self.exchanges} of {rank}" for rank in range(self.world_size)]
        self.store.set(names[self.rank], json.dumps(value))
        return [json.loads(given) for given in self.store.multi_get(names)]

    def compare_torch(self) -> None:
        """Warns where the processes have not all the same torch."""
        first, *others = self.exchange(torch.__version__)
        for rank, version in enumerate(others, 1):
            if self.is_main and version != first:
                difference = f"torch {version} where rank 0 has {first}"
                warn(f"rank {rank} has {difference}: their numbers may differ")

    @contextmanager
    def together(self) -> Iterator[dict]:
        """Has a part of setting up succeed on all processes, or on none.

        Yields a dict for what the part finds that has to be the same on all. Raises InputError, in
        the same words on all, where that differs or the part has failed on one of them.
        """
        same, mistake = {}, None
        try:
            yield same
        except InputError as error:
            if not self.launched:
                raise
            mistake = str(error)
        answers = self.exchange({"mistake": mistake, "same": same})
        if said := disagreement(answers):
            self.see_off()
            raise InputError(said)

    def see_off(self) -> None:
        """Has rank 0, whose store may end with it, wait until the others have read it."""
        if not self.launched:
            return
        names = [f"read by {rank}" for rank in range(1, self.world_size)]
        with suppress(dist.DistError):
            if self.is_main:
                self.store.wait(names, timedelta(seconds=10))
            else:
                self.store.set(names[self.rank - 1], "")

    def own_device(self, device: torch.device) -> torch.device:
        """Returns this process's device of the kind of `device`.

        Raises InputError where a process has no GPU of its own, or cannot share it.
        """
        if self.launched and device.type == "mps":
            raise InputError(
                "Apple's GPU trains in one process: start without torchrun, or pass --device cpu"
            )
        if not self.launched or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {self.local_rank} of this machine has no GPU of its own: pass "
                f"--nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    # --- Once they have met ---

    def meet(self, device: torch.device) -> None:
        """Connects the processes' devices. Raises OwnMistake where this one's cannot be."""
        if not self.launched:
            return
        backend, hint = "gloo", "GLOO_SOCKET_IFNAME in the environment names its network interface"
        if device.type == "cuda":
            backend, hint = "nccl", "NCCL_DEBUG=INFO in the environment has it say more"
        group = {"store": self.store, "rank": self.rank, "world_size": self.world_size}
        try:
            dist.init_process_group(backend, **group)
            if backend == "nccl":  # which starts when it is first used
                dist.all_reduce(torch.zeros(1, device=device))
        except (RuntimeError, ValueError) as error:
            if "by peer" in str(error):
                raise
            reason = f"{device}: {first_line(error)}"
            raise OwnMistake(f"{backend.upper()} could not start on {reason}; {hint}") from error

    def from_main(self, value, device: torch.device):
        """Returns rank 0's `value` on all processes: a nested state with its tensors."""
        if not self.launched:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=device)
        return box[0]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Returns `model` with gradients averaged over all processes in each backward pass."""
        if not self.launched:
            return model
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def average_next_backward(self, model: nn.Module, now: bool) -> None:
        """Tells a wrapped model whether its next backward pass averages: once a step is enough."""
        if self.launched:
            model.require_backward_grad_sync = now

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values` over all processes, in place."""
        if self.launched:
            dist.all_reduce(values)
        return values

    def agree(self, values: list[Tensor], stop: Stop | None) -> tuple[list[float], Stop | None]:
        """Returns the means of () float32 `values` over all processes, and whether they stop.

        All stop for what one of them has to stop for; a signal goes before the clock. In
        bfloat16 and float32 the one synchronization of host and device in a step.
        """
        reasons = get_args(Stop)
        wishes = [torch.full_like(values[0], stop == reason) for reason in reasons]
        sums = self.sum(torch.stack([*values, *wishes])).tolist()
        means = [value / self.world_size for value in sums[: len(values)]]
        wished = [reason for reason, n in zip(reasons, sums[len(values) :], strict=True) if n]
        return means, wished[0] if wished else None

    def leave(self) -> None:
        """Ends what `meet` began."""
        if self.launched:
            dist.destroy_process_group()
