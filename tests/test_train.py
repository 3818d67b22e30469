import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

from config import GPTConfig, TrainingConfig
from model import GPT
from storygpt.checkpoint import load_checkpoint
from storygpt.token_files import load_meta, load_tokens, training_batch, validation_starts
from train import build_optimizers, build_schedule, draw_loss_plot, estimate_loss


def metrics_of(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_leaves_what_it_promises(run_dir, data_dir):
    metrics = metrics_of(run_dir)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert [line["step"] for line in metrics if "val_loss" in line] == [10, 20]
    assert metrics[-1]["tokens"] == 20 * 4 * 2 * 64
    assert all(line["grad_norm"] > 0 and line["tokens_per_second"] > 0 for line in metrics)
    assert metrics[-1]["val_loss"] < metrics[9]["val_loss"] < math.log(512)
    best, final, latest = (
        load_checkpoint(run_dir / f"StoryGPT_{name}.pt") for name in ("best", "final", "latest")
    )
    assert best["val_loss"] == final["val_loss"] == metrics[-1]["val_loss"]
    assert best.keys() == final.keys() < latest.keys()
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in best["model_state_dict"])
    image = Image.open(run_dir / "loss_plot.png")
    assert image.size == (960, 600)
    assert len(np.unique(np.asarray(image).reshape(-1, 4), axis=0)) > 50  # there are curves on it
    names = {path.name for path in run_dir.iterdir()}
    weights = {f"StoryGPT_{name}.pt" for name in ("best", "final", "latest")}
    assert names == weights | {"metrics.jsonl", "loss_plot.png"}


def test_reported_losses_are_those_of_a_plain_float64_loop(script, data_dir, tmp_path):
    """Replays the run by hand: Adam written out, one large batch for the accumulated ones."""
    flags = [*TINY, "--dropout", "0", "--max_steps", "6", "--eval_interval", "3"]
    flags += ["--data_dir", data_dir, "--checkpoint_dir", tmp_path, "--grad_clip", "0.5"]
    result = script("train.py", *flags)
    assert result.code == 0, result.output
    checkpoint = load_checkpoint(tmp_path / "StoryGPT_final.pt")
    config = checkpoint["training_config"]
    torch.manual_seed(config.seed)
    model = GPT(checkpoint["gpt_config"]).double()
    meta = load_meta(data_dir, 512)
    tokens, val_tokens = (load_tokens(data_dir, s, meta, 64) for s in ("train", "validation"))
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}

    def loss_of(x, y):
        return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())

    for line in metrics_of(tmp_path):
        step = line["step"]
        model.zero_grad()
        x, y = map(torch.from_numpy, training_batch(tokens, config.seed, step, range(8), 64))
        loss = loss_of(x, y)
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        warm = (step - 1) / 4  # the share of the warm-up that is over
        lr = 3e-3 * (1e-3 + (1 - 1e-3) * warm)
        if step > 4:
            lr = 3e-4 + (3e-3 - 3e-4) * (1 + math.cos(math.pi * (step - 5) / 2)) / 2
        assert line["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert line["learning_rate"] == pytest.approx(lr, rel=1e-6)
        with torch.no_grad():
            for name, p in model.named_parameters():
                mean, square = moments[name]
                grad = p.grad * min(1, 0.5 / norm)
                mean.lerp_(grad, 0.1)
                square.lerp_(grad**2, 0.05)
                if p.dim() >= 2:
                    p.mul_(1 - lr * 0.1)
                p -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        if "val_loss" in line:
            starts = validation_starts(val_tokens, 64, 16)
            rows = np.stack([val_tokens[s : s + 65] for s in starts]).astype(np.int64)
            rows = torch.from_numpy(rows)
            with torch.no_grad():
                expected = loss_of(rows[:, :-1], rows[:, 1:]).item()
            assert line["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_muon_orthogonalizes_the_blocks_matrices_and_leaves_the_rest_to_adamw():
    config = TrainingConfig(
        optimizer="muon", learning_rate=0.01, min_lr=0, weight_decay=0.0, max_steps=2_000
    )
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, context_length=16, n_layer=2, n_head=2, n_embd=32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randint(300, (8, 17))
    model(x[:, :-1], x[:, 1:])[1].backward()
    for optimizer in build_optimizers(model, config):
        optimizer.step()
    for name, p in model.named_parameters():
        update = (before[name] - p.detach()) / 0.01
        if name.startswith("h.") and p.dim() == 2:
            # U Vᵀ of the gradient U S Vᵀ, as far as five Newton-Schulz steps go, 0.2 √max(shape)
            u, s, vt = torch.linalg.svd(p.grad, full_matrices=False)
            along = ((u.T @ update @ vt.T) / (0.2 * max(p.shape) ** 0.5)).diagonal()[s > 0.1 * s[0]]
            assert along.min() > 0.6 and along.max() < 1.3, name
        else:  # Adam's first step is the sign of the gradient
            moved = p.grad.abs() > 1e-5
            assert torch.allclose(update[moved], p.grad[moved].sign(), atol=1e-2), name


def test_schedule_is_the_references():
    config = TrainingConfig(max_steps=500, warmup_steps=100, learning_rate=3e-4, min_lr=3e-5)
    model = GPT(GPTConfig(vocab_size=300, context_length=8, n_layer=1, n_head=1, n_embd=8))
    (optimizer,) = build_optimizers(model, config)
    schedule = build_schedule(optimizer, config)
    rates = []
    for _ in range(500):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(3e-7)
    assert rates[50] == pytest.approx(3e-4 * (0.001 + 0.999 / 2))
    assert max(rates) == rates[100] == pytest.approx(3e-4)
    assert rates[300] == pytest.approx((3e-4 + 3e-5) / 2)
    assert rates[499] == pytest.approx(3e-5, rel=1e-2)


def test_evaluation_leaves_training_as_it_was(data_dir):
    config = TrainingConfig(batch_size=4, eval_iters=2)
    model = GPT(GPTConfig(vocab_size=512, context_length=64, n_layer=1, n_head=1, n_embd=16))
    tokens = load_tokens(data_dir, "validation", load_meta(data_dir, 512), 64)
    model.train()
    precision = torch.autocast("cpu", enabled=False)
    losses = {estimate_loss(model, tokens, config, 64, precision) for _ in range(3)}
    assert len(losses) == 1 and model.training  # the same windows, without dropout


def test_plot_of_a_run_without_evaluations_is_left_out(tmp_path):
    draw_loss_plot([], tmp_path / "a.png")
    draw_loss_plot([{"step": 1, "tokens": 5, "train_loss": 3.0}], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_story_windows_train(script, data_dir, tmp_path):
    flags = ["--data_dir", data_dir, "--checkpoint_dir", tmp_path, "--story_windows", "0.5"]
    result = script("train.py", *TINY, *flags)
    assert result.code == 0, result.output
    assert metrics_of(tmp_path)[-1]["val_loss"] < 6


def test_mistakes_are_named_before_any_step(fails, data_dir, run_dir, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(data_dir, short)
    (short / "train.bin").write_bytes((data_dir / "train.bin").read_bytes()[:-2])
    data = ["--data_dir", data_dir]
    for flags, says in (
        (["--data_dir", tmp_path / "none"], "no prepared data in"),
        (["--data_dir", short], "where meta.json says"),
        ([*data, "--vocab_size", "513"], "pass --vocab_size 512"),
        ([*data, "--n_head", "3"], "n_embd 32 is not divisible by n_head 3"),
        ([*data, "--warmup_steps", "20"], "pass --warmup_steps 2"),
        ([*data, "--device", "tpu"], "is no device"),
        ([*data, "--device", "cuda:99"], "there is no device cuda:99"),
        ([*data, "--context_length", "60000"], "too few for one window"),
    ):
        fails("train.py", *TINY, "--checkpoint_dir", tmp_path / "out", *flags, says=says)
        assert not (tmp_path / "out").exists()
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    flags = [*TINY, *data, "--checkpoint_dir", run_dir]
    fails("train.py", *flags, says="already holds a run")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


@pytest.mark.parametrize(
    "flags", [["--preset", "huge"], ["--n_layers", "3"], ["--n_layer", "x"], ["--checkpoint_dir"]]
)
def test_mistyped_flags_are_named(flags, script):
    result = script("train.py", *flags)
    assert result.code == 2 and "Traceback" not in result.output
    assert re.match(r"error: .*; see python train.py --help\n$", result.output)
    assert flags[0] in result.output


def test_real_stories_are_learned(script, tinystories, tmp_path):
    data = tmp_path / "data"
    flags = ("--dataset", tinystories, "--vocab_size", 1024, "--data_dir", data)
    assert script("prepare_data.py", *flags).code == 0
    flags = "--n_layer 2 --n_embd 64 --n_head 2 --batch_size 4 --gradient_accumulation_steps 1 "
    flags += "--vocab_size 1024 --warmup_steps 10 --max_steps 90 --eval_interval 30 "
    flags += "--eval_iters 10 --learning_rate 0.003 --min_lr 0.0003 --device cpu"
    result = script(
        "train.py", *flags.split(), "--data_dir", data, "--checkpoint_dir", tmp_path / "run"
    )
    assert result.code == 0, result.output
    losses = [line["val_loss"] for line in metrics_of(tmp_path / "run") if "val_loss" in line]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert losses[-1] < 5.2  # of ln 1024 = 6.9 at the start
