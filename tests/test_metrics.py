"""What a run shows of itself: the plot, and its last words."""

import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from storygpt.cli import progress_bar
from storygpt.log import Log
from storygpt.metrics import draw_loss_plot, read_metrics, smoothed


def entries(number: int, first: int = 1) -> list[dict]:
    """Lines of metrics.jsonl: a loss that falls, evaluated every fifth step, best at the tenth."""
    lines = []
    for step in range(first, first + number):
        line = {"step": step, "tokens": 1_000 * step, "train_loss": 5 / step}
        line |= {"tokens_per_second": 500.0, "epoch": step / 100}
        if step % 5 == 0:
            line["val_loss"] = 2 + abs(step - 10) / 10
        lines.append(line)
    return lines


def test_the_plot_shows_the_curves_and_marks_the_best(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    draw_loss_plot(entries(20), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    lines = {line.get_label(): line.get_xydata() for line in drawn[0].axes[0].lines}
    assert lines["best validation 2.000 at step 10"].tolist() == [[0.01, 2.0]]
    assert lines["validation"].T.tolist() == [[0.005, 0.01, 0.015, 0.02], [2.5, 2, 2.5, 3]]
    raw = drawn[0].axes[0].lines[0].get_xydata()
    assert np.allclose(raw, [[step / 1_000, 5 / step] for step in range(1, 21)])
    draw_loss_plot(entries(4), tmp_path / "none.png")  # not evaluated yet
    assert not (tmp_path / "none.png").exists()


def test_smoothing_neither_lags_nor_changes_a_line():
    ramp = np.arange(500.0)
    assert np.allclose(smoothed(ramp), ramp)
    noise = np.random.default_rng(0).normal(size=5_000)
    assert smoothed(noise)[1_000:4_000].std() < 0.15
    assert np.allclose(smoothed(noise)[200], noise[200 - 50 : 200 + 51].mean())


def test_metrics_are_cut_to_the_step_that_goes_on(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path, 0) == [] and not capsys.readouterr().err
    assert read_metrics(path, 7) == [] and "begin at step 7" in capsys.readouterr().err
    path.write_text("".join(f"{line}\n".replace("'", '"') for line in entries(9)) + '{"step": 10')
    assert read_metrics(path, 7) == entries(7)
    assert [line["step"] for line in read_metrics(path, 100)] == [*range(1, 8)]


@pytest.mark.parametrize("status", [0, 130])
def test_the_last_words_tell_the_speed_of_this_sitting(status, tmp_path, capsys):
    """Of a run resumed at step 10: what was done before counts neither as tokens nor as time."""
    before = entries(10)
    log = Log(before, 10, 90, tmp_path, lambda entry: None, 1.0, torch.device("cpu"), torch.float32)
    with log:
        for entry in entries(20, first=11):
            log.add(entry)
        log.start = time.monotonic() - 10
        said = log.stopped(tmp_path / "data", "none") if status else log.finished(2.0)
    assert "2,000 tokens/s with saves and evaluations" in said
    assert (f"python train.py --resume --data_dir {tmp_path}/data" in said) == (status != 0)
    assert ("best val_loss 2.0000" in said) == (status == 0)
    assert (tmp_path / "loss_plot.png").exists()
    # 60 steps are left, of 1,000 tokens at 500 a second
    assert log.bar.n == 30 and "about 0:02:00 to go at 500 tokens/s" in capsys.readouterr().out


def test_what_only_shows_a_run_ends_none(tmp_path, capsys):
    def track(entry: dict) -> None:
        raise ConnectionError("gone\nfor good") if entry["step"] > 1 else TimeoutError

    nowhere = tmp_path / "no" / "folder"  # for the plot
    log = Log([], 0, 30, nowhere, track, 1.0, torch.device("cpu"), torch.float32)
    with log:
        for entry in entries(5):
            log.add(entry)
    said = capsys.readouterr().err
    assert said.count("could not show the run: gone for good\n") == 4
    assert "could not show the run: TimeoutError" in said and "loss_plot.png cannot be" in said


def test_a_log_file_is_not_filled_with_progress(capsys):
    bar = progress_bar(total=9)
    for _ in range(3):
        time.sleep(0.15)
        bar.update()
    assert capsys.readouterr().err.count("\r") == 1
