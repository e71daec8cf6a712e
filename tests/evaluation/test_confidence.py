import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osum_npu.evaluation.confidence import bootstrap_interval, wilson_interval


@given(st.integers(1, 10**6), st.data())
def test_wilson_bounds_solve_the_score_equation(trials, data):
    share = data.draw(st.integers(0, trials)) / trials
    for bound in wilson_interval(round(share * trials), trials):
        assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / trials, rel=1e-4, abs=1e-12)


def test_bootstrap_interval_agrees_with_drawing_utterances_one_by_one():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 20, 300)
    errors = rng.binomial(lengths, 0.1)
    drawn = rng.integers(0, 300, (4000, 300))
    expected = np.percentile(errors[drawn].sum(1) / lengths[drawn].sum(1), [2.5, 97.5])
    assert bootstrap_interval(errors, lengths) == pytest.approx(expected, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30), st.randoms())
def test_bootstrap_interval_knows_no_order_and_is_ordered(pairs, rng):
    shuffled = random.Random(rng.random()).sample(pairs, len(pairs))
    interval = bootstrap_interval(*zip(*pairs, strict=True))
    assert interval == bootstrap_interval(*zip(*shuffled, strict=True))
    assert interval is None if not sum(d for _, d in pairs) else interval[0] <= interval[1]


def test_no_trials_no_interval():
    assert wilson_interval(0, 0) is None
    assert bootstrap_interval([], []) is None
    assert bootstrap_interval([3], [0]) is None


def test_many_distinct_utterances_are_drawn_in_blocks():
    values = np.random.default_rng(0).random(9000)
    low, high = bootstrap_interval(values, np.ones(9000))
    spread = 1.96 * values.std() / np.sqrt(9000)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.15)
    assert low < values.mean() < high
