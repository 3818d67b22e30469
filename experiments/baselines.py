"""Script: bits per byte of any causal models, ours and others', on the same held-out stories.

One definition for every vocabulary and context length: each story stands alone after an
end-of-text, the tokens of its text are scored, and where the context is too short the window
slides on by half of it. Needs requirements-dev.txt (transformers).
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import InputError, check_whole
from storygpt.checkpoint import load_model
from storygpt.cli import command_line, parse_flags, run
from storygpt.device import use_device
from storygpt.files import write_bytes
from storygpt.judging.measures import NUM_RESAMPLES
from storygpt.judging.story_losses import logits_of, story_losses
from storygpt.token_files import data_fingerprint, load_meta, load_tokens, split_stories
from storygpt.tokenizer import GPT2_VOCAB_SIZE, load_tokenizer


@dataclass(frozen=True)
class Arguments:
    """Compare models by their bits per byte on the same held-out stories."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Our .pt files, folders in transformers' layout, and names on the Hub: gpt2,
    roneneldan/TinyStories-33M."""
    data_dir: Path = Path("data")
    """Folder that prepare_data.py wrote, in any vocabulary."""
    num_stories: int = 0
    """Score this many of its held-out stories, evenly spread; 0 means all."""
    batch_size: int = 4
    """Stories at once."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    output: Path | None = None
    """A .json file to keep the figures in. Those of other models that it has already, on the same
    stories, stay there and in the table."""


@dataclass(frozen=True)
class Model:
    """What `story_losses` needs of a model, and what the table says of it."""

    parameters: int
    vocab_size: int
    context_length: int
    start: int
    encode: Callable[[str], list[int]]
    logits: Callable[[torch.Tensor], Iterable[torch.Tensor]]


class NotHereError(Exception):
    """A model that is not on this machine and does not come from the Hub."""


def open_ours(path: Path, device: torch.device) -> Model:
    """A checkpoint that train.py wrote. Raises InputError."""
    model, _ = load_model(path, device)
    config, tokenizer = model.config, load_tokenizer(model.config.vocab_size)
    return Model(
        parameters=model.num_parameters(),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        start=tokenizer.eot_token,
        encode=tokenizer.encode_ordinary,
        logits=logits_of(model),
    )


def open_theirs(name: str, device: torch.device) -> Model:
    """Whatever transformers can load as a causal model, in float32.

    Raises InputError for a folder that it cannot, NotHereError for a name.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # transformers' own, the Hub's, and those of the layers below
        reason = " ".join(str(error).split())
        if Path(name).exists():
            raise InputError(f"transformers cannot load {name}: {reason}") from error
        raise NotHereError(reason) from error
    start, encode = open_tokenizer(name, model.config.vocab_size)
    model.to(device).eval()
    return Model(
        parameters=sum(p.numel() for p in model.parameters()),
        vocab_size=model.config.vocab_size,
        context_length=getattr(model.config, "max_position_embeddings", 2048),
        start=start,
        encode=encode,
        logits=lambda idx: model(idx.to(device), use_cache=False).logits,
    )


def open_tokenizer(name: str, vocab_size: int) -> tuple[int, Callable[[str], list[int]]]:
    """The id that a story stands after, and text to ids; GPT-2's where a model of its size brings
    none. Raises InputError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        start = next(token for token in known if token is not None)
        if not tokenizer("a")["input_ids"]:  # where it finds no files, transformers makes up this
            raise ValueError("an empty vocabulary")
        return start, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:
        if vocab_size != GPT2_VOCAB_SIZE:
            raise InputError(
                f"{name} has no tokenizer that transformers can load, with an end-of-text: add its "
                "files to the folder"
            ) from error
        ours = load_tokenizer()
        return ours.eot_token, ours.encode_ordinary


def score(model: Model, texts: list[str], batch_size: int) -> dict:
    """A line of the table: bits a byte of all `texts`, and its 95 % interval over them."""
    stories = [np.array(model.encode(text)) for text in texts]
    nats = story_losses(
        model.logits,
        stories,
        end_of_text=model.start,
        context_length=model.context_length,
        batch_size=batch_size,
    )
    bits, sizes = nats / math.log(2), np.array([len(text.encode()) for text in texts])
    draws = np.random.default_rng(0).integers(len(texts), size=(NUM_RESAMPLES, len(texts)))
    interval = np.percentile(bits[draws].sum(1) / sizes[draws].sum(1), (2.5, 97.5))
    return {
        "parameters": model.parameters,
        "vocab_size": model.vocab_size,
        "context_length": model.context_length,
        "bits_per_byte": round(bits.sum() / sizes.sum(), 6),
        "interval": [round(bound, 6) for bound in interval],
    }


def read_stories(arguments: Arguments) -> tuple[list[str], dict]:
    """The held-out texts, and what tells them from others. Raises InputError."""
    meta = load_meta(arguments.data_dir, None)
    tokens = load_tokens(arguments.data_dir, "validation", meta, 1)
    stories = split_stories(tokens, meta["end_of_text"])
    tokenizer = load_tokenizer(meta["vocab_size"])
    number = min(arguments.num_stories or len(stories), len(stories))
    picked = np.arange(number) * len(stories) // number
    texts = [tokenizer.decode(stories[i].tolist()) for i in picked]
    return texts, {"data": data_fingerprint(meta), "num_stories": number}


def read_earlier(output: Path | None, of: dict) -> dict[str, dict]:
    """The lines in `output` that are of the same stories. Raises InputError."""
    if output is None:
        return {}
    if output.suffix != ".json" or not output.parent.is_dir():
        raise InputError(f"--output {output} is no .json file in a folder that exists")
    if not output.exists():
        return {}
    try:
        earlier = json.loads(output.read_text(encoding="utf-8"))
        return earlier["models"] if earlier["of"] == of else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output} is not one that baselines.py wrote: pass another") from error


def main() -> None:
    arguments = parse_flags(Arguments)
    check_whole("num_stories", arguments.num_stories, 0)
    check_whole("batch_size", arguments.batch_size, 1)
    if not arguments.models:
        raise InputError("there is no model to score: name one, as in `baselines.py gpt2`")
    device = use_device(arguments.device)
    texts, of = read_stories(arguments)
    lines, missing = read_earlier(arguments.output, of), {}
    for name in arguments.models:
        try:
            ours = name.endswith(".pt")
            model = open_ours(Path(name), device) if ours else open_theirs(name, device)
            lines[name] = score(model, texts, arguments.batch_size)
        except NotHereError as error:
            missing[name] = str(error)
    print(f"{of['num_stories']:,} held-out stories of {arguments.data_dir}, each alone\n")
    print("| model | parameters | vocabulary | context | bits per byte (95 %) |")
    print("|---|---|---|---|---|")
    for name, x in sorted(lines.items(), key=lambda line: line[1]["bits_per_byte"]):
        low, high = x["interval"]
        print(
            f"| {name} | {x['parameters']:,} | {x['vocab_size']:,} | {x['context_length']:,} "
            f"| {x['bits_per_byte']:.4f} ({low:.4f}–{high:.4f}) |"
        )
    if arguments.output:
        text = json.dumps({"of": of, "models": lines}, indent=2) + "\n"
        write_bytes(arguments.output, text.encode())
    if missing:
        flags = {"data_dir": arguments.data_dir, "num_stories": arguments.num_stories}
        flags |= {"output": arguments.output} if arguments.output else {}
        command = command_line("experiments/baselines.py", **flags)
        for name, reason in missing.items():
            print(f"\n{name} is not here: {reason}")
        print(f"\nwhere the Hub can be reached, this fills the rest: {command} {' '.join(missing)}")


if __name__ == "__main__":
    run(main)
