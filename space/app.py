"""A page that tells stories and looks inside the model: a Hugging Face Space as it lies here.

It shows a model that `upload_to_hf.py` has built, from a folder or from the Hub, with the packages
of requirements.txt; of StoryGPT's repository it uses nothing. The page itself is page.html, with
its style and its script beside it. Gradio only serves it: a Space on ZeroGPU must be one of Gradio.
"""

import os

if os.getenv("SPACES_ZERO_GPU"):  # set by ZeroGPU alone, whose package comes before torch
    import spaces

    # No Space starts there without a function for its GPU. This one is never called: a model as
    # small as ours answers faster from the CPU than a GPU is handed out.
    spaces.GPU(lambda: None)

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import gradio as gr
import torch
import torch.nn.functional as F
from fastapi import HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from huggingface_hub import metadata_load, snapshot_download
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).parent
WEIGHTS = "checkpoints/StoryGPT_best.pt"
FILES = ("model.py", "config.py", WEIGHTS, "tokenizer.json")
CARD = "README.md"
DESCRIPTIONS = ("config.json", CARD)  # which older models lack
OPENING = "Once upon a time"  # of a model that does not say how its stories begin
AT_ONCE = 8  # visitors whose stories come at the same time; the others wait
MOST_VISITORS = 300
MOST_BYTES = 60_000  # of a request
PATIENCE = 300  # seconds in which a visitor must have sent, or read, a piece
MOST_NEW_TOKENS = 1000
SHOWN_EVERY = 0.05  # seconds: faster is more than eyes follow


# --- The model ---


@dataclass(frozen=True)
class Published:
    """A published model, its tokenizer, and what it says of itself: the record, empty if none."""

    name: str
    model: torch.nn.Module
    tokenizer: Tokenizer
    record: dict
    language: str = "en"  # of its stories

    @property
    def config(self):
        """Returns the model's GPTConfig."""
        return self.model.config

    @property
    def end_of_text(self) -> int:
        return self.config.vocab_size - 1

    @property
    def openings(self) -> list[str]:
        """Returns how the stories it learned from begin most often, the commonest first."""
        known = (self.record.get("data") or {}).get("openings") or [(OPENING, 1)]
        return [text for text, _ in known]

    def batch(self, rows: list[list[int]]) -> Tensor:
        """Returns rows of ids as int64, where the model is."""
        return torch.tensor(rows, device=self.model.wte.weight.device)

    def encode(self, prompt: str) -> list[int]:
        """Returns a prompt's ids; a story from nothing begins after an end-of-text."""
        return self.tokenizer.encode(prompt).ids or [self.end_of_text]

    def text(self, ids: list[int]) -> str:
        """Returns what `ids` spell, without end-of-text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def default_model() -> str | None:
    """Returns the model named in this Space's README.md."""
    models = (metadata_load(HERE / "README.md") or {}).get("models")
    return models[0] if models else None


def title(folder: Path) -> str:
    """Returns what its card calls the model in a folder, else the folder's own name."""
    try:
        return str(metadata_load(folder / CARD)["model-index"][0]["name"])
    except Exception:  # no card, or one that was edited by hand
        return folder.resolve().name


def language(folder: Path) -> str:
    """Returns the first language that its card names, else English."""
    try:
        named = metadata_load(folder / CARD)["language"]
        return named if isinstance(named, str) else str(named[0])
    except Exception:  # as in `title`
        return "en"


def load(name: str) -> Published:
    """Loads the model in a folder or of a Hub id. Its own model.py is what runs it.

    Ends the program with a sentence where there is no such model.
    """
    folder = Path(name)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*FILES, *DESCRIPTIONS]))
        except Exception as error:  # no such name, the Hub's answer, a proxy's, no network at all
            reason = " ".join(str(error).split())[:200]
            sys.exit(
                f"error: {name} is no folder here, and cannot be downloaded (a private model needs "
                f"HF_TOKEN): {reason}"
            )
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        sys.exit(f"error: {name} has no {', '.join(missing)}: publish it with upload_to_hf.py")
    sys.path.insert(0, str(folder.resolve()))
    from config import GPTConfig, TrainingConfig
    from model import GPT

    try:
        with torch.serialization.safe_globals([GPTConfig, TrainingConfig]):
            checkpoint = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        model = GPT(checkpoint["gpt_config"])
        model.load_state_dict(checkpoint["model_state_dict"])
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        described = folder / "config.json"
        description = json.loads(described.read_text("utf-8")) if described.is_file() else {}
    except Exception as error:  # a damaged file can fail in any layer below
        kind = type(error).__name__
        sys.exit(f"error: {name} is damaged ({kind}): get it again, or publish it again")
    tokenizer.encode_special_tokens = True  # a prompt that spells <|endoftext|> is only text
    on_gpu = torch.cuda.is_available() and not os.getenv("SPACES_ZERO_GPU")
    return Published(
        name=name if folder != Path(name) else title(folder),
        model=model.to("cuda" if on_gpu else "cpu").eval(),
        tokenizer=tokenizer,
        record=description.get("storygpt", {}).get("record", {}),
        language=language(folder),
    )


# --- Telling ---


class Wish(BaseModel):
    """What a visitor asks for. The page's settings are made of it; generate.py has the same."""

    prompt: str = Field(max_length=5_000)
    seed: int = Field(
        1337, ge=0, le=2**53 - 10, title="Seed", description="The same seed, the same story"
    )
    num_samples: int = Field(1, ge=1, le=4, title="Stories", description="Side by side, up to 4")
    max_new_tokens: int = Field(
        200, ge=1, le=MOST_NEW_TOKENS, title="Length", description="In tokens, at most 1,000"
    )
    temperature: float = Field(
        0.8, ge=0, le=2, title="Temperature", description="0: always the likeliest token"
    )
    top_k: int = Field(
        100, ge=0, le=100_000, title="Top-k", description="Among the k likeliest; 0: all"
    )
    top_p: float = Field(
        1, ge=0.01, le=1, title="Top-p", description="Among the likeliest up to this share"
    )


@dataclass
class Story:
    """A story as far as it has come, and how many of its ids and characters the page has."""

    ids: list[int]
    sent_ids: int
    sent_characters: int
    state: str = "telling"  # or "the end", "length reached"

    def news(self, published: Published) -> list:
        """Returns ids and text that the page does not have yet, and the state."""
        text = published.text(self.ids)
        if self.state == "telling":
            # half a character waits for the rest
            text = text[: self.sent_characters] + text[self.sent_characters :].rstrip("\ufffd")
        added = [self.ids[self.sent_ids :], text[self.sent_characters :], self.state]
        self.sent_ids, self.sent_characters = len(self.ids), len(text)
        return added


def generate(published: Published, wish: Wish, every: float = SHOWN_EVERY) -> Iterator[dict]:
    """Yields how the stories begin, then, every so many seconds, what has come to each.

    First {given: text, ids, unread: how many tokens of the prompt are too many for the context},
    then {told: [[ids, text, state] of each story]}. A seed's story is the one that `generate.py
    --seed` generates.
    """
    prompt = published.encode(wish.prompt)
    start = prompt[-published.config.context_length :]
    given = published.text(start)
    yield {"given": given, "ids": start, "unread": len(prompt) - len(start)}
    seeds = range(wish.seed, wish.seed + wish.num_samples)
    stories = [Story(list(start), len(start), len(given)) for _ in seeds]

    idx = published.batch([start] * len(seeds))
    columns = published.model.stream(
        idx,
        max_new_tokens=wish.max_new_tokens,
        temperature=wish.temperature,
        top_k=wish.top_k or None,
        top_p=wish.top_p,
        end_of_text=published.end_of_text,
        generator=[torch.Generator(idx.device).manual_seed(seed) for seed in seeds],
    )
    shown = time.monotonic()
    for column in columns:
        for story, token in zip(stories, column[:, 0].tolist(), strict=True):
            if story.state == "telling":
                story.ids.append(token)
                story.state = "the end" if token == published.end_of_text else "telling"
        if time.monotonic() - shown >= every:
            yield {"told": [story.news(published) for story in stories]}
            shown = time.monotonic()
    for story in stories:
        story.state = "length reached" if story.state == "telling" else story.state
    yield {"told": [story.news(published) for story in stories]}


# --- Looking inside ---


def windows(length: int, context_length: int) -> Iterator[tuple[int, int, int]]:
    """Yields how `GPT.stream` reads a story of `length` tokens: each window's (start, first, last).

    The tokens first to last - 1 are told by a model that has read those from `start` on. When the
    context is full, its last half is read again.
    """
    start, first = 0, 1
    while first < length:
        last = min(start + context_length + 1, length)
        yield start, first, last
        start, first = last - max(1, context_length // 2), last


def window_start(index: int, context_length: int) -> int:
    """Returns where the window begins in which token `index`, at least 1, was told."""
    return next(w[0] for w in windows(index + 1, context_length) if index < w[2])


def pieces(published: Published, ids: list[int]) -> list[str]:
    """Returns what each token spells: a character of several tokens is its last one's."""
    texts, begun = [], 0
    for i in range(len(ids)):
        text = published.text(ids[begun : i + 1])
        whole = not text.endswith("\ufffd") or i - begun == 3  # no character has more than 4 bytes
        texts.append(text if whole else "")
        begun = i + 1 if whole else begun
    return texts


@torch.no_grad()
def token_probabilities(published: Published, ids: list[int]) -> list[float | None]:
    """Returns the probability of each token in its place, None for the first."""
    found: list[float | None] = [None]
    for start, first, last in windows(len(ids), published.config.context_length):
        logits, _ = published.model(published.batch([ids[start : last - 1]]))
        told = published.batch([ids[first:last]])[0]
        logits = logits[0, first - start - 1 :].float()
        found += F.cross_entropy(logits, told, reduction="none").neg().exp().tolist()
    return found


@torch.no_grad()
def likeliest(published: Published, ids: list[int], index: int) -> dict[str, object]:
    """Finds the ten tokens that the model expected most in the place of ids[index], at least 1.

    Returns {likeliest: [[id, text, probability], ...], told: [rank from 1, probability], start:
    where what it had read begins}; the probabilities are before temperature and filters.
    """
    start = window_start(index, published.config.context_length)
    logits, _ = published.model(published.batch([ids[start:index]]))
    expected = logits[0, -1].float().softmax(-1)
    most = expected.topk(min(10, len(expected)))
    told = expected[ids[index]]
    return {
        "likeliest": [
            [token, published.text([token]), p]
            for token, p in zip(most.indices.tolist(), most.values.tolist(), strict=True)
        ],
        "told": [int((expected > told).sum()) + 1, told.item()],
        "start": start,
    }


@torch.no_grad()
def attention(published: Published, ids: list[int], layer: int) -> bytes:
    """Returns how much each of T ids takes from each in one layer's heads, in 65,535ths.

    They are n_head x T x T little-endian uint16.
    """
    weights = published.model.attention_weights(published.batch([ids]), layer)[0]
    return (weights.float() * 65_535).round().cpu().numpy().astype("<u2").tobytes()


# --- The page ---


def link(place: str, text: str) -> str:
    return f'<a href="https://huggingface.co/{escape(place)}">{escape(text)}</a>'


def about(published: Published) -> str:
    """Says in a sentence of HTML what the model is and who trained it on what, as far as known."""
    owner, _, title = published.name.rpartition("/")
    name = link(published.name, title) if owner else escape(title)
    data = published.record.get("data") or {}
    sentence = f"{name} is a small language model that makes up stories, word by word"
    train = data.get("splits", {}).get("train", {})
    if not train:
        return f"{sentence}; {link(owner, owner)} published it." if owner else f"{sentence}."
    stories, source = f"{train['stories']:,} stories", data.get("name")
    if source and data.get("commit"):  # of the Hub: a name of somebody's folder is no link
        stories += f" of {link(f'datasets/{source}', source)}"
    who = f"{link(owner, owner)} trained it" if owner else "it was trained"
    return f"{sentence}: {who} on {stories}, to guess each next word from those before."


def setting(name: str, schema: dict) -> str:
    """Makes a field of the page's settings of what pydantic says of it, as HTML."""
    whole = schema["type"] == "integer"
    kind, step = ("number", 1) if whole else ("range", 0.01)
    output = "" if whole else f'<output for="{name}">{schema["default"]}</output>'
    return (
        f'<p><label for="{name}">{schema["title"]}</label>{output}'
        f'<input id="{name}" name="{name}" type="{kind}" step="{step}" min="{schema["minimum"]}" '
        f'max="{schema["maximum"]}" value="{schema["default"]}" required '
        f'aria-describedby="{name}-hint">'
        f'<small id="{name}-hint">{schema["description"]}</small></p>'
    )


def render(published: Published) -> str:
    """Makes the page, with the story that greets whoever comes: told once, then replayed."""
    config, opening = published.config, published.openings[0]
    wish = Wish(prompt=opening)
    story = list(generate(published, wish, every=0))
    text = story[0]["given"] + "".join(event["told"][0][1] for event in story[1:])
    fields = Wish.model_json_schema()["properties"]
    known = {
        "first": {"wish": wish.model_dump(), "events": story},
        "end": published.end_of_text,
        "language": published.language,
        "layers": config.n_layer,
        "heads": config.n_head,
    }
    language = escape(published.language)
    chip = f'<button type="button" lang="{language}">{{}}</button>'
    return Template((HERE / "page.html").read_text("utf-8")).substitute(
        title=escape(published.name.rpartition("/")[2]),
        about=about(published),
        size=f"{published.model.num_parameters():,} parameters in {config.n_layer} layers of "
        f"{config.n_head} heads. It sees the last {config.context_length:,} tokens.",
        heads=config.n_head,
        language=language,
        opening=escape(opening),
        chips="".join(chip.format(escape(text)) for text in published.openings),
        most_characters=fields["prompt"]["maxLength"],
        settings="".join(setting(*field) for field in fields.items() if field[0] != "prompt"),
        story=escape(text),
        known=json.dumps(known).replace("<", "\\u003c"),
        style=(HERE / "page.css").read_text("utf-8"),
        script=(HERE / "page.js").read_text("utf-8"),
    )


class Look(BaseModel):
    """What a visitor looks into: the ids of a story, and, of one, its place and a layer from 0."""

    ids: list[int] = Field(min_length=1)
    index: int = Field(0, ge=0)
    layer: int = Field(0, ge=0)


class Door:
    """Lets in what the page asks for, and none of Gradio's own addresses, such as for uploads."""

    OPEN = ("/", "/stories", "/tokens", "/likeliest", "/attention", "/gradio_api/startup-events")

    def __init__(self, app: Callable):
        self.app, self.visitors = app, 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, refusal = dict(scope["headers"]), None
        if scope["path"] not in self.OPEN:
            refusal = JSONResponse({"detail": "There is nothing here."}, 404)
        elif b"transfer-encoding" in headers or int(headers.get(b"content-length", 0)) > MOST_BYTES:
            refusal = JSONResponse({"detail": "That is too long."}, 413)
        elif self.visitors >= MOST_VISITORS:
            busy = "Too many visitors are waiting: come back in some minutes."
            refusal = JSONResponse({"detail": busy}, 503)

        async def send_on(message: dict) -> None:
            await send(message)
            patience.reschedule(asyncio.get_running_loop().time() + PATIENCE)

        self.visitors += 1
        try:
            async with asyncio.timeout(PATIENCE) as patience:
                await (refusal or self.app)(scope, receive, send_on)
        except TimeoutError:  # whoever neither sends nor reads would keep a place for ever
            pass
        finally:
            self.visitors -= 1


def build_server(published: Published) -> gr.Server:
    """Serves the page and what it asks for; keeps nothing of a visitor but a place in the queue."""
    from config import InputError

    server, html, config = gr.Server(), render(published), published.config
    queue: list[object] = []  # in the order they came; the first AT_ONCE are being told to
    looks = asyncio.Semaphore(2)  # each takes the memory of a story's logits

    @server.exception_handler(RequestValidationError)
    async def refuse(_, error: RequestValidationError):
        # FastAPI's own answer repeats what was sent, and JSON has no NaN and no half a character
        mistake = error.errors()[0]
        return JSONResponse({"detail": f"{mistake['loc'][-1]}: {mistake['msg']}."}, 422)

    @server.api_route("/", methods=["GET", "HEAD"])
    def page():
        return HTMLResponse(html, headers={"cache-control": "no-cache"})

    @server.post("/stories")
    async def stories(wish: Wish):
        async def events():
            me = object()
            queue.append(me)
            try:
                while (place := queue.index(me) - AT_ONCE + 1) > 0:
                    yield line({"place": place})
                    await asyncio.sleep(0.5)
                async for event in iterate_in_threadpool(generate(published, wish)):
                    yield line(event)
            except InputError as error:
                yield line({"error": f"{error}."})
            finally:
                queue.remove(me)

        # or a proxy would keep the story until it is whole
        headers = {"x-accel-buffering": "no", "cache-control": "no-cache, no-transform"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    async def look(function: Callable, ids: list[int], *arguments):
        most = config.context_length + MOST_NEW_TOKENS
        if len(ids) > most or not all(0 <= i < config.vocab_size for i in ids):
            raise HTTPException(422, "That is no story of this model.")
        async with looks:
            return await run_in_threadpool(function, published, ids, *arguments)

    @server.post("/tokens")
    async def tokens(asked: Look):
        probabilities = await look(token_probabilities, asked.ids)
        return {"texts": pieces(published, asked.ids), "probabilities": probabilities}

    @server.post("/likeliest")
    async def likeliest_tokens(asked: Look):
        if not 0 < asked.index < len(asked.ids):
            raise HTTPException(422, "Nothing came before that token.")
        return await look(likeliest, asked.ids, asked.index)

    @server.post("/attention")
    async def attention_of_a_layer(asked: Look):
        if len(asked.ids) > config.context_length or asked.layer >= config.n_layer:
            raise HTTPException(422, "There is no such layer, or it never saw so many tokens.")
        if not hasattr(published.model, "attention_weights"):
            raise HTTPException(404, "This model's own code is older: to see it, publish it again.")
        return Response(await look(attention, asked.ids, asked.layer))

    server.add_middleware(GZipMiddleware, compresslevel=3)
    server.add_middleware(Door)
    return server


def line(event: dict) -> str:
    return f"data: {json.dumps(event)}\n\n"


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
    published = load(arguments.model)
    from config import InputError

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["no_proxy"] = "*"  # Gradio asks its own page whether it is there
    host = arguments.host
    if host and ":" in host:
        host = f"[{host.strip('[]')}]"  # IPv6, as in an address
    try:
        server = build_server(published)
        server.launch(
            server_name=host,
            server_port=arguments.port,
            inbrowser=arguments.open,
            ssr_mode=False,
            share=False,  # or it is published to the internet from Kaggle and SageMaker
        )
    except InputError as error:  # of the first story
        sys.exit(f"error: {arguments.model} is broken: {error}")
    except (OSError, OverflowError):  # no such port, or somebody else's
        sys.exit("error: the page cannot be served there: pass another --port or --host")


if __name__ == "__main__":
    main()
