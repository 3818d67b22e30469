"""Script: how well a checkpoint predicts a split, and how the stories that it tells read beside
held-out ones."""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch

from config import InputError, check_whole
from model import GPT, check_sampling
from storygpt.builtin_stories import keeps_hero_and_object
from storygpt.checkpoint import load_model
from storygpt.cli import DEFAULT_CHECKPOINT, parse_flags, progress_bar, run
from storygpt.copies import CopySearch, read_chunks
from storygpt.device import use_device
from storygpt.files import write_atomically
from storygpt.kernels import chunked_cross_entropy, pack_linears
from storygpt.losses import exact_loss, logits_of, story_losses
from storygpt.measures import (
    LENGTHS,
    ROWS,
    Story,
    find_names,
    read_measures,
    read_story,
    sentences,
    shuffle_sentences,
    shuffle_words,
    story_table,
    summarize,
)
from storygpt.sources import BUILTIN
from storygpt.telling import TEMPERATURE, TOP_K, tell_from
from storygpt.token_files import (
    bits_per_byte,
    data_fingerprint,
    load_meta,
    load_tokens,
    split_stories,
)
from storygpt.tokenizer import load_tokenizer


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
    """Also tell this many stories from nothing, and as many from the first sentences of held-out
    ones, and set them beside those."""
    temperature: float = TEMPERATURE
    """Of those stories: 1 samples the model's own probabilities."""
    top_k: int | None = TOP_K
    """Of those stories: sample among the k likeliest tokens; None among all."""
    top_p: float = 1.0
    """Of those stories: sample among the likeliest tokens that together reach this probability."""
    controls: bool = False
    """Also measure held-out stories with their sentences, or words, shuffled among all of them:
    what each row makes of stories that are none."""
    output: Path | None = None
    """Where to write all figures as FILE.json, and a plot of the rows as FILE.png. upload_to_hf.py
    puts those of an evaluation.json beside the checkpoint on its model card."""
    seed: int = 1337
    """Seed of the stories and intervals; the loss needs none."""


def check(arguments: Arguments) -> None:
    """Raises InputError with the first flag that is out of range."""
    check_whole("batch_size", arguments.batch_size, 1)
    check_whole("num_stories", arguments.num_stories, 0, 10_000)
    check_whole("seed", arguments.seed, 0, 2**63 - 10_001)
    sampling = (arguments.temperature, arguments.top_k, arguments.top_p)
    check_sampling(torch.zeros(1, 1), 1, *sampling)
    output = arguments.output
    if output and (output.suffix != ".json" or output.is_dir() or not output.parent.is_dir()):
        raise InputError(
            f"--output {output} is no .json file in a folder that exists: pass --output "
            "evaluation.json"
        )


# --- How well it predicts ---


def score(model: GPT, checkpoint: dict, meta: dict, arguments: Arguments) -> dict:
    """The losses on all of a split. Raises InputError where they are no numbers."""
    split, size = arguments.split, arguments.batch_size
    counts, end_of_text = meta["splits"][split], meta["end_of_text"]
    tokens = load_tokens(arguments.data_dir, split, meta, model.config.context_length)
    loss = exact_loss(model, tokens, end_of_text, size)
    if not math.isfinite(loss):
        raise InputError(f"the model's loss is {loss}: the weights are broken")
    stories = split_stories(tokens, end_of_text)
    alone = (end_of_text, model.config.context_length, size, model.wte.weight.device)
    nats = story_losses(logits_of(model), stories, *alone)
    return {
        "step": checkpoint["step"],
        "data": data_fingerprint(meta),
        "split": split,
        "tokens": counts["tokens"],
        "loss": round(loss, 6),
        "perplexity": round(math.exp(loss), 6),
        "bits_per_byte": round(bits_per_byte(loss, counts), 6),
        "story_bits_per_byte": round(nats.sum() / math.log(2) / counts["bytes"], 6),
    }


# --- How its stories read ---


def collect(
    model: GPT, meta: dict, tokenizer: tiktoken.Encoding, arguments: Arguments
) -> dict[str, list[Story]]:
    """The sets of stories that are measured, by their title. Raises InputError."""
    number, seed, end_of_text = arguments.num_stories, arguments.seed, meta["end_of_text"]
    context_length = model.config.context_length
    tokens = load_tokens(arguments.data_dir, "validation", meta, context_length)
    stories = split_stories(tokens, end_of_text)
    if number > len(stories):
        raise InputError(
            f"there are {len(stories)} held-out stories to compare with: pass --num_stories "
            f"{len(stories)}"
        )
    picked = np.random.default_rng(seed).choice(len(stories), number, replace=False)
    whole = [[*stories[i].tolist(), end_of_text] for i in picked]
    held_out = [read_story(ids, tokenizer, context_length) for ids in whole]
    first = ["".join(sentences(story.text)[:1]) for story in held_out]  # nothing of white space
    openings = [tokenizer.encode_ordinary(sentence) for sentence in first]
    pack_linears(model)
    sampling = (arguments.temperature, arguments.top_k, arguments.top_p)
    sets = {}
    for title, prompts in (
        ("told from nothing", [[]] * number),
        ("told from first sentences", openings),
    ):
        told = tell_from(model, prompts, end_of_text, seed, *sampling)
        sets[title] = [read_story(ids, tokenizer, context_length) for ids in told]
    sets["held-out"] = held_out
    if arguments.controls:
        sets["sentences shuffled"] = shuffle_sentences(held_out, tokenizer, seed)
        sets["words shuffled"] = shuffle_words(held_out, tokenizer, seed)
    return sets


def judge(
    model: GPT, meta: dict, sets: dict[str, list[Story]], arguments: Arguments
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Of each set the rows of its column, and the longest run that it shares with train.bin."""
    tokenizer, end_of_text = load_tokenizer(model.config.vocab_size), meta["end_of_text"]
    alone = (end_of_text, model.config.context_length, arguments.batch_size)
    load_tokens(arguments.data_dir, "train", meta, 1, verify=False)  # raises where it is cut
    train = arguments.data_dir / "train.bin"
    names = find_names(tokenizer.decode(next(read_chunks(train, 1)).tolist()))

    ids = {title: [story.ids for story in stories] for title, stories in sets.items()}
    searches = {title: CopySearch(each, LENGTHS) for title, each in ids.items()}
    overlap = max(len(story) for each in ids.values() for story in each) or 1
    count = meta["splits"]["train"]["tokens"]
    with progress_bar(total=count, unit=" tokens", desc="searching", leave=False) as bar:
        for chunk in read_chunks(train, overlap):
            for search in searches.values():
                search.scan(chunk)
            bar.update(len(chunk))

    columns, longest = {}, {}
    for title, stories in sets.items():
        nats = story_losses(logits_of(model), ids[title], *alone, model.wte.weight.device)
        sizes = np.array([len(tokenizer.decode_bytes(story.tolist())) for story in ids[title]])
        search = searches[title]
        values = read_measures(stories, names)
        values |= {f"copied_{n}": search.share(n) for n in LENGTHS}
        values["loss"] = np.where(sizes > 0, nats / math.log(2) / sizes.clip(min=1), math.nan)
        if meta["dataset"] in BUILTIN:
            kept = [story.ended and keeps_hero_and_object(story.text) for story in stories]
            values["keeps"] = np.array(kept, float)
        columns[title] = {name: summarize(name, x, arguments.seed) for name, x in values.items()}
        run = search.longest_run()
        longest[title] = {"tokens": len(run), "text": tokenizer.decode(run.tolist())}
    return columns, longest


def draw(columns: dict[str, dict], path: Path) -> None:
    """Draws a panel for each row: its numbers and intervals in all columns."""
    from matplotlib.figure import Figure

    names = [name for name in ROWS if name in next(iter(columns.values()))]
    figure = Figure(figsize=(15, 2.2 * math.ceil(len(names) / 3)), layout="constrained")
    panels = figure.subplots(math.ceil(len(names) / 3), 3, sharey=True, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        for y, (title, column) in enumerate(columns.items()):
            if column[name]:
                value, low, high = column[name]
                color = "tab:blue" if title.startswith("told") else "tab:gray"
                axes.plot([low, high], [y, y], color=color, linewidth=3, alpha=0.4)
                axes.plot(value, y, "o", color="black" if title == "held-out" else color)
        axes.set_title(f"{ROWS[name].label}, {ROWS[name].unit}", fontsize=9)
        axes.set_yticks(range(len(columns)), columns)
        axes.set_ylim(len(columns) - 0.5, -0.5)
        axes.grid(alpha=0.3)
        if ROWS[name].unit == "%":
            axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}")
    for axes in list(panels):  # those left over
        axes.set_axis_off()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None})
    write_atomically(path, lambda file: file.write(image.getvalue()))


# --- The command ---


def main() -> None:
    arguments = parse_flags(Arguments)
    check(arguments)
    model, checkpoint = load_model(arguments.checkpoint, use_device(arguments.device))
    meta = load_meta(arguments.data_dir, model.config.vocab_size)
    model.loss_function = chunked_cross_entropy
    report = score(model, checkpoint, meta, arguments)
    print(
        f"{arguments.checkpoint} (step {report['step']:,}) on {report['tokens']:,} "
        f"{arguments.split} tokens\n"
        f"loss           {report['loss']:.4f} nats a token\n"
        f"perplexity     {report['perplexity']:.3f}\n"
        f"bits per byte  {report['bits_per_byte']:.4f}\n"
        f"               {report['story_bits_per_byte']:.4f} with each story alone"
    )
    if arguments.num_stories:
        tokenizer = load_tokenizer(model.config.vocab_size)
        columns, longest = judge(model, meta, collect(model, meta, tokenizer, arguments), arguments)
        report |= {
            "num_stories": arguments.num_stories,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "seed": arguments.seed,
            "columns": columns,
            "longest_copy": longest,
        }
        print(f"\n{arguments.num_stories} stories each, with 95 % intervals:\n")
        print(f"{story_table(columns)}\n")
        for title, copy in longest.items():
            print(f"longest run from train.bin, {title}: {copy['tokens']} tokens {copy['text']!r}")
    if arguments.output:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_atomically(arguments.output, lambda file: file.write(text.encode()))
        if arguments.num_stories:
            draw(report["columns"], arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
