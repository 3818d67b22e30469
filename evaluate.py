"""Script: the exact validation loss of a checkpoint, as nats, perplexity and bits per byte."""

from storygpt.cli import DEFAULT_CHECKPOINT, parse_flags, run

# isort: split

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import check_whole
from model import GPT
from storygpt.builtin_stories import keeps_hero_and_object
from storygpt.checkpoint import load_model
from storygpt.device import pick_device
from storygpt.kernels import chunked_cross_entropy, pack_linears
from storygpt.losses import exact_loss
from storygpt.telling import tell
from storygpt.token_files import bits_per_byte, load_meta, load_tokens


@dataclass(frozen=True)
class Arguments:
    """Score every token of a split once."""

    checkpoint: Path = DEFAULT_CHECKPOINT
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


def judge_stories(model: GPT, num_stories: int, seed: int) -> tuple[int, int]:
    """Of `num_stories` told from nothing at temperature 0.8: how many end within the context, and
    how many keep their hero and object, as the grammar in builtin_stories.py judges it."""
    pack_linears(model)
    seeds = range(seed, seed + num_stories)
    stories = tell(model, "", seeds, model.config.context_length - 1, temperature=0.8, top_k=None)
    ended = [story for story, is_whole in stories if is_whole]
    return len(ended), sum(map(keeps_hero_and_object, ended))


def main() -> None:
    arguments = parse_flags(Arguments)
    check_whole("batch_size", arguments.batch_size, 1)
    check_whole("num_stories", arguments.num_stories, 0, 10_000)
    check_whole("seed", arguments.seed, 0, 2**63 - 10_001)
    device = pick_device(arguments.device)
    model, checkpoint = load_model(arguments.checkpoint, device)
    meta = load_meta(arguments.data_dir, model.config.vocab_size)
    tokens = load_tokens(arguments.data_dir, arguments.split, meta, model.config.context_length)
    model.loss_function = chunked_cross_entropy
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
