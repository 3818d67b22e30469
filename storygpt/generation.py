"""A prompt and seeds in, stories out."""

from collections.abc import Sequence
from dataclasses import asdict

import tiktoken
import torch

from config import GenerationSettings
from model import GPT
from storygpt.tokenizer import load_tokenizer, story_text

AT_ONCE = 100  # stories in one batch of `generate_ids`
DEFAULTS = GenerationSettings()


def prompt_ids(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """Returns the ids of `prompt`; a story from nothing begins after an end-of-text."""
    return tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]


def generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Makes a generator a story, so that none depends on how many are generated beside it."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def generate_stories(
    model: GPT, prompt: str, seeds: Sequence[int], settings: GenerationSettings = DEFAULTS
) -> list[str]:
    """Generates a story that begins with `prompt` for each of `seeds`.

    They are those of `generate.py --seed SEED` on the same device. Raises InputError as
    `GPT.stream` does.
    """
    tokenizer, device = load_tokenizer(model.config.vocab_size), model.wte.weight.device
    start = prompt_ids(prompt, tokenizer)
    ids = model.generate(
        torch.tensor([start] * len(seeds), device=device),
        **asdict(settings),
        end_of_text=tokenizer.eot_token,
        generator=generators(seeds, device),
    )
    return [prompt + story_text(tokenizer, row[len(start) :]) for row in ids.tolist()]


def generate_ids(
    model: GPT, starts: Sequence[Sequence[int]], seed: int, settings: GenerationSettings
) -> list[list[int]]:
    """Continues each of `starts`, lists of ids; returns each with its continuation.

    Starts of one length go side by side. One generator draws for all, which is quicker than one
    each: a story depends on the others.
    """
    device = model.wte.weight.device
    end_of_text = load_tokenizer(model.config.vocab_size).eot_token
    generator = torch.Generator(device).manual_seed(seed)
    stories = [[]] * len(starts)
    for length in sorted({len(start) for start in starts}):
        same = [i for i, start in enumerate(starts) if len(start) == length]
        for first in range(0, len(same), AT_ONCE):
            batch = same[first : first + AT_ONCE]
            idx = torch.tensor([starts[i] for i in batch], device=device)
            ids = model.generate(
                idx, **asdict(settings), end_of_text=end_of_text, generator=generator
            )
            for i, story in zip(batch, ids.tolist(), strict=True):
                stories[i] = story
    return stories
