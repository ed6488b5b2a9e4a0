"Selection: normalisation, weights, frontier, each against numbers known without it."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from matfm.core import BadInput
from matfm.evaluate.selection import Criterion, frontier, normalised, pareto, reversals, scores, select, sensitivity, weight_ranges

VALUES = arrays(float, st.tuples(st.integers(3, 7), st.integers(2, 4)), elements=st.floats(0.01, 100).map(lambda v: round(v, 3)))


def table(values): return {f"m{i}": {f"c{j}": float(v) for j, v in enumerate(row)} for i, row in enumerate(values)}


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_winners_lie_on_the_frontier(values):
    s = select(table(values), [Criterion(f"c{j}", j + 1) for j in range(values.shape[1])])
    slow = [not any((values[k] <= v).all() and (values[k] < v).any() for k in range(len(values))) for v in values]
    assert pareto(values, ["min"] * values.shape[1]).tolist() == slow
    assert any(s.totals()[s.candidates.index(n)] == s.totals().max() for n in frontier(s))
    shares = sensitivity(s, draws=500)
    assert abs(sum(r["wins"] for r in shares) - 1) < 1e-9 and all(1 <= r["mean rank"] <= len(values) for r in shares)
    assert (s.scores >= 0).all() and (s.scores <= 1).all()


@settings(max_examples=40, deadline=None)
@given(VALUES, st.floats(0.1, 10), st.floats(0.5, 20))
def test_scores_do_not_depend_on_the_unit(values, factor, shift):
    v = values[:, 0]
    assert np.allclose(scores(v, Criterion("x")), scores(v * factor + shift, Criterion("x")), atol=1e-6)
    assert np.allclose(scores(v, Criterion("x", log=True)), scores(v * factor, Criterion("x", log=True)), atol=1e-6)


def test_target_scores_ignore_who_takes_part():
    c = Criterion("mae", better="min", good=1.0, bad=5.0)
    assert np.allclose(scores([0.5, 3.0, 9.0], c), [1, 0.5, 0]) and np.allclose(scores([3.0], c), [0.5])
    assert np.allclose(scores([100.0, 10.0, 1.0], Criterion("speed", better="max", log=True, good=100, bad=1)), [1, 0.5, 0])


def test_share_of_weights_is_the_area_of_the_simplex():
    # two criteria: a total of A is w, of B is 1 − w, of C is t for every w: C wins where max(w, 1 − w) < t
    for t in (0.4, 0.6, 0.8):
        s = select({"A": {"x": 1.0, "y": 0.0}, "B": {"x": 0.0, "y": 1.0}, "C": {"x": t, "y": t}}, [Criterion("x", better="max"), Criterion("y", better="max")])
        wins = {r["candidate"]: r["wins"] for r in sensitivity(s, draws=40_000)}
        assert wins["C"] == pytest.approx(max(2 * t - 1, 0), abs=0.01) and wins["A"] == pytest.approx(wins["B"], abs=0.02)


def test_requirements_exclude_and_do_not_scale():
    m = {"good": {"e": 1.0, "s": 1.0}, "fair": {"e": 2.0, "s": 0.5}, "poor": {"e": 3.0, "s": 0.7}, "slow": {"e": 0.1, "s": 1e6}}
    s = select(m, [Criterion("e", 1), Criterion("s", 1, unit="s", must=60)])
    assert s.excluded == {"slow": "s 1e+06, must be ≤ 60 s"} and s.scores.max(axis=0).tolist() == [1, 1]
    assert s.table()[-1]["candidate"] == "slow" and "slow" in s._repr_html_()
    with pytest.raises(BadInput, match="no candidate"): select(m, [Criterion("e", must=0.0)])
    with pytest.raises(BadInput, match="different names"): select(m, [Criterion("e"), Criterion("e")])
    with pytest.raises(BadInput, match="finite"): select({**m, "nan": {"e": float("nan"), "s": 1.0}}, [Criterion("e")])


def test_small_shakes_keep_a_clear_winner_and_not_a_close_one():
    clear = select({"a": {"x": 0.0, "y": 0.1}, "b": {"x": 1.0, "y": 1.0}, "c": {"x": 0.9, "y": 0.0}}, [Criterion("x", 2), Criterion("y", 1)])
    close = select({"a": {"x": 0.0, "y": 1.0}, "b": {"x": 1.0, "y": 0.0}, "c": {"x": 1.0, "y": 1.0}}, [Criterion("x", 1.02), Criterion("y", 1)])
    assert sensitivity(clear, around=50)[0]["wins"] > 0.99 and 0.4 < sensitivity(close, around=50)[0]["wins"] < 0.7
    assert weight_ranges(close)[0]["low"] == pytest.approx(0.5) and reversals(clear) == []


def test_weights():
    assert normalised([2, 1, 1]).tolist() == [0.5, 0.25, 0.25]
    for wrong in ([0, 0], [-1, 2], [float("nan")], [[1]]):
        with pytest.raises(BadInput): normalised(wrong)
