"""Script: the values and pictures of docs/tour.md, from a run of your own: one story of its first
batch, from text to tokens, bytes, vectors, attention, probabilities, loss, and stories told."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storygpt import cli

if __name__ == "__main__":
    cli.end_quietly_on_interrupt()  # before torch: see storygpt/cli.py

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from config import InputError, TrainingConfig, check_whole
from model import GPT
from storygpt.batches import Batches
from storygpt.checkpoint import build_model, load_checkpoint
from storygpt.files import METRICS, save_figure
from storygpt.generation import GenerationSettings, generate_stories
from storygpt.judging.measures import find_names, sentences
from storygpt.kernels import pack_linears
from storygpt.metrics import parse_metrics, smoothed
from storygpt.token_files import load_meta, load_tokens
from storygpt.tokenizer import load_tokenizer

COLUMNS = 92  # characters in a line of a picture
PASTELS = ("#fde2c8", "#d5e8d4", "#dae8fc", "#fff2cc", "#e1d5e7")
OFTEN = 500  # the commonest tokens, which have been seen enough to have a place
SEED = 1337  # that of generate.py


@dataclass(frozen=True)
class Arguments:
    """Follow one story through a model: print what docs/tour.md shows, and draw its pictures."""

    checkpoint: Path = Path("checkpoints/demo/StoryGPT_best.pt")
    """The .pt file of a run; the run's metrics.jsonl lies beside it."""
    data_dir: Path = Path("data/demo")
    """Folder of the data it was trained on."""
    output_dir: Path = Path("checkpoints/demo")
    """Folder for the pictures, tour_*.png."""
    row: int = 3
    """Row of the first batch, counted from 0: the story that begins there is followed, or the next
    row's where it names nobody twice."""


@dataclass(frozen=True)
class Story:
    """The story that is followed: where it begins in train.bin, its ids, what each spells, and the
    places of its hero's name, a list of tokens for each time it is named."""

    start: int
    ids: list[int]
    pieces: list[str]
    hero: str
    named: list[list[int]]


def stop(title: str) -> None:
    print(f"\n--- {title} ---")


def shown(piece: str) -> str:
    """A token so that what has no ink can be seen."""
    return piece.replace(" ", "␣").replace("\n", "↵")


# --- The story ---


def find_story(tokens: np.ndarray, row: np.ndarray, tokenizer, most: int) -> Story | None:
    """The first story that begins in a batch's `row`, at most `most` tokens of it.

    None where it names nobody twice, or the row is inside the last story.
    """
    places = np.flatnonzero(tokens[: len(tokens) - len(row) + 1] == row[0])
    window = next(p for p in places if np.array_equal(tokens[p : p + len(row)], row))
    starts = np.append(0, np.flatnonzero(tokens == tokenizer.eot_token) + 1)
    following = starts[np.searchsorted(starts, window) :]
    if len(following) < 2:
        return None
    start, after = following[:2]
    ids = tokens[start : min(after - 1, start + most)].tolist()
    spelled = [tokenizer.decode_single_token_bytes(i) for i in ids]
    raw, token_of_byte = b"".join(spelled), np.repeat(range(len(ids)), [len(s) for s in spelled])
    text = raw.decode(errors="replace")
    hero = max(sorted(find_names(text)), key=re.findall(r"\w+", text).count, default="")
    spans = [match.span() for match in re.finditer(rf"\b{hero}\b".encode(), raw)] if hero else []
    named = [sorted({*token_of_byte[first:last].tolist()}) for first, last in spans]
    pieces = [piece.decode(errors="replace") for piece in spelled]
    if len(named) < 2:
        return None
    return Story(start=int(start), ids=ids, pieces=pieces, hero=hero, named=named)


def pick_story(tokens: np.ndarray, x: np.ndarray, row: int, tokenizer) -> tuple[int, Story]:
    """The first of the rows of a batch `x`, from `row` on, with a story to follow, and the story.

    Raises InputError where there is none.
    """
    for i in (*range(row, len(x)), *range(row)):
        if story := find_story(tokens, x[i], tokenizer, x.shape[1] - 1):
            return i, story
    raise InputError("no story of the first batch names anybody twice: there is nobody to follow")


def show_tokens(story: Story, tokens: np.ndarray, arguments: Arguments) -> None:
    stop("1 and 2: text and tokens")
    text = "".join(story.pieces)
    print(text)
    print(f"{len(text.encode())} bytes, {len(story.ids)} tokens")
    print("  ".join(f"{shown(p)} {i}" for p, i in zip(story.pieces[:12], story.ids, strict=False)))
    draw_tokens(
        arguments.output_dir / "tour_tokens.png",
        story.pieces,
        colours=[PASTELS[i % len(PASTELS)] for i in range(len(story.ids))],
        notes=[str(i) for i in story.ids],
    )
    stop("3: bytes in train.bin")
    first, path = 2 * story.start, arguments.data_dir / "train.bin"
    raw = tokens[story.start : story.start + 6].tobytes()
    print(f"byte {first:,} of {path} and on: {raw.hex(' ', 2)}")
    print(f"read as little-endian uint16: {' '.join(map(str, story.ids[:6]))}")


def show_batch(x: np.ndarray, y: np.ndarray, row: int, tokenizer) -> None:
    stop("4: a batch and its targets")
    print(f"x {x.shape}, y {y.shape}, {x.dtype}; row {row}:")
    for name, ids in (("x", x[row]), ("y", y[row])):
        pieces = [tokenizer.decode([i]) for i in ids[:10].tolist()]
        print(f"{name}: {' '.join(f'{shown(p):>7}' for p in pieces)} …")


# --- Inside the model ---


def show_embeddings(model: GPT, story: Story, tokens: np.ndarray, tokenizer) -> None:
    stop("5: embeddings")
    table, hero = model.wte.weight, story.ids[story.named[0][0]]
    values = ", ".join(f"{value:+.2f}" for value in table[hero, :5].tolist())
    print(f"wte {tuple(table.shape)}, wpe {tuple(model.wpe.weight.shape)}")
    print(f"{shown(tokenizer.decode([hero]))} is row {hero}: {values} …")
    often = np.bincount(tokens).argsort()[::-1][:OFTEN].tolist()
    unit = F.normalize(table[often], dim=1)
    own = [often.index(i) for i in dict.fromkeys(story.ids) if i in often]
    cosines = unit[own] @ unit.T
    cosines[range(len(own)), own] = -1
    nearest = cosines.topk(4)
    for i in nearest.values[:, 0].argsort(descending=True)[:10].tolist():
        found = zip(nearest.indices[i].tolist(), nearest.values[i].tolist(), strict=True)
        near = "  ".join(
            f"{shown(tokenizer.decode([often[j]]))} {cosine:.2f}" for j, cosine in found
        )
        print(f"{shown(tokenizer.decode([often[own[i]]])):>8} is like {near}")


def all_heads(model: GPT, ids: list[int]) -> Tensor:
    """(n_layer, n_head, T, T): how much each of T ids takes from each."""
    idx = torch.tensor([ids])
    return torch.cat([model.attention_weights(idx, layer) for layer in range(len(model.h))])


def show_attention(model: GPT, story: Story, arguments: Arguments) -> None:
    stop("6: attention")
    last = story.named[-1][0]
    asking, answers = last - 1, [i for place in story.named[:-1] for i in place]
    weights = all_heads(model, story.ids[:last])[:, :, asking]
    shares = weights[:, :, answers].sum(-1)
    layer, head = divmod(int(shares.argmax()), model.config.n_head)
    print(
        f"before the last {story.hero}: at {shown(story.pieces[asking])} head {head + 1} of layer "
        f"{layer + 1} takes {shares[layer, head]:.0%} from where {story.hero} stood before"
    )
    for i, share in enumerate(shares.tolist()):
        print(f"all heads of layer {i + 1}: {' '.join(f'{s:.0%}' for s in share)}")
    row = weights[layer, head]
    most = row.max().item()
    colours = [colormaps["Oranges"](0.75 * math.sqrt(w / most)) for w in row.tolist()]
    colours[asking] = "#9ecae1"
    draw_tokens(
        arguments.output_dir / "tour_attention.png",
        [*story.pieces[:last], " ?"],
        colours=[*colours, "white"],
        notes=[f"{w:.0%}" if w >= 0.01 else "" for w in row.tolist()] + [""],
    )


def show_next(logits: Tensor, story: Story, tokenizer) -> None:
    """`logits` (T + 1, vocab_size): of each token of the story after an end-of-text."""
    stop("7: the logits of the next word")
    last = story.named[-1][0]
    print(f"after {shown(''.join(story.pieces[max(0, last - 9) : last]))}")
    most = logits[last].topk(6)
    p = logits[last].softmax(-1)
    for logit, i in zip(most.values.tolist(), most.indices.tolist(), strict=True):
        bar = "█" * round(30 * p[i].item())
        print(f"{shown(tokenizer.decode([i])):>9} logit {logit:6.2f}  p {p[i]:7.2%}  {bar}")


def show_loss(logits: Tensor, story: Story, tokenizer, arguments: Arguments) -> None:
    stop("8: the loss")
    targets = torch.tensor([*story.ids, tokenizer.eot_token][: len(logits)])
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = -p.log().mean().item()
    size = logits.size(-1)
    print(f"mean of -ln p over {len(p)} tokens: {loss:.3f} nats, exp of it {math.exp(loss):.2f}")
    print(f"knowing nothing: ln {size:,} = {math.log(size):.2f}")
    pieces = [*story.pieces, "<the end>"][: len(p)]
    for title, order in (("least", p.argsort()), ("most", p.argsort(descending=True))):
        few = [f"{shown(pieces[i])} {p[i]:.2%}" for i in order[:5].tolist()]
        print(f"{title} expected: {'  '.join(few)}")
    colours = [colormaps["RdYlGn"](0.15 + 0.7 * math.sqrt(x)) for x in p.tolist()]
    draw_tokens(
        arguments.output_dir / "tour_surprise.png",
        pieces,
        colours=colours,
        notes=[f"{100 * x:.0f}" for x in p.tolist()],
    )


# --- The run, and what it left ---


def show_training(metrics: list[dict], training: TrainingConfig, arguments: Arguments) -> None:
    stop("9: gradients, clipping, schedule")
    steps = [entry for entry in metrics if entry["step"]]
    norms = np.array([entry["grad_norm"] or math.nan for entry in steps])
    for entry in steps:
        if entry["step"] in (1, 2, 10, training.warmup_steps, 500, len(steps)):
            print(
                f"step {entry['step']:>6,}: train loss {entry['train_loss']:6.3f}, gradient norm "
                f"{entry['grad_norm'] or math.nan:5.2f}, learning rate {entry['learning_rate']:.2e}"
            )
    clip = training.grad_clip or math.inf
    print(f"{(norms > clip).sum():,} of {len(steps):,} steps had a norm over {clip:g}: clipped")
    draw_training(steps, norms, clip, arguments.output_dir / "tour_training.png")


def show_stories(model: GPT, story: Story) -> None:
    prompt = sentences("".join(story.pieces))[0]
    stop(f"11: sampling, from {prompt!r}")
    pack_linears(model)  # as generate.py does
    for temperature in (0.0, 0.8, 1.5):
        settings = GenerationSettings(temperature=temperature)
        (text,) = generate_stories(model, prompt, [SEED], settings)
        print(f"temperature {temperature}:{text.removeprefix(prompt)}")


def show_checkpoint(path: Path, checkpoint: dict) -> None:
    stop("12: the checkpoint")
    weights = checkpoint["model_state_dict"]
    print(f"{path.name}: {path.stat().st_size:,} bytes, {', '.join(checkpoint)}")
    print(f"step {checkpoint['step']:,}, val_loss {checkpoint['val_loss']:.4f}")
    for name in list(weights)[:4]:
        print(f"{name} {tuple(weights[name].shape)}")
    print(f"and {len(weights) - 4} more")


# --- Pictures ---


def save(figure: Figure, path: Path) -> None:
    save_figure(figure, path, dpi=110)


def draw_tokens(path: Path, pieces: list[str], colours: list, notes: list[str]) -> None:
    """Text as boxes, one a token, with a small note below each."""
    places, column, line = [], 0, 0
    for piece in pieces:
        if column + len(piece) > COLUMNS:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(piece)
    figure = Figure(figsize=(0.1 * COLUMNS + 0.2, 0.42 * (line + 1) + 0.1))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, COLUMNS + 1), ylim=(line + 0.85, -0.65))
    axes.set_axis_off()
    for piece, colour, note, (x, y) in zip(pieces, colours, notes, places, strict=True):
        axes.add_patch(Rectangle((x, y - 0.4), len(piece), 0.55, facecolor=colour, edgecolor="w"))
        for i, letter in enumerate(shown(piece).replace("␣", " ")):
            axes.text(
                x + i + 0.5, y, letter, ha="center", va="baseline", family="monospace", size=11
            )
        axes.text(
            x + len(piece) / 2, y + 0.4, note, ha="center", va="baseline", size=6, color="#555"
        )
    save(figure, path)


def draw_training(steps: list[dict], norms: np.ndarray, clip: float, path: Path) -> None:
    """The learning rate, the gradient norm and the train loss of every step."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    rate, norm, loss = figure.subplots(1, 3)
    x = [entry["step"] for entry in steps]
    rate.plot(x, [entry["learning_rate"] for entry in steps], color="tab:green")
    norm.plot(x, norms, color="tab:purple", linewidth=0.5)
    norm.axhline(min(clip, np.nanmax(norms)), color="black", linestyle="--", linewidth=0.8)
    losses = np.array([entry["train_loss"] for entry in steps])
    loss.plot(x, losses, color="tab:blue", alpha=0.3, linewidth=0.5)
    loss.plot(x, smoothed(losses), color="tab:blue")
    for axes in (norm, loss):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    titles = ("learning rate", "gradient norm (dashed: the clip)", "train loss, nats a token")
    for axes, title in zip((rate, norm, loss), titles, strict=True):
        axes.set_title(title, size=10)
        axes.set_xlabel("step", size=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    save(figure, path)


@torch.no_grad()
def main() -> None:
    arguments = cli.parse_flags(Arguments)
    checkpoint = load_checkpoint(arguments.checkpoint)
    model = build_model(checkpoint, arguments.checkpoint)
    config, training = model.config, checkpoint["training_config"]
    windows = training.batch_size * training.gradient_accumulation_steps
    check_whole("row", arguments.row, 0, windows - 1)
    meta = load_meta(arguments.data_dir, config.vocab_size)
    tokens = load_tokens(arguments.data_dir, "train", meta, config.context_length)
    metrics_path = arguments.checkpoint.parent / METRICS
    if not metrics_path.exists():
        raise InputError(f"there is no {metrics_path}: pass the --checkpoint of a run's own folder")
    metrics = parse_metrics(metrics_path.read_bytes(), metrics_path)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer, end = load_tokenizer(config.vocab_size), meta["end_of_text"]

    batches = Batches(
        tokens=tokens,
        end_of_text=end,
        seed=training.seed,
        windows_per_step=windows,
        context_length=config.context_length,
        story_windows=training.story_windows,
    )
    x, y = batches(1, range(windows))
    row, story = pick_story(tokens, x, arguments.row, tokenizer)
    show_tokens(story, tokens, arguments)
    show_batch(x, y, row, tokenizer)
    show_embeddings(model, story, tokens, tokenizer)
    show_attention(model, story, arguments)
    logits = model(torch.tensor([[end, *story.ids]]))[0][0]
    show_next(logits, story, tokenizer)
    show_loss(logits, story, tokenizer, arguments)
    show_training(metrics, training, arguments)
    show_stories(model, story)
    show_checkpoint(arguments.checkpoint, checkpoint)


if __name__ == "__main__":
    cli.run(main)
