import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

from config import GPTConfig
from model import GPT
from storygpt.checkpoint import load_checkpoint
from storygpt.device import describe, peak_flops
from storygpt.distributed import Processes
from storygpt.losses import estimate_loss
from storygpt.metrics import draw_loss_plot
from storygpt.token_files import load_meta, load_tokens, training_batch, validation_starts


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
    assert names == weights | {"metrics.jsonl", "loss_plot.png", ".lock"}


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
        x, y = map(torch.from_numpy, training_batch(tokens, config.seed, step, range(8), 8, 64))
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


def test_evaluation_leaves_training_as_it_was(data_dir):
    model = GPT(GPTConfig(vocab_size=512, context_length=64, n_layer=1, n_head=1, n_embd=16))
    tokens = load_tokens(data_dir, "validation", load_meta(data_dir, 512), 64)
    model.train()
    where = (torch.device("cpu"), torch.float32, Processes())
    losses = {estimate_loss(model, tokens, 64, 4, 2, *where) for _ in range(3)}
    assert len(losses) == 1 and model.training  # the same windows, without dropout


def test_plot_of_a_run_without_evaluations_is_left_out(tmp_path):
    draw_loss_plot([], tmp_path / "a.png")
    draw_loss_plot([{"step": 1, "tokens": 5, "train_loss": 3.0}], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


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


def test_float32_on_a_gpu_says_that_its_products_are_tf32():
    assert describe(torch.device("cuda"), torch.float32) == "cuda, float32 with products in TF32"
    assert describe(torch.device("cuda"), torch.bfloat16) == "cuda, bfloat16"
    assert describe(torch.device("cpu"), torch.float32) == "cpu, float32"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_found_by_its_whole_name(name, known, monkeypatch):
    """A stand-in for the driver, which alone knows the name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == known
