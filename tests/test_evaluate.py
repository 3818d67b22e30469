import math
import re

import numpy as np
import torch

from storygpt.checkpoint import load_model
from storygpt.losses import all_windows
from storygpt.token_files import load_meta, load_tokens


def test_every_token_is_a_target_once():
    for number in (5, 16, 17, 100, 161):
        tokens = np.arange(1, number + 1, dtype="<u2")
        targets = []
        for x, y in all_windows(tokens, 0, 16, 3):
            assert x.shape == y.shape and x.shape[1] <= 16
            assert np.array_equal(x + 1, y)  # 0, the end-of-text, comes before the first token
            targets += y.flatten().tolist()
        assert targets == tokens.tolist()


def test_agrees_with_float64(script, run_dir, data_dir):
    result = script(
        "evaluate.py", "--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir
    )
    assert result.code == 0, result.output
    model, _ = load_model(run_dir / "StoryGPT_best.pt")
    model.double()
    meta = load_meta(data_dir, 512)
    counts = meta["splits"]["validation"]
    tokens = load_tokens(data_dir, "validation", meta, 64).astype(np.int64)
    stream = torch.from_numpy(np.concatenate(([meta["end_of_text"]], tokens)))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), 64):
            x, y = stream[start : start + 64], stream[start + 1 : start + 65]
            log_probabilities = model(x[None, : len(y)])[0][0].log_softmax(-1)
            total -= log_probabilities[range(len(y)), y].sum().item()
    loss = total / len(tokens)
    bits_per_byte = total / math.log(2) / counts["bytes"]
    printed = [float(n) for n in re.findall(r"^\w.*  ([\d.]+)(?: nats.*)?$", result.output, re.M)]
    assert np.allclose(printed, [loss, math.exp(loss), bits_per_byte], rtol=1e-4)


def test_stories_are_judged(script, run_dir, data_dir):
    flags = ("--checkpoint", run_dir / "StoryGPT_best.pt", "--data_dir", data_dir)
    result = script("evaluate.py", *flags, "--num_stories", 4)
    assert re.search(r"of 4 stories .* \d end .* 0 keep their hero", result.output)


def test_mistakes_are_named(fails, run_dir, data_dir, tmp_path):
    best = ("--checkpoint", run_dir / "StoryGPT_best.pt")
    fails("evaluate.py", "--checkpoint", tmp_path / "a.pt", says="there is no checkpoint")
    fails("evaluate.py", *best, "--data_dir", tmp_path, says="no prepared data")
    fails("evaluate.py", *best, "--data_dir", data_dir, "--batch_size", 0, says="batch_size must")
