"""Script: the exact validation loss of a checkpoint, as nats, perplexity and bits per byte."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from config import InputError
from model import GPT
from storygpt.builtin_stories import keeps_hero_and_object
from storygpt.checkpoint import BEST, load_model
from storygpt.cli import parse_flags, progress_bar, run
from storygpt.device import pick_device
from storygpt.token_files import bits_per_byte, load_meta, load_tokens, windows
from storygpt.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Arguments:
    """Score every token of a split once."""

    checkpoint: Path = Path("checkpoints") / BEST
    """A .pt file, a folder that upload_to_hf.py made, or a model on the Hub: owner/name."""
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote."""
    split: Literal["validation", "train"] = "validation"
    """Split to score."""
    batch_size: int = 16
    """Windows at once."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    num_stories: int = 0
    """For a model of the built-in stories: also tell this many at temperature 0.8, and count those
    that end and those that keep their hero and object to the end."""
    seed: int = 1337
    """Seed of those stories; the loss needs none."""


def all_windows(
    tokens: np.ndarray, end_of_text: int, context_length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of inputs and targets, (B, T) int64, in which every token is a target once.

    The first token is predicted from an end-of-text, which ended the story before it; the last
    window is as short as what is left, so T is context_length in all batches but the last.
    """
    stream = np.concatenate(([end_of_text], tokens[:context_length]))
    yield windows(stream, np.zeros(1, int), len(stream) - 1)
    starts = np.arange(context_length - 1, len(tokens) - context_length, context_length)
    for first in range(0, len(starts), batch_size):
        yield windows(tokens, starts[first : first + batch_size], context_length)
    scored = context_length * (len(starts) + 1)
    if scored < len(tokens):
        yield windows(tokens, np.array([scored - 1]), len(tokens) - scored)


@torch.no_grad()
def exact_loss(model: GPT, tokens: np.ndarray, end_of_text: int, batch_size: int) -> float:
    """Mean loss in nats over all `tokens` (uint16), each scored once; summed in float64."""
    device, total = model.wte.weight.device, 0.0
    batches = all_windows(tokens, end_of_text, model.config.context_length, batch_size)
    with progress_bar(total=len(tokens), unit=" tokens", desc="scoring") as bar:
        for x, y in batches:
            x, y = torch.from_numpy(x), torch.from_numpy(y)
            _, loss = model(x.to(device), y.to(device))
            total += loss.item() * y.numel()
            bar.update(y.numel())
    return total / len(tokens)


def judge_stories(model: GPT, num_stories: int, seed: int) -> tuple[int, int]:
    """Of `num_stories` told from nothing at temperature 0.8: how many end within the context, and
    how many keep their hero and object, as the grammar in builtin_stories.py judges it."""
    tokenizer = load_tokenizer(model.config.vocab_size)
    device, end_of_text = model.wte.weight.device, tokenizer.eot_token
    idx = torch.full((num_stories, 1), end_of_text, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    ids = model.generate(
        idx,
        model.config.context_length - 1,
        temperature=0.8,
        end_of_text=end_of_text,
        generator=generator,
    )
    stories = [row[1:] for row in ids.tolist()]
    ended = [story[: story.index(end_of_text)] for story in stories if end_of_text in story]
    kept = sum(keeps_hero_and_object(tokenizer.decode(story)) for story in ended)
    return len(ended), kept


def main() -> None:
    arguments = parse_flags(Arguments)
    if arguments.batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {arguments.batch_size}")
    device = pick_device(arguments.device)
    model, checkpoint = load_model(arguments.checkpoint, device)
    meta = load_meta(arguments.data_dir, model.config.vocab_size)
    tokens = load_tokens(arguments.data_dir, arguments.split, meta, model.config.context_length)
    loss = exact_loss(model, tokens, meta["end_of_text"], arguments.batch_size)
    counts = meta["splits"][arguments.split]
    print(
        f"{arguments.checkpoint} (step {checkpoint['step']:,}) on {counts['tokens']:,} "
        f"{arguments.split} tokens\n"
        f"loss           {loss:.4f} nats a token\n"
        f"perplexity     {math.exp(loss):.3f}\n"
        f"bits per byte  {bits_per_byte(loss, counts):.4f}"
    )
    if arguments.num_stories:
        ended, kept = judge_stories(model, arguments.num_stories, arguments.seed)
        print(
            f"of {arguments.num_stories} stories told at temperature 0.8, {ended} end within the "
            f"context and {kept} keep their hero and object to the end"
        )


if __name__ == "__main__":
    run(main)
