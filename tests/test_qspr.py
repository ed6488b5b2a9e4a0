"""QSPR: closed forms against refits, selection that stays inside the folds, permutations, reports that draw themselves, rows that cannot be read."""
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from matfm.core import BadInput
from matfm.data.records import compositions, molecules
from matfm.data.splits import Split
from matfm.evaluate.metrics import r2
from matfm.evaluate.qspr import (
    MODELS, Domain, GolbraikhTropsha, LeastSquares, QsprMlr, QsprPls, Selection, concordance, distinct, external_q2, fit_qspr, forward, mlr_statistic, nested, qspr, vif, y_scramble,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def table(n=40, columns=12, seed=0, noise=0.2):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, columns)) * rng.uniform(1e-3, 1e3, columns)
    return X, 3 * X[:, 2] / X[:, 2].std() - X[:, 5] / X[:, 5].std() + noise * rng.normal(size=n)


@pytest.mark.parametrize("seed", range(4))
def test_closed_forms_agree_with_refits(seed):
    X, y = table(18, 6, seed)
    fit = LeastSquares.fit(X, y)
    reference = LinearRegression().fit(X, y)
    np.testing.assert_allclose(fit.coefficients, [reference.intercept_, *reference.coef_], rtol=1e-8)
    np.testing.assert_allclose(y - fit.left_out, cross_val_predict(LinearRegression(), X, y, cv=LeaveOneOut()), rtol=1e-7)
    A = np.column_stack([np.ones(18), X])
    np.testing.assert_allclose(fit.leverage, np.diag(A @ np.linalg.pinv(A)), rtol=1e-6)
    np.testing.assert_allclose(vif(X), [1 / (1 - LinearRegression().fit(np.delete(X, j, 1), X[:, j]).score(np.delete(X, j, 1), X[:, j])) for j in range(6)], rtol=1e-7)
    np.testing.assert_allclose(Domain.fit(X, most=6).leverage(X), fit.leverage, rtol=1e-7)


def test_forward_is_greedy_on_the_leave_one_out_error():
    X, y = table(25, 9, 1)
    chosen = []
    for _ in range(3):
        press = {j: LeastSquares.fit(X[:, [*chosen, j]], y).press for j in range(9) if j not in chosen}
        chosen.append(min(press, key=press.get))
    assert forward(X, y, 3, limit=1e9)[:3] == chosen[:len(forward(X, y, 3, limit=1e9))] and chosen[:2] == [2, 5]


def test_dependent_and_constant_columns_do_no_harm():
    X, y = table()
    wide = np.column_stack([X, np.full(40, 7.0), X[:, 2] * 2, np.zeros(40)])
    assert distinct(wide).tolist() == list(range(12))
    assert set(Selection()(wide, y)) == set(Selection()(X, y))
    doubled = LeastSquares.fit(np.column_stack([X[:, 2], X[:, 2]]), y)
    np.testing.assert_allclose(doubled.residuals, LeastSquares.fit(X[:, [2]], y).residuals, atol=1e-9)
    assert Selection()(np.ones((12, 3)), y[:12]).size == 0
    model = fit_qspr("mlr", np.ones((12, 3)), y[:12])
    np.testing.assert_allclose(model(np.ones((2, 3)))[0], y[:12].mean())


def test_selection_inside_the_folds_finds_nothing_in_noise():
    inside, flattered = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        X, y = rng.normal(size=(40, 150)), rng.normal(size=40)
        inside.append(r2(y, nested("mlr", X, y)))
        flattered.append(1 - LeastSquares.fit(X[:, Selection()(X, y)], y).press / ((y - y.mean()) ** 2).sum())
    assert max(inside) < 0.2 and np.mean(inside) < -0.2 and min(flattered) > 0.3


def test_permutations_of_noise_are_uniform_only_with_the_selection_repeated():
    honest, kept = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        X, y = rng.normal(size=(30, 60)), rng.normal(size=30)
        honest.append(y_scramble(mlr_statistic(), X, y, seed=seed).p)
        kept.append(y_scramble(mlr_statistic(columns=Selection()(X, y)), X, y, seed=seed).p)
    assert sum(p < 0.05 for p in honest) <= 3 and max(honest) > 0.4 and sum(p < 0.05 for p in kept) >= 10


def test_external_statistics_in_closed_form():
    train, y, p = np.array([0.0, 2.0, 4.0]), np.array([1.0, 3.0, 6.0]), np.array([1.0, 4.0, 5.0])
    q = external_q2(y, p, train)
    assert q["Q²F1"] == pytest.approx(1 - 2 / (1 + 1 + 16)) and q["Q²F2"] == pytest.approx(1 - 2 / ((y - y.mean()) ** 2).sum()) and q["Q²F3"] == pytest.approx(1 - (2 / 3) / (8 / 3))
    assert concordance(y, p) == pytest.approx(2 * np.cov(y, p, bias=True)[0, 1] / (y.var() + p.var() + (y.mean() - p.mean()) ** 2))
    g = GolbraikhTropsha.of(y, p, 0.7)
    assert g.k == pytest.approx(43 / 42) and g.k_ == pytest.approx(43 / 46) and g.r2 == pytest.approx(np.corrcoef(y, p)[0, 1] ** 2)
    assert not GolbraikhTropsha.of(y, np.ones(3), 0.7).passed
    with pytest.raises(BadInput): external_q2(np.array([]), np.array([]), train)


SMILES = ["C" * k for k in range(1, 13)] + ["C" * k + "O" for k in range(1, 13)] + ["c1ccccc1" + "C" * k for k in range(1, 9)]


def some_molecules():
    mass = [float(len(s.replace("1", ""))) + 0.3 * s.count("O") for s in SMILES]
    return molecules(SMILES, {"size": mass}, {"size": "angstrom"})[0]


def test_report_of_molecules():
    records = some_molecules()
    report = qspr(records, "size", models=("mlr", "pls"))
    assert report.best.model in MODELS and report.rows[0]["model"] == "mean" and max(r["Q²"] for r in report.rows) > 0.9 and report.scramble.p < 0.05
    assert "<table" in report._repr_html_() and "(angstrom)" in report.figure().axes[0].get_xlabel()
    again = qspr(records, "size", models=("mlr", "pls"))
    assert [r["Q²"] for r in again.rows] == [r["Q²"] for r in report.rows] and np.array_equal(again.scramble.q2s, report.scramble.q2s)


def test_report_sets_rows_aside():
    y = list(np.linspace(0, 1, 26))
    y[3] = float("nan")
    records = compositions([*(f"{a}{n}O{m}" for a in ("Mg", "Ca", "Fe", "Ti") for n in (1, 2, 3) for m in (1, 5)), "RfO2", "MgO7"], {"x": y, "other": [0.0] * 26})[0]  # no properties of rutherfordium
    report = qspr(records, "x", Split("by hand", tuple(range(20)), (), tuple(range(20, 26))), models=("mlr",))
    assert len(records) == 26 and len(report.rejected) == 1 and len(report.y) == 19 and len(report.measured) == 5


def test_compositions_and_bad_input():
    rows = compositions([f"{a}{n}O{m}" for a in ("Mg", "Ca", "Fe", "Ti") for n in (1, 2, 3) for m in (1, 3)], {"x": list(np.linspace(0, 1, 24))})[0]
    assert len(qspr(rows, "x", models=("pls",)).y) > 10
    with pytest.raises(BadInput, match="did you mean"): qspr(rows, "x", models=("mrl",))
    with pytest.raises(BadInput, match="at least one model"): qspr(rows, "x", models=())
    with pytest.raises(BadInput, match="VIF|inflation"): Selection(vif=0.5)
    with pytest.raises(BadInput, match="most"): Selection(most=0)


@pytest.mark.parametrize("cls", [QsprMlr, QsprPls])
def test_baseline_meets_a_wild_row(cls):
    X, y = table()
    model = fit_qspr(cls.model, X, y)
    wild = np.abs(X[:1]) * 1e9
    assert np.isfinite(model(wild)[0]).all() and abs(model(wild)[0][0]) < 1e3
