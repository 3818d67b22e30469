"""What the machine offers: its device, the precision to use on it, its peak speed, its memory."""

import os
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from config import GPTConfig, InputError

# Peak dense bfloat16 (V100 and T4: float16) FLOP/s, from the vendors' data sheets. The keys are
# regular expressions that match the whole name the driver gives.
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100( 80GB HBM3)?": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100[- ].+": 312e12,
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

    Also makes it torch's current device and allows TF32 for its products of float32. Raises
    InputError where it is not to be had here.
    """
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.insert(0, "mps")
    if torch.cuda.is_available():
        found.insert(0, "cuda")
    try:
        device = torch.device(found[0] if name == "auto" else name)
    except RuntimeError as error:
        raise InputError(f"{name!r} is no device: pass --device {found[0]}") from error
    if device.type not in found or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"there is no device {name} here: pass --device {found[0]}")
    if device.type == "cuda":  # kernels and memory that name no device go to the current one
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # has given gradients that are no numbers
    torch.set_float32_matmul_precision("high")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named precision; for `auto`, bfloat16 where the GPU or CPU has instructions for it, else
    float16 on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    # An older torch does not tell (2.9): float32 is never wrong.
    known = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """`cuda, bfloat16`; says that float32's products are TF32 on CUDA."""
    exact = dtype != torch.float32 or device.type != "cuda"
    return f"{device.type}, {dtype_name(dtype)}{'' if exact else ' with products in TF32'}"


def autocast(device: torch.device, dtype: torch.dtype):
    """A context in which matrix products run in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s in half precision, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if re.fullmatch(known, name)), None)


def check_fits(gpt: GPTConfig, batch_size: int, device: torch.device) -> None:
    """Raises InputError where the device surely cannot hold a training step.

    That takes 16 bytes a parameter (weight, gradient, AdamW's two averages), and at least 20 ·
    n_layer · n_embd bytes a token for the backward pass.
    """
    weights = gpt.n_embd * (12 * gpt.n_layer * gpt.n_embd + gpt.vocab_size + gpt.context_length)
    tokens = batch_size * gpt.context_length
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
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
    """Most bytes so far: torch's on a CUDA device, else this process's, where Linux tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s+(\d+)", status.read_text())
    return 1024 * int(found[1]) if found else None


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`.

    To CUDA from pinned memory, so that the copy does not wait for the GPU's work; nowhere else, as
    only CUDA keeps the source alive until an asynchronous copy is done.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def compile_model(model: nn.Module, wanted: bool | None, device: torch.device) -> nn.Module:
    """torch.compile(model) if `wanted`; None means on CUDA, where it works.

    Raises InputError where it is wanted and does not work: it needs a C++ compiler, and on GPUs
    Triton.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return model
    try:  # a small function first: a model's first step is late for such news
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: (x.sin() * 2).sum())(x).backward()
    except Exception as error:  # each layer of the compiler has its own
        reason = f"torch.compile does not work here ({type(error).__name__})"
        if wanted:
            raise InputError(f"{reason}: pass --compile False") from error
        print(f"{reason}: training goes on without it, more slowly")
        return model
    return torch.compile(model)
