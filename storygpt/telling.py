"""How the scripts tell stories: a prompt and seeds in, whole texts out."""

from collections.abc import Sequence

import tiktoken
import torch

from model import GPT
from storygpt.tokenizer import load_tokenizer, story_text

PROMPT = "Once upon a time"
# What `generate.py` does unless told otherwise, and what a published model's files say of it.
MAX_NEW_TOKENS, TEMPERATURE, TOP_K = 200, 0.8, 100


def prompt_ids(prompt: str, tokenizer: tiktoken.Encoding) -> list[int]:
    """The ids a model is given for `prompt`; a story from nothing begins after an end-of-text."""
    return tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]


def generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """A generator a story, so that no story depends on how many are told beside it."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def tell(
    model: GPT,
    prompt: str,
    seeds: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
    top_p: float | None = None,
) -> list[tuple[str, bool]]:
    """A story for each of `seeds` that begins with `prompt`, and whether it came to its end.

    They are what `generate.py --seed SEED` tells on the same device. Raises InputError as
    `GPT.stream` does.
    """
    tokenizer, device = load_tokenizer(model.config.vocab_size), model.wte.weight.device
    start, end_of_text = prompt_ids(prompt, tokenizer), tokenizer.eot_token
    idx = torch.tensor([start] * len(seeds), device=device)
    draw = generators(seeds, device)
    ids = model.generate(idx, max_new_tokens, temperature, top_k, top_p, end_of_text, draw)
    told = [row[len(start) :] for row in ids.tolist()]
    return [(prompt + story_text(tokenizer, new), end_of_text in new) for new in told]
