"""What a run shows of itself: the plot, and its last words."""

import os
import signal

import numpy as np
import pytest
from conftest import entries, metrics_of, wait_for_step
from matplotlib.figure import Figure

from storygpt.metrics import draw_loss_plot, read_metrics, smoothed


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


def test_smoothing_ends_in_a_line_and_not_in_a_single_value():
    """The mean of fewer and fewer values ended in one: its hook said nothing of the run."""
    rng = np.random.default_rng(0)
    for number in (100, 1_499, 5_000):
        values = 1 / (20 + np.arange(number)) + rng.normal(size=number)
        reach = number // 100
        line = np.polyfit(range(2 * reach + 1), values[-2 * reach - 1 :], 1)
        end = smoothed(values)[-reach - 1 :]  # from the middle of the last window on
        assert np.allclose(end, np.polyval(line, range(reach, 2 * reach + 1)))
    for number in (0, 1, 99):  # too few to smooth
        assert smoothed(values[:number]).tolist() == values[:number].tolist()


def test_metrics_are_cut_to_the_step_that_goes_on(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path, 0) == [] and not capsys.readouterr().err
    assert read_metrics(path, 7) == [] and "has no steps 1 to 7" in capsys.readouterr().err
    path.write_text("".join(f"{line}\n".replace("'", '"') for line in entries(9)) + '{"step": 10')
    assert read_metrics(path, 7) == entries(7)
    assert [line["step"] for line in read_metrics(path, 100)] == [*range(1, 8)]


def test_metrics_with_a_gap_are_kept_and_no_reason_to_refuse_the_run(
    script, flags, data_dir, tmp_path
):
    """A backup of the metrics, restored beside a later checkpoint, and then a second stop."""
    run = tmp_path / "run"
    assert script("train.py", *flags, "--max_steps", 200, "--max_hours", 1e-9).code == 75
    resume = ["train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", run]
    process = script.start(*resume)
    wait_for_step(process, run, 9)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(whole[:4]))
    for _ in range(2):
        result = script(*resume, "--max_hours", 1e-9)
        assert result.code == 75, result.output
        assert f"metrics.jsonl has no steps 5 to {len(whole)}: the curves" in result.output
    steps = [line["step"] for line in metrics_of(run)]
    assert steps == [1, 2, 3, 4, len(whole) + 1, len(whole) + 2]


def test_a_byte_order_mark_loses_no_metrics(script, copy_of_run, data_dir):
    path = copy_of_run / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + before + b'{"step": 21, "tok')  # and half a line
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", copy_of_run)
    assert result.code == 0, result.output
    assert path.read_bytes() == before


# The last is of a step that has been.
LINES = ["", "{}", "3", "[1]", "not JSON", '{"step": 5, "tokens": 1, "train_loss": 3.0}']


@pytest.mark.parametrize("line", LINES)
def test_a_spoiled_line_is_named_and_the_file_untouched(line, fails, copy_of_run, data_dir):
    path = copy_of_run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], line, *lines[6:]]) + "\n")
    before = path.read_bytes()
    flags = ["--resume", "--data_dir", data_dir, "--checkpoint_dir", copy_of_run]
    said = fails("train.py", *flags, says="line 7 of ")
    assert ("has step 5 after step 6" in said) == ("step" in line)
    assert ("not one that training wrote" in said) == ("step" not in line)
    assert path.read_bytes() == before


def test_missing_metrics_are_said(script, copy_of_run, data_dir):
    (copy_of_run / "metrics.jsonl").unlink()
    result = script("train.py", "--resume", "--data_dir", data_dir, "--checkpoint_dir", copy_of_run)
    assert result.code == 0 and "metrics.jsonl has no steps 1 to 20" in result.output
