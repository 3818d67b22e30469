"""The table of `evaluate.py --num_stories`: a column each for generated and held-out stories."""

import math
from collections.abc import Sequence

import numpy as np
import tiktoken

from config import GenerationSettings, InputError
from model import GPT
from storygpt.builtin_stories import keeps_hero_and_object
from storygpt.cli import progress_bar
from storygpt.generation import generate_ids
from storygpt.judging.copies import CopySearch, chunks
from storygpt.judging.measures import (
    LENGTHS,
    Story,
    find_names,
    read_measures,
    read_story,
    sentences,
    with_interval,
)
from storygpt.judging.story_losses import logits_of, story_losses
from storygpt.tokenizer import load_tokenizer

# Names are looked for in the first million tokens of train.bin, thousands of stories. All of
# TinyStories would take minutes; the names that it adds are rare, and lack in all columns alike.
NAMES_FROM = 2**20  # tokens


def collect_stories(
    model: GPT,
    held_out: Sequence[np.ndarray],
    num_stories: int,
    settings: GenerationSettings,
    seed: int,
) -> dict[str, list[Story]]:
    """Picks `num_stories` of the `held_out` ones, (tokens,) ids each, and generates as many from
    nothing, and as many from the first sentences of those; returns the sets by their titles.

    Each story goes as far as the model's context. Raises InputError where so many are not held out.
    """
    tokenizer, context_length = load_tokenizer(model.config.vocab_size), model.config.context_length
    end_of_text = tokenizer.eot_token
    if num_stories > len(held_out):
        raise InputError(
            f"there are {len(held_out)} held-out stories to compare with: pass --num_stories "
            f"{len(held_out)}"
        )
    picked = np.random.default_rng(seed).choice(len(held_out), num_stories, replace=False)
    whole = [[*held_out[i].tolist(), end_of_text] for i in picked]
    real = [read_story(ids, tokenizer, context_length) for ids in whole]

    def opening(text: str) -> list[int]:
        first, *others = sentences(text) or [""]  # nothing of white space
        ids = tokenizer.encode_ordinary(first)
        return ids if others else ids[: len(ids) // 2]  # or nothing would be left to tell

    def generate(openings: Sequence[list[int]]) -> list[Story]:
        starts = [[end_of_text, *ids] for ids in openings]
        rows = generate_ids(model, starts, seed, settings)
        return [read_story(row[1:], tokenizer, context_length) for row in rows]

    return {
        "told from nothing": generate([[]] * num_stories),
        "told from first sentences": generate([opening(story.text) for story in real]),
        "held-out": real,
    }


def judge_stories(
    sets: dict[str, list[Story]],
    model: GPT,
    train: np.ndarray,
    batch_size: int,
    builtin: bool,
    seed: int,
) -> dict[str, dict]:
    """Measures all `sets`, and finds the longest run of tokens that each shares with `train`.

    Returns {"columns": {title: {name of a row: its numbers}}, "longest_copy": {title: its number
    of tokens and its text}}. `train` are the (tokens,) ids of the training split; `builtin` says
    that they are of the built-in stories, whose hero and object are known.
    """
    tokenizer = load_tokenizer(model.config.vocab_size)
    names = find_names(tokenizer.decode(train[:NAMES_FROM].tolist()))
    searches = search_copies(sets, train)
    columns, longest = {}, {}
    for title, stories in sets.items():
        column = read_measures(stories, names)
        column |= {f"copied_{n}": searches[title].share(n) for n in LENGTHS}
        column["loss"] = own_loss(stories, model, tokenizer, batch_size)
        if builtin:
            kept = [story.ended and keeps_hero_and_object(story.text) for story in stories]
            column["keeps"] = np.array(kept, float)
        columns[title] = {
            name: with_interval(name, values, seed) for name, values in column.items()
        }
        run = searches[title].longest_run()
        longest[title] = {"tokens": len(run), "text": tokenizer.decode(run.tolist())}
    return {"columns": columns, "longest_copy": longest}


def search_copies(sets: dict[str, list[Story]], train: np.ndarray) -> dict[str, CopySearch]:
    """Looks through `train` once, for what any of `sets` has from there."""
    searches = {
        title: CopySearch([story.ids for story in stories], LENGTHS)
        for title, stories in sets.items()
    }
    overlap = max(len(story.ids) for stories in sets.values() for story in stories)
    with progress_bar(total=len(train), unit=" tokens", desc="searching", leave=False) as bar:
        for chunk in chunks(train, overlap):
            for search in searches.values():
                search.scan(chunk)
            bar.update(len(chunk))
    return searches


def own_loss(
    stories: Sequence[Story], model: GPT, tokenizer: tiktoken.Encoding, batch_size: int
) -> np.ndarray:
    """Returns the bits a byte of each story alone: (stories,) float64, NaN for an empty one."""
    nats = story_losses(
        logits_of(model),
        [story.ids for story in stories],
        end_of_text=tokenizer.eot_token,
        context_length=model.config.context_length,
        batch_size=batch_size,
    )
    num_bytes = np.array([len(tokenizer.decode_bytes(story.ids.tolist())) for story in stories])
    return np.where(num_bytes > 0, nats / math.log(2) / num_bytes.clip(min=1), math.nan)
