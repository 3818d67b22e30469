from dataclasses import replace

import numpy as np
import pytest

from storygpt.batches import Batches, cut_windows, order_of, validation_starts

TOKENS = np.arange(1000, dtype="<u2")


def make(tokens, seed, windows_per_step, context_length=16, **options) -> Batches:
    return Batches(
        tokens=tokens,
        end_of_text=0,
        seed=seed,
        windows_per_step=windows_per_step,
        context_length=context_length,
        **options,
    )


def test_targets_are_the_next_tokens():
    x, y = cut_windows(TOKENS, np.array([0, 5, 990]), 9)
    assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
    assert x.tolist() == [list(range(s, s + 9)) for s in (0, 5, 990)]
    assert np.array_equal(y, x + 1)


def targets_of_an_epoch(num_tokens: int, length: int, epoch: int) -> np.ndarray:
    """How often each position is a target in all windows of one epoch, drawn as one step."""
    tokens = np.arange(num_tokens, dtype="<u2")
    one = make(tokens, seed=3, windows_per_step=1, context_length=length)
    whole = replace(one, windows_per_step=one.windows_per_epoch)
    _, y = whole(epoch + 1, range(whole.windows_per_step))
    return np.bincount(y.flatten(), minlength=num_tokens)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 64])
def test_each_token_is_a_target_once_an_epoch_but_for_less_than_a_window_at_either_end(length):
    for num_tokens in (
        length + 1,
        2 * length,
        2 * length + 1,
        5 * length,
        *range(300, 300 + length),
    ):
        firsts = []
        for epoch in range(3):
            counts = targets_of_an_epoch(num_tokens, length, epoch)
            seen = np.flatnonzero(counts)
            assert (counts[seen[0] : seen[-1] + 1] == 1).all()
            assert seen[0] - 1 < length  # the first token of all can be no target
            assert num_tokens - 1 - seen[-1] < length
            firsts.append(seen[0])
        if num_tokens > 2 * length and length > 2:
            assert firsts[0] != firsts[1] != firsts[2]  # another offset each time


def test_two_epochs_in_steps_that_cross_them():
    tokens = np.arange(1000, dtype="<u2")
    batches = make(tokens, seed=3, windows_per_step=8)
    num_windows = batches.windows_per_epoch
    assert num_windows % 8 and 2 * num_windows % 8  # both epochs end within a step
    steps = range(1, 2 * num_windows // 8 + 2)
    rows = np.concatenate([batches(s, range(8))[1] for s in steps])
    counts = np.bincount(rows[: 2 * num_windows].flatten(), minlength=1000)
    assert set(counts[17:-17]) == {2} and counts.max() == 2
    assert len(np.unique(rows[:num_windows], axis=0)) == num_windows
    first, second = rows[:num_windows, 0], rows[num_windows : 2 * num_windows, 0]
    assert not np.array_equal(first // 16, second // 16)  # another order
    assert not np.array_equal(np.sort(first), first)


def test_any_number_of_processes_draws_the_batches_of_one():
    batches = make(TOKENS, seed=7, windows_per_step=12)
    for step in (1, 7, 8, 100):
        whole = batches(step, range(12))
        for processes in (2, 4):
            own = 12 // processes
            parts = [batches(step, range(i, i + own)) for i in reversed(range(0, 12, own))]
            for i in (0, 1):
                assert np.array_equal(np.concatenate([part[i] for part in parts[::-1]]), whole[i])
        assert not np.array_equal(whole[0], replace(batches, seed=8)(step, range(12))[0])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_windows_is_moved_back_to_where_its_story_starts(share):
    tokens = np.random.default_rng(0).integers(0, 40, 20_000).astype("<u2")  # 0 ends a story
    batches = make(tokens, seed=5, windows_per_step=300, story_windows=share)
    plain = batches.starts(3, range(300))
    x, y = batches(3, range(300))
    places = {tokens[i : i + 17].tobytes(): i for i in range(20_000 - 16)}
    rows = np.concatenate((x, y[:, -1:]), 1).astype("<u2")
    starts = np.array([places[row.tobytes()] for row in rows])
    moved, behind = 0, 0
    for start, was in zip(starts, plain, strict=True):
        if start != was:
            (between,) = np.nonzero(tokens[start : was + 1] == 0)  # no other story between
            assert between.tolist() in ([0], []) and (
                start == 0 or 0 in tokens[start - 1 : start + 1]
            )
            moved, behind = moved + 1, behind + (tokens[start] != 0)
    assert abs(moved / 300 - share) < 0.1 and abs(behind / moved - 0.5) < 0.15
    parts = [batches(3, range(i, i + 100))[0] for i in (0, 100, 200)]
    assert np.array_equal(np.concatenate(parts), x)


def test_the_order_of_an_epoch_is_kept_in_four_bytes_a_window():
    order = order_of(5, num_windows=100_000, seed=1)
    assert order.nbytes == 400_000 and np.array_equal(np.sort(order), np.arange(100_000))


def test_validation_windows_are_spread_and_do_not_overlap():
    for length, most in ((100, 3), (100, 1000), (999, 1), (7, 40)):
        starts = validation_starts(TOKENS, length, most)
        assert len(starts) == min(most, 999 // length)
        assert starts[0] == 0 and starts[-1] + length < len(TOKENS)
        assert (np.diff(starts) >= length).all()
        assert len(starts) == 1 or starts[-1] >= (len(TOKENS) - 1) * (1 - 2 / len(starts))
