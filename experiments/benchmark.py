"""Script: speed beside transformers' GPT-2, in one run on one machine.

Contenders take turns, so that a machine that slows down slows all of them; medians are compared.
Needs requirements-dev.txt (transformers).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Literal

import numpy as np
import pyarrow
import tiktoken
import torch
import torch.nn.functional as F
import tyro
from pyarrow import parquet
from torch import Tensor

from config import GPTConfig, InputError, TrainingConfig, check_whole
from model import GPT
from storygpt.device import autocast, dtype_name, peak_memory, pick_dtype, use_device
from storygpt.kernels import compile_model, pack_linears, speed_up_training
from storygpt.optimizer import Optimizer
from storygpt.token_files import SPLITS, load_meta, load_tokens, split_stories
from storygpt.tokenizer import GPT2_VOCAB_SIZE, load_tokenizer

PREPARE_DATA = Path(__file__).resolve().parent.parent / "prepare_data.py"
PARTS = ("training", "decoding", "tokenizing")


@dataclass(frozen=True)
class Arguments:
    """Measure training, decoding and tokenizing, beside transformers."""

    gpt: tyro.conf.FlagConversionOff[GPTConfig] = field(default_factory=GPTConfig)
    parts: tuple[Literal["training", "decoding", "tokenizing"], ...] = PARTS
    """What to measure."""
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


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    gpt: GPTConfig
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    rounds: int
    decode_tokens: int
    seed: int
    thorough: bool  # with what --quick leaves out


def take_turns(contenders: dict[str, Callable[[], object]], setting: Setting) -> dict[str, float]:
    """{name: median seconds of a turn}, after one turn each to warm up."""
    seconds = {name: [] for name in contenders}
    for _ in range(1 + setting.rounds):
        for name, turn in contenders.items():
            start = time.perf_counter()
            turn()
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times[1:]) for name, times in seconds.items()}


def transformers_gpt2(c: GPTConfig):
    """transformers' GPT-2 in our shape, with its fastest attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": c.vocab_size, "n_positions": c.context_length, "n_embd": c.n_embd}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    config = GPT2Config(**shape, **drops, n_layer=c.n_layer, n_head=c.n_head)
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


# --- Training: a contender is an optimizer step, a function without arguments ---


def storygpt_step(setting: Setting, x: Tensor, y: Tensor, compiled: bool) -> Callable[[], None]:
    """The step of train.py."""
    model = GPT(setting.gpt).to(setting.device).train()
    speed_up_training(model, setting.device)
    recipe = TrainingConfig().filled_in(setting.gpt.n_embd)
    optimizer = Optimizer(model, recipe, setting.device, setting.dtype)
    forward = compile_model(model, compiled, setting.device)

    def step() -> None:
        with autocast(setting.device, setting.dtype):
            loss = forward(x, y)[1]
        optimizer.backward(loss)
        optimizer.step()

    return step


def transformers_step(setting: Setting, x: Tensor, y: Tensor, compiled: bool) -> Callable[[], None]:
    """The same with transformers' model and torch's loss."""
    model = transformers_gpt2(setting.gpt).to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with autocast(setting.device, setting.dtype):
            loss = F.cross_entropy(forward(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"StoryGPT": storygpt_step, "transformers": transformers_step}


def make_step(name: str, setting: Setting, compiled: bool = False) -> Callable[[], None]:
    """The step of a contender on a batch of its own."""
    torch.manual_seed(setting.seed)
    shape = (setting.batch_size, setting.gpt.context_length + 1)
    rows = torch.randint(setting.gpt.vocab_size, shape, device=setting.device)
    return STEPS[name](setting, rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), compiled)


def memory_of_steps(name: str, setting: Setting) -> int | None:
    """Peak bytes of two training steps, in a process that makes nothing else."""
    step = make_step(name, setting)
    step()
    step()
    return peak_memory(setting.device)


def make_products(setting: Setting) -> dict[str, Callable[[], Tensor]]:
    """The two shapes that nearly all the FLOPs of a step have."""
    tokens, width = setting.batch_size * setting.gpt.context_length, setting.gpt.n_embd
    empty = partial(torch.empty, device=setting.device, dtype=setting.dtype)
    x = empty(tokens, width).normal_()
    wide, head = empty(4 * width, width).normal_(), empty(setting.gpt.vocab_size, width).normal_()
    # into memory that is there: a ceiling has no page faults
    body_out, head_out = empty(tokens, len(wide)), empty(tokens, len(head))
    return {
        "body product": lambda: torch.mm(x, wide.T, out=body_out),
        "head product": lambda: torch.mm(x, head.T, out=head_out),
    }


def measure_training(setting: Setting) -> dict:
    steps = {name: make_step(name, setting) for name in STEPS}
    if setting.thorough:
        steps |= {f"{name}, compiled": make_step(name, setting, compiled=True) for name in STEPS}
    seconds = take_turns(steps | make_products(setting), setting)

    c, tokens = setting.gpt, setting.batch_size * setting.gpt.context_length
    body_rate = 2 * tokens * 4 * c.n_embd**2 / seconds["body product"]
    head_rate = 2 * tokens * c.n_embd * c.vocab_size / seconds["head product"]
    with torch.device("meta"):
        flops = GPT(c).flops_per_token()
    head_flops = 6 * c.vocab_size * c.n_embd
    # The fastest a step could be if every product ran at the measured rate of its shape.
    floor = tokens * ((flops - head_flops) / body_rate + head_flops / head_rate)
    result = {
        "batch": f"{setting.batch_size} x {c.context_length}",
        "body product, GFLOP/s": body_rate / 1e9,
        "head product, GFLOP/s": head_rate / 1e9,
    }
    for name in steps:
        result[f"{name}, tokens/s"] = tokens / seconds[name]
        result[f"{name}, share of the ceiling"] = floor / seconds[name]
    for name in STEPS if setting.thorough else ():
        with get_context("spawn").Pool(1) as pool:
            if peak := pool.apply(memory_of_steps, (name, setting)):
                result[f"{name}, peak memory, GB"] = peak / 1e9
    return result


# --- Decoding: a contender takes a prompt and how many tokens to generate ---


def storygpt_decoder(setting: Setting) -> Callable[[Tensor, int], Tensor]:
    """As generate.py generates."""
    model = GPT(setting.gpt).to(setting.device, setting.dtype).eval()
    pack_linears(model)
    return partial(model.generate, temperature=0.8, top_k=100)


def transformers_decoder(setting: Setting) -> Callable[[Tensor, int], Tensor]:
    """The same sampling with transformers."""
    model = transformers_gpt2(setting.gpt).to(setting.device, setting.dtype).eval()
    model.generation_config.pad_token_id = 0
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 100}

    def decode(prompt: Tensor, number: int) -> Tensor:
        mask, length = torch.ones_like(prompt), {"max_new_tokens": number, "min_new_tokens": number}
        return model.generate(prompt, attention_mask=mask, **length, **sampling)

    return decode


DECODERS = {"StoryGPT": storygpt_decoder, "transformers": transformers_decoder}


def measure_decoding(setting: Setting) -> dict:
    on_gpu, count = setting.device.type == "cuda", setting.decode_tokens
    torch.manual_seed(setting.seed)
    decoders = {name: make(setting) for name, make in DECODERS.items()}
    source = torch.ones(2**28 if on_gpu else 2**25, device=setting.device)
    target = torch.ones_like(source)
    copying = take_turns({"copy": lambda: target.copy_(source)}, setting)["copy"]
    bandwidth = 2 * source.nbytes / copying
    with torch.device("meta"):
        weight_bytes = GPT(setting.gpt).num_parameters() * setting.dtype.itemsize
    result = {"copy bandwidth, GB/s": bandwidth / 1e9}
    for size in (1, 8, 64, 256)[: 2 if not setting.thorough else 4 if on_gpu else 3]:
        prompt = torch.randint(setting.gpt.vocab_size, (size, 16), device=setting.device)
        turns = {name: partial(decode, prompt, count) for name, decode in decoders.items()}
        if size == 1:
            turns |= {
                f"{name} first": partial(decode, prompt, 1) for name, decode in decoders.items()
            }
        seconds = take_turns(turns, setting)
        for name in decoders:
            result[f"{name}, batch {size}, tokens/s"] = size * count / seconds[name]
            if size == 1:
                result[f"{name}, first token, ms"] = 1000 * seconds[f"{name} first"]
                share = weight_bytes * count / seconds[name] / bandwidth
                result[f"{name}, batch 1, share of the copy bandwidth"] = share
    return result


# --- Tokenizing ---

# Peak of the largest process below this small one, in ru_maxrss' unit: on Linux a process's own
# begins at what its parent had, and this script has torch.
PEAK_OF = """
import subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
try:
    import resource
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
except ImportError:  # Windows does not tell
    print(0)
"""


def prepare(dataset: str, folder: str, seed: int) -> tuple[float, int]:
    """Seconds of prepare_data.py, start-up included, and bytes of its largest process at its peak.

    Raises InputError with its own sentence where it fails.
    """
    flags = ("--dataset", dataset, "--data_dir", folder, "--seed", str(seed))
    command = (sys.executable, "-c", PEAK_OF, sys.executable, PREPARE_DATA, *flags)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise InputError(f"prepare_data.py: {said[-1][7:]}" if said else done.stderr)
    return seconds, int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def read_stories(dataset: str, seed: int) -> list[str]:
    """All stories of `dataset`, as prepare_data.py reads them: its tokens lose nothing."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(dataset, folder, seed)
        meta, stories = load_meta(folder, GPT2_VOCAB_SIZE), []
        for split in SPLITS:
            tokens = np.array(load_tokens(folder, split, meta))
            stories += [ids.tolist() for ids in split_stories(tokens, meta["end_of_text"])]
    return load_tokenizer().decode_batch(stories)


def encode_all(tokenizer: tiktoken.Encoding, stories: list[str]) -> None:
    for story in stories:
        tokenizer.encode_ordinary(story)


def measure_copies(stories: list[str], times: int, setting: Setting) -> dict:
    """MB/s of UTF-8: tiktoken alone in one thread, and prepare_data.py with all its processes.

    prepare_data.py gets the stories `times` over, to show what grows with them.
    """
    from tiktoken_ext.openai_public import r50k_pat_str

    megabytes = sum(len(story.encode()) for story in stories) / 1e6
    ours, processes, peaks = load_tokenizer(), cli.usable_cpus(), []
    ranks = ours._mergeable_ranks
    plain = tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    table = pyarrow.table({"text": stories})
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/stories.parquet"
        with parquet.ParquetWriter(path, table.schema) as writer:
            for _ in range(times):
                writer.write_table(table, row_group_size=1000)
        turns = {
            "plain": partial(encode_all, plain, stories),
            "ours": partial(encode_all, ours, stories),
            "whole": lambda: peaks.append(prepare(path, f"{folder}/data", setting.seed)[1]),
        }
        seconds = take_turns(turns, setting)
    plain_rate, whole_rate = megabytes / seconds["plain"], times * megabytes / seconds["whole"]
    return {
        "one thread of tiktoken, MB/s": plain_rate,
        "the same with tokenizer.py's pattern, MB/s": megabytes / seconds["ours"],
        f"prepare_data.py with {processes} processes, MB/s": whole_rate,
        "share of (processes x one thread)": whole_rate / processes / plain_rate,
        "largest process at its peak, MB": max(peaks) / 1e6,
    }


def measure_tokenizing(dataset: str, setting: Setting) -> dict:
    stories = read_stories(dataset, setting.seed)
    result = {}
    for times in (1, 4, 16) if setting.thorough else (1, 4):
        figures = measure_copies(stories, times, setting)
        result |= {f"{times} x the stories: {name}": value for name, value in figures.items()}
    return result


# --- The whole ---


def describe_machine(setting: Setting) -> dict:
    import transformers

    processor, device = platform.processor() or platform.machine(), setting.device
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
        processor = next(names, processor)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{cli.usable_cpus()} x {processor}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(setting.dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def make_setting(arguments: Arguments) -> Setting:
    """Raises InputError, before anything is measured, where nothing could be."""
    for name in ("batch_size", "rounds", "decode_tokens"):
        if (value := getattr(arguments, name)) is not None:
            check_whole(name, value, 1)
    check_whole("seed", arguments.seed, 0, 2**63 - 1)
    room = arguments.gpt.context_length - 16
    if "decoding" in arguments.parts:
        check_whole("decode_tokens", arguments.decode_tokens, 1, max(1, room))
    if not arguments.output.absolute().parent.is_dir():
        raise InputError(f"there is no folder for --output {arguments.output}: make it first")
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "benchmark.py compares with transformers, which is not installed: "
            "pip install -r requirements-dev.txt"
        ) from error
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    device, quick = use_device(arguments.device), arguments.quick
    on_gpu = device.type == "cuda"
    return Setting(
        gpt=arguments.gpt,
        device=device,
        dtype=pick_dtype(arguments.dtype, device),
        batch_size=arguments.batch_size or (64 if on_gpu else 2 if quick else 8),
        rounds=arguments.rounds or (20 if on_gpu else 3 if quick else 5),
        decode_tokens=arguments.decode_tokens // (2 if quick else 1) or 1,
        seed=arguments.seed,
        thorough=on_gpu or not quick,
    )


def show(figures: dict) -> None:
    for name, value in figures.items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        print(f"  {name:60} {value}")


def main() -> None:
    arguments = cli.parse_flags(Arguments)
    setting = make_setting(arguments)
    start = time.perf_counter()
    report = {"machine": describe_machine(setting)}
    measures = {
        "training": measure_training,
        "decoding": measure_decoding,
        "tokenizing": partial(measure_tokenizing, arguments.dataset),
    }
    for part in dict.fromkeys(arguments.parts):
        print(f"measuring {part} ...", file=sys.stderr, flush=True)
        report[part] = measures[part](setting)
    for title, figures in report.items():
        print(f"\n{title}")
        show(figures)
    report["seconds"] = time.perf_counter() - start
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{report['seconds']:.0f} s; written to {arguments.output}")


if __name__ == "__main__":
    cli.run(main)
