"""Metrics and uncertainty beyond what their pages show: every metric against its reference on many kinds of data, and the guarantees."""
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as skm
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.core import BadInput
from matfm.evaluate.metrics import METRICS, bootstrap, evaluate, paired_bootstrap
from matfm.evaluate.uncertainty import SplitConformal, calibration_curve, conformal_rank, coverage, ece, evaluate_intervals, miscalibration_area

REFERENCE = {
    "mae": skm.mean_absolute_error, "rmse": skm.root_mean_squared_error, "r2": skm.r2_score, "spearman": lambda a, b: scipy.stats.spearmanr(a, b)[0],
    "auroc": skm.roc_auc_score, "auprc": skm.average_precision_score, "accuracy": lambda a, b: skm.accuracy_score(a, b >= 0.5),
    "logloss": lambda a, b: skm.log_loss(a, b, labels=[0, 1]),
}


def example(kind: str, n: int, seed: int, digits: int, offset: float = 0.0):
    rng = np.random.default_rng(seed)
    if kind == "regression":
        y = np.round(offset + rng.normal(size=n), digits)
        return y, np.round(y + rng.normal(size=n), digits)
    y = np.zeros(n)
    y[: 1 + rng.integers(n - 1)] = 1
    return rng.permutation(y), np.round(rng.random(n), digits)


def test_every_metric_has_a_reference():
    assert set(REFERENCE) == set(METRICS)


@pytest.mark.parametrize("name", sorted(METRICS))
@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 10**6), digits=st.integers(0, 4))
def test_equals_the_reference(name, n, seed, digits):
    m = METRICS[name]
    y, p = example(m.kind, n, seed, digits)
    if m.undefined(y, p): assert np.isnan(m(y, p))
    else: assert np.isclose(m(y, p), REFERENCE[name](y, p), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_resamples_equal_repeated_rows(name):
    m = METRICS[name]
    y, p = example(m.kind, 50, 1, 1)
    counts = np.random.default_rng(2).multinomial(50, np.full(50, 0.02), size=20)
    want = [REFERENCE[name](np.repeat(y, c), np.repeat(p, c)) for c in counts]
    assert np.allclose(m.formula(y, p, counts.astype(float)), want, atol=1e-12)


def test_r2_keeps_its_digits_far_from_zero():
    y, p = example("regression", 100, 0, 6, offset=1e6)
    assert np.isclose(METRICS["r2"](y, p), skm.r2_score(y, p), rtol=1e-9)
    assert np.isnan(METRICS["r2"](np.full(10, 0.1), np.arange(10.0)))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_missing_targets_are_left_out_and_missing_predictions_refused(name):
    m = METRICS[name]
    y, p = example(m.kind, 30, 3, 2)
    assert m(np.r_[y, np.nan], np.r_[p, 0.5]) == m(y, p)
    with pytest.raises(BadInput, match="1 of 31 measured rows"): m(np.r_[y, 1.0], np.r_[p, np.nan])


@pytest.mark.parametrize("kind", ["regression", "binary"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_tiny_and_constant_tables_never_raise(kind, rows):
    for m in evaluate(kind, np.ones(rows), np.full(rows, 0.7)):
        assert (m.value is None) == (m.n == 0 or METRICS[m.name].needs != "rows")
        assert m.value is not None or m.tags["reason"]
        if rows == 1: assert m.low is None


def test_interval_of_a_large_table_fits_the_memory():
    y, p = example("regression", 300_000, 0, 3)
    m = bootstrap("mae", y, p, n=20)
    assert m.low < m.value < m.high and m.high - m.low < 0.02


def test_bootstrap_standard_error_is_the_textbook_one():
    e = np.random.default_rng(0).normal(size=400)
    m = bootstrap("mae", np.zeros(400), e, n=4000)
    assert np.isclose((m.high - m.low) / (2 * 1.96), np.abs(e).std() / 20, rtol=0.07)


def test_paired_difference_is_antisymmetric():
    y, a = example("regression", 80, 5, 3)
    b = y + 0.3
    ab, ba = paired_bootstrap("rmse", y, a, b), paired_bootstrap("rmse", y, b, a)
    assert np.allclose([ab.value, ab.low, ab.high], [-ba.value, -ba.high, -ba.low])
    assert {ab.tags["better"], ba.tags["better"]} in ({"a", "b"}, {"unclear"})


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("n", [20, 50])
def test_conformal_guarantee(level, n):
    "Exchangeable rows: mean coverage lies in [level, level + 1/(n + 1)], up to the simulation's own error."
    rng = np.random.default_rng(n)
    hits = []
    for _ in range(1500):
        y, std = rng.standard_t(3, n + 1), rng.uniform(0.5, 2, n + 1)
        c = SplitConformal(level).fit(y[:n], np.zeros(n), std[:n])
        low, high = c.interval([0.0], std[n:])
        hits.append(low[0] <= y[n] <= high[0])
    noise = 3 * np.sqrt(level * (1 - level) / len(hits))
    assert level - noise <= np.mean(hits) <= level + 1 / (n + 1) + noise


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), level=st.floats(0.05, 0.99))
def test_conformal_rank_covers_its_own_calibration_rows(n, level):
    k = conformal_rank(n, level)
    assert k is None or level <= k / (n + 1) + 1e-9 and (k - 1) / (n + 1) < level + 1e-9


def test_scaled_interval_without_spread_is_the_plain_one():
    y, p = example("regression", 60, 7, 3)
    plain, scaled = SplitConformal(0.9).fit(y, p), SplitConformal(0.9).fit(y, p, np.zeros(60))
    assert np.allclose(plain.interval(p), scaled.interval(p, np.zeros(60)))


def test_calibrated_gaussian():
    z = np.random.default_rng(0).normal(size=20_000)
    assert miscalibration_area(z, 0 * z, 0 * z + 1) < 0.01
    assert miscalibration_area(z, 0 * z, 0 * z + 1e-6) > 0.49 and miscalibration_area(z, 0 * z, 0 * z + 1e6) > 0.49
    nominal, observed = calibration_curve(z, 0 * z, 0 * z + 1)
    assert (np.diff(observed) >= 0).all() and observed[0] == 0 and observed[-1] == 1 and len(nominal) == len(observed)


def test_interval_score_prefers_the_true_quantiles():
    y = np.random.default_rng(1).normal(size=20_000)
    def score(half): return evaluate_intervals(y, np.full_like(y, -half), np.full_like(y, half), 0.9)[2].value
    best = scipy.stats.norm.ppf(0.95)
    assert score(best) < min(score(0.8 * best), score(1.2 * best))
    assert abs(coverage(y, np.full_like(y, -best), np.full_like(y, best)) - 0.9) < 0.01


def test_ece_of_a_constant_forecast():
    y = np.r_[np.ones(30), np.zeros(70)]
    assert np.isclose(ece(y, np.full(100, 0.3)), 0) and np.isclose(ece(y, np.full(100, 0.9)), 0.6) and ece([1.0], [1.0]) == 0
