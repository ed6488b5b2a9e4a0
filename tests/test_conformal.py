"""Conformal prediction against MAPIE's numbers, exact small cases and properties that must hold for any data."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.core import BadInput
from matfm.evaluate.conformal import (ConformalQuantiles, ConformalSets, Mondrian, aurc, crps_draws, crps_normal, cross_plus, excess_aurc, fit_domain, forest_quantiles, plus_interval,
                                      risk_coverage, shift_weights, weighted_half_width, weighted_quantiles)
from matfm.evaluate.uncertainty import SplitConformal, coverage

# Computed with MAPIE 1.6.0 and scikit-learn 1.9.1 in an environment of their own, on the rows of `data` below (seeds 0: training, 2: calibration, 1: new) with
# CrossConformalRegressor(LinearRegression(), confidence_level=[0.9, 0.8], method="plus", cv=KFold(5) or LeaveOneOut()),
# SplitConformalRegressor(..., prefit=True), ConformalizedQuantileRegressor of QuantileRegressor(alpha=0, solver="highs") at 0.05, 0.95, 0.5 (prefit, symmetric correction),
# SplitConformalClassifier(LogisticRegression, confidence_level=0.85, conformity_score="lac", prefit=True). (Its APS draws random numbers that are not in the answer.)
PLUS = {"cv_plus": [[[-2.6603673, -2.0586568], [0.3297494, -0.1346951]], [[-4.4283815, -3.9617094], [-1.5476214, -1.9615438]], [[-3.0148071, -2.486274], [-0.0721861,
    -0.5344831]], [[-0.9804351, -0.4037931], [2.0096815, 1.4958614]]],
        "jackknife_plus": [[[-2.6228133, -2.1485168], [0.3837091, -0.1172379]], [[-4.4080945, -4.0074515], [-1.4451538, -1.8860584]], [[-2.997591, -2.5255687], [0.0089314,
    -0.4844322]], [[-0.9611287, -0.4901145], [2.0453937, 1.5411645]]]}  # [row, end, level]
SPLIT = [[-2.0872926, -0.1935711], [-3.9311799, -2.0374584], [-2.4912999, -0.5975784], [-0.4294786, 1.4642429]]
CQR = [[-1.9701351, -0.1864139], [-4.4583334, -1.7799404], [-2.731804, -0.4361318], [-0.4046654, 1.5742864]]
PROB = np.array([[0.121039, 0.051267, 0.827695], [0.663775, 0.038594, 0.29763], [0.66644, 0.256609, 0.076951], [0.840401, 0.13213, 0.027469], [0.07419, 0.56757,
    0.35824], [0.129538, 0.366873, 0.503589], [0.367994, 0.373572, 0.258433], [0.229683, 0.177891, 0.592426], [0.09871, 0.021391, 0.8799], [0.205884,
    0.105534, 0.688582], [0.626534, 0.367606, 0.00586], [0.005511, 0.254755, 0.739734], [0.236891, 0.133206, 0.629903], [0.642907, 0.198422,
    0.158671], [0.007008, 0.156436, 0.836556], [0.266875, 0.4807, 0.252426], [0.030271, 0.615494, 0.354235], [0.725254, 0.079897, 0.194849],
    [0.106761, 0.397537, 0.495701], [0.049141, 0.919615, 0.031244], [0.427705, 0.137334, 0.434961], [0.081363, 0.389902, 0.528736], [0.981295,
    0.017306, 0.001399], [0.340028, 0.558163, 0.101809], [0.074136, 0.919259, 0.006604], [0.109532, 0.727002, 0.163466], [0.33721, 0.579541,
    0.083249], [0.016346, 0.928559, 0.055095], [0.282377, 0.45198, 0.265643], [0.044055, 0.142277, 0.813668], [0.44371, 0.530971, 0.025319],
    [0.478571, 0.508327, 0.013102], [0.688194, 0.247508, 0.064298], [0.648758, 0.325954, 0.025288], [0.222741, 0.674709, 0.102549], [0.85109,
    0.135463, 0.013447], [0.149693, 0.709453, 0.140854], [0.962554, 0.03322, 0.004226], [0.302423, 0.389088, 0.308489], [0.863715, 0.020355, 0.11593],
    [0.31613, 0.658167, 0.025704], [0.039566, 0.896869, 0.063566], [0.646409, 0.182015, 0.171576], [0.346542, 0.067242, 0.586216], [0.045725,
    0.927434, 0.026841], [0.025358, 0.93832, 0.036322], [0.194386, 0.739809, 0.065805]])
LABEL = np.array([2, 0, 0, 0, 1, 2, 1, 2, 2, 2, 0, 2, 2, 1, 0, 1, 2, 1, 2, 1, 2, 2, 0, 1, 1, 1, 0, 1, 0, 2, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 2, 1, 1, 0])
NEW = np.array([[0.93215, 0.06723, 0.00062], [0.973664, 0.024658, 0.001677], [0.178156, 0.517027, 0.304818], [0.741396, 0.141061, 0.117543], [0.534547, 0.333713,
    0.13174], [0.950831, 0.035053, 0.014116], [0.851773, 0.088105, 0.060123], [0.041819, 0.144065, 0.814116]])
LAC = [[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]]


def data(n, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    return X, X @ [1.0, -2.0, 0.5] + (0.3 + 0.4 * np.abs(X[:, 0])) * rng.normal(size=n)


def least_squares(X, y):
    w = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), y, rcond=None)[0]
    return lambda Z: Z @ w[:-1] + w[-1]


@pytest.mark.parametrize("name", PLUS)
def test_plus_intervals_are_those_of_mapie(name):
    (X, y), (new, _) = data(43, 0), data(4, 1)
    folds = np.repeat(np.arange(5), [9, 9, 9, 8, 8]) if name == "cv_plus" else np.arange(43)
    models = [least_squares(X[folds != k], y[folds != k]) for k in range(folds.max() + 1)]
    r = np.array([abs(y[i] - models[folds[i]](X[i:i + 1])[0]) for i in range(43)])
    for j, level in enumerate((0.9, 0.8)):
        assert np.allclose(np.array(PLUS[name])[:, :, j].T, plus_interval(r, [m(new) for m in models], folds, level), atol=1e-6)


def test_split_and_quantiles_are_those_of_mapie():
    from sklearn.linear_model import QuantileRegressor
    (X, y), (Xc, yc), (new, _) = data(43, 0), data(51, 2), data(4, 1)
    m = least_squares(X, y)
    assert np.allclose(np.array(SPLIT).T, SplitConformal(0.9).fit(yc, m(Xc)).interval(m(new)), atol=1e-6)
    low, high = (QuantileRegressor(quantile=q, alpha=0.0, solver="highs").fit(X, y) for q in (0.05, 0.95))
    made = ConformalQuantiles(0.9).fit(yc, low.predict(Xc), high.predict(Xc))
    assert np.allclose(np.array(CQR).T, made.interval(low.predict(new), high.predict(new)), atol=1e-6)


def test_sets_are_those_of_mapie():
    assert (ConformalSets(0.85).fit(LABEL, PROB).sets(NEW) == np.array(LAC, bool)).all()


def test_plus_with_one_model_is_split_conformal():
    rng = np.random.default_rng(0)
    e, p = rng.normal(size=37), rng.normal(size=5)
    assert np.allclose(plus_interval(np.abs(e), p[None], np.zeros(37, int), 0.8), SplitConformal(0.8).fit(e, 0 * e).interval(p))


def test_scaled_residuals_make_wide_where_uncertain():
    rng = np.random.default_rng(0)
    X = rng.random((200, 1))
    y = (0.1 + X[:, 0]) * rng.normal(size=200)
    made = cross_plus(lambda X, y: lambda Z: (np.zeros(len(Z)), 0.1 + Z[:, 0]), X, y, 5, scaled=True)
    _, low, high = made.interval(np.array([[0.0], [1.0]]), 0.9)
    assert (high - low)[1] / (high - low)[0] == pytest.approx(11)


def test_blocks_of_new_rows_do_not_change_anything(monkeypatch):
    rng = np.random.default_rng(0)
    r, p, f = np.abs(rng.normal(size=300_000)), rng.normal(size=(3, 40)), rng.integers(0, 3, 300_000)
    whole, part = plus_interval(r, p, f), plus_interval(r, p[:, 30:], f)
    assert np.array_equal(whole[0][30:], part[0]) and np.array_equal(whole[1][30:], part[1])


@given(st.integers(9, 60), st.integers(0, 10_000), st.sampled_from([0.5, 0.8, 0.9]))
@settings(max_examples=40, deadline=None)
def test_a_higher_level_never_gives_a_smaller_interval(n, seed, level):
    rng = np.random.default_rng(seed)
    r, f, p = np.abs(rng.normal(size=n)), rng.integers(0, 3, n), rng.normal(size=(3, 4))
    (a, b), (c, d) = plus_interval(r, p, f, level / 2), plus_interval(r, p, f, level)
    assert (c <= a).all() and (d >= b).all()
    w = rng.random(n) + 0.01
    assert (weighted_half_width(r, w, w[:3], level / 2) <= weighted_half_width(r, w, w[:3], level)).all()


@given(st.integers(2, 40), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_no_order_of_rejection_beats_the_oracle(n, seed):
    rng = np.random.default_rng(seed)
    e, u = np.abs(rng.normal(size=n)), rng.integers(0, 5, n).astype(float)
    share, risk = risk_coverage(e, u)
    assert risk[-1] == pytest.approx(e.mean()) and share[-1] == 1 and aurc(e, e) <= aurc(e, u) + 1e-12
    assert excess_aurc(e, u) >= -1e-9


def test_mondrian_is_split_conformal_in_each_group():
    rng = np.random.default_rng(0)
    y, g, std = rng.normal(size=60), np.arange(60) % 2, rng.random(60) + 0.5
    made = Mondrian(0.8).fit(y, 0 * y, g, std)
    for k in (0, 1): assert made.quantiles[str(k)] == SplitConformal(0.8).fit(y[g == k], 0 * y[g == k], std[g == k]).quantile
    with pytest.raises(BadInput, match="calibrated with std"): made.interval([0.0], [1])
    y[0] = np.nan
    assert Mondrian(0.8).fit(y, 0 * y, g).sizes == {"0": 29, "1": 30}


def test_forest_quantiles_of_one_leaf_are_those_of_the_rows():
    from sklearn.ensemble import RandomForestRegressor
    X, y = data(40, 0)
    one = RandomForestRegressor(3, max_depth=1, min_samples_leaf=40, bootstrap=False).fit(X, y)
    assert np.allclose(forest_quantiles(one, X, y, X[:2], [0.05, 0.5, 0.9]), [np.quantile(y, [0.05, 0.5, 0.9], method="inverted_cdf")] * 2)
    assert weighted_quantiles(np.array([1.0, 2.0]), np.array([[0.0, 1.0]]), [0.1]).tolist() == [[2.0]]


def test_weights_find_the_shifted_feature_among_many():
    rng = np.random.default_rng(0)
    a, b = (np.hstack([m + rng.normal(size=(300, 1)) + rng.normal(size=(300, 15)), rng.normal(size=(300, 15))]) for m in (0, 1))  # a shift along one direction
    w, v = shift_weights(a, b)
    s = a[:, :15].mean(1)
    assert np.corrcoef(np.log(w), s)[0, 1] > 0.6 and np.median(v) > 1.4 * np.median(w)


def test_scores_of_a_distribution_agree_with_its_draws():
    rng = np.random.default_rng(0)
    y, mean, std = rng.normal(size=8), rng.normal(size=8), rng.random(8) + 0.3
    assert np.allclose(crps_draws(y, mean + std * rng.normal(size=(40_000, 8))), crps_normal(y, mean, std), atol=0.02)
    with pytest.raises(BadInput, match="at least 2 draws"): crps_draws([0.0], [[1.0]])


@pytest.mark.parametrize("method", ["mahalanobis", "leverage"])
def test_left_out_distances_are_those_of_refitting(method):
    X, _ = data(30, 0)
    X = (X - X.mean(0)) / X.std(0)
    d = fit_domain(X, method, ridge=0)
    one = fit_domain(np.delete(X, 4, 0), method, ridge=0).distance(X[4:5])[0]
    assert d.own[4] == pytest.approx(one, rel=1e-6) and d.distance(X)[4] < d.own[4]


def test_a_constant_feature_and_a_far_row():
    X = np.column_stack([data(50, 0)[0], np.full(50, 7.0)])
    for method in ("neighbours", "mahalanobis", "leverage"):
        d = fit_domain(X, method)
        assert np.isfinite(d.own).all() and d.inside(X).mean() > 0.9 and not d.inside(X[:1] + [9, 9, 9, 0])[0]
    with pytest.raises(BadInput, match="rows of 4 features"): d.distance([1.0, 2.0])


def test_refusals():
    with pytest.raises(BadInput, match="between 0 and 1"): Mondrian(1.5)
    with pytest.raises(BadInput, match="method"): ConformalSets(0.9, "raps")
    with pytest.raises(BadInput, match="at least one row"): ConformalQuantiles(0.9).fit([np.nan], [0.0], [1.0])
    with pytest.raises(BadInput, match="cannot make 50 folds"): cross_plus(least_squares, *data(20, 0), folds=50)
    assert coverage([1.0], *plus_interval([1.0], [[0.0]], [0], 0.4)) == 1.0
