"""The processes of a run: one, or as many as torchrun starts."""

import os
import signal
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import InputError

Stop = Literal["signal", "time"]  # what a run is stopped for before its last step


def lost_a_process(error: BaseException) -> bool:
    """Tells whether another process of this run is gone: gloo has no error of its own for that."""
    return isinstance(error, dist.DistError) or "by peer" in str(error)


class Processes:
    """This process among the others: its rank, how they meet, and what they do together."""

    def __init__(self):
        """Raises InputError where the launcher's variables are not all there, or no numbers."""
        self.launched = "RANK" in os.environ  # a WORLD_SIZE alone is a leftover
        self.rank, self.local_rank, self.world_size = 0, 0, 1
        if self.launched:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            lacking = [name for name in names if not os.environ.get(name)]
            wrong = [n for n in (*names[:3], "MASTER_PORT") if not os.environ.get(n, "0").isdigit()]
            if lacking or wrong:
                what = "without" if lacking else "and no numbers in"
                raise InputError(
                    f"RANK is set, as a launcher does, {what} {', '.join(lacking or wrong)}: start "
                    "with torchrun, or `unset RANK`"
                )
            self.rank, self.local_rank, self.world_size = (int(os.environ[n]) for n in names[:3])
            if self.rank >= self.world_size:
                raise InputError(
                    f"RANK {self.rank} is not below WORLD_SIZE {self.world_size}: start with "
                    "torchrun, or `unset RANK`"
                )

    @property
    def restarted(self) -> bool:
        """Whether torchrun has started this process anew, because one of them had died."""
        return self.launched and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes and prints."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """Returns this process's part of `number` micro-batches.

        Raises InputError where they do not divide among the processes.
        """
        if number % self.world_size:
            raise InputError(
                f"gradient_accumulation_steps {number} does not divide among {self.world_size} "
                f"processes: pass a multiple of {self.world_size}"
            )
        size = number // self.world_size
        return range(self.rank * size, (self.rank + 1) * size)

    def meet(self, device: torch.device) -> torch.device:
        """Waits for the others, where torchrun started them; returns this process's device.

        Raises InputError where a process has no GPU of its own, or they cannot meet on them.
        """
        if not self.launched:
            return device
        if device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise InputError(
                    f"process {self.local_rank} of this machine has no GPU of its own: pass "
                    f"--nproc_per_node={torch.cuda.device_count()}"
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        # While a process waits for the others, a handler in Python would not get its turn.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives a restart: the addresses in it are of dead workers.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        group = {"store": store, "rank": self.rank, "world_size": self.world_size}
        try:
            dist.init_process_group(backend, **group)
            if backend == "nccl":  # which starts when it is first used
                dist.all_reduce(torch.zeros(1, device=device))
        except (RuntimeError, ValueError) as error:
            if backend == "gloo":
                raise
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"NCCL could not start on {device}: {reason}; NCCL_DEBUG=INFO in the environment "
                "has it say more"
            ) from error
        return device

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Returns `model` with gradients averaged over all processes in each backward pass."""
        if not self.launched:
            return model
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

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

        All stop for what one of them has to stop for; a signal goes before the clock. The one
        synchronization of host and device in a step.
        """
        reasons = get_args(Stop)
        wishes = [torch.full_like(values[0], stop == reason) for reason in reasons]
        sums = self.sum(torch.stack([*values, *wishes])).tolist()
        means = [value / self.world_size for value in sums[: len(values)]]
        wished = [reason for reason, n in zip(reasons, sums[len(values) :], strict=True) if n]
        return means, wished[0] if wished else None

    def part(self) -> None:
        """Ends what `meet` began."""
        if self.launched:
            dist.destroy_process_group()
