"""What the machine offers: its device, the precision to use on it, its peak speed, its memory."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from config import GPTConfig, InputError
from model import GPT
from storygpt.cli import is_out_of_memory
from storygpt.distributed import Processes

# Peak dense bfloat16 (V100 and T4: float16) FLOP/s, from the vendors' data sheets. The keys are
# regular expressions that match the whole name the driver gives.
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100( 80GB HBM3)?": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100[- ](?!.*MIG).+": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100-.+": 125e12,
    "Tesla T4": 65e12,
}


def use_device(name: str = "auto") -> torch.device:
    """Returns the named device, or for `auto` the first of cuda, mps and cpu.

    Also makes it torch's current device. Raises InputError where it is not to be had here, and
    where there is an NVIDIA GPU that this torch cannot use.
    """
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.insert(0, "mps")
    if torch.cuda.is_available():
        found.insert(0, "cuda")
    elif name == "auto" or name.startswith("cuda"):
        check_driver()
    try:
        device = torch.device(found[0] if name == "auto" else name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device: pass --device {found[0]}") from error
    if device.type not in found or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"there is no device {name} here: pass --device {found[0]}")
    if device.type == "cuda":
        check_architecture(device)
        if device.index is not None:  # kernels and memory that name no device go there
            torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # has given gradients that are no numbers
    return device


# The oldest NVIDIA driver for each major version of CUDA, from NVIDIA's compatibility tables.
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}


def check_driver() -> None:
    """Raises InputError where torch has no CUDA but the driver has a GPU: training on the CPU
    instead would take weeks."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or torch.version.hip:
        return
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return
    dead = re.search("Unknown Error|Driver/library version mismatch", answer.stdout + answer.stderr)
    if dead:  # a container that has lost its GPU; a driver that was updated while in use
        raise InputError(
            f"there is a GPU here whose driver does not answer ({dead[0]}): start the "
            "machine, or its container, again; or pass --device cpu to do without"
        )
    found = re.match(r"((\d+)[.\d]*), (.+)", answer.stdout)
    if not found:
        return
    driver, major, gpu = found[1], int(found[2]), found[3]
    cuda = torch.version.cuda
    shown = f" with CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    needed = OLDEST_DRIVER.get(cuda.split(".")[0], 0) if cuda else 0
    mend = install_torch("cu130" if major >= OLDEST_DRIVER["13"] else "cu126")
    if major < OLDEST_DRIVER["12"]:
        mend = f"update the driver to {OLDEST_DRIVER['13']} or newer"
    if not cuda:
        what = "is built for CPUs alone"
    elif major < needed:
        what = f"is built for CUDA {cuda}, which needs a driver of {needed} or newer"
    else:
        what = f"cannot start its CUDA {cuda}{shown}"
        mend = "python -c 'import torch; torch.cuda.init()' says why"
    raise InputError(
        f"there is a GPU here ({gpu}, driver {driver}), but torch {torch.__version__} {what}: "
        f"{mend}; or pass --device cpu to do without"
    )


def check_architecture(device: torch.device) -> None:
    """Raises InputError where this torch has no kernels for the GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    known = re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))
    for kind, number in known:
        # Kernels run on their own generation; what a driver compiles itself, on all later ones.
        if int(number) <= own and (kind == "compute" or int(number) // 10 == major):
            return
    if known:
        older = own < min(int(number) for _, number in known)
        raise InputError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)}, "
            f"sm_{own}, but for {', '.join(torch.cuda.get_arch_list())}: "
            f"{install_torch('cu126' if older else 'cu130')}; or pass --device cpu to do without"
        )


def install_torch(build: str) -> str:
    """Returns the command that installs PyTorch's own build for a version of CUDA, as in cu126."""
    return (
        f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the named precision; for `auto`, bfloat16 where the GPU or CPU has instructions for
    it, else float16 on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    # An older torch does not tell (2.9): float32 is never wrong.
    known = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Returns `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Returns `cuda, bfloat16`; says that float32's products are TF32 on CUDA."""
    exact = dtype != torch.float32 or device.type != "cuda"
    return f"{device.type}, {dtype_name(dtype)}{'' if exact else ' with products in TF32'}"


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns a context in which matrix products run in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_flops(device: torch.device) -> float | None:
    """Returns the device's peak FLOP/s in half precision, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if re.fullmatch(known, name)), None)


def says_when_full(device: torch.device) -> bool:
    """Tells whether more than the device's memory is an error; a CPU's process is killed."""
    return device.type == "cuda"


def card_name(device: torch.device) -> str:
    """Returns what the driver calls a GPU, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fit_micro_batch(
    model: GPT, most: int, *, dtype: torch.dtype, spare: int, processes: Processes
) -> int:
    """Returns the largest divisor of `most`, in windows, that a training step has memory for.

    Each is tried: forward, backward, with `spare` bytes set aside for what comes later. All
    `processes` take the same. Raises InputError where not even one window fits.
    """
    device = model.wte.weight.device
    if not says_when_full(device):
        return most
    for windows in (n for n in range(most, 0, -1) if most % n == 0):
        fits = _fits(model, windows, dtype, spare)
        if not processes.sum(torch.tensor(float(not fits), device=device)):
            torch.cuda.empty_cache()  # what was tried is not what the run takes
            torch.cuda.reset_peak_memory_stats(device)
            return windows
    raise InputError(
        f"{card_name(device)} has not enough memory for a step on one window: pass a smaller "
        "--context_length, --n_layer or --n_embd"
    )


def _fits(model: GPT, windows: int, dtype: torch.dtype, spare: int) -> bool:
    device, shape = model.wte.weight.device, (windows, model.config.context_length)
    try:
        aside = torch.empty(spare, dtype=torch.uint8, device=device)
        idx = torch.zeros(shape, dtype=torch.int64, device=device)
        for _ in range(2):  # the second has the gradients of the first in memory
            with autocast(device, dtype):
                _, loss = model(idx, idx)
            loss.backward()
        del aside
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad()
    return True


def check_fits(gpt: GPTConfig, batch_size: int, device: torch.device) -> None:
    """Raises InputError where a CPU surely cannot hold a training step: it would be killed.

    That takes 16 bytes a parameter (weight, gradient, AdamW's two averages), and at least 20 ·
    n_layer · n_embd bytes a token for the backward pass.
    """
    if says_when_full(device) or not (
        hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    ):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = gpt.n_embd * (12 * gpt.n_layer * gpt.n_embd + gpt.vocab_size + gpt.context_length)
    tokens = batch_size * gpt.context_length
    for what, size, flags in (
        (f"a model of {weights:,} parameters", 16 * weights, "--n_layer or --n_embd"),
        (f"a micro-batch of {tokens:,} tokens", 20 * gpt.n_layer * gpt.n_embd * tokens,
         "--batch_size"),
    ):  # fmt: skip
        if size > memory:
            raise InputError(
                f"{what} takes at least {size / 1e9:,.0f} GB to train, and {device} has "
                f"{memory / 1e9:,.0f}: pass a smaller {flags}"
            )


def peak_memory(device: torch.device) -> int | None:
    """Returns the most bytes so far: torch's on a CUDA device, else this process's, where Linux
    tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s+(\d+)", status.read_text())
    return 1024 * int(found[1]) if found else None


def has_room(device: torch.device, size: int) -> bool:
    """Tells whether a CUDA device has `size` bytes beside the most that torch has used so far."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return free + unused > size


@contextmanager
def beside_training(device: torch.device) -> Iterator[None]:
    """Has CUDA do what this thread asks for beside the work that is queued later, and after the
    work that is queued now."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns the array as a tensor on `device`.

    To CUDA from pinned memory, so that the copy does not wait for the GPU's work; nowhere else, as
    only CUDA keeps the source alive until an asynchronous copy is done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
