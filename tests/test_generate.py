import io
import os
import re
import select
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hub_server import Hub

import evaluate
import generate
import train
from config import GenerationSettings, GPTConfig, TrainingConfig
from model import GPT
from storygpt.checkpoint import load_checkpoint, load_model, save_checkpoint
from storygpt.device import pick_dtype
from storygpt.files import BEST
from storygpt.formats import write_folder
from storygpt.generation import generate_stories
from storygpt.kernels import pack_linears
from storygpt.record import begin_record
from storygpt.tokenizer import TextStream, load_tokenizer

BETWEEN = "\n\n" + "-" * 40 + "\n"


@pytest.fixture
def tells(run_dir, monkeypatch, capsys):
    """tells(*flags, typed=b"") -> what generate.py prints, run in this process."""
    precision = torch.get_float32_matmul_precision()

    def told(*flags, typed: bytes = b"", seat=io.TextIOWrapper) -> str:
        flags = ["--checkpoint", run_dir / "StoryGPT_best.pt", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", seat(io.BytesIO(typed), encoding="utf-8"))
        generate.main()
        return capsys.readouterr().out

    yield told
    torch.set_float32_matmul_precision(precision)


def told(result) -> str:
    assert result.code == 0, result.output
    return re.sub(r"\n\d+ tokens in .*\n", "", result.output)


def test_characters_that_span_tokens_come_out_whole():
    tokenizer = load_tokenizer(300)
    text = "naïve 👩‍👩‍👧‍👦 日本!"
    stream = TextStream(tokenizer)
    pieces = [stream.add([token]) for token in tokenizer.encode_ordinary(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert stream.add([tokenizer.encode_ordinary("é")[0]]) == ""  # half a character waits
    assert stream.close() == "\ufffd"
    end = tokenizer.eot_token
    assert [stream.add(ids) for ids in ([32, end, 32], [32], [32, end])] == ["A", "", ""]


def test_same_seed_same_story_and_it_is_the_models(script, run_dir):
    checkpoint = run_dir / "StoryGPT_best.pt"
    flags = ("--checkpoint", checkpoint, "--max_new_tokens", 40, "--prompt", "One day,")
    first, again, other = (told(script("generate.py", *flags, "--seed", s)) for s in (5, 5, 6))
    assert first == again != other
    assert first.startswith("One day,")
    model, _ = load_model(checkpoint)
    tokenizer = load_tokenizer(512)
    torch.manual_seed(5)
    idx = torch.tensor([tokenizer.encode_ordinary("One day,")])
    ids = model.generate(idx, 40, temperature=0.8, top_k=100)[0].tolist()
    assert first.rstrip("\n") == tokenizer.decode(ids).split("<|endoftext|>")[0].rstrip("\n")


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--prompt Tom", {"prompt": "Tom"}),
        ("--prompt <|endoftext|>", {"prompt": "<|endoftext|>"}),
        ("--max_new_tokens 7", {"max_new_tokens": 7}),
        ("--temperature 1.5", {"temperature": 1.5}),
        ("--top_k 5", {"top_k": 5}),
        ("--top_k None", {"top_k": None}),
        ("--top_p 0.3", {"top_p": 0.3}),
        ("--seed 9", {"seeds": [9]}),
        ("--num_samples 3", {"seeds": [1337, 1338, 1339]}),
        ("--num_samples 9 --dtype bfloat16", {"seeds": range(1337, 1346)}),
        ("--num_samples 9 --dtype auto", {"seeds": range(1337, 1346)}),
    ],
)
def test_every_flag_reaches_the_model(flags, changes, tells, run_dir):
    given = {"prompt": "One day", "seeds": [1337], "max_new_tokens": 60, "top_p": 1.0}

    def expected(dtype=torch.float32, **changes) -> str:
        model, _ = load_model(run_dir / "StoryGPT_best.pt")
        pack_linears(model.to(dtype))
        settings = given | changes
        prompt, seeds = settings.pop("prompt"), settings.pop("seeds")
        told = generate_stories(model, prompt, seeds, GenerationSettings(**settings))
        return BETWEEN.join(told) + "\n"

    told = tells("--prompt", "One day", "--max_new_tokens", 60, *flags.split())
    dtype = pick_dtype(flags.partition("--dtype ")[2] or "float32", torch.device("cpu"))
    assert told == expected(dtype, **changes)
    assert told != expected(**{} if dtype == torch.float32 else changes)  # it changes something


def test_prompt_over_the_context_is_cut_from_the_left_and_says_so(script, run_dir):
    prompt = "👦" * 20 + "The end "
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--max_new_tokens", 5)
    result = script("generate.py", *flags, "--prompt", prompt)
    assert "more than the model's context of 64: only its last 64 are read" in result.output
    assert "the prompt ends in a space" in result.output
    assert "The end " in told(result)


def test_what_is_cut_short_and_what_is_counted(capsys):
    """A stand-in for a model: two stories, of which one ends in the middle of a character."""
    tokenizer = load_tokenizer(512)
    half, whole = tokenizer.encode_ordinary("é")[0], tokenizer.encode_ordinary("a")[0]
    columns = [[half, whole], [511, whole], [511, half], [511, 511]]
    model = SimpleNamespace(
        config=GPTConfig(vocab_size=512),
        wte=torch.nn.Embedding(1, 1),
        stream=lambda *_, **__: (torch.tensor(column)[:, None] for column in columns),
    )
    generate.tell_aloud(model, generate.Arguments(prompt="Tom", num_samples=2))
    out, err = capsys.readouterr()
    assert out == f"Tom\ufffd{BETWEEN}Tomaa\ufffd\n"
    assert "6 tokens in" in err  # an end-of-text is one, and nothing after it


def test_every_token_is_shown_before_the_next_is_asked_for(monkeypatch):
    (token,) = load_tokenizer(512).encode_ordinary("a")
    screen, shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), []

    def stream(*_, **__):
        for _ in range(3):
            shown.append(screen.buffer.getvalue())
            yield torch.tensor([[token]])

    model = SimpleNamespace(
        config=GPTConfig(vocab_size=512), wte=torch.nn.Embedding(1, 1), stream=stream
    )
    monkeypatch.setattr(sys, "stdout", screen)
    generate.tell_aloud(model, generate.Arguments(prompt="Tom"))
    assert shown == [b"Tom", b"Toma", b"Tomaa"]


def test_empty_prompt_and_greedy(script, run_dir):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--prompt", "", "--temperature", 0)
    results = [told(script("generate.py", *flags, "--seed", seed)) for seed in (1, 2)]
    assert results[0] == results[1] and results[0].strip()


def test_interactive_tells_a_story_a_line_and_another_for_an_empty_one(tells, run_dir):
    flags = ("--max_new_tokens", 20, "--seed", 5, "--interactive")
    told = tells(*flags, typed="\nOne day\n\n\nTom 👦\n".encode())
    model, _ = load_model(run_dir / "StoryGPT_best.pt")
    asked = [("This is the story", 5), *(("One day", seed) for seed in (5, 6, 7)), ("Tom 👦", 5)]
    settings = GenerationSettings(max_new_tokens=20)
    stories = [generate_stories(model, p, [seed], settings)[0] for p, seed in asked]
    assert told == "".join(f"{story}\n" for story in stories)  # no "> ": nobody sits there

    class Keyboard(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    typed = "\nOne day\n\n\nTom 👦\n".encode()
    assert tells(*flags, typed=typed, seat=Keyboard) == told  # into a file, which is stories alone
    as_on_windows = "\ufeff\r\nOne day\r\n\r\n\r\nTom 👦\r\n".encode()
    assert tells(*flags, typed=as_on_windows) == told


def test_interactive_bytes_that_are_no_text_are_replaced(tells):
    told = tells("--max_new_tokens", 1, "--interactive", typed=b"\xff\n")
    assert told.startswith("\ufffd") and "> " not in told


def test_characters_that_control_a_terminal_do_not_reach_one(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "Tom\x1b[2J\x07 ran.\r\x9b1A\x7f\n\tThe end"
    for screen, shown in (
        (Terminal(), "Tom\ufffd[2J\ufffd ran.\ufffd\ufffd1A\ufffd\n\tThe end\n"),
        (io.StringIO(), text + "\n"),  # a file holds what was told
    ):
        tokenizer = load_tokenizer(512)
        ids = tokenizer.encode_ordinary(text.removeprefix("Tom"))
        model = SimpleNamespace(
            config=GPTConfig(vocab_size=512),
            wte=torch.nn.Embedding(1, 1),
            stream=lambda *_, ids=ids, **__: (torch.tensor([[token]]) for token in ids),
        )
        monkeypatch.setattr(sys, "stdout", screen)
        generate.tell_aloud(model, generate.Arguments(prompt="Tom"))
        assert screen.getvalue() == shown


def test_a_model_is_known_by_its_weights_file_its_address_and_its_revision(
    script, fails, run_dir, tmp_path
):
    """Two versions in one repo, which begin differently."""
    checkpoint = load_checkpoint(run_dir / BEST)
    stories, versions = [], []
    for opening in ("Once more", "One day, a boy"):
        meta = {"dataset": "builtin", "vocab_size": 512, "openings": [[opening, 0.5]]}
        counts = dict.fromkeys(("stories", "tokens", "bytes"), 9) | {"sha256": opening}
        meta["splits"] = {"train": counts, "validation": counts}
        folder = tmp_path / opening
        folder.mkdir()
        write_folder(folder, checkpoint | {"record": begin_record(meta, None)})
        versions.append({path.name: path.read_bytes() for path in folder.iterdir()})
        stories.append(opening)
    flags = ("--max_new_tokens", 3, "--device", "cpu")

    def begins(checkpoint, **environment) -> str:
        result = script("generate.py", "--checkpoint", checkpoint, *flags, **environment)
        assert result.code == 0, result.output
        return next(text for text in stories if text in result.output)

    assert begins(tmp_path / stories[1] / "model.safetensors") == stories[1]
    with Hub() as hub:
        repo = hub.add("models/you/x", versions[0])
        repo.commits.append(versions[1])
        environment = hub.environment(tmp_path / "hf") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        old = repo.sha(1)
        for name, told in (
            ("you/x", 1),
            ("you/x@main", 1),
            (f"you/x@{old}", 0),
            ("https://huggingface.co/you/x", 1),
            ("https://huggingface.co/you/x/", 1),
            ("https://huggingface.co/you/x?library=transformers", 1),
            ("hf.co/you/x", 1),
            (f"https://huggingface.co/you/x/resolve/{old}/model.safetensors?download=true", 0),
            (f"https://huggingface.co/you/x/tree/{old}", 0),
            (f"https://huggingface.co/you/x/blob/{old}/model.safetensors", 0),
        ):
            assert begins(name, **environment) == stories[told], name
        says = "you/x is no file or folder here, and cannot be downloaded (HTTP 404)"
        fails("generate.py", "--checkpoint", "you/x@none", says=says, **environment)
    page = "https://example.com/you/x"
    fails("generate.py", "--checkpoint", page, says="there is no checkpoint https:/example.com")


@pytest.fixture
def endless(tmp_path):
    """A checkpoint that answers everything with " a a a a", whatever it has read."""
    config = GPTConfig(vocab_size=512, context_length=32, n_layer=1, n_head=1, n_embd=8)
    model, (token,) = GPT(config), load_tokenizer(512).encode_ordinary(" a")
    with torch.no_grad():
        model.wte.weight[token] = 1.0  # all others are near 0
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
    checkpoint = {"gpt_config": config, "training_config": TrainingConfig(), "step": 1}
    checkpoint |= {"val_loss": 1.0, "model_state_dict": model.state_dict()}
    save_checkpoint(tmp_path / "endless.pt", checkpoint)
    return tmp_path / "endless.pt"


def test_ctrl_c_ends_a_story_and_ctrl_d_the_program(endless):
    """On a terminal, which throws away what was typed before a Ctrl-C: every key waits for what
    it answers. A story of " a" alone holds no prompt."""
    pty = pytest.importorskip("pty")
    flags = ["--checkpoint", str(endless), "--temperature", "0", "--max_new_tokens", "1000000"]
    process, here = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ["TERM"] = "dumb"  # no sequences that a terminal would hide
        os.execv(sys.executable, [sys.executable, "generate.py", "--interactive", *flags])
    seen, deadline = b"", time.monotonic() + 90

    def read_for(seconds: float, text: bytes) -> None:
        """Reads what comes in so many seconds, or until there is `text`."""
        nonlocal seen
        end = min(deadline, time.monotonic() + seconds)
        while text not in seen and time.monotonic() < end:
            if select.select([here], [], [], 0.1)[0]:
                seen += os.read(here, 4096)
        assert time.monotonic() < deadline, seen[-500:]

    def wait_for(*texts: bytes) -> None:
        """Reads until the texts have come, in this order."""
        nonlocal seen
        for text in texts:
            read_for(90, text)
            seen = seen[seen.index(text) + len(text) :]

    try:
        for _ in range(2):
            wait_for(b"> ")
            os.write(here, b"The dog\n")
            wait_for(b"The dog", b"The dog a a a")  # as typed, and as told
            os.write(here, b"\x03")
        wait_for(b"> ")
        # And none while nothing is told. Python may miss one between a prompt and the wait for a
        # key, until the next comes: type it again, as who sees nothing happen does.
        while b"> " not in seen:
            os.write(here, b"\x03")
            read_for(5, b"> ")
        wait_for(b"> ")
        os.write(here, b"\x1b[A\n")  # the arrow up: the line before
        wait_for(b"The dog", b"The dog a a a")
        os.write(here, b"\x03")
        wait_for(b"> ")
        os.write(here, b"\x04")
        status = None
        while status is None:
            assert time.monotonic() < deadline
            ended, number = os.waitpid(process, os.WNOHANG)
            status = number if ended else None
            time.sleep(0.01)
        process = None
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(here)


def test_what_is_told_from_is_the_best_that_training_leaves():
    taken = {script.Arguments().checkpoint for script in (generate, evaluate)}
    assert taken == {train.FirstFlags().checkpoint_dir / BEST}


def test_mistakes_are_named(fails, run_dir, tmp_path):
    best = ("--checkpoint", run_dir / "StoryGPT_best.pt")
    for flags, says in (
        (("--checkpoint", tmp_path / "none.pt"), "there is no checkpoint"),
        ((*best, "--temperature", -1), "temperature must be at least 0"),
        ((*best, "--top_k", 0), "top_k must be at least 1"),
        ((*best, "--top_p", 2), "top_p must be above 0"),
        ((*best, "--num_samples", 0), "num_samples must be a whole number of at least 1"),
        ((*best, "--device", "cuda:99"), "there is no device"),
        ((*best, "--seed", 2**63 - 1), f"seed {2**63 - 1} is over"),
    ):
        fails("generate.py", *flags, says=says)
