"""A page that tells stories and looks inside the model: a Hugging Face Space as it lies here.

It shows a model that `upload_to_hf.py` has built, from a folder or from the Hub, with the packages
of requirements.txt; of StoryGPT's repository it uses nothing.
"""

import argparse
import base64
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import gradio as gr
import torch
from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

FILES = ("model.py", "config.py", "checkpoints/StoryGPT_best.pt", "tokenizer.json")
PROMPTS = (
    "Once upon a time",
    "One day, a little girl found a",
    "Tom had a red kite.",
    '"Please help me," said the bird.',
)
VISITORS = 8  # whose stories come at the same time; the others wait
SHOWN_EVERY = 0.05  # seconds: faster is more than eyes follow, and costs every visitor


# --- The model ---


@dataclass(frozen=True)
class Storyteller:
    """A published model and its tokenizer."""

    name: str
    model: torch.nn.Module
    tokenizer: Tokenizer

    @property
    def config(self):
        """The model's GPTConfig."""
        return self.model.config

    @property
    def end_of_text(self) -> int:
        return self.config.vocab_size - 1

    @property
    def device(self) -> torch.device:
        return self.model.wte.weight.device

    def encode(self, prompt: str) -> list[int]:
        """A prompt's ids; a story from nothing begins after an end-of-text."""
        prompt = prompt.encode(errors="replace").decode()  # half a surrogate pair has no bytes
        return self.tokenizer.encode(prompt).ids or [self.end_of_text]

    def text(self, ids: list[int]) -> str:
        """What `ids` spell, without end-of-text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def default_model() -> str | None:
    """The model named in this Space's README.md."""
    models = (metadata_load(Path(__file__).with_name("README.md")) or {}).get("models")
    return models[0] if models else None


def load(name: str) -> Storyteller:
    """The model in a folder or of a Hub id. Its own model.py is what runs it.

    Ends the program with a sentence where there is no such model.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=FILES))
        except (HFValidationError, OSError) as error:  # the latter also of the Hub's answers
            reason = " ".join(str(error).split())[:200]
            sys.exit(f"error: {name} is no folder here, and no model to download: {reason}")
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        sys.exit(f"error: {name} has no {', '.join(missing)}: publish it with upload_to_hf.py")
    sys.path.insert(0, str(folder.resolve()))
    from config import GPTConfig, TrainingConfig
    from model import GPT

    try:
        with torch.serialization.safe_globals([GPTConfig, TrainingConfig]):
            checkpoint = torch.load(folder / FILES[2], map_location="cpu", weights_only=True)
        model = GPT(checkpoint["gpt_config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # a damaged file can fail in any layer below
        kind = type(error).__name__
        sys.exit(f"error: {name} is damaged ({kind}): get it again, or publish it again")
    tokenizer.encode_special_tokens = True  # a prompt that spells <|endoftext|> is only text
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shown_as = folder.resolve().name if Path(name).is_dir() else name  # nobody's whole path
    return Storyteller(shown_as, model.to(device).eval(), tokenizer)


# --- Telling ---


@dataclass
class Story:
    """The ids of a story so far: the first `given` are the prompt's, as far as it was read."""

    seed: int
    given: int
    ids: list[int] = field(default_factory=list)
    state: str = "telling"  # or "the end", "length reached", "stopped"


def tell(
    teller: Storyteller,
    prompt: str,
    seeds: range,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> Iterator[list[Story]]:
    """A story for each seed, longer at every step: those that `generate.py --seed SEED` tells."""
    context_length = teller.config.context_length
    start = teller.encode(prompt)[-context_length:]
    stories = [Story(seed, len(start), list(start)) for seed in seeds]
    columns = teller.model.stream(
        torch.tensor([start] * len(seeds), device=teller.device),
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        teller.end_of_text,
        [torch.Generator(teller.device).manual_seed(seed) for seed in seeds],
    )
    for column in columns:
        for story, token in zip(stories, column[:, 0].tolist(), strict=True):
            if story.state == "telling":
                story.ids.append(token)
                story.state = "the end" if token == teller.end_of_text else "telling"
        yield stories
    for story in stories:
        story.state = "length reached" if story.state == "telling" else story.state
    yield stories


# --- Looking inside ---


def windows(length: int, context_length: int) -> Iterator[tuple[int, int, int]]:
    """How `GPT.stream` reads a story of `length` tokens: (start, first, last) of each window.

    The tokens first to last - 1 are told by a model that has read those from `start` on. When the
    context is full, its last half is read again.
    """
    start, first = 0, 1
    while first < length:
        last = min(start + context_length + 1, length)
        yield start, first, last
        start, first = last - max(1, context_length // 2), last


def window_start(story: Story, index: int, context_length: int) -> int:
    """Where the window begins in which token `index`, at least 1, was told."""
    return next(w[0] for w in windows(len(story.ids), context_length) if index < w[2])


@torch.no_grad()
def probabilities(teller: Storyteller, ids: list[int]) -> Tensor:
    """(T,) ids to (T, vocab_size): what the model expects after each, before any filter."""
    logits, _ = teller.model(torch.tensor([ids], device=teller.device))
    return logits[0].float().softmax(-1)


def token_probabilities(teller: Storyteller, story: Story) -> list[float | None]:
    """The probability that each token had in its place; None for the first, which had no before."""
    found: list[float | None] = [None]
    for start, first, last in windows(len(story.ids), teller.config.context_length):
        expected = probabilities(teller, story.ids[start : last - 1])
        told = torch.tensor(story.ids[first:last], device=teller.device)
        found += expected[first - start - 1 :].gather(1, told[:, None])[:, 0].tolist()
    return found


@torch.no_grad()
def attention_weights(teller: Storyteller, ids: list[int], layer: int) -> Tensor:
    """(n_head, T, T): how much each of T ids takes from each, in the heads of one layer."""
    return teller.model.attention_weights(torch.tensor([ids], device=teller.device), layer)[0]


# --- What is shown ---


def percent(probability: float) -> str:
    """Three digits."""
    return "< 0.001 %" if probability < 1e-5 else f"{100 * probability:#.3g}".rstrip(".") + " %"


def spelled(teller: Storyteller, token: int) -> str:
    """A token as HTML in which what has no ink can be seen."""
    if token == teller.end_of_text:
        return "<em>the end</em>"
    text = escape(teller.text([token]))
    for blank, sign in ((" ", "␣"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(blank, f"<i>{sign}</i>")
    return text


def show_stories(teller: Storyteller, stories: list[Story], note: str = "") -> str:
    """The stories side by side, as HTML."""
    cards = []
    for number, story in enumerate(stories):
        given = teller.text(story.ids[: story.given])
        told = teller.text(story.ids)[len(given) :]
        if story.state == "telling":
            told = told.rstrip("\ufffd")  # half a character waits for the rest
        count = len(story.ids) - story.given
        cards.append(
            f'<article class="{story.state}"><p><mark>{escape(given)}</mark>{escape(told)}</p>'
            f"<footer><span>Seed {story.seed} · {count} tokens · {story.state}</span>"
            f'<button type="button" data-index="{number}">Look inside</button></footer></article>'
        )
    return f'{note and f"<p>{note}</p>"}<div class="stories">{"".join(cards)}</div>'


def show_tokens(teller: Storyteller, story: Story, chosen: int) -> str:
    """The story as a list of tokens to choose from, coloured by its probability, as HTML."""
    options = []
    for i, (token, p) in enumerate(zip(story.ids, token_probabilities(teller, story), strict=True)):
        text = escape(teller.text([token])).replace("\n", "↵\n")
        if token == teller.end_of_text:
            text = "<em>the end</em>" if i else "<em>the beginning</em>"
        kind = "given" if i < story.given else "told"
        looks = 'class="first"' if p is None else f'class="{kind}" style="--p:{100 * p:.1f}%"'
        title = "nothing came before it" if p is None else percent(p)
        looks += ' aria-selected="true" tabindex="0"' if i == chosen else ' tabindex="-1"'
        options.append(
            f'<span role="option" {looks} title="{title}" data-index="{i}">{text}</span>'
        )
    return f'<div class="tokens" role="listbox" aria-label="The story">{"".join(options)}</div>'


def show_choice(teller: Storyteller, story: Story, index: int, layer: int) -> str:
    """The ten likeliest in the place of one token, and where each head looked, as HTML."""
    if index == 0:
        return "<p>Nothing came before the first token, so there was nothing to choose by.</p>"
    start = window_start(story, index, teller.config.context_length)
    expected = probabilities(teller, story.ids[start:index])[-1]
    token, most = story.ids[index], expected.topk(min(10, len(expected)))
    shown = list(zip(most.indices.tolist(), most.values.tolist(), strict=True))
    rows = [bar(teller, other, p, other == token) for other, p in shown]
    rank = int((expected > expected[token]).sum()) + 1
    if rank > len(shown):
        rows.append(bar(teller, token, expected[token].item(), True, f"no. {rank:,}: "))
    whose = "you wrote" if index < story.given else "the model told"
    return (
        f"<h3>In the place of <code>{spelled(teller, token)}</code></h3>"
        f"<p>The ten likeliest tokens here, and which of them {whose}. These are the model's own "
        f'probabilities, before temperature, top-k and top-p.</p><ol class="bars">{"".join(rows)}'
        f"</ol>{show_heads(teller, story.ids[start:index], layer)}"
    )


def bar(teller: Storyteller, token: int, p: float, told: bool, rank: str = "") -> str:
    kind = ' class="told"' if told else ""
    return (
        f'<li{kind}><code>{spelled(teller, token)}</code><span><s style="width:{100 * p:.2f}%">'
        f"</s></span><b>{rank}{percent(p)}</b></li>"
    )


def show_heads(teller: Storyteller, ids: list[int], layer: int) -> str:
    """A picture of each head's weights among `ids`, and of its last row by itself, as HTML."""
    if not hasattr(teller.model, "attention_weights"):
        return "<p>To see where its heads looked, publish this model again: its code is older.</p>"
    figures = []
    for head, weights in enumerate(attention_weights(teller, ids, layer).cpu(), 1):
        most = weights[-1].topk(min(3, len(ids)))
        looks = ", ".join(
            f"<code>{spelled(teller, ids[i])}</code>&nbsp;{100 * p:.0f}&nbsp;%"
            for p, i in zip(most.values.tolist(), most.indices.tolist(), strict=True)
        )
        figures.append(
            f'<figure><img alt="Weights of head {head}" src="{png(weights)}">'
            f'<img alt="Its last row" src="{png(weights[-1:])}">'
            f"<figcaption>Head {head}: {looks}</figcaption></figure>"
        )
    return (
        f"<h3>Where the heads of layer {layer + 1} looked</h3><p>A row for each token read, from "
        "top to bottom; in it the tokens so far, from left to right: the deeper, the more of the "
        "head's attention, beside the most in that row. The strip is the last row again: "
        f"<code>{spelled(teller, ids[-1])}</code>, from which the choice was made; below it, what "
        f'it took most from.</p><div class="heads">{"".join(figures)}</div>'
    )


def png(weights: Tensor) -> str:
    """(rows, T) weights as a picture for an <img>, see-through where they are 0."""
    depth = (weights / weights.amax(-1, keepdim=True)).sqrt()  # small ones can be seen too
    alpha = Image.fromarray((depth * 255).round().to(torch.uint8).numpy())
    picture = Image.new("RGB", alpha.size, (13, 148, 136))
    picture.putalpha(alpha)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


CSS = """
.gradio-container { max-width: 1000px !important; width: 100%; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#start, #stop, #another { padding-inline: 8px; white-space: nowrap; }
body:not(:has(article.telling)) #stop { opacity: 0.45; }
.stories { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.stories article {
  display: flex; flex-direction: column; border: 1px solid var(--border-color-primary);
  border-radius: 10px; background: var(--background-fill-secondary); padding: 14px 16px;
}
.stories p {
  margin: 0 0 12px; flex: 1; font-size: 1.05rem; line-height: 1.6; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 60vh; overflow-y: auto;
}
.stories mark { background: none; color: inherit; opacity: 0.65; }
.stories .telling p::after { content: "▍"; color: #0d9488; animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
.stories footer {
  display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: 8px;
  font-size: 0.85rem;
}
.stories footer button {
  border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px 12px;
  color: var(--body-text-color); background: var(--background-fill-primary);
}
.stories footer button:hover { border-color: #0d9488; }
.note { margin: 0 0 8px; }
.nowrap { white-space: nowrap; }
.tokens { font-size: 1.05rem; line-height: 2; overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens span {
  --hue: color-mix(in oklab, #0d9488 var(--p), #f97316);
  background: color-mix(in srgb, var(--hue) 38%, transparent);
  padding: 3px 0; border-radius: 4px; cursor: pointer;
}
.tokens .first { background: none; }
.tokens .given { text-decoration: underline dotted; text-underline-offset: 4px; }
.tokens [aria-selected="true"] { outline: 2px solid var(--body-text-color); }
:focus-visible { outline: 3px solid #0d9488 !important; outline-offset: 1px; }
.scale { display: inline-block; width: 90px; height: 10px; border-radius: 5px; margin: 0 6px;
  background: linear-gradient(90deg in oklab, #f97316, #0d9488); opacity: 0.55; }
.choice h3 { margin: 18px 0 4px; font-size: 1.1rem; font-weight: 600; }
.choice p { margin: 0 0 10px; max-width: 70ch; }
.choice code {
  font-family: var(--font-mono); background: color-mix(in srgb, currentColor 8%, transparent);
  border-radius: 4px; padding: 0 4px; overflow-wrap: anywhere;
}
.choice code i { opacity: 0.5; font-style: normal; }
.bars { list-style: none; margin: 0; padding: 0; max-width: 640px; }
.bars li {
  display: grid; grid-template-columns: minmax(90px, 1fr) 3fr minmax(110px, auto); gap: 10px;
  align-items: center; padding: 2px 6px; border-radius: 6px;
}
.bars li.told { background: color-mix(in srgb, #0d9488 18%, transparent); font-weight: 600; }
.bars code { justify-self: end; }
.bars s { display: block; height: 12px; min-width: 2px; border-radius: 3px; background: #0d9488; }
.bars b { font-weight: inherit; font-variant-numeric: tabular-nums; text-align: right; }
.heads {
  display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(max(140px, 22%), 1fr));
}
.heads figure { margin: 0; }
.heads img {
  display: block; width: 100%; image-rendering: pixelated; box-sizing: border-box;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
}
.heads img:first-child { aspect-ratio: 1; }
.heads img + img { height: 22px; margin-top: 4px; }
.heads figcaption { font-size: 0.85rem; margin-top: 4px; }
"""

LEGEND = """
<p class="note">Every token is coloured by the probability that the model gave it there, before
temperature, top-k and top-p: <span class="nowrap">0 %<span class="scale"></span>100 %.</span> The
underlined ones are yours. Choose one, with the mouse or the arrow keys.</p>
"""

# A click on what has an index chooses it; among the tokens of a story, so do the arrow keys.
CHOOSE = """
let waiting;
const choose = (chosen) => {
  if (chosen.role === 'option') {
    for (const other of element.querySelectorAll('[role=option]')) {
      other.tabIndex = other === chosen ? 0 : -1;
      other.ariaSelected = String(other === chosen);
    }
    chosen.focus();
  }
  clearTimeout(waiting);  // an arrow key held down asks for the last token only
  waiting = setTimeout(() => trigger('select', {index: Number(chosen.dataset.index)}), 80);
};
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-index]');
  if (chosen) choose(chosen);
});
element.addEventListener('keydown', (event) => {
  const tokens = [...element.querySelectorAll('[role=option]')];
  const at = tokens.indexOf(event.target);
  const to = {Home: 0, End: tokens.length - 1, ArrowLeft: at - 1, ArrowRight: at + 1}[event.key];
  if (at < 0 || !tokens[to]) return;
  event.preventDefault();
  choose(tokens[to]);
});
"""


# --- The page ---


@dataclass(frozen=True)
class Answers:
    """What the page does when a visitor clicks; each visitor has stories of their own."""

    teller: Storyteller

    def tell(self, prompt, seed, count, length, temperature, top_k, top_p):
        """Yields the stories as HTML, and as what `look` takes. Raises gr.Error, one sentence."""
        from config import InputError, check_whole

        try:
            seed = int(seed)
        except (TypeError, ValueError):
            raise gr.Error("The seed must be a whole number.", print_exception=False) from None
        prompt, sampling = prompt or "", (int(length), temperature, int(top_k) or None, top_p)
        tokens, context_length = len(self.teller.encode(prompt)), self.teller.config.context_length
        note = ""
        if tokens > context_length:
            note = f"The prompt has {tokens:,} tokens: only its last {context_length} were read."
        try:
            check_whole("seed", seed, 0, 2**63 - 10_001)
            shown = 0.0
            for stories in tell(self.teller, prompt, range(seed, seed + int(count)), *sampling):
                done = all(story.state != "telling" for story in stories)
                if done or time.monotonic() - shown > SHOWN_EVERY:
                    shown = time.monotonic()
                    yield show_stories(self.teller, stories, note), stories
        except InputError as error:
            raise gr.Error(f"{error}.", print_exception=False) from None

    def stop(self, stories):
        for story in stories:
            story.state = "stopped" if story.state == "telling" else story.state
        return show_stories(self.teller, stories), stories

    def next_seed(self, seed, count):
        return str(int(seed) + int(count)) if str(seed).strip().isdecimal() else seed

    def look(self, story, layer):
        """Opens a story at its first token, or the prompt's last where there is none."""
        index = min(story.given, len(story.ids) - 1)
        tokens = show_tokens(self.teller, story, index)
        return gr.Tabs(selected="inside"), (story, index), tokens, self.detail(story, index, layer)

    def look_at(self, stories, layer, event: gr.EventData):
        return self.look(stories[event.index], layer)

    def look_at_latest(self, stories, looked, layer):
        """For whoever opens the tab by itself: the first story, unless one of them is open."""
        if not stories or (looked and looked[0] in stories):
            return gr.skip()
        return self.look(stories[0], layer)

    def choose(self, looked, layer, event: gr.EventData):
        story, index = looked[0], event.index
        return (story, index), self.detail(story, index, layer)

    def other_layer(self, looked, layer):
        return self.detail(*looked, layer) if looked else gr.skip()

    def detail(self, story, index, layer):
        return f'<div class="choice">{show_choice(self.teller, story, index, int(layer) - 1)}</div>'


def sampling_settings() -> list[gr.components.Component]:
    """The controls of `Answers.tell` after the prompt, in its order; generate.py's defaults."""
    with gr.Accordion("Settings", open=False), gr.Row():
        return [
            gr.Textbox("1337", label="Seed", info="The same seed, the same story", min_width=260),
            *(
                gr.Slider(least, most, value, step=step, label=label, info=info, min_width=260)
                for label, info, least, most, value, step in (
                    ("Stories", "Side by side", 1, 4, 1, 1),
                    ("Length", "Tokens at most", 1, 1000, 200, 1),
                    ("Temperature", "0: always the likeliest", 0, 2, 0.8, 0.05),
                    ("Top-k", "0: all tokens", 0, 500, 100, 1),
                    ("Top-p", "1: all tokens", 0.01, 1, 1, 0.01),
                )
            ),
        ]


def page(teller: Storyteller) -> gr.Blocks:
    """The whole page."""
    answers, config = Answers(teller), teller.config
    layers = [str(layer + 1) for layer in range(config.n_layer)]
    with gr.Blocks(title="StoryGPT", analytics_enabled=False, fill_width=True) as blocks:
        stories, looked = gr.State([]), gr.State(None)
        gr.Markdown(
            f"# StoryGPT\n{teller.model.num_parameters():,} parameters, {config.n_layer} layers of "
            f"{config.n_head} heads, {config.context_length} tokens of context: `{teller.name}`"
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Tell", id="tell"):
                prompt = gr.Textbox(PROMPTS[0], label="How the story begins", max_lines=8)
                gr.Examples([[text] for text in PROMPTS], prompt, label="Or begin with")
                with gr.Row():
                    start = gr.Button("Tell", variant="primary", elem_id="start", min_width=70)
                    stop = gr.Button("Stop", elem_id="stop", min_width=70)
                    another = gr.Button("Another one", elem_id="another", min_width=130)
                settings = [prompt, *sampling_settings()]
                cards = gr.HTML(js_on_load=CHOOSE, apply_default_css=False)
            with gr.Tab("Look inside", id="inside") as inside:
                gr.HTML(LEGEND, apply_default_css=False)
                tokens = gr.HTML(
                    "<p>Tell a story first.</p>", js_on_load=CHOOSE, apply_default_css=False
                )
                layer = gr.Radio(layers, value=layers[-1], label="Layer of the attention pictures")
                detail = gr.HTML(apply_default_css=False)

        told, opened = [cards, stories], [tabs, looked, tokens, detail]
        quiet = {"show_progress": "hidden"}
        inner = quiet | {"api_visibility": "private"}
        shared = quiet | {"concurrency_limit": VISITORS, "concurrency_id": "tell"}
        every = inner | {"trigger_mode": "multiple"}
        clicks = [start.click, prompt.submit]
        telling = gr.on(clicks, answers.tell, settings, told, api_name="tell", **shared)
        seed = another.click(
            answers.next_seed, settings[1:3], settings[1], cancels=telling, **inner
        )
        again = seed.success(answers.tell, settings, told, api_visibility="private", **shared)
        stop.click(answers.stop, stories, told, cancels=[telling, again], **inner)
        cards.select(answers.look_at, [stories, layer], opened, **inner)
        inside.select(answers.look_at_latest, [stories, looked, layer], opened, **inner)
        tokens.select(answers.choose, [looked, layer], [looked, detail], **every)
        layer.change(answers.other_layer, [looked, layer], detail, **every)
    return blocks


# --- The command ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default=default_model(),
        help="folder or Hub id of a model that upload_to_hf.py has built, whose model.py is run "
        "(the one that README.md names)",
    )
    parser.add_argument("--host", help="address to answer at (this machine only)")
    parser.add_argument("--port", type=int, help="port to answer at (7860, or the next free one)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    arguments = parser.parse_args()
    if not arguments.model:
        parser.error("README.md names no model under `models`: pass --model, a folder or a Hub id")
    theme = gr.themes.Soft(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],  # nothing is fetched from elsewhere
        font_mono=["ui-monospace", "monospace"],
    )
    blocks = page(load(arguments.model))
    try:
        blocks.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            inbrowser=arguments.open,
            theme=theme,
            css=CSS,
            ssr_mode=False,
            footer_links=[],
        )
    except (OSError, OverflowError):  # no such port, or somebody else's
        sys.exit("error: the page cannot be served there: pass another --port or --host")


if __name__ == "__main__":
    main()
