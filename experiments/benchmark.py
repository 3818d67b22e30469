"""Script: speed beside transformers' GPT-2, interleaved in one run on one machine.

Contenders take turns, so that a machine that slows down slows all of them; medians are compared.
Needs requirements-dev.txt (transformers).
"""

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import GPTConfig, InputError, TrainingConfig
from storygpt.cli import parse_flags, run

CONFIG = GPTConfig()  # the 57M reference, dropout 0.1 in training


@dataclass(frozen=True)
class Arguments:
    """Measure training, decoding and tokenizing, beside transformers."""

    quick: bool = False
    """Fewer rounds and contenders: under two minutes on two cores."""
    batch_size: int | None = None
    """Sequences in a training step; by default 64 on a GPU and 8 (quick: 2) on CPU."""
    rounds: int | None = None
    """Turns of each contender; by default 20 on a GPU and 5 (quick: 3) on CPU."""
    decode_tokens: int = 64
    """Tokens to decode in a turn."""
    dataset: str = "builtin"
    """Stories to tokenize: anything prepare_data.py takes."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of both sides; auto as in train.py."""
    output: Path = Path("benchmark.json")
    """Where to write the figures as JSON."""
    seed: int = 1337
    """Seed of weights and batches."""


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int, device) -> dict:
    """{name: seconds of each turn}, after one turn each to warm up."""
    import torch

    def timed(turn) -> float:
        start = time.perf_counter()
        turn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for turn in contenders.values():
        timed(turn)
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, turn in contenders.items():
            seconds[name].append(timed(turn))
    return seconds


def transformers_gpt2(**changes):
    """transformers' GPT-2 in our shape, with its fastest attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = CONFIG
    shape = {"vocab_size": c.vocab_size, "n_positions": c.context_length, "n_embd": c.n_embd}
    config = GPT2Config(**shape, n_layer=c.n_layer, n_head=c.n_head, **changes)
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def training_contender(name: str, batch_size: int, device, dtype, seed: int):
    """One optimizer step of a contender as a function without arguments."""
    import torch

    from model import GPT
    from train import build_optimizers

    torch.manual_seed(seed)
    model = (GPT(CONFIG) if "StoryGPT" in name else transformers_gpt2()).to(device).train()
    if "StoryGPT" in name:
        (optimizer,) = build_optimizers(model, TrainingConfig())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    rows = torch.randint(CONFIG.vocab_size, (batch_size, CONFIG.context_length + 1), device=device)
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    forward = torch.compile(model) if "compiled" in name else model
    half = dtype != torch.float32

    def step() -> None:
        with torch.autocast(device.type, dtype) if half else nullcontext():
            if "StoryGPT" in name:
                loss = forward(x, y)[1]
            else:
                logits = forward(x).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(name: str, batch_size: int, device_name: str, dtype_name: str, seed: int) -> int:
    """Peak bytes of two training steps: of the GPU, or of a fresh process on CPU."""
    import torch

    device = torch.device(device_name)
    step = training_contender(name, batch_size, device, getattr(torch, dtype_name), seed)
    step()
    step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # on Linux ru_maxrss begins at what the parent had
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_training(arguments: Arguments, device, dtype) -> dict:
    import torch

    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (64 if on_gpu else 2 if arguments.quick else 8)
    rounds = arguments.rounds or (20 if on_gpu else 3 if arguments.quick else 5)
    names = ["StoryGPT", "transformers"]
    if on_gpu or not arguments.quick:
        names += ["StoryGPT compiled", "transformers compiled"]
    make = partial(
        training_contender, batch_size=batch_size, device=device, dtype=dtype, seed=arguments.seed
    )
    steps = {name: make(name) for name in names}

    # The ceilings: the two shapes that nearly all the FLOPs of a step have.
    tokens, width, vocab = batch_size * CONFIG.context_length, CONFIG.n_embd, CONFIG.vocab_size
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    wide = torch.randn(4 * width, width, device=device, dtype=dtype)
    head = torch.randn(vocab, width, device=device, dtype=dtype)
    body_out, head_out = x.new_empty(tokens, 4 * width), x.new_empty(tokens, vocab)
    shapes = {  # into memory that is there: a ceiling has no page faults
        "body product": lambda: torch.mm(x, wide.T, out=body_out),
        "head product": lambda: torch.mm(x, head.T, out=head_out),
    }
    seconds = take_turns(steps | shapes, rounds, device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rates = {
        "body product": 2 * tokens * width * 4 * width / medians["body product"],
        "head product": 2 * tokens * width * vocab / medians["head product"],
    }

    from model import GPT

    with torch.device("meta"):
        flops = GPT(CONFIG).flops_per_token()
    head_flops = 6 * vocab * width
    # The fastest a step could be if every product ran at the measured rate of its shape.
    floor = tokens * ((flops - head_flops) / rates["body product"])
    floor += tokens * head_flops / rates["head product"]
    result = {
        "batch": f"{batch_size} x {CONFIG.context_length}",
        "body product, GFLOP/s": rates["body product"] / 1e9,
        "head product, GFLOP/s": rates["head product"] / 1e9,
    }
    for name in names:
        result[f"{name}, tokens/s"] = tokens / medians[name]
        result[f"{name}, share of the ceiling"] = floor / medians[name]
    if on_gpu or not arguments.quick:
        for name in ("StoryGPT", "transformers"):
            where = (name, batch_size, str(device), str(dtype)[6:], arguments.seed)
            with get_context("spawn").Pool(1) as pool:
                result[f"{name}, peak memory, GB"] = pool.apply(peak_memory, where) / 1e9
    return result


def measure_decoding(arguments: Arguments, device, dtype) -> dict:
    import torch

    from model import GPT

    on_gpu = device.type == "cuda"
    torch.manual_seed(arguments.seed)
    ours = GPT(CONFIG).to(device, dtype).eval()
    theirs = transformers_gpt2().to(device, dtype).eval()
    theirs.generation_config.pad_token_id = 0
    count = arguments.decode_tokens // (2 if arguments.quick else 1)
    rounds = arguments.rounds or (3 if arguments.quick else 5)

    source = torch.empty(2**28 if on_gpu else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    copy_seconds = statistics.median(take_turns(copy, 5, device)["copy"])
    bandwidth = 2 * source.nbytes / copy_seconds
    result = {"copy bandwidth, GB/s": bandwidth / 1e9}

    def transformers_tokens(prompt, number):
        return theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=number,
            min_new_tokens=number,
            do_sample=True,
            temperature=0.8,
            top_k=100,
        )

    def our_tokens(prompt, number):
        return ours.generate(prompt, number, temperature=0.8, top_k=100)

    sizes = [1, 8, 64, *([256] if on_gpu else [])]
    for size in sizes[:2] if arguments.quick else sizes:
        prompt = torch.randint(CONFIG.vocab_size, (size, 16), device=device)
        turns = {
            "StoryGPT": partial(our_tokens, prompt, count),
            "transformers": partial(transformers_tokens, prompt, count),
        }
        if size == 1:
            turns["StoryGPT first"] = partial(our_tokens, prompt, 1)
            turns["transformers first"] = partial(transformers_tokens, prompt, 1)
        seconds = take_turns(turns, rounds, device)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name in ("StoryGPT", "transformers"):
            result[f"{name}, batch {size}, tokens/s"] = size * count / medians[name]
        if size == 1:
            weight_bytes = sum(p.nbytes for p in ours.parameters())
            rate = weight_bytes * count / medians["StoryGPT"]
            result["StoryGPT, batch 1, share of the copy bandwidth"] = rate / bandwidth
            for name in ("StoryGPT", "transformers"):
                result[f"{name}, first token, ms"] = 1000 * medians[f"{name} first"]
    return result


def run_prepare(path: str, num_proc: int) -> tuple[float, int]:
    """Seconds of prepare_data.py, start-up included, and bytes of the largest process at its peak.

    To be called in a process that is fresh and small: on Linux a child's peak is never below what
    its parent had when it started the child.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).resolve().parent.parent / "prepare_data.py")
        flags = ("--dataset", path, "--data_dir", folder, "--num_proc", str(num_proc))
        start = time.perf_counter()
        subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
        seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def measure_tokenizing(arguments: Arguments) -> dict:
    """MB/s of UTF-8: tiktoken alone in one thread, and prepare_data.py with all its processes.

    prepare_data.py gets the stories several times over, to show what grows with them.
    """
    import pyarrow
    import tiktoken
    from pyarrow import parquet
    from tiktoken_ext.openai_public import r50k_pat_str

    from storygpt.sources import open_stories
    from storygpt.tokenizer import load_tokenizer

    splits = open_stories(arguments.dataset, seed=arguments.seed).splits
    stories = [story for rows in splits.values() for story in rows if story]
    table = pyarrow.table({"text": stories})
    megabytes = sum(len(story.encode()) for story in stories) / 1e6
    ours = load_tokenizer()
    ranks = ours._mergeable_ranks
    as_it_comes = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    num_proc = os.cpu_count() or 1
    result = {}
    for times in (1, 4) if arguments.quick else (1, 4, 16):
        single, single_ours, whole, peaks = [], [], [], []
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/stories.parquet"
            with parquet.ParquetWriter(path, table.schema) as writer:
                for _ in range(times):
                    writer.write_table(table, row_group_size=1000)
            for _ in range(arguments.rounds or 3):
                for tokenizer, rates in ((as_it_comes, single), (ours, single_ours)):
                    start = time.perf_counter()
                    for story in stories:
                        tokenizer.encode_ordinary(story)
                    rates.append(megabytes / (time.perf_counter() - start))
                with get_context("forkserver").Pool(1) as pool:
                    seconds, peak = pool.apply(run_prepare, (path, num_proc))
                whole.append(times * megabytes / seconds)
                peaks.append(peak)
        share = statistics.median(whole) / (num_proc * statistics.median(single))
        size = f"{times * megabytes:.0f} MB"
        result |= {
            f"{size}: one thread of tiktoken, MB/s": statistics.median(single),
            f"{size}: the same with tokenizer.py's pattern, MB/s": statistics.median(single_ours),
            f"{size}: prepare_data with {num_proc} processes, MB/s": statistics.median(whole),
            f"{size}: share of (processes x one thread)": share,
            f"{size}: largest process at its peak, MB": max(peaks) / 1e6,
        }
    return result


def describe_machine(device, dtype) -> dict:
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "cpu": f"{os.cpu_count()} x {name}, {torch.backends.cpu.get_cpu_capability()}",
        "dtype": str(dtype)[6:],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    arguments = parse_flags(Arguments)
    try:
        import transformers

        transformers.logging.set_verbosity_error()
    except ImportError as error:
        raise InputError(
            "benchmark.py compares with transformers, which is not installed: "
            "pip install -r requirements-dev.txt"
        ) from error

    import torch

    from storygpt.device import pick_device, pick_dtype

    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    report = {"machine": describe_machine(device, dtype)}
    for title, measure in (
        ("training", lambda: measure_training(arguments, device, dtype)),
        ("decoding", lambda: measure_decoding(arguments, device, dtype)),
        ("tokenizing", lambda: measure_tokenizing(arguments)),
    ):
        print(f"measuring {title} ...", file=sys.stderr, flush=True)
        report[title] = measure()
    report["seconds"] = time.perf_counter() - start
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    for title, figures in report.items():
        if isinstance(figures, dict):
            print(f"\n{title}")
            for name, value in figures.items():
                shown = f"{value:,.3g}" if isinstance(value, float) and value < 100 else value
                shown = f"{value:,.0f}" if isinstance(value, float) and value >= 100 else shown
                print(f"  {name:50} {shown}")
    print(f"\n{report['seconds']:.0f} s; written to {arguments.output}")


if __name__ == "__main__":
    run(main)
