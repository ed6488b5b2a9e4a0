"""Comparisons of methods: what must hold for any losses, and that what is kept is what was made."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from matfm.core import BadInput
from matfm.evaluate.comparison import against, corrected_t, critical_difference, differences, friedman, holm, kept, mean_ranks, over_sets, win_rate

FIVE = arrays(float, 5, elements=st.integers(1, 9999).map(lambda v: v / 100))
TABLE = arrays(float, st.tuples(st.integers(2, 8), st.integers(2, 6)), elements=st.integers(1, 9).map(float))
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(FIVE, FIVE, st.floats(0, 1))
def test_swapping_the_methods_turns_the_sign(a, b, share):
    x, y = corrected_t(a, b, share), corrected_t(b, a, share)
    assert np.isclose(x.mean, -y.mean) and np.isclose(x.low, -y.high) and np.isclose(x.p, y.p)
    assert x.low <= x.mean <= x.high and 0 <= x.p <= 1


@QUICK
@given(FIVE, FIVE)
def test_the_correction_only_widens(a, b):
    plain, corrected = corrected_t(a, b, 0), corrected_t(a, b, 0.25)
    assert corrected.p >= plain.p - 1e-12 and corrected.high - corrected.low >= plain.high - plain.low - 1e-12


def test_the_interval_and_the_p_value_agree():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = rng.normal(size=8), rng.normal(0.4, 1, size=8)
        d = corrected_t(a, b, 0.1)
        assert (d.p < 0.05) == (d.low > 0 or d.high < 0)


def test_without_overlap_it_is_the_paired_t_test():
    a, b = np.random.default_rng(1).random((2, 12))
    assert np.isclose(corrected_t(a, b, 0).p, stats.ttest_rel(a, b).pvalue)


@QUICK
@given(st.integers(1, 60), st.data())
def test_wilson_interval_is_scipys(n, data):
    won = data.draw(st.integers(0, n))
    share, low, high = win_rate(won, n)
    want = stats.binomtest(won, n).proportion_ci(method="wilson")
    assert np.isclose(low, want.low, atol=1e-6) and np.isclose(high, want.high, atol=1e-6) and low - 1e-9 <= share <= high + 1e-9


@QUICK
@given(FIVE, FIVE, st.sampled_from([0.01, 0.5, 2.0, 10.0, 100.0]))
def test_units_do_not_matter_over_sets(a, b, factor):
    scale = factor ** np.arange(5)
    x, y = over_sets(a, b, draws=50), over_sets(a * scale, b * scale, draws=50)
    assert np.isclose(x.ratio, y.ratio) and x.won + x.tied + x.lost == y.won + y.tied + y.lost == 5


def test_over_sets_counts_and_tests_like_scipy():
    a, b = np.random.default_rng(2).uniform(1, 2, (2, 15))
    w = over_sets(a, b)
    assert (w.won, w.lost) == (int((a < b).sum()), int((a > b).sum())) and np.isclose(w.p, stats.wilcoxon(np.log(a / b)).pvalue)
    assert w.ratio_low <= w.ratio <= w.ratio_high and np.isclose(w.ratio, stats.gmean(a / b))


@QUICK
@given(TABLE)
def test_ranks_add_up(table):
    ranks = mean_ranks(table)
    k = table.shape[1]
    assert np.isclose(ranks.sum(), k * (k + 1) / 2) and 1 <= ranks.min() and ranks.max() <= k
    assert 0 <= friedman(table)[2] <= 1


def test_friedman_is_scipys_without_ties():
    table = np.random.default_rng(3).random((10, 4))
    assert np.isclose(friedman(table)[0], stats.friedmanchisquare(*table.T).statistic)


def test_the_critical_difference_of_the_table_of_demsar():
    q = [2.343, 2.728, 3.164]
    for k, want in zip((3, 5, 10), q, strict=True): assert np.isclose(critical_difference(k, 30), want * np.sqrt(k * (k + 1) / 180), atol=1e-3)
    assert critical_difference(4, 40) < critical_difference(4, 10) and critical_difference(4, 10, 0.1) < critical_difference(4, 10, 0.05)


@QUICK
@given(arrays(float, st.integers(1, 8), elements=st.floats(0, 1)))
def test_holm_keeps_the_order_and_never_helps(p):
    adjusted = holm(p)
    assert (adjusted >= p - 1e-15).all() and (adjusted <= 1).all() and (np.diff(adjusted[np.argsort(p)]) >= -1e-15).all()


def test_holm_of_a_known_example():
    assert np.allclose(holm([0.01, 0.02, 0.03, 0.005]), [0.03, 0.04, 0.04, 0.02])


def test_a_missing_loss_is_left_out_and_counted():
    losses = {"a": {"x": 1.0, "y": 2.0, "z": 3.0}, "b": {"x": 2.0, "y": float("nan"), "z": 4.0}}
    (row,) = against("a", losses)
    assert row["sets"] == 2 and row["won"] == 2
    with pytest.raises(BadInput, match="'c'"): against("c", losses)


def test_bad_input_is_named():
    for call, word in ((lambda: differences([1, 2], [[1, 2]]), "shape"), (lambda: corrected_t([1, 2], [1, 3], float("nan")), "test_share"), (lambda: win_rate(1, 0), "n"),
                       (lambda: mean_ranks([1, 2, 3]), "table"), (lambda: over_sets([1, -1], [1, 1]), "> 0")):
        with pytest.raises(BadInput, match=word): call()


def test_kept_reads_back_exactly_and_minds_the_key(tmp_path):
    calls = []
    def make():
        calls.append(1)
        return {"pred": np.arange(3) / 3, "about": "kernel 0.7"}
    first, again = (kept(tmp_path / "a", "x", "k", make) for _ in range(2))
    assert len(calls) == 1 and np.array_equal(first["pred"], again["pred"]) and str(again["about"]) == "kernel 0.7"
    kept(tmp_path / "a", "x", "other", make)
    assert len(calls) == 2 and [p.name for p in (tmp_path / "a").iterdir()] == ["x.npz"]
    def broken(): raise ValueError("no")
    with pytest.raises(ValueError, match="no"): kept(tmp_path / "a", "y", "k", broken)
    assert not (tmp_path / "a" / "y.npz").exists()
