"""Script: tells stories with a trained checkpoint, each word as it comes."""

import codecs
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config import InputError
from storygpt.cli import parse_flags, run

# torch takes seconds to import: --help and a mistyped flag should not have to wait for it.


@dataclass(frozen=True)
class Arguments:
    """Tell stories."""

    prompt: str = "Once upon a time"
    """How the story begins; "" leaves that to the model."""
    checkpoint: Path = Path("checkpoints/StoryGPT_best.pt")
    """A .pt file, a folder that upload_to_hf.py made, or a model on the Hub: owner/name."""
    max_new_tokens: int = 200
    """Most tokens to add to the prompt."""
    temperature: float = 0.8
    """0 always takes the likeliest token; 1 samples the model's own probabilities."""
    top_k: int | None = 100
    """Sample among the k likeliest tokens; None among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability."""
    num_samples: int = 1
    """Stories to tell, in one batch."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto takes the first there is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights."""
    seed: int = 1337
    """The same seed tells the same stories on the same device."""


class TextStream:
    """Turns token ids into text as they come, holding back half-told characters."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def text(self, ids: Iterable[int], final: bool = False) -> str:
        """The text that `ids` complete; with `final`, also whatever was held back."""
        data = self.tokenizer.decode_bytes(list(ids))
        return self.decoder.decode(data, final)


def main() -> None:
    arguments = parse_flags(Arguments)
    if arguments.num_samples < 1:
        raise InputError(f"num_samples must be at least 1, not {arguments.num_samples}")

    import torch

    from storygpt.checkpoint import load_model
    from storygpt.device import pick_device
    from storygpt.tokenizer import load_tokenizer

    device = pick_device(arguments.device)
    model, _ = load_model(arguments.checkpoint, device)
    model.to(getattr(torch, arguments.dtype))
    tokenizer = load_tokenizer(model.config.vocab_size)
    end_of_text = tokenizer.eot_token
    prompt = tokenizer.encode_ordinary(arguments.prompt) or [end_of_text]
    context_length = model.config.context_length
    if len(prompt) > context_length:
        print(
            f"the prompt has {len(prompt)} tokens, more than the model's context of "
            f"{context_length}: only its last {context_length} are read",
            file=sys.stderr,
        )
        prompt = prompt[-context_length:]

    torch.manual_seed(arguments.seed)
    idx = torch.tensor([prompt] * arguments.num_samples, device=device)
    stories = [[] for _ in range(arguments.num_samples)]
    first = TextStream(tokenizer)  # the first story is shown as it is told
    columns = model.stream(
        idx,
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        end_of_text=end_of_text,
    )
    start = time.perf_counter()
    print(first.text(token for token in prompt if token != end_of_text), end="", flush=True)
    for column in columns:
        for story, token in zip(stories, column[:, 0].tolist(), strict=True):
            if end_of_text not in story:
                story.append(token)
                if story is stories[0] and token != end_of_text:
                    print(first.text([token]), end="", flush=True)
    print(first.text([], final=True))
    seconds = time.perf_counter() - start
    for story in stories[1:]:
        ids = [token for token in prompt + story if token != end_of_text]
        print("\n" + "-" * 40 + "\n" + TextStream(tokenizer).text(ids, final=True))
    told = sum(map(len, stories))
    print(f"\n{told} tokens in {seconds:.1f} s, {told / seconds:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run(main)
