"""What the machine offers: its device, the precision to use on it, and its peak speed."""

import torch

from config import InputError

# Peak dense bfloat16 (V100 and T4: float16) FLOP/s, from the vendors' data sheets. The first name
# found in the device's own name counts, so more special names come first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or for `auto` the first of cuda, mps and cpu.

    Raises InputError where it is not to be had here.
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
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named precision; for `auto`, bfloat16 where the GPU or CPU has instructions for it, else
    float16 on CUDA and float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s in half precision, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
