"""The page of space/: published, started and used as on the Hub, in a real browser."""

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from html import unescape
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import Hub, Repo
from tokenizers import Tokenizer

from config import GenerationSettings
from model import GPT
from storygpt.checkpoint import load_model
from storygpt.formats import tokenizer_files
from storygpt.generation import generate_ids, generate_stories
from storygpt.tokenizer import load_tokenizer

pytest.importorskip("gradio", "6.12")
FILES = {"app.py", "page.html", "page.css", "page.js", "requirements.txt", "README.md"}
OPENING = "This is the story"  # as its record says of the model on the loopback Hub
OPENINGS = [["Once upon a time", 0.6], ["One day, a", 0.2]]
RECORD = {
    "data": {
        "name": "you/tales",
        "commit": "0" * 40,
        "splits": {"train": {"stories": 1234}},
        "openings": OPENINGS,
    }
}


@pytest.fixture(scope="module")
def space(script, run_dir, data_dir, tmp_path_factory):
    """A tiny model and its Space on a loopback Hub, and what the Hub has of it, started."""
    folder, home = tmp_path_factory.mktemp("space"), tmp_path_factory.mktemp("home")
    flags = ["--repo_id", "you/StoryGPT", "--checkpoint", run_dir / "StoryGPT_best.pt", "--space"]
    flags += ["--data_dir", data_dir, "--gguf", "none"]
    with Hub() as hub:
        environment = hub.environment(home)
        result = script("upload_to_hf.py", *flags, **environment)
        assert result.code == 0, result.output
        for name, data in hub.repos["spaces/you/StoryGPT-space"].commits[-1].items():
            (folder / name).write_bytes(data)
        page = Page(folder, environment)
        page.start()
        try:
            page.hub, page.flags, page.environment = hub, flags, environment
            page.model = load_model(run_dir / "StoryGPT_best.pt")[0]
            yield page
        finally:
            page.process.kill()
            page.process.wait()


@pytest.fixture(autouse=True)
def served(request):
    """Has the page answer, whatever a test before has made of the server."""
    if "space" in request.fixturenames:
        space = request.getfixturevalue("space")
        if space.process.poll() is not None:
            space.start()


class Page:
    """`python app.py` in a Space's folder."""

    def __init__(self, folder: Path, environment: dict, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url, self.host = folder, f"http://127.0.0.1:{self.port}", "127.0.0.1"
        self.command = [sys.executable, "app.py", "--port", str(self.port), *map(str, flags)]
        self.started = {**os.environ, **environment}
        self.started.pop("PYTHONPATH", None)

    def start(self) -> None:
        log = self.folder / "log.txt"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.started, stdout=output, stderr=output
            )
        until(lambda: self.process.poll() is not None or self.answers(), 120)
        assert self.answers(), log.read_text()

    def answers(self) -> bool:
        with suppress(OSError):
            return self.request("GET", "/")[0] == 200
        return False

    def request(self, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
        """A status and a body; `body` is sent as JSON."""
        connection = HTTPConnection(self.host, self.port, timeout=120)
        headers = {"content-type": "application/json", **headers}
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()

    def stories(self, prompt: str, **wish) -> list[str]:
        """What the page is told, put together."""
        status, body = self.request("POST", "/stories", {"prompt": prompt, **SHORT, **wish})
        assert status == 200, body
        events = [json.loads(event[6:]) for event in body.decode().split("\n\n") if event]
        return put_together(event for event in events if "place" not in event)


SHORT = {"max_new_tokens": 60}


def generated(model: GPT, prompt: str, seeds=(1337,), **settings) -> list[str]:
    """The stories that `generate.py` generates."""
    settings = GenerationSettings(**settings)
    return generate_stories(model, prompt, list(seeds), settings)


def put_together(events) -> list[str]:
    """The events of stories as their texts."""
    first, *others = events
    texts = None
    for event in others:
        texts = texts or [first["given"]] * len(event["told"])
        texts = [text + told[1] for text, told in zip(texts, event["told"], strict=True)]
    return texts


@pytest.fixture(scope="module")
def app():
    """app.py as a module: what it computes, without the page."""
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_app"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def published(app, run_dir):
    tokenizer = Tokenizer.from_str(tokenizer_files(512, 64)["tokenizer.json"])
    model = load_model(run_dir / "StoryGPT_best.pt")[0]
    return app.Published("you/Tiny", model, tokenizer, RECORD)


@pytest.fixture
def client(app, published):
    from starlette.testclient import TestClient

    return TestClient(app.build_server(published))


def until(true, seconds: float = 60):
    """What `true` returns once it is true; stale and missing elements count as false."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := true():
                return found
        except WebDriverException:
            pass
        time.sleep(0.02)
    raise AssertionError("waited in vain")


@contextmanager
def slowed(process: subprocess.Popen):
    """The process gets a tenth of the time, for what takes a tiny model no time to watch."""
    done = threading.Event()

    def take_turns() -> None:
        while not done.wait(0.005):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.045)
            process.send_signal(signal.SIGCONT)

    turns = threading.Thread(target=take_turns)
    turns.start()
    try:
        yield
    finally:
        done.set()
        turns.join()


# --- As a Space ---


def test_the_space_is_one_commit_with_the_models_id_and_the_same_again_is_none(space, script):
    repo = space.hub.repos["spaces/you/StoryGPT-space"]
    files = {name for name in repo.commits[-1] if name != ".gitattributes"}
    assert len(repo.commits) == 2 and files == FILES
    from huggingface_hub import RepoCard

    card = RepoCard(repo.commits[-1]["README.md"].decode()).data.to_dict()
    assert card["models"] == ["you/StoryGPT"] and card["sdk"] == "gradio"
    again = script("upload_to_hf.py", *space.flags, **space.environment)
    assert again.output.count("nothing changed: ") == 2 and len(repo.commits) == 2, again.output


def test_a_dry_run_builds_both_folders_and_overwrites_neither(space, script, fails, tmp_path):
    flags = (*space.flags, "--dry_run", "--output_dir", tmp_path / "out")
    result = script("upload_to_hf.py", *flags)
    assert result.code == 0 and result.output.count("built in ") == 2, result.output
    assert {path.name for path in (tmp_path / "out-space").iterdir()} == FILES
    for name in FILES - {"README.md"}:
        assert (tmp_path / "out-space" / name).read_bytes() == (ROOT / "space" / name).read_bytes()
    shutil.rmtree(tmp_path / "out")
    fails("upload_to_hf.py", *flags, says="out-space is not empty")
    assert not (tmp_path / "out").exists()


def test_a_space_that_the_hub_refuses_is_a_sentence_and_nothing_is_sent(space, fails, tmp_path):
    """Without the hardware that we ask for, the stand-in refuses every Space, as the Hub does."""
    with Hub() as hub:
        for name in ("one", "two"):
            hub.repos[f"spaces/you/{name}"] = Repo(private=False)
        says = fails(
            "upload_to_hf.py",
            *space.flags,
            says="(HTTP 402): you host two Spaces on ZeroGPU already. A personal account",
            **hub.environment(tmp_path),
        )
        assert "leave out --space" in says
        assert len(hub.repos["models/you/StoryGPT"].commits) == 1  # as the Hub made it


def test_what_is_no_model_is_a_sentence(app, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model.py").touch()
    for flags, says in (
        ([], "README.md names no model"),
        (["--model", tmp_path], "has no config.py, checkpoints"),
        (["--model", tmp_path / "model.py"], "model.py has no model.py, config.py, checkpoints"),
        (["--model", "no such thing"], "is no folder here"),
    ):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert says in f"{ended.value.code} {capsys.readouterr().err}" and ended.value.code != 0


@pytest.fixture
def folder(run_dir, tmp_path, monkeypatch):
    """A published folder with no more than the page needs."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("model.py", "config.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    shutil.copy(run_dir / "StoryGPT_best.pt", tmp_path / "checkpoints")
    (tmp_path / "tokenizer.json").write_text(tokenizer_files(512, 64)["tokenizer.json"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # where app.py puts the model's own code
    return tmp_path


def test_a_port_in_use_and_a_damaged_model_are_sentences(app, space, folder, monkeypatch):
    weights = folder / "checkpoints" / "StoryGPT_best.pt"
    flags = ["app.py", "--model", str(folder), "--port", str(space.port)]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="pass another --port"):
        app.main()
    (folder / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="is damaged"):
        app.main()
    (folder / "config.json").unlink()
    for data in (b"", weights.read_bytes()[:5000]):
        weights.write_bytes(data)
        with pytest.raises(SystemExit, match="is damaged"):
            app.main()


def test_a_private_model_without_a_token_and_a_proxy_that_refuses_are_sentences(tmp_path):
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(403)

    with Hub() as hub, HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        hub.add("models/you/mine", {"config.json": b"{}"}, private=True)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.server_port}"
        real = {"HF_ENDPOINT": "https://huggingface.co", "https_proxy": address}
        for environment in ({"HF_TOKEN": ""}, real):
            flags = [sys.executable, ROOT / "space" / "app.py", "--model", "you/mine"]
            environment = {**os.environ, **hub.environment(tmp_path), **environment}
            result = subprocess.run(flags, env=environment, capture_output=True, text=True)
            says = "error: you/mine is no folder here, and cannot be downloaded (a private model"
            assert says in result.stderr and "Traceback" not in result.stderr, result.stderr
            assert result.returncode == 1
        proxy.shutdown()


def test_it_is_served_where_it_was_told_to_whatever_the_environment_says(folder, tmp_path_factory):
    """Behind proxies that are not there; on Kaggle, where Gradio would publish it; on IPv6."""
    place = tmp_path_factory.mktemp("served")
    shutil.copytree(ROOT / "space", place, dirs_exist_ok=True)
    nobody = "http://127.0.0.1:9"
    proxies = {"http_proxy": nobody, "HTTP_PROXY": nobody, "ALL_PROXY": nobody}
    host = "::1"
    try:
        socket.create_server((host, 0), family=socket.AF_INET6).close()
    except OSError:
        host = "127.0.0.1"  # a machine without IPv6
    environment = {**proxies, "KAGGLE_KERNEL_RUN_TYPE": "Interactive", "GRADIO_SHARE": "True"}
    environment["PYTHONUNBUFFERED"] = "1"
    page = Page(place, environment, "--model", folder, "--host", host)
    page.host = host
    page.start()
    try:
        assert page.stories("Once")
        until(lambda: "To create a public link" in (place / "log.txt").read_text(), 20)
        assert "share link" not in (place / "log.txt").read_text()
    finally:
        page.process.kill()
        page.process.wait()


def test_it_answers_on_this_machine_alone(space):
    with pytest.raises(OSError):  # loopback too, but not where it listens
        socket.create_connection(("127.0.0.2", space.port), timeout=5)


def test_it_starts_on_zerogpu(folder, tmp_path_factory):
    """With ZeroGPU's own package, and what it reports to stood in for."""
    pytest.importorskip("spaces")
    if not torch.version.cuda:
        pytest.skip("ZeroGPU's package needs a torch that is built for CUDA")
    asked = []

    class Devices(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Devices) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        zero = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": address}
        place = tmp_path_factory.mktemp("zero")
        shutil.copytree(ROOT / "space", place, dirs_exist_ok=True)
        page = Page(place, zero, "--model", folder)
        page.start()
        try:
            assert asked == ["/startup-report"]  # or ZeroGPU would end the Space
            assert page.stories("Once")
        finally:
            page.process.kill()
            page.process.wait()
            server.shutdown()


# --- What the page says of the model ---


def test_a_folder_is_called_what_its_card_calls_it(app, folder):
    assert app.load(str(folder)).name == folder.name
    card = "---\nmodel-index:\n- name: Fables\n  results: []\n---\n"
    (folder / "README.md").write_text(card)
    shown = app.load(str(folder))
    assert shown.name == "Fables" and not shown.model.training and shown.record == {}
    (folder / "config.json").write_text(json.dumps({"storygpt": {"record": RECORD}}))
    assert app.load(str(folder)).record == RECORD
    for edited in ("---\na: b: c\n---\n", "---\nmodel-index: Fables\n---\n", "Only words."):
        (folder / "README.md").write_text(edited)
        assert app.title(folder) == folder.name


def test_a_story_is_read_aloud_in_the_language_that_the_card_names(app, folder):
    for named, expected in (("de", "de"), ("[zh, en]", "zh"), ("[]", "en"), ('"<b>"', "&lt;b&gt;")):
        (folder / "README.md").write_text(f"---\nlanguage: {named}\n---\n")
        html = app.render(app.load(str(folder)))
        assert f'<article><p dir="auto" lang="{expected}"' in html, named
    assert '<html lang="en">' in html  # the page itself


def test_one_sentence_says_what_it_is_as_far_as_it_is_known(app, published):
    def about(name: str, data: dict) -> tuple[str, list[str]]:
        html = app.about(app.Published(name, published.model, None, {"data": data}))
        return re.sub("<[^>]*>", "", html), re.findall('href="([^"]*)"', html)

    hub = "https://huggingface.co"
    text, links = about("you/Tiny", RECORD["data"])
    assert "Tiny is a small language model" in text and text.count(".") == 1
    assert "you trained it on 1,234 stories of you/tales" in text
    assert links == [f"{hub}/you/Tiny", f"{hub}/you", f"{hub}/datasets/you/tales"]
    text, links = about("Tiny", {"name": "my tales", "splits": {"train": {"stories": 2}}})
    assert "trained on 2 stories, to" in text and not links  # a folder's name is nobody's affair
    text, links = about("you/Tiny", {})
    assert text.endswith("; you published it.") and len(links) == 2
    assert (
        about("<b>", {})[0]
        == "&lt;b&gt; is a small language model that makes up stories, word by word."
    )


def test_the_openings_are_the_models_own_or_the_commonest_of_all(app, published, client):
    html = client.get("/").text
    for opening, _ in OPENINGS:
        assert f'<button type="button" lang="en">{opening}</button>' in html
    unknown = app.Published("Tiny", published.model, published.tokenizer, {})
    assert unknown.openings == ["Once upon a time"]
    evil = app.Published(
        "</title><b>",
        published.model,
        published.tokenizer,
        {"data": {"openings": [["<script>alert(1)</script>", 1]]}},
    )
    html = app.render(evil)
    assert "<script>alert" not in html and "</title><b>" not in html


# --- What it tells ---


def test_eight_visitors_at_once_get_the_stories_that_generate_tells(space, script, run_dir):
    seeds, prompt = range(5, 13), "One day, a"
    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(lambda seed: space.stories(prompt, seed=seed), seeds))
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--prompt", prompt, "--seed", 5)
    for count, first in ((8, 5), (1, 9)):
        result = script(
            "generate.py", *flags[:-1], first, "--num_samples", count, "--max_new_tokens", 60
        )
        text = re.sub(r"\n\d+ tokens in .*\n", "", result.output)
        expected = [story.strip("\n") for story in text.split("\n" + "-" * 40 + "\n")]
        assert [t[0].strip("\n") for t in told[first - 5 : first - 5 + count]] == expected
    together = space.stories(prompt, seed=5, num_samples=4)
    assert [[story] for story in together] == told[:4]


def test_odd_input_is_answered_and_the_server_lives(space):
    for prompt in (
        "",
        " ",
        "<b>bold</b> & ${1+1} `x` {{value}}",
        "👩‍👩‍👧‍👦 日本\u2028\0",
        "<|endoftext|>",
    ):
        assert space.stories(prompt) == generated(space.model, prompt, **SHORT), prompt
    for wish, says in (
        ({"seed": "abc"}, b"valid integer"),
        ({"seed": -1}, b"greater than or equal to 0"),
        ({"seed": int("9" * 30)}, b"less than or equal to"),
        ({"num_samples": 99}, b"less than or equal to 4"),
        ({"temperature": -1}, b"greater than or equal to 0"),
        ({"prompt": "x" * 5001}, b"at most 5000 characters"),
        ({"prompt": "x" * 70_000}, b"too long"),
    ):
        status, body = space.request("POST", "/stories", {"prompt": "Once", **SHORT, **wish})
        assert status in (413, 422) and says in body, (wish, body)
    assert space.stories("Once")


ODD = [
    ("/stories", f'{{"prompt": "Once", "{name}": {value}}}', "application/json")
    for name in ("seed", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p")
    for value in ("NaN", "Infinity", "-1e999", "9" * 400, "9" * 5000, '"\\ud800"', "null", "[]")
]
ODD += [
    ("/stories", f'{{"prompt": {value}}}', "application/json")
    for value in ('"\\ud800"', "NaN", "null", "[" * 900 + "]" * 900, "[" * 20_000)
]
ODD += [
    (path, f'{{"ids": {value}}}', "application/json")
    for path in ("/tokens", "/likeliest", "/attention")
    for value in ("[NaN]", "[1e999]", '["\\ud800"]', f"[{'9' * 400}]", '[1], "index": NaN', "1")
]
ODD += [
    ("/stories", body, kind)
    for body in (b"", b"{", b"null", b"NaN", b"\xff", b'{"prompt": "\xed\xa0\x80"}')
    for kind in ("application/json", "text/plain", "multipart/form-data; boundary=x", ";", "")
]


def test_whatever_a_request_holds_it_is_refused_in_a_sentence(client):
    for path, body, kind in ODD:
        headers = {"content-type": kind} if kind else {}
        answer = client.post(path, content=body, headers=headers)  # raises what would be a 500
        assert answer.status_code in (400, 422), (path, body)
        detail = answer.json()["detail"]
        assert isinstance(detail, str) and len(detail) < 200, (path, body, detail)


def test_gradios_own_addresses_are_closed(space):
    for path in ("/config", "/docs", "/openapi.json", "/gradio_api/info", "/gradio_api/upload"):
        for method in ("GET", "POST"):
            assert space.request(method, path)[0] == 404, path


def test_whoever_leaves_makes_room_and_too_many_are_told_so(app, space, client, monkeypatch):
    def come(count: int) -> list[HTTPConnection]:
        body = json.dumps({"prompt": "Once", "num_samples": 4, "max_new_tokens": 1000})
        connections = [HTTPConnection("127.0.0.1", space.port, timeout=60) for _ in range(count)]
        for connection in connections:
            connection.request("POST", "/stories", body, {"content-type": "application/json"})
        return connections

    def first_event(connection: HTTPConnection) -> dict:
        return json.loads(connection.getresponse().readline()[6:])

    with slowed(space.process):
        served = come(app.AT_ONCE)
        assert all("given" in first_event(visitor) for visitor in served)
        waiting = come(2)
        assert sorted(first_event(visitor)["place"] for visitor in waiting) == [1, 2]
    for visitor in (*served, *waiting):
        visitor.sock.close()
    assert space.stories("Once")
    monkeypatch.setattr(app, "MOST_VISITORS", 0)
    response = client.post("/stories", json={"prompt": "Once"})
    assert response.status_code == 503 and "Too many visitors" in response.json()["detail"]


def test_a_proxy_is_told_to_keep_no_story_back(client):
    answer = client.post("/stories", json={"prompt": "Once", **SHORT})
    assert answer.headers["x-accel-buffering"] == "no"
    assert "no-transform" in answer.headers["cache-control"]
    assert "content-encoding" not in answer.headers


def test_whoever_neither_sends_nor_reads_keeps_no_place(app, monkeypatch):
    """But a story may take as long as it does, while its pieces are read."""
    monkeypatch.setattr(app, "PATIENCE", 0.2)
    scope = {"type": "http", "path": "/stories", "headers": []}

    async def never(*_) -> None:
        await asyncio.Event().wait()

    async def read(message: dict) -> None:
        taken.append(message)

    async def asks_for_a_body(_, receive, send) -> None:
        await receive()

    async def tells(_, receive, send) -> None:
        for piece in range(6):
            await asyncio.sleep(0.05)
            await send({"piece": piece})

    for serve, send, pieces in (
        (asks_for_a_body, read, 0),
        (tells, never, 0),
        (tells, read, 6),
    ):
        door, taken = app.Door(serve), []
        asyncio.run(asyncio.wait_for(door(scope, never, send), 10))
        assert len(taken) == pieces and door.visitors == 0


def test_every_setting_is_that_of_generate(app, published):
    model = published.model

    def texts(**settings) -> list[str]:
        wish = app.Wish(prompt="One day", seed=7, num_samples=3, **settings)
        return put_together(app.generate(published, wish, every=0))

    settings = {"max_new_tokens": 25, "temperature": 1.3, "top_k": 9, "top_p": 0.7}
    expected = generated(model, "One day", (7, 8, 9), **settings)
    assert texts(**settings) == expected
    for name, other in zip(settings, (24, 0.8, 2, 0.1), strict=True):
        changed = settings | {name: other}
        others = generated(model, "One day", (7, 8, 9), **changed)
        assert others != expected and texts(**changed) == others
    expected = generated(model, "One day", (7, 8, 9), **settings | {"top_k": None, "top_p": None})
    assert texts(**settings | {"top_k": 0, "top_p": 1}) == expected


def test_a_story_has_one_end_and_says_how_it_ended(app, published):
    wish = app.Wish(prompt="One day", num_samples=4, max_new_tokens=400, temperature=1.3, top_k=0)
    for every in (0, 0.01, 1000):
        first, *events = app.generate(published, wish, every=every)
        ids = [list(first["ids"]) for _ in range(4)]
        for event in events:
            for story, told in zip(ids, event["told"], strict=True):
                story += told[0]
        states = [told[2] for told in events[-1]["told"]]
        assert len({len(story) for story in ids}) > 1 and "telling" not in states
        for story, state in zip(ids, states, strict=True):
            assert story.count(published.end_of_text) == (state == "the end")
    for length in (64, 65):
        first, *_ = app.generate(published, app.Wish(prompt=" a" * length))
        assert (first["unread"], len(first["ids"])) == (length - 64, 64)


def test_broken_weights_are_a_sentence(published, client):
    with torch.no_grad():
        published.model.wte.weight.fill_(torch.nan)
    assert "logits are not finite" in client.post("/stories", json={"prompt": "Once"}).text


# --- What it shows inside ---


def test_what_is_shown_is_what_the_model_computed_while_telling(app, published):
    """Also where the context was full and its last half was read again."""
    model, given = published.model, [5, 6, 7]
    seen = []
    head = model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out[0]))
    drawn = torch.Generator().manual_seed(1)
    told = [int(token) for token in model.stream(torch.tensor([given]), 150, generator=drawn)]
    head.remove()
    ids, expected = given + told, torch.stack(seen).softmax(-1)
    probabilities = app.token_probabilities(published, ids)
    assert probabilities[0] is None and len(probabilities) == 153
    torch.testing.assert_close(
        torch.tensor(probabilities[3:]), expected.gather(1, torch.tensor(told)[:, None])[:, 0]
    )
    for index in (3, 4, 64, 65, 66, 100, 152):
        p = expected[index - 3]
        shown = app.likeliest(published, ids, index)
        most = p.topk(10)
        assert [token for token, *_ in shown["likeliest"]] == most.indices.tolist()
        found = torch.tensor([p for *_, p in shown["likeliest"]])
        torch.testing.assert_close(found, most.values)
        rank, own = shown["told"]
        assert rank == int((p > p[ids[index]]).sum()) + 1
        assert own == pytest.approx(p[ids[index]].item(), rel=1e-4)
        assert len(ids[shown["start"] : index]) <= 64


def test_the_pictures_are_the_weights_of_the_models_own_attention(client, published):
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    for layer in range(2):
        body = client.post("/attention", json={"ids": ids, "layer": layer}).content
        weights = np.frombuffer(body, "<u2").reshape(2, 8, 8) / 65535
        expected = published.model.attention_weights(torch.tensor([ids]), layer)[0]
        assert np.abs(weights - expected.detach().numpy()).max() < 1e-5


def test_characters_of_several_tokens_are_shown_whole(app, published):
    text = "The 日本 dog 👩‍👩‍👧‍👦 يوم"
    ids = published.encode(text)
    pieces = app.pieces(published, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text and "" in pieces
    broken = published.encode("日")[:1]
    assert app.pieces(published, [*broken, *published.encode(" dog")])[-1].endswith("g")


def test_nonsense_is_refused_and_an_older_model_shown_without_its_heads(client, monkeypatch):
    for path, body in (
        ("/tokens", {"ids": [512]}),
        ("/tokens", {"ids": [-1]}),
        ("/tokens", {"ids": []}),
        ("/tokens", {"ids": [1] * (64 + 1001)}),
        ("/likeliest", {"ids": [1, 2], "index": 2}),
        ("/likeliest", {"ids": [1, 2], "index": 0}),
        ("/attention", {"ids": [1] * 65}),
        ("/attention", {"ids": [1], "layer": 2}),
    ):
        assert client.post(path, json=body).status_code == 422, (path, body)
    monkeypatch.delattr(GPT, "attention_weights")
    answer = client.post("/attention", json={"ids": [1]})
    assert answer.status_code == 404 and "publish it again" in answer.json()["detail"]
    assert client.post("/tokens", json={"ids": [1, 2]}).status_code == 200


# --- In the browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, as Debian packages it, without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        f"disable-component-update disable-sync user-data-dir={tmp_path_factory.mktemp('chromium')}"
    ).split():
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.set_script_timeout(60)
        yield chrome


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's script, which finds what keeps people out of a page."""
    path = os.environ.get("AXE_CORE", "")
    if not path:
        pytest.skip("AXE_CORE names no axe.min.js: npm install axe-core")
    return Path(path).read_text(encoding="utf-8")


TELL = "#tell, #another, #openings button"


class Visitor:
    """Someone at the page, by CSS selectors, in a tab of their own."""

    def __init__(
        self, browser, url: str, width: int = 1280, dark: bool = False, still: bool = True
    ):
        self.browser = browser
        browser.switch_to.new_window("tab")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wishes = {"prefers-color-scheme": "dark" if dark else "light"}
        wishes["prefers-reduced-motion"] = "reduce" if still else "no-preference"
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(url)
        until(lambda: self.all("article footer"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return "".join(e.get_property("textContent") for e in self.all(selector))

    def click(self, selector: str) -> None:
        if selector in TELL:
            self.mark_what_is_there()
        until(lambda: self.all(selector)[0].click() or True if self.all(selector) else False)

    def set(self, **settings) -> None:
        """Fills in fields by their names, as fingers do; a slider, as a hand does."""
        if not self.run("document.querySelector('details').open"):
            self.click("summary")
        for name, value in settings.items():
            field = self.all(f"[name={name}]")[0]
            if field.get_attribute("type") == "range":
                self.run(f"(document.querySelector('[name={name}]').value = {value})")
            else:
                field.send_keys("\ue009a\ue000\ue003", str(value))  # Ctrl-A, Backspace

    def mark_what_is_there(self) -> None:
        """Marks the stories that are not meant by those asked for next."""
        self.run("document.querySelectorAll('article').forEach((a) => (a.title = 'of before'))")

    def told(self, *seeds: int) -> list[str]:
        """The stories of those seeds, once those asked for last have come to their end."""
        wanted = [f"Seed {seed} ·" for seed in seeds]

        def done() -> bool:
            counts = [footer.text for footer in self.all("article footer")]
            whole = [c.startswith(w) for c, w in zip(counts, wanted, strict=False)]
            of_before = self.all("article.telling, article[title]")
            return len(counts) == len(seeds) and all(whole) and not of_before

        until(done)
        return [e.get_property("textContent") for e in self.all("article p")]

    def tell(self, seed: int = 1337) -> str:
        """Clicks Tell and waits for the end of that seed's story."""
        self.click("#tell")
        return self.told(seed)[0]

    def look_inside(self, number: int = 1) -> None:
        self.click(f"article:nth-child({number}) footer button:last-child")
        until(lambda: self.all("#heads figure"))

    def run(self, script: str):
        return self.browser.execute_script(f"return {script}")

    def press(self, keys: str) -> None:
        tells = self.run(f"document.activeElement.matches('{TELL}, #prompt')")
        if tells and keys in ("\ue007", " "):
            self.mark_what_is_there()
        self.browser.switch_to.active_element.send_keys(keys)

    def tab_to(self, selector: str) -> None:
        """Presses Tab until the focus is there."""
        for _ in range(40):
            if self.run(f"document.activeElement.matches('{selector}')"):
                return
            self.press("\ue004")
        raise AssertionError(f"the keyboard does not reach {selector}")

    def hold_pauses(self) -> None:
        """Has the page's pauses of a second and more last until `end_pauses`."""
        held = "(f, ms) => (ms < 1000 ? start(f, ms) : void pauses.push(f))"
        self.run(f"(window.pauses = [], window.start = setTimeout, window.setTimeout = {held})")

    def end_pauses(self) -> None:
        self.run("pauses.splice(0).forEach((go) => go())")

    def let_seconds_pass(self, seconds: int) -> None:
        """By the page's clock."""
        later = f"((now) => () => now() + {1000 * seconds})(performance.now.bind(performance))"
        self.run(f"(performance.now = {later})")

    def shows_the_chosen(self) -> bool:
        """Whether what is said of a token is said of the one that is chosen."""
        chosen = self.text("#tokens [aria-selected=true]")
        return self.text("#place code").replace("␣", " ") == chosen

    def fits(self) -> bool:
        return self.run("document.documentElement.scrollWidth <= innerWidth")


def test_whoever_comes_is_told_a_story_that_costs_nothing(space, browser):
    visitor = Visitor(browser, space.url, still=False)
    assert visitor.all("article.telling")
    lengths = set()
    until(lambda: lengths.add(len(visitor.text("article p"))) or len(lengths) > 3)
    (expected,) = generated(space.model, OPENING)
    assert visitor.told(1337) == [expected]
    asked = "performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert visitor.run(asked) == []  # neither of this server nor of any other
    assert expected in unescape(
        space.request("GET", "/")[1].decode()
    )  # also for whoever runs no script


def test_a_story_grows_stops_and_its_tokens_show_the_models_ten_likeliest(space, browser):
    visitor = Visitor(browser, space.url)
    starts = ("The dog ran", "One day", "Once upon", "She saw", "A big", "Tom said")
    greedy = GenerationSettings(max_new_tokens=1000, temperature=0)
    tokenizer = load_tokenizer(space.model.config.vocab_size)

    def ends(prompt: str) -> bool:
        start = tokenizer.encode_ordinary(prompt)
        (ids,) = generate_ids(space.model, [start], seed=1337, settings=greedy)
        return tokenizer.eot_token in ids

    endless = next(prompt for prompt in starts if not ends(prompt))
    visitor.set(prompt=endless, max_new_tokens=1000, temperature=0)
    with slowed(space.process):
        visitor.click("#tell")
        until(lambda: "Seed 1337 ·" in visitor.text("article") and visitor.all("article.telling"))
        visitor.click("#another")
        until(lambda: "Seed 1338 ·" in visitor.text("article"))
        lengths, seeds = set(), set()
        until(
            lambda: (
                lengths.add(len(visitor.text("article p")))
                or seeds.update(re.findall(r"Seed \d+", visitor.text("article")))
                or len(lengths) > 3
            )
        )
        assert seeds == {"Seed 1338"}  # the one before is told no further
        assert visitor.text("#status") == "Telling …"
        visitor.click("#stop")
        until(lambda: "stopped" in visitor.text("article"))
    assert visitor.text("#status") == "Stopped."
    stopped = visitor.text("article p")
    time.sleep(0.3)  # in which the server tells more than once
    assert visitor.text("article p") == stopped and stopped.startswith(endless)

    visitor.set(prompt="The dog ran", temperature=0.8, max_new_tokens=40, seed=7)
    story = visitor.tell(7)
    assert [story] == generated(space.model, "The dog ran", [7], max_new_tokens=40)
    assert visitor.text("#said").startswith(story)  # what a screen reader reads
    visitor.look_inside()
    pieces = [e.get_property("textContent") for e in visitor.all("#tokens [role=option]")]
    assert "".join(pieces).replace("↵", "").removesuffix("the end") == story
    for index in (3, 20):
        visitor.click(f"#tokens span:nth-child({index + 1})")
        until(partial(shows_the_ten_likeliest, visitor, space.model, story, index))
    assert visitor.text("#who") == "came"
    assert len(visitor.all("#heads figure")) == space.model.config.n_head
    assert "layer 2 looked" in visitor.text("#layer")
    visitor.click("input[type=radio][value='1']")
    until(lambda: "layer 1 looked" in visitor.text("#layer"))
    until(partial(names_what_the_heads_took_from, visitor, space.model, story, 20, 0))


def ids_of(model: GPT, story: str) -> list[int]:
    return load_tokenizer(model.config.vocab_size).encode_ordinary(story)


def shows_the_ten_likeliest(visitor, model: GPT, story: str, index: int) -> bool:
    """Whether the percentages on the page are the model's for the token `index`, to three digits.

    Half a unit of the third digit is at most 5 in a thousand.
    """
    ids = ids_of(model, story)
    with torch.no_grad():
        expected = model(torch.tensor([ids[:index]]))[0][0, -1].softmax(-1)
    shown = [e.get_property("textContent") for e in visitor.all("#bars b")]
    numbers = torch.tensor([float(p.removesuffix(" %").split(": ")[-1]) / 100 for p in shown])
    rank = int((expected > expected[ids[index]]).sum()) + 1
    most = expected.topk(10).values
    if rank > 10:
        most = torch.cat([most, expected[ids[index], None]])
    marked = [i for i, row in enumerate(visitor.all("#bars li")) if row.get_attribute("class")]
    return (
        len(shown) == len(most)
        and torch.allclose(numbers, most, rtol=5.1e-3, atol=0)
        and marked == [min(rank, 11) - 1]
        and (rank <= 10 or f"no. {rank}: " in shown[-1])
    )


def names_what_the_heads_took_from(visitor, model, story: str, index: int, layer: int) -> bool:
    """Whether each head's caption has the largest of its last row, and the mouse names a cell."""
    ids = ids_of(model, story)[:index]
    with torch.no_grad():
        weights = model.attention_weights(torch.tensor([ids]), layer)[0]
    captions = [e.get_property("textContent") for e in visitor.all("#heads figcaption")]
    shown = [re.findall(r" (\d+) %", caption) for caption in captions]
    most = weights[:, -1].topk(3).values
    if shown != [[f"{100 * p:.0f}" for p in row] for row in most.tolist()]:
        return False
    canvas = visitor.all("#heads canvas.map")[1]
    canvas.send_keys("\ue012")  # the arrow to the left, from the last cell
    hint = visitor.all("#heads .hint")[1].get_property("textContent")
    share = float(re.search(r": ([\d.]+) %", hint)[1])
    return abs(share - 100 * weights[1, -1, -2].item()) < 0.01 + share / 150


def test_markup_in_a_prompt_is_text(space, browser):
    visitor = Visitor(browser, space.url)
    evil = "<img src=x onerror=\"document.title='run'\"> ${document.title='run'} {{value}} <b>b</b>"
    visitor.set(prompt=evil)
    assert visitor.tell().startswith(evil)
    visitor.look_inside()
    assert visitor.text("#tokens").startswith(evil)
    assert not visitor.all("#tokens img, #tokens b, article img, article b")
    assert visitor.run("document.title") == "StoryGPT"


def test_a_setting_that_is_none_is_shown_where_it_stands(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.set(seed="")
    visitor.click("summary")  # closed again
    visitor.click("#tell")
    until(lambda: visitor.run("document.activeElement.name") == "seed")
    assert visitor.run("document.querySelector('details').open")
    visitor.set(seed=8)
    visitor.click("#another")
    visitor.told(9)


def test_a_prompt_has_its_bounds_said(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.set(prompt=" a" * 70)
    visitor.tell()
    assert "sees only the last 64 of these 70 tokens" in visitor.text("#room")
    visitor.set(prompt="Once ")
    visitor.tell()
    assert "ends in a space" in visitor.text("#room")
    visitor.run("(document.querySelector('#prompt').value = 'x'.repeat(4999))")
    visitor.all("#prompt")[0].send_keys("yz")  # of which there is room for one
    assert "room for: 5000 characters" in visitor.text("#room")


def test_an_opening_tells_when_it_is_chosen(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.set(prompt="Tom", seed=3)
    visitor.click("#openings button")
    story = visitor.told(3)[0]
    assert [story] == generated(space.model, OPENING, [3])


def test_a_link_tells_the_same_stories_to_somebody_else(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.set(prompt="«Où?» & #1=2\n+ 日本", seed=11, num_samples=4, max_new_tokens=30)
    visitor.set(temperature=1.25, top_k=50, top_p=0.9)
    visitor.click("#tell")
    told = visitor.told(11, 12, 13, 14)
    visitor.run("(navigator.clipboard.writeText = async (text) => { window.copied = text })")
    visitor.click("#link")
    link = until(lambda: visitor.run("window.copied"))
    visitor.click("article button")
    assert until(lambda: visitor.run("window.copied") != link and visitor.run("copied")) == told[0]

    other = Visitor(browser, link)
    assert other.told(11, 12, 13, 14) == told
    assert other.run("document.querySelector('#temperature').value") == "1.25"
    wrong = Visitor(
        browser, link.replace("seed=11", "seed=x").replace("num_samples=4", "num_samples=9")
    )
    assert wrong.told(1337)  # what is no setting is asked about, and nothing is told


def test_a_reload_loses_nothing(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.set(prompt="Tom said", seed=5, max_new_tokens=30)
    story = visitor.tell(5)
    visitor.set(prompt="Not yet told")
    visitor.look_inside()
    visitor.click("#tokens span:nth-child(9)")
    until(visitor.shows_the_chosen)
    place = visitor.text("#place")
    visitor.browser.refresh()
    until(lambda: visitor.text("#place") == place)
    assert not visitor.run("performance.getEntriesByType('resource')").count("stories")
    visitor.click("#back")
    until(lambda: visitor.run("document.activeElement.ariaLabel") == "Look inside: seed 5")
    assert visitor.told(5) == [story]
    assert visitor.run("document.querySelector('#prompt').value") == "Not yet told"


@contextmanager
def before_every_page(browser, script: str):
    """Has the tab run a script before the page's own, from the next load on."""
    (name,) = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": script}
    ).values()
    yield
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": name})


def test_another_model_at_the_same_address_does_not_tell_the_stories_of_the_one_before(
    space, browser
):
    visitor = Visitor(browser, space.url)
    visitor.set(prompt="Tom said", seed=5, max_new_tokens=30)
    visitor.tell(5)
    kept = "JSON.parse(sessionStorage.storygpt)"
    other = f"sessionStorage.storygpt = JSON.stringify({{...{kept}, model: 'another'}})"
    with before_every_page(browser, other):
        visitor.mark_what_is_there()
        browser.refresh()
        until(lambda: visitor.run("performance.getEntriesByType('resource').length"))
    visitor.told(5)  # once more, and not from what was kept


def test_where_nothing_can_be_kept_a_reload_inside_leaves_a_way_back(space, browser):
    """As in the frame of a Space, where the browser refuses others' storage."""
    refused = "{get() { throw new DOMException('', 'SecurityError') }}"
    visitor = Visitor(browser, space.url)
    with before_every_page(browser, f"Object.defineProperty(window, 'sessionStorage', {refused})"):
        browser.refresh()
        visitor.told(1337)
        visitor.look_inside()
        browser.refresh()
        visitor.told(1337)
        visitor.look_inside()
        visitor.click("#back")
        until(lambda: visitor.all("article")[0].is_displayed())
        time.sleep(0.2)
        assert visitor.all("article")[0].is_displayed()


def test_a_copy_that_the_browser_refuses_is_not_called_one(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.run("(navigator.clipboard.writeText = async () => { throw new Error() })")
    visitor.run("(document.execCommand = () => false)")
    visitor.click("#link")
    until(lambda: "does not let the page copy" in visitor.text("#status"))
    assert visitor.text("#link") == "Copy link"


def test_the_enter_that_ends_a_composed_word_asks_for_no_story(space, browser):
    visitor = Visitor(browser, space.url)
    press = (
        "document.querySelector('#prompt').dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', cancelable: true, %s}))"
    )
    for composing in ("isComposing: true", "keyCode: 229"):  # Safari's has only the latter
        assert visitor.run(press % composing), composing
    assert not visitor.run(press % "keyCode: 13")  # prevented: it asks


def test_on_paper_a_story_is_dark_on_light_and_has_no_buttons(space, browser):
    visitor = Visitor(browser, f"{space.url}?__theme=dark", dark=True)
    visitor.look_inside()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert contrast(visitor, "#tokens .told") >= 4.5
    assert luminance(channels(visitor.run("getComputedStyle(document.body).color"))[:3]) < 0.2
    assert not visitor.all("#back")[0].is_displayed()


def test_where_the_system_chooses_the_colours_a_bar_is_still_seen(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.look_inside()
    shown = "getComputedStyle(document.querySelector('%s')).backgroundColor"
    plain = [visitor.run(shown % selector) for selector in ("#bars s", "#tokens .told")]
    forced = [{"name": "forced-colors", "value": "active"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": forced})
    assert visitor.run("matchMedia('(forced-colors: active)').matches")
    assert visitor.run(shown % "#tell") != plain[0]  # what is not excepted is forced
    assert [visitor.run(shown % s) for s in ("#bars s", "#tokens .told")] == plain


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 1280])
def test_the_keyboard_reaches_and_uses_everything(space, browser, width, dark):
    visitor = Visitor(browser, space.url, width=width, dark=dark)
    tab, enter, blank, right, end = "\ue004", "\ue007", " ", "\ue014", "\ue010"
    visitor.tab_to("#prompt")
    visitor.press("\ue009a\ue000One day")
    visitor.press(enter)  # as in a search box
    assert visitor.told(1337)[0].startswith("One day")
    assert visitor.run("document.activeElement.id") == "prompt"  # where it was
    visitor.tab_to("#openings button")
    visitor.press(enter)
    assert visitor.told(1337)[0].startswith(OPENING)
    visitor.tab_to("summary")
    visitor.press(blank)
    for name in ("seed", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p"):
        visitor.tab_to(f"[name={name}]")
        before = visitor.run("document.activeElement.value")
        visitor.press("\ue013" if name != "top_p" else "\ue015")  # up, but down from the most
        assert visitor.run("document.activeElement.value") != before, name
    visitor.tab_to("article:last-child footer button:last-child")  # of what was told before
    visitor.run("document.querySelector('#tell').focus()")
    visitor.press(blank)
    visitor.told(1338, 1339)
    visitor.tab_to("#another")
    visitor.press(enter)
    visitor.told(1340, 1341)
    visitor.tab_to("#link")
    visitor.press(enter)
    until(lambda: visitor.text("#link") == "Copied")
    visitor.tab_to("article footer button:last-child")
    assert visitor.fits()
    visitor.press(enter)
    until(lambda: visitor.all("#heads figure"))
    assert visitor.fits()
    visitor.tab_to("#tokens [role=option]")
    chosen = "#tokens [aria-selected=true]"
    visitor.press(right + right)
    until(visitor.shows_the_chosen)
    assert visitor.run(f"document.activeElement === document.querySelector('{chosen}')")
    assert len(visitor.all(chosen)) == 1
    visitor.press(end)
    last = "#tokens [role=option]:last-child"
    until(lambda: visitor.run(f"document.activeElement === document.querySelector('{last}')"))
    visitor.tab_to("#layers input")
    visitor.press("\ue013")
    until(lambda: "layer 1 looked" in visitor.text("#layer"))
    visitor.tab_to("canvas")
    visitor.press(right)
    until(lambda: visitor.text(".hint"))
    visitor.run("document.querySelector('#whose').focus()")
    visitor.browser.switch_to.active_element.send_keys("\ue008" + tab)  # Shift-Tab
    assert visitor.run("document.activeElement.id") == "back"
    visitor.press(enter)
    until(lambda: visitor.run("document.activeElement.ariaLabel") == "Look inside: seed 1340")
    assert visitor.fits()


def test_what_is_asked_for_is_said_aloud_also_the_second_time(space, browser):
    """And nothing is that nobody asked for."""
    visitor = Visitor(browser, space.url)
    visitor.told(1337)
    assert visitor.text("#said") == ""
    said = "document.querySelector('#said')"
    listen = f"new MutationObserver(() => announced.push({said}.textContent))"
    visitor.run(f"(window.announced = [], {listen}.observe({said}, {{childList: true}}))")
    for _ in range(2):
        visitor.click("#openings button")
        visitor.told(1337)
    visitor.run("(navigator.clipboard.writeText = async () => {})")
    visitor.click("#link")
    visitor.click("article button")
    heard = until(lambda: len(visitor.run("announced")) >= 4 and visitor.run("announced"))
    assert len(heard) == 4 and heard[0] == heard[1] and heard[0].startswith(OPENING)
    assert heard[2:] == ["Copied", "Copied"]


def test_a_finger_names_the_dots(space, browser):
    visitor = Visitor(browser, space.url, width=390)
    visitor.look_inside()
    for picture in ("map", "strip"):
        canvas = f"document.querySelector('#heads .{picture}')"
        visitor.run(f"{canvas}.scrollIntoView()")
        visitor.run("(document.querySelector('.hint').textContent = '')")
        box = visitor.run(f"{canvas}.getBoundingClientRect().toJSON()")
        place = {"x": box["right"] - 3, "y": box["bottom"] - 3}
        for kind, fingers in (("touchStart", [place]), ("touchEnd", [])):
            touch = {"type": kind, "touchPoints": fingers}
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
        until(lambda: visitor.text("figure:first-child .hint").startswith("at "))


def test_a_phone_scrolls_to_the_story(space, browser):
    visitor = Visitor(browser, space.url, width=390)
    visitor.set(prompt="One day")  # which opens the settings
    visitor.run("scrollTo(0, 0)")
    visitor.click("#tell")
    top = "document.querySelector('article').getBoundingClientRect().top"
    until(lambda: 0 <= visitor.run(top) < 450)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_keeps_anybody_out(space, browser, axe, width, dark):
    visitor = Visitor(browser, space.url, width=width, dark=dark, still=False)

    def violations() -> list[str]:
        browser.execute_script(axe)
        found = browser.execute_async_script(
            "axe.run({resultTypes: ['violations']}).then((found) => arguments[0](found.violations))"
        )
        return [f"{v['help']}: {[node['html'] for node in v['nodes']]}" for v in found]

    assert visitor.all("article.telling") and violations() == []
    visitor.told(1337)
    assert violations() == []
    visitor.set(prompt="", num_samples=4, max_new_tokens=20)
    assert violations() == []
    visitor.click("#tell")
    visitor.told(1337, 1338, 1339, 1340)
    assert violations() == []
    visitor.look_inside(2)
    assert violations() == []
    for text in ("You are number 53 in the queue.", "The server does not answer."):
        visitor.click("#back") if visitor.all("#back")[0].is_displayed() else None
        visitor.run(f"(document.querySelector('#status').textContent = '{text}')")
        assert violations() == []


@pytest.mark.parametrize("dark", [False, True])
def test_tokens_can_be_read_on_their_colours(space, browser, dark):
    """Which axe cannot judge: where they are inline, and mixed in another space."""
    visitor = Visitor(browser, space.url, dark=dark)
    visitor.look_inside()
    for share in range(0, 101, 10):
        visitor.run(f"document.querySelector('#tokens .told').style.setProperty('--p', '{share}%')")
        assert contrast(visitor, "#tokens .told") >= 4.5, share
    for selector in ("#bars li.told b", "#tokens .given", "#pieces"):
        assert contrast(visitor, selector) >= 4.5, selector


def contrast(visitor, selector: str) -> float:
    """WCAG's contrast of the text of the first such element and what is behind it."""
    element = f"getComputedStyle(document.querySelector('{selector}'))"
    text, *layers = (
        channels(visitor.run(color))
        for color in (
            f"{element}.color",
            "getComputedStyle(document.body).backgroundColor",
            f"{element}.backgroundColor",
        )
    )
    behind = [1.0, 1.0, 1.0]
    for *color, alpha in layers:
        behind = [alpha * c + (1 - alpha) * b for c, b in zip(color, behind, strict=True)]
    dark, light = sorted(map(luminance, (text[:3], behind)))
    return (light + 0.05) / (dark + 0.05)


def channels(color: str) -> list[float]:
    """rgb(1, 2, 3) or color(srgb 0.1 0.2 0.3 / 0.4) as four numbers from 0 to 1."""
    *parts, alpha = [*map(float, re.findall(r"[\d.]+", color)), 1.0][:4]
    return [*(part / (1 if color.startswith("color(") else 255) for part in parts), alpha]


def luminance(color: list[float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in color]
    return sum(p * w for p, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_waiting_is_shown_and_a_broken_connection_mended(space, browser):
    visitor = Visitor(browser, space.url)
    body = json.dumps({"prompt": "Once", "num_samples": 4, "max_new_tokens": 1000})
    others = [HTTPConnection("127.0.0.1", space.port, timeout=60) for _ in range(20)]
    visitor.set(prompt="Tom said", max_new_tokens=1000)
    with slowed(space.process):
        for other in others:
            other.request("POST", "/stories", body, {"content-type": "application/json"})
        visitor.click("#tell")
        until(lambda: re.fullmatch(r"You are number \d+ in the queue\.", visitor.text("#status")))
        for other in others:
            other.close()
        until(lambda: visitor.text("#status") == "Telling …")
    visitor.hold_pauses()
    space.process.kill()
    space.process.wait()
    until(lambda: "Reconnecting" in visitor.text("#status"))
    space.start()
    visitor.end_pauses()
    assert visitor.told(1337) == generated(space.model, "Tom said", max_new_tokens=1000)
    visitor.set(prompt="She saw", seed=2)
    space.process.send_signal(signal.SIGSTOP)
    visitor.click("#tell")
    until(lambda: visitor.text("#status") == "Asking …")
    visitor.let_seconds_pass(4)
    until(lambda: "The server is slow" in visitor.text("#status"))
    space.process.send_signal(signal.SIGCONT)
    visitor.told(2)
    space.process.kill()
    space.process.wait()
    visitor.set(prompt="A big")
    visitor.click("#tell")
    until(lambda: visitor.end_pauses() or "The server does not answer" in visitor.text("#status"))
    visitor.click("article button:last-child")
    until(lambda: "The server does not answer" in visitor.text("#looking"))


def test_what_another_server_answers_in_its_place_is_no_sentence_of_ours(space, browser):
    """A Space that is asleep, or a proxy: JSON, but not as ours."""
    visitor = Visitor(browser, space.url)
    asleep = """(window.fetch = async () => new Response('{"error": "asleep"}', {status: 503}))"""
    visitor.run(asleep)
    visitor.hold_pauses()
    visitor.click("#another")
    until(lambda: visitor.end_pauses() or "The server does not answer" in visitor.text("#status"))
