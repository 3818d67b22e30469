import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from config import GPTConfig, InputError
from storygpt.device import (
    check_architecture,
    check_fits,
    describe,
    has_room,
    peak_flops,
    peak_memory,
    pick_dtype,
    use_device,
)
from storygpt.kernels import compile_model, failed_to_compile


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


@pytest.mark.parametrize("has_it", [True, False])
def test_auto_takes_bfloat16_only_where_the_cpu_has_it(has_it, monkeypatch):
    """A stand-in for the processor: without instructions for it, it would be far slower."""
    known = {"avx512_bf16": has_it, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    expected = torch.bfloat16 if has_it else torch.float32
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32


def test_float32_on_a_gpu_says_that_its_products_are_tf32():
    assert describe(torch.device("cuda"), torch.float32) == "cuda, float32 with products in TF32"
    assert describe(torch.device("cuda"), torch.bfloat16) == "cuda, bfloat16"
    assert describe(torch.device("cpu"), torch.float32) == "cpu, float32"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),  # a seventh of one
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_found_by_its_whole_name(name, known, monkeypatch):
    """A stand-in for the driver, which alone knows the name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == known


def test_a_gpu_is_taken_and_one_that_is_not_there_is_named(monkeypatch):
    """A stand-in for a machine with one GPU, which has no bfloat16 but in software."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr(torch.cuda, "set_device", torch.cuda._utils._get_device_index)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda setting: None)
    assert use_device() == torch.device("cuda")
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(InputError, match="there is no device cuda:1 here: pass --device cuda"):
        use_device("cuda:1")


def test_a_compiler_that_does_not_work_ends_only_a_run_that_asks_for_it(monkeypatch, capsys):
    def broken(model, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    model, cpu, cuda = torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cuda")
    with pytest.raises(InputError, match=r"does not work here .*: pass --compile False"):
        compile_model(model, True, cpu)
    assert compile_model(model, False, cuda) is compile_model(model, None, cpu) is model
    assert not capsys.readouterr().out
    assert compile_model(model, None, cuda) is model
    assert "training goes on without it" in capsys.readouterr().out


def test_a_compiler_that_fails_later_on_the_model_is_known_by_its_errors():
    def broken(graph, inputs):
        raise ValueError("this shape is too much")

    with pytest.raises(RuntimeError, match="too much") as raised:
        torch.compile(torch.sin, backend=broken)(torch.ones(2))
    assert failed_to_compile(raised.value) and not failed_to_compile(RuntimeError("too much"))


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs /proc")
def test_memory_is_counted_in_bytes():
    number = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    with pytest.raises(InputError) as error:
        check_fits(GPTConfig(n_layer=1000, n_embd=2**16), 1, torch.device("cpu"))
    said = re.search(r"cpu has ([\d,]+): pass a smaller --n_layer", str(error.value))[1]
    assert int(said.replace(",", "")) == pytest.approx(1024 * number / 1e9, rel=0.05, abs=1)
    large = np.ones(30_000_000)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    del large  # the peak remains
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0.95 * pages * resource.getpagesize() < peak_memory(torch.device("cpu")) < 1.05 * most


def test_a_gpu_has_room_for_what_training_has_never_needed(monkeypatch):
    """A stand-in for the driver and torch's allocator: 7 GB are nobody's, and of the 6 GB that
    torch holds a step took 5 at the most."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 10**9, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 10**9)
    cuda, gigabyte = torch.device("cuda"), 10**9
    assert has_room(cuda, 7 * gigabyte) and not has_room(cuda, 9 * gigabyte)
    assert not has_room(torch.device("cpu"), 1)


CU130, CU126 = (
    f"https://download.pytorch.org/whl/{build}; or pass" for build in ("cu130", "cu126")
)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize(
    ("driver", "cuda", "says"),
    [
        (
            "551.23",
            "13.0",
            "CUDA 13.0, which needs a driver of 580 or newer: pip install",
        ),
        ("551.23", "13.0", CU126),
        ("470.82.01", "12.6", "needs a driver of 525 or newer: update the driver to 580 or newer"),
        ("580.65.06", None, "is built for CPUs alone: pip install --force-reinstall torch"),
        ("580.65.06", None, CU130),
        ("551.23", None, CU126),
        ("580.65.06", "13.0", "cannot start its CUDA 13.0 with CUDA_VISIBLE_DEVICES=7: python -c"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_one_sentence(driver, cuda, says, monkeypatch, tmp_path):
    """A stand-in for the driver's own program, and for how torch was built."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{driver}, NVIDIA GeForce RTX 3060'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # which is not there, for one
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("auto", "cuda"):
        with pytest.raises(InputError) as error:
            use_device(name)
        assert says in str(error.value)
        assert f"(NVIDIA GeForce RTX 3060, driver {driver})" in str(error.value)
    assert use_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whoever hides the GPU means it
    assert use_device() == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Unknown Error'; exit 255\n")
    with pytest.raises(InputError, match=r"does not answer \(Unknown Error\): start the machine"):
        use_device()
    program.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert use_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "architectures", "says"),
    [
        ((6, 0), ["sm_75", "sm_80", "sm_90"], CU126),
        ((12, 0), ["sm_75", "sm_80", "sm_90"], CU130),
        ((8, 6), ["sm_75", "sm_80", "sm_90"], None),  # of sm_80's generation
        ((12, 1), ["sm_80", "compute_90"], None),  # the driver compiles for what is newer
        ((9, 0), ["sm_90a"], None),
        ((9, 4), ["gfx942"], None),  # AMD's
    ],
)
def test_a_gpu_without_kernels_is_one_sentence(capability, architectures, says, monkeypatch):
    """A stand-in for the GPU and for how torch was built."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA P100")
    if not says:
        return check_architecture(torch.device("cuda"))
    with pytest.raises(InputError, match=r"no kernels for NVIDIA P100, sm_\d+, but") as error:
        check_architecture(torch.device("cuda"))
    assert says in str(error.value)


def test_only_training_allows_tf32():
    """What evaluate.py says of a model is exact on any GPU."""
    use_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
