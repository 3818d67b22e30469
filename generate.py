"""Script: tells stories with a trained checkpoint, each word as it comes."""

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from config import GenerationSettings, Precision, check_whole
from storygpt.cli import DEFAULT_CHECKPOINT, parse_flags, printable, run, warn

# torch takes seconds to import: --help and a mistyped flag should not have to wait for it.


@dataclass(frozen=True)
class Arguments:
    """Tell stories."""

    prompt: str | None = None
    """How the story begins: as most of the model's own stories do unless given; --prompt=
    leaves that to the model. One that begins with a dash: --prompt=-Hello."""
    checkpoint: Path = DEFAULT_CHECKPOINT
    """A .pt file, a folder in the layout of transformers' GPT-2, or a model on the Hub: owner/name,
    owner/name@revision or its address."""
    sampling: GenerationSettings = field(default_factory=GenerationSettings)
    """How the tokens of a story are drawn, and how many at most."""
    num_samples: int = 1
    """Stories to tell, in one batch: those of seed, seed + 1 and so on."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    dtype: Precision = "float32"
    """Precision of the weights; auto is the fastest that the device has."""
    seed: int = 1337
    """The same seed tells the same story on the same device."""
    interactive: bool = False
    """Ask for prompts, one a line; an empty line tells another story (that of the next seed).
    Ctrl-C ends a story, Ctrl-D the program."""


def main() -> None:
    arguments = parse_flags(Arguments)
    check_whole("num_samples", arguments.num_samples, 1, 10_000)
    check_whole("seed", arguments.seed, 0, 2**63 - 10_001)  # num_samples seeds follow

    from storygpt.checkpoint import load_to_generate
    from storygpt.device import pick_dtype, use_device
    from storygpt.record import opening_of

    device = use_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    model, checkpoint = load_to_generate(arguments.checkpoint, device, dtype)
    if arguments.prompt is None:
        arguments = replace(arguments, prompt=opening_of(checkpoint))
    if arguments.interactive:
        converse(model, arguments)
    else:
        tell_aloud(model, arguments)


def converse(model, arguments: Arguments) -> None:
    """Tells a story for every line that is typed."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401, input() then has history and arrow keys
    sys.stdin.reconfigure(errors="replace", newline=None)  # lines may end as on Windows
    question = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""  # a file is stories alone
    prompt, next_seed = arguments.prompt, arguments.seed  # which an empty line takes
    while True:
        try:
            line = input(question).removeprefix("\ufeff")  # of a file from Windows
            prompt, seed = (line, arguments.seed) if line else (prompt, next_seed)
            next_seed = seed + arguments.num_samples
            tell_aloud(model, replace(arguments, prompt=prompt, seed=seed))
        except KeyboardInterrupt:
            print()
        except EOFError:
            if question:
                print()
            return


def tell_aloud(model, arguments: Arguments) -> None:
    """Shows the first story as it is told, then the others, then the speed."""
    import torch

    from model import check_sampling
    from storygpt.generation import generators, prompt_ids
    from storygpt.tokenizer import TextStream, load_tokenizer

    tokenizer = load_tokenizer(model.config.vocab_size)
    start, context_length = prompt_ids(arguments.prompt, tokenizer), model.config.context_length
    if len(start) > context_length:
        warn(
            f"the prompt has {len(start)} tokens, more than the model's context of "
            f"{context_length}: only its last {context_length} are read"
        )
    if arguments.prompt.endswith(" "):
        warn("the prompt ends in a space, which tokens begin with: without it the story is better")
    device = model.wte.weight.device
    seeds = range(arguments.seed, arguments.seed + arguments.num_samples)
    idx = torch.tensor([start] * len(seeds), device=device)
    settings = asdict(arguments.sampling)
    check_sampling(idx, **settings)  # before the prompt is shown
    columns = model.stream(
        idx, **settings, end_of_text=tokenizer.eot_token, generator=generators(seeds, device)
    )
    begun, told = time.perf_counter(), 0
    streams, texts = [TextStream(tokenizer) for _ in seeds], [[] for _ in seeds]
    show(arguments.prompt)
    for column in columns:
        for stream, text, token in zip(streams, texts, column[:, 0].tolist(), strict=True):
            told += not stream.ended
            text.append(stream.add([token]))  # a token may end inside a character
        show(texts[0][-1])
    show(streams[0].close() + "\n")
    seconds = time.perf_counter() - begun
    for stream, text in list(zip(streams, texts, strict=True))[1:]:
        show("\n" + "-" * 40 + "\n" + arguments.prompt + "".join(text) + stream.close() + "\n")
    warn(f"\n{told} tokens in {seconds:.1f} s, {told / seconds:.0f} tokens/s")


def show(text: str) -> None:
    """Prints a piece of a story at once; on a terminal nothing that would give it orders."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


if __name__ == "__main__":
    run(main)
