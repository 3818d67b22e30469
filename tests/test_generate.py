import os
import re
import select
import signal
import sys
import time

import pytest
from conftest import ROOT, python

from storygpt.checkpoint import load_model
from storygpt.telling import tell
from storygpt.tokenizer import TextStream, load_tokenizer


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


def test_same_seed_same_story_and_it_is_the_models(script, run_dir):
    checkpoint = run_dir / "StoryGPT_best.pt"
    flags = ("--checkpoint", checkpoint, "--max_new_tokens", 40, "--prompt", "One day,")
    first, again, other = (told(script("generate.py", *flags, "--seed", s)) for s in (5, 5, 6))
    assert first == again != other
    assert first.startswith("One day,")
    import torch

    model, _ = load_model(checkpoint)
    tokenizer = load_tokenizer(512)
    torch.manual_seed(5)
    idx = torch.tensor([tokenizer.encode_ordinary("One day,")])
    ids = model.generate(idx, 40, temperature=0.8, top_k=100)[0].tolist()
    assert first.rstrip("\n") == tokenizer.decode(ids).split("<|endoftext|>")[0].rstrip("\n")


def test_several_samples_in_one_batch(script, run_dir):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--max_new_tokens", 20)
    stories = told(script("generate.py", *flags, "--num_samples", 3)).split("-" * 40)
    assert len(stories) == 3
    assert all(story.strip().startswith("Once upon a time") for story in stories)
    assert len({story.strip() for story in stories}) == 3


def test_prompt_over_the_context_is_cut_from_the_left_and_says_so(script, run_dir):
    prompt = "dog " * 200 + "The end of it"
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--max_new_tokens", 5)
    result = script("generate.py", *flags, "--prompt", prompt)
    assert "more than the model's context of 64: only its last 64 are read" in result.output
    assert "The end of it" in told(result)


def test_empty_prompt_and_greedy(script, run_dir):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--prompt", "", "--temperature", 0)
    results = [told(script("generate.py", *flags, "--seed", seed)) for seed in (1, 2)]
    assert results[0] == results[1] and results[0].strip()


def test_interactive_tells_a_story_a_line_and_another_for_an_empty_one(run_dir):
    checkpoint = run_dir / "StoryGPT_best.pt"
    flags = ("--checkpoint", checkpoint, "--max_new_tokens", 20, "--seed", 5, "--interactive")
    result = python("generate.py", *flags, input="\nOne day\n\n\nTom 👦\n")
    assert result.returncode == 0, result.stderr
    model, _ = load_model(checkpoint)
    asked = [("Once upon a time", 5), *(("One day", seed) for seed in (5, 6, 7)), ("Tom 👦", 5)]
    stories = [tell(model, prompt, [seed], 20)[0][0] for prompt, seed in asked]
    assert result.stdout == "".join(f"> {story}\n" for story in stories) + "> \n"


def test_interactive_bytes_that_are_no_text_are_replaced(run_dir):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--max_new_tokens", 1, "--interactive")
    result = python("generate.py", *flags, input=b"\xff\n", text=False)
    assert result.returncode == 0 and "> \ufffd".encode() in result.stdout, result.stderr


@pytest.mark.xfail(strict=False, reason="what is typed at a bad moment can be lost on a terminal")
def test_ctrl_c_ends_a_story_and_ctrl_d_the_program(run_dir):
    pty = pytest.importorskip("pty")
    checkpoint = run_dir / "StoryGPT_best.pt"
    model, _ = load_model(checkpoint)
    starts = ("The dog ran", "One day", "Once upon", "She saw", "A big", "Tom said")
    endless = next(p for p in starts if not tell(model, p, [1337], 1000, 0)[0][1])
    flags = ["--checkpoint", str(checkpoint), "--temperature", "0", "--max_new_tokens", "1000000"]
    process, here = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "generate.py", "--interactive", *flags])
    seen = b""

    def wait_for(text: bytes, times: int = 1) -> None:
        nonlocal seen
        end = time.monotonic() + 30
        while seen.count(text) < times and time.monotonic() < end:
            if select.select([here], [], [], 1)[0]:
                seen += os.read(here, 4096)
        assert seen.count(text) >= times, seen

    try:
        for story in (1, 2):
            wait_for(b"> ", story)
            os.write(here, endless.encode() + b"\n")
            wait_for(endless.encode(), 2 * story)  # as typed, and as told
            os.write(here, b"\x03")
        wait_for(b"> ", 3)
        os.write(here, b"\x03")  # and none while nothing is told
        wait_for(b"> ", 4)
        os.write(here, b"\x1b[A\n")  # the arrow up: the line before
        wait_for(endless.encode(), 6)
        os.write(here, b"\x03")
        wait_for(b"> ", 5)
        os.write(here, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        process = None
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(here)


def test_mistakes_are_named(fails, run_dir, tmp_path):
    best = ("--checkpoint", run_dir / "StoryGPT_best.pt")
    for flags, says in (
        (("--checkpoint", tmp_path / "none.pt"), "there is no checkpoint"),
        ((*best, "--temperature", -1), "temperature must be at least 0"),
        ((*best, "--top_k", 0), "top_k must be at least 1"),
        ((*best, "--top_p", 2), "top_p must be above 0"),
        ((*best, "--num_samples", 0), "num_samples must be a whole number of at least 1"),
        ((*best, "--device", "cuda:99"), "there is no device"),
    ):
        fails("generate.py", *flags, says=says)
