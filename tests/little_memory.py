"""train.py in an address space that suffices for set-up, and not for a large batch."""

import resource
from pathlib import Path

import train


def main() -> None:
    so_far = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (so_far + 3_500_000_000,) * 2)
    train.main()
