"""How the scripts tell stories: a prompt and seeds in, whole texts out."""

from collections.abc import Sequence

import tiktoken
import torch

from model import GPT, sample
from storygpt.tokenizer import load_tokenizer, story_text

PROMPT = "Once upon a time"
# What `generate.py` does unless told otherwise, and what a published model's files say of it.
MAX_NEW_TOKENS, TEMPERATURE, TOP_K = 200, 0.8, 100
AT_ONCE = 100  # stories, in one batch of `tell_from`


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


@torch.no_grad()
def tell_from(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    end_of_text: int,
    seed: int,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
    top_p: float | None = None,
) -> list[list[int]]:
    """The ids of a story for each of `prompts`, which begin it after an end-of-text, to where it
    ends or the context does: context_length of them, the prompt's included, end-of-text after its
    end.

    Prompts of different lengths go side by side: while one lasts, its tokens stand in for what
    was drawn. One generator draws for all, so that a story depends on those beside it.
    """
    device, context_length = model.wte.weight.device, model.config.context_length
    generator, told = torch.Generator(device).manual_seed(seed), []
    for first in range(0, len(prompts), AT_ONCE):
        batch = [prompt[:context_length] for prompt in prompts[first : first + AT_ONCE]]
        ids = torch.full((len(batch), 1 + context_length), end_of_text)
        for row, prompt in zip(ids, batch, strict=True):
            row[1 : 1 + len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        ids, cache = ids.to(device), model.new_cache()
        sizes = torch.tensor([len(prompt) for prompt in batch], device=device)
        ended = torch.zeros_like(sizes, dtype=torch.bool)
        for t in range(context_length):
            logits = model.lm_head(model.hidden(ids[:, t : t + 1], cache)[:, 0])
            drawn = sample(logits, temperature, top_k, top_p, generator)[:, 0]
            drawn = drawn.masked_fill(ended, end_of_text)
            ids[:, t + 1] = torch.where(t < sizes, ids[:, t + 1], drawn)
            ended |= ids[:, t + 1] == end_of_text
            if ended.all():
                break
        told += ids[:, 1:].tolist()
    return told
