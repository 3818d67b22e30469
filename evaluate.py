"""Script: how well a checkpoint predicts a split, and how the stories that it generates read beside
held-out ones."""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from config import GenerationSettings, InputError, Sampling, check_whole
from model import GPT, check_sampling
from storygpt.checkpoint import load_to_generate
from storygpt.cli import DEFAULT_CHECKPOINT, parse_flags, run
from storygpt.device import use_device
from storygpt.files import EVALUATION, write_bytes
from storygpt.judging.judge import collect_stories, judge_stories
from storygpt.judging.measures import story_table
from storygpt.judging.story_losses import logits_of, story_losses
from storygpt.kernels import chunked_cross_entropy
from storygpt.losses import exact_loss
from storygpt.record import fingerprint_of, weights_sha256
from storygpt.sources import BUILTIN
from storygpt.token_files import (
    bits_per_byte,
    data_fingerprint,
    load_meta,
    load_tokens,
    perplexity,
    split_stories,
)


@dataclass(frozen=True)
class Arguments:
    """Score every token of a split once; with --num_stories also measure how stories read."""

    checkpoint: Path = DEFAULT_CHECKPOINT
    """A .pt file, a folder in the layout of transformers' GPT-2, or a model on the Hub."""
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote."""
    split: Literal["validation", "train"] = "validation"
    """Split to score."""
    batch_size: int = 16
    """Windows at once."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    num_stories: int = 0
    """Also generate this many stories from nothing, and as many from the first sentences of
    held-out ones, and set them beside those."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the tokens of the generated stories are drawn."""
    output: Path | None = None
    """Where to write all figures, a .json file. upload_to_hf.py puts those of evaluation.json
    beside the checkpoint (checkpoints/evaluation.json) on its model card."""
    seed: int = 1337
    """Seed of the stories and intervals; the loss needs none."""


def check(arguments: Arguments) -> None:
    """Raises InputError with the first flag that is out of range."""
    check_whole("batch_size", arguments.batch_size, 1)
    check_whole("num_stories", arguments.num_stories, 0, 10_000)
    check_whole("seed", arguments.seed, 0, 2**63 - 10_001)
    check_sampling(torch.zeros(1, 1), max_new_tokens=1, **asdict(arguments.sampling))
    output = arguments.output
    if output and (output.suffix != ".json" or output.is_dir() or not output.parent.is_dir()):
        place = DEFAULT_CHECKPOINT.with_name(EVALUATION)
        raise InputError(
            f"--output {output} is no .json file in a folder that exists: pass --output {place}, "
            "or another beside your checkpoint"
        )


def score(model: GPT, checkpoint: dict, meta: dict, arguments: Arguments) -> dict:
    """Returns the losses on all of a split. Raises InputError where they are no numbers."""
    counts, end_of_text = meta["splits"][arguments.split], meta["end_of_text"]
    tokens = load_tokens(arguments.data_dir, arguments.split, meta)
    loss = exact_loss(model, tokens, end_of_text, arguments.batch_size)
    if not math.isfinite(perplexity(loss)):
        raise InputError(f"the model's loss is {loss}: the weights are broken")
    nats = story_losses(
        logits_of(model),
        split_stories(tokens, end_of_text),
        end_of_text=end_of_text,
        context_length=model.config.context_length,
        batch_size=arguments.batch_size,
    )
    return {
        "step": checkpoint["step"],
        "data": data_fingerprint(meta),
        "split": arguments.split,
        "tokens": counts["tokens"],
        "loss": round(loss, 6),
        "perplexity": round(perplexity(loss), 6),
        "bits_per_byte": round(bits_per_byte(loss, counts), 6),
        "story_bits_per_byte": round(nats.sum() / math.log(2) / counts["bytes"], 6),
    }


def judge(model: GPT, meta: dict, arguments: Arguments) -> dict:
    """Returns how the model's stories read beside held-out ones. Raises InputError."""
    context_length, sampling = model.config.context_length, asdict(arguments.sampling)
    held_out = load_tokens(arguments.data_dir, "validation", meta)
    train = load_tokens(arguments.data_dir, "train", meta)
    sets = collect_stories(
        model,
        split_stories(held_out, meta["end_of_text"]),
        num_stories=arguments.num_stories,
        settings=GenerationSettings(max_new_tokens=context_length, **sampling),
        seed=arguments.seed,
    )
    judged = judge_stories(
        sets,
        model,
        train,
        batch_size=arguments.batch_size,
        builtin=meta["dataset"] in BUILTIN,
        seed=arguments.seed,
    )
    asked = {"num_stories": arguments.num_stories, **sampling, "seed": arguments.seed}
    return asked | judged


def main() -> None:
    arguments = parse_flags(Arguments)
    check(arguments)
    model, checkpoint = load_to_generate(arguments.checkpoint, use_device(arguments.device))
    meta = load_meta(arguments.data_dir, model.config.vocab_size)
    model.loss_function = chunked_cross_entropy
    report = {"weights_sha256": weights_sha256(checkpoint["model_state_dict"])}
    report |= score(model, checkpoint, meta, arguments)
    if fingerprint_of(checkpoint) not in (None, report["data"]):
        print(
            f"note: {arguments.data_dir} is other data than the model was trained on, and may hold "
            "stories that it has seen"
        )
    print(
        f"{arguments.checkpoint} (step {report['step']:,}) on {report['tokens']:,} "
        f"{arguments.split} tokens\n"
        f"loss           {report['loss']:.4f} nats a token\n"
        f"perplexity     {report['perplexity']:.3f}\n"
        f"bits per byte  {report['bits_per_byte']:.4f}\n"
        f"               {report['story_bits_per_byte']:.4f} with each story alone"
    )
    if arguments.num_stories:
        report |= judge(model, meta, arguments)
        print(f"\n{arguments.num_stories} stories each, with 95 % intervals:\n")
        print(f"{story_table(report['columns'])}\n")
        for title, copy in report["longest_copy"].items():
            print(f"longest run from train.bin, {title}: {copy['tokens']} tokens {copy['text']!r}")
    if arguments.output:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_bytes(arguments.output, text.encode())


if __name__ == "__main__":
    run(main)
