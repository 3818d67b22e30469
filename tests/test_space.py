"""The page of space/: published, started and used as on the Hub, in a real browser."""

import importlib.util
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
from contextlib import contextmanager
from functools import partial
from html import unescape
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hub_server import Hub
from tokenizers import Tokenizer

from model import GPT
from storygpt.checkpoint import load_model
from storygpt.formats import tokenizer_files
from storygpt.generation import GenerationSettings, generate_stories

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")
SETTINGS = (1337, 1, 60, 0.8, 100, 1)  # seed, stories, length, temperature, top-k, top-p


@pytest.fixture(scope="module")
def space(script, run_dir, data_dir, tmp_path_factory):
    """A tiny model and its Space on a loopback Hub, and what the Hub has of it, started."""
    folder, home = tmp_path_factory.mktemp("space"), tmp_path_factory.mktemp("home")
    flags = ["--repo_id", "you/StoryGPT", "--checkpoint", run_dir / "StoryGPT_best.pt", "--space"]
    flags += ["--data_dir", data_dir, "--gguf", "none"]
    with Hub() as hub, socket.socket() as free:
        environment = hub.environment(home)
        result = script("upload_to_hf.py", *flags, **environment)
        assert result.code == 0, result.output
        for name, data in hub.repos["spaces/you/StoryGPT-space"].commits[-1].items():
            (folder / name).write_bytes(data)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        started = {**os.environ, **environment, "GRADIO_SERVER_PORT": str(port)}
        started.pop("PYTHONPATH", None)
        log = folder / "log.txt"
        with log.open("w") as output:
            command = [sys.executable, "app.py"]
            process = subprocess.Popen(
                command, cwd=folder, env=started, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            until(lambda: process.poll() is not None or answers(port), 120)
            assert answers(port), log.read_text()
            yield SimpleNamespace(
                url=f"http://127.0.0.1:{port}",
                port=port,
                process=process,
                hub=hub,
                flags=flags,
                environment=environment,
                model=load_model(run_dir / "StoryGPT_best.pt")[0],
            )
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def app():
    """app.py as a module: what it computes, without the page."""
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_app"] = module
    spec.loader.exec_module(module)
    return module


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


def answers(port: int) -> bool:
    try:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False


def stories(html: str) -> list[str]:
    """The texts on the cards."""
    found = re.findall(r"<article.*?<p>(.*?)</p>", html, re.DOTALL)
    return [unescape(re.sub("<[^>]*>", "", text)) for text in found]


def ask(client, prompt: str, *settings) -> str:
    """The page's last answer to a click on Tell."""
    job = client.submit(prompt, *(settings or SETTINGS), api_name="/tell")
    job.result(timeout=120)
    return job.outputs()[-1]


# --- As a Space ---


def test_the_space_is_one_commit_with_the_models_id_and_the_same_again_is_none(space, script):
    repo = space.hub.repos["spaces/you/StoryGPT-space"]
    files = {name for name in repo.commits[-1] if name != ".gitattributes"}
    assert len(repo.commits) == 2 and files == {"app.py", "requirements.txt", "README.md"}
    from huggingface_hub import RepoCard

    card = RepoCard(repo.commits[-1]["README.md"].decode()).data.to_dict()
    assert card["models"] == ["you/StoryGPT"] and card["sdk"] == "gradio"
    again = script("upload_to_hf.py", *space.flags, **space.environment)
    assert again.output.count("nothing changed: ") == 2 and len(repo.commits) == 2, again.output


def test_a_dry_run_builds_both_folders_and_overwrites_neither(space, script, fails, tmp_path):
    flags = (*space.flags, "--dry_run", "--output_dir", tmp_path / "out")
    result = script("upload_to_hf.py", *flags)
    assert result.code == 0 and result.output.count("built in ") == 2, result.output
    assert (tmp_path / "out-space" / "app.py").read_bytes() == (ROOT / "space/app.py").read_bytes()
    shutil.rmtree(tmp_path / "out")
    fails("upload_to_hf.py", *flags, says="out-space is not empty")
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_a_sentence(app, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model.py").touch()
    for flags, says in (
        ([], "README.md names no model"),
        (["--model", tmp_path], "has no config.py, checkpoints"),
        (["--model", "no such thing"], "is no folder here"),
    ):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert says in f"{ended.value.code} {capsys.readouterr().err}" and ended.value.code != 0


def test_a_port_in_use_and_a_damaged_model_are_sentences(
    app, space, run_dir, tmp_path, monkeypatch
):
    (tmp_path / "checkpoints").mkdir()
    for name in ("model.py", "config.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    weights = tmp_path / "checkpoints" / "StoryGPT_best.pt"
    weights.write_bytes((run_dir / weights.name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(tokenizer_files(512, 64)["tokenizer.json"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # where app.py puts the model's own code
    flags = ["app.py", "--model", str(tmp_path), "--port", str(space.port)]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit, match="pass another --port"):
        app.main()
    for data in (b"", weights.read_bytes()[:5000]):
        weights.write_bytes(data)
        with pytest.raises(SystemExit, match="is damaged"):
            app.main()


def test_it_answers_on_this_machine_alone(space):
    with pytest.raises(OSError):  # loopback too, but not where it listens
        socket.create_connection(("127.0.0.2", space.port), timeout=5)


def test_a_folder_is_shown_by_its_name_alone(app, space, script, tmp_path):
    flags = (*space.flags, "--dry_run", "--output_dir", tmp_path / "published")
    assert script("upload_to_hf.py", *flags).code == 0
    teller = app.load(str(tmp_path / "published"))
    assert teller.name == "published" and not teller.model.training


# --- What it tells ---


def test_eight_visitors_at_once_get_the_stories_that_generate_tells(space, script, run_dir):
    seeds, prompt = range(5, 13), "One day, a"

    def visit(seed):
        client = gradio_client.Client(space.url, verbose=False)
        return stories(ask(client, prompt, seed, *SETTINGS[1:]))

    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(visit, seeds))
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--prompt", prompt, "--seed", 5)
    for count, first in ((8, 5), (1, 9)):
        result = script(
            "generate.py", *flags[:-1], first, "--num_samples", count, "--max_new_tokens", 60
        )
        text = re.sub(r"\n\d+ tokens in .*\n", "", result.output)
        expected = [story.strip("\n") for story in text.split("\n" + "-" * 40 + "\n")]
        assert [t[0].strip("\n") for t in told[first - 5 : first - 5 + count]] == expected
    together = visit_together(space, prompt)
    assert [[story] for story in together] == told[:4]


def visit_together(space, prompt: str) -> list[str]:
    client = gradio_client.Client(space.url, verbose=False)
    return stories(ask(client, prompt, 5, 4, *SETTINGS[2:]))


def test_odd_input_is_answered_and_the_server_lives(space):
    client = gradio_client.Client(space.url, verbose=False)
    for prompt in (
        "",
        " ",
        "<b>bold</b> & ${1+1} `x` {{value}}",
        "👩‍👩‍👧‍👦 日本\u2028\0",
        "<|endoftext|>",
    ):
        settings = GenerationSettings(max_new_tokens=60)
        expected = generate_stories(space.model, prompt, [1337], settings)[0].text
        assert stories(ask(client, prompt)) == [expected], prompt
    long = client.submit("Once", 1337, 4, 1000, 0.8, 100, 1, api_name="/tell")
    assert stories(ask(client, "Once", *SETTINGS[:2], 1, *SETTINGS[3:])) and not long.done()
    long.cancel()  # it had not to end before another visitor's story
    html = ask(client, "The dog ran. " * 7700)
    assert "tokens: only its last 64 were read" in html and len(stories(html)[0]) > 60
    for settings, says in (
        (("abc", *SETTINGS[1:]), "The seed must be a whole number."),
        (("-1", *SETTINGS[1:]), "seed must be a whole number of at least 0"),
        (("9" * 30, *SETTINGS[1:]), "the most it can be here"),
        ((1, 99, *SETTINGS[2:]), "is greater than maximum value 4"),
        ((1, 1, 60, -1, 100, 1), "is less than minimum value 0"),
    ):
        with pytest.raises(Exception, match=re.escape(says)):
            ask(client, "Once", *settings)
    assert stories(ask(client, "Once"))


@pytest.fixture
def teller(app, run_dir):
    tokenizer = Tokenizer.from_str(tokenizer_files(512, 64)["tokenizer.json"])
    return app.Storyteller("tiny", load_model(run_dir / "StoryGPT_best.pt")[0], tokenizer)


def test_every_setting_is_that_of_generate(app, teller):
    answers, model = app.Answers(teller), teller.model
    settings = (25, 1.3, 9, 0.7)  # length, temperature, top-k, top-p
    *_, (html, told) = answers.tell("One day", "7", 3, *settings)
    expected = generate_stories(model, "One day", [7, 8, 9], GenerationSettings(*settings))
    assert stories(html) == [text for text, _ in expected] and [s.seed for s in told] == [7, 8, 9]
    for i, other in enumerate((24, 0.8, 2, 0.1)):
        changed = (*settings[:i], other, *settings[i + 1 :])
        others = generate_stories(model, "One day", [7, 8, 9], GenerationSettings(*changed))
        assert others != expected
    assert answers.next_seed("7", 3) == "10" and answers.next_seed("x", 3) == "x"
    *_, (html, _) = answers.tell("One day", "7", 1, 25, 1.3, 0, 1)  # all tokens
    unlimited = GenerationSettings(max_new_tokens=25, temperature=1.3, top_k=None)
    assert stories(html) == [generate_stories(model, "One day", [7], unlimited)[0].text]
    *_, (_, told) = answers.tell("One day", "7", 4, 400, 1.3, 0, 1)
    assert len({len(story.ids) for story in told}) > 1  # some end before others
    for story in told:
        assert story.ids.count(teller.end_of_text) == (story.state == "the end")
    for length in (64, 65):
        *_, (html, _) = answers.tell(" a" * length, "7", 1, 1, 1.3, 0, 1)
        assert ("its last 64 were read" in html) == (length > 64)


# --- What it shows inside ---


def test_what_is_shown_is_what_the_model_computed_while_telling(app, space):
    """Also where the context was full and its last half was read again."""
    model, ids = space.model, torch.tensor([[5, 6, 7]])
    teller = app.Storyteller("tiny", model, None)
    seen = []
    head = model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out[0]))
    drawn = torch.Generator().manual_seed(1)
    told = [int(token) for token in model.stream(ids, 150, generator=drawn)]
    head.remove()
    story = app.Story(1, 3, [5, 6, 7, *told])
    expected = torch.stack(seen).softmax(-1)
    probabilities = app.token_probabilities(teller, story)
    assert probabilities[0] is None and len(probabilities) == 153
    torch.testing.assert_close(
        torch.tensor(probabilities[3:]), expected.gather(1, torch.tensor(told)[:, None])[:, 0]
    )
    for index in (3, 4, 64, 65, 66, 100, 152):
        start = app.window_start(story, index, 64)
        after = app.probabilities(teller, story.ids[start:index])[-1]
        torch.testing.assert_close(after, expected[index - 3])


def input_of(module, call) -> torch.Tensor:
    """What `module` is given while `call` runs."""
    caught = []
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    call()
    hook.remove()
    return caught[0]


def test_the_pictures_are_the_weights_of_the_models_own_attention(app, space):
    model, ids = space.model, [3, 1, 4, 1, 5, 9, 2, 6]
    for layer, block in enumerate(model.h):
        caught = input_of(block.attn, lambda: model(torch.tensor([ids])))
        weights = app.attention_weights(app.Storyteller("tiny", model, None), ids, layer)
        q, k, v = block.attn.heads(caught)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
        torch.testing.assert_close(weights @ v[0], y)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_what_is_said_of_a_choice(app, teller):
    """Likely or not: which was taken, its place and probability, and where the heads looked."""
    answers, angle = app.Answers(teller), teller.encode("<")[0]
    for place in (0, 3, 9, 10, 400):
        ids = [5, angle, 7]
        p, order = app.probabilities(teller, ids)[-1].sort(descending=True)
        story = app.Story(7, 2, [*ids, order[place].item(), 9])
        html = answers.detail(story, 3, "2")
        rows = re.findall(r"<li( class=.told.)?><code>(.*?)</code>.*?<b>(.*?)</b>", html)
        taken = [i for i, row in enumerate(rows) if row[0]]
        assert taken == [min(place, 10)] and len(rows) == (11 if place > 9 else 10)
        assert rows[taken[0]][1] == app.spelled(teller, story.ids[3])
        number = f"no. {place + 1}: " * (place > 9)
        assert rows[taken[0]][2] == number + app.percent(p[place].item())
    assert "the heads of layer 2 looked" in html and "<p>Nothing" in answers.detail(story, 0, "1")
    assert app.spelled(teller, angle) == "&lt;"
    assert app.show_tokens(teller, story, 2).count(">&lt;</span>") == 1
    for head, weights in enumerate(app.attention_weights(teller, ids, 1), 1):
        most = [f"{100 * w:.0f}&nbsp;%" for w in weights[-1].sort(descending=True).values.tolist()]
        (caption,) = re.findall(f"Head {head}: (.*?)</figcaption>", html)
        assert re.findall(r"\d+&nbsp;%", caption) == most
    kinds = re.findall(r'class="(first|given|told)"', app.show_tokens(teller, story, 2))
    assert kinds == ["first", "given", "told", "told", "told"]


def test_a_model_published_by_an_older_version_is_shown_without_its_heads(app, teller, monkeypatch):
    monkeypatch.delattr(GPT, "attention_weights")
    html = app.Answers(teller).detail(app.Story(7, 2, [5, 6, 7, 8]), 3, "2")
    assert "publish this model again" in html and html.count("<li") >= 10


def test_the_story_that_is_asked_for_is_opened_and_an_open_one_stays(app, teller):
    answers = app.Answers(teller)
    *_, (_, told) = answers.tell("One day", "7", 3, 5, 0.8, 100, 1)
    _, looked, *_ = answers.look_at(told, "1", SimpleNamespace(index=1))
    assert looked == (told[1], told[1].given)
    assert "__type__" in answers.look_at_latest(told, looked, "1")  # nothing changes
    *_, (_, others) = answers.tell("Once", "7", 1, 5, 0.8, 100, 1)
    assert answers.look_at_latest(others, looked, "1")[1] == (others[0], others[0].given)
    told[0].state, told[1].state, told[2].state = "telling", "the end", "length reached"
    answers.stop(told)
    assert [story.state for story in told] == ["stopped", "the end", "length reached"]


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
        yield chrome


class Visitor:
    """Someone at the page, by CSS selectors."""

    def __init__(self, browser, url: str, width: int = 1200, dark: bool = False):
        self.browser = browser
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(url + ("?__theme=dark" if dark else ""))
        until(lambda: self.all("#start"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return "".join(e.get_property("textContent") for e in self.all(selector))

    def click(self, selector: str) -> None:
        until(lambda: self.all(selector)[0].click() or True if self.all(selector) else False)

    def type(self, label: str, text: str) -> None:
        """Replaces what a field with that label holds, as fingers do."""
        field = until(lambda: self.field(label))
        field.send_keys("\ue009a\ue000", text, "\ue004")  # Ctrl-A, the text, Tab

    def field(self, label: str):
        inner = "//label[contains(., '{0}')]//*[self::textarea or self::input]"
        inner += " | //input[@type='number'][contains(@aria-label, '{0}')]"
        return self.browser.find_element("xpath", inner.format(label))

    def tell(self, seed: int = 1337) -> None:
        """Clicks Tell and waits for the end of that seed's story."""
        self.click("#start")
        until(lambda: f"Seed {seed} " in self.text("article") and not self.all("article.telling"))

    def run(self, script: str):
        return self.browser.execute_script(f"return {script}")


def test_a_story_grows_stops_and_its_tokens_show_the_models_ten_likeliest(space, browser):
    visitor = Visitor(browser, space.url)
    starts = ("The dog ran", "One day", "Once upon", "She saw", "A big", "Tom said")
    greedy = GenerationSettings(max_new_tokens=1000, temperature=0)
    endless = next(
        p for p in starts if not generate_stories(space.model, p, [1337], greedy)[0].ended
    )
    visitor.type("How the story begins", endless)
    visitor.run("document.querySelector('.label-wrap').click()")
    visitor.type("Length", "1000")
    visitor.type("Temperature", "0")
    with slowed(space.process):
        visitor.click("#start")
        until(lambda: "Seed 1337 " in visitor.text("article"))
        visitor.click("#another")
        until(lambda: "Seed 1338 " in visitor.text("article"))
        lengths, seeds = set(), set()
        until(
            lambda: (
                lengths.add(len(visitor.text("article p")))
                or seeds.update(re.findall(r"Seed \d+", visitor.text("article")))
                or len(lengths) > 3
            )
        )
        assert seeds == {"Seed 1338"}  # the one before is told no further
        visitor.click("#stop")
        until(lambda: visitor.all("article.stopped"))
    stopped = visitor.text("article p")
    time.sleep(1)
    assert visitor.text("article p") == stopped and stopped.startswith(endless)

    visitor.type("How the story begins", "The dog ran")
    visitor.type("Temperature", "0.8")
    visitor.type("Length", "40")
    visitor.type("Seed", "7")
    visitor.tell(7)
    story = visitor.text("article p")
    settings = GenerationSettings(max_new_tokens=40)
    assert story == generate_stories(space.model, "The dog ran", [7], settings)[0].text
    visitor.click("article button")
    until(lambda: visitor.all(".bars li"))
    pieces = [e.get_property("textContent") for e in visitor.all(".tokens [role=option]")]
    assert "".join(pieces).replace("↵", "").removesuffix("the end") == story
    for index in (3, 20):
        visitor.click(f".tokens [data-index='{index}']")
        until(partial(shows_the_ten_likeliest, visitor, space.model, story, index))
    assert "before temperature, top-k and top-p" in visitor.text(".choice")
    assert len(visitor.all(".heads figure")) == space.model.config.n_head
    assert "layer 2 looked" in visitor.text(".choice")
    visitor.click("input[type=radio][value='1']")
    until(lambda: "layer 1 looked" in visitor.text(".choice"))


def shows_the_ten_likeliest(visitor, model: GPT, story: str, index: int) -> bool:
    """Whether the percentages on the page are the model's for the token `index`, to three digits.

    Half a unit of the third digit is at most 5 in a thousand.
    """
    from storygpt.tokenizer import load_tokenizer

    ids = load_tokenizer(model.config.vocab_size).encode_ordinary(story)[:index]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0][0, -1].softmax(-1).topk(10).values
    shown = [e.get_property("textContent") for e in visitor.all(".bars b")][:10]
    numbers = torch.tensor([float(percent.removesuffix(" %")) / 100 for percent in shown])
    return len(shown) == 10 and torch.allclose(numbers, expected, rtol=5.1e-3, atol=0)


def test_markup_in_a_prompt_is_text(space, browser):
    visitor = Visitor(browser, space.url)
    evil = "<img src=x onerror=\"document.title='run'\"> ${document.title='run'} {{value}} <b>b</b>"
    visitor.type("How the story begins", evil)
    visitor.tell()
    assert visitor.text("article p").startswith(evil)
    visitor.click("article button")
    until(lambda: visitor.all(".bars li"))
    assert visitor.text(".tokens").startswith(evil)
    assert not visitor.all(".tokens img, .tokens b, article img, article b")
    assert visitor.run("document.title") == "StoryGPT"


def test_a_seed_that_is_no_number_is_a_sentence_on_the_page(space, browser):
    visitor = Visitor(browser, space.url)
    visitor.run("document.querySelector('.label-wrap').click()")
    visitor.type("Seed", "abc")
    visitor.click("#start")
    until(lambda: "The seed must be a whole number." in visitor.text(".toast-body"))
    visitor.type("Seed", "8")
    visitor.click("#another")
    until(lambda: "Seed 9" in visitor.text("article"))


@pytest.mark.parametrize("dark", [False, True])
def test_a_phones_width_and_the_keyboard(space, browser, dark):
    visitor = Visitor(browser, space.url, width=390, dark=dark)
    field = visitor.field("How the story begins")
    field.send_keys("\ue009a\ue000", "One day", "\ue007")  # Enter tells
    until(lambda: visitor.all("article") and not visitor.all("article.telling"))
    assert visitor.run("document.documentElement.scrollWidth") <= 390
    keyboard = visitor.browser.switch_to
    for _ in range(40):
        if visitor.run("document.activeElement.matches('article button')"):
            break
        keyboard.active_element.send_keys("\ue004")
    keyboard.active_element.send_keys("\ue007")
    until(lambda: visitor.all(".bars li"))
    assert visitor.run("document.documentElement.scrollWidth") <= 390
    chosen = ".tokens [aria-selected=true]"
    visitor.all(chosen)[0].send_keys("\ue014\ue014")  # the arrow to the right, twice
    until(
        lambda: (
            visitor.text(".choice h3:first-child code").strip("␣") == visitor.text(chosen).strip()
        )
    )
    assert visitor.run(f"document.activeElement === document.querySelector('{chosen}')")
    assert len(visitor.all(chosen)) == 1
    visitor.all(chosen)[0].send_keys("\ue010")  # End
    until(lambda: visitor.all(".tokens [role=option]")[-1].get_attribute("aria-selected") == "true")
    for selector in (".tokens .told", ".tokens .given", ".bars b", ".note"):
        assert contrast(visitor, selector) >= 4.5, selector


def contrast(visitor, selector: str) -> float:
    """WCAG's contrast of the text of the first such element and what is behind it."""
    element = f"getComputedStyle(document.querySelector('{selector}'))"
    text, *layers = (
        channels(visitor.run(color))
        for color in (
            f"{element}.color",
            "getComputedStyle(document.querySelector('gradio-app')).backgroundColor",
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
