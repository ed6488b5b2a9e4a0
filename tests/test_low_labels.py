"Starts compared at few labels: the same rows for all, a penalty chosen by leaving rows out, intervals over draws."
import numpy as np
import pytest

from matfm.adapt.low_labels import Arm, cell, loo_ridge, low_label_rows, make_pool, paired_gain
from matfm.data.sources import load
from matfm.models.zoo import from_scratch
from matfm.represent.crystal import CrystalGraph

GRAPHS = CrystalGraph(cutoff=4.0, max_neighbors=6)


@pytest.fixture(scope="module")
def pool():
    crystals = load("matfm_crystals")
    return make_pool(crystals.take(np.arange(120)), "formation_energy", GRAPHS, n_test=15)


def test_ridge_agrees_with_scikit_learn():
    from sklearn.linear_model import RidgeCV
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 8))
    X = (X - X.mean(0)) / X.std(0)
    y = X @ rng.normal(size=8) + rng.normal(size=30)
    penalties = (0.1, 1.0, 10.0, 100.0)
    theirs, ours = RidgeCV(penalties).fit(X, y), loo_ridge(X, y, penalties)
    assert ours.penalty == theirs.alpha_
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), atol=1e-8)


def test_constant_columns_do_no_harm():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    wide = np.hstack([X, np.full((20, 2), 7.0)])
    np.testing.assert_allclose(loo_ridge(wide, y).predict(wide), loo_ridge(X, y).predict(X), atol=1e-9)


def test_validation_and_test_rows_are_never_learnt_from(pool):
    train, valid = pool.draw(0, 30)
    assert len(train) == 30 and len(valid) == 12 and len(pool.test) <= 15
    assert not (set(train) & set(valid)) and not (set(train) | set(valid)) & set(pool.test)


def test_a_cell_is_made_once_for_each_key(tmp_path):
    made = []
    value = lambda: made.append(1) or float(len(made))
    assert cell(tmp_path, {"n": 1}, value) == cell(tmp_path, {"n": 1}, value) == 1.0
    assert cell(tmp_path, {"n": 2}, value) == 2.0 and cell("", {"n": 1}, value) == 3.0


def test_arms_share_the_baselines(pool, tmp_path):
    arm = Arm("fresh", from_scratch(GRAPHS, "crystal_gnn", seed=0, width=16, depth=1))
    rows = low_label_rows([arm], pool, (20,), (0, 1), ("frozen",), folder=tmp_path)
    other = {(r["arm"], r["how"], r["seed"]): r["mae"] for r in rows}
    assert len(other) == 6 and len(set(other.values())) == 6
    arm_again = Arm("other", from_scratch(GRAPHS, "crystal_gnn", seed=1, width=16, depth=1))
    assert arm_again.digest != arm.digest
    again = low_label_rows([arm_again], pool, (20,), (0, 1), ("frozen",), folder=tmp_path)
    assert [r["mae"] for r in again if r["arm"] == "composition"] == [r["mae"] for r in rows if r["arm"] == "composition"]


def test_gain_is_the_mean_of_the_paired_ratios():
    rows = [{"target": "t", "n": 5, "how": "frozen", "arm": a, "seed": s, "mae": m} for a, ms in {"x": (1.0, 2.0), "y": (2.0, 2.0)}.items() for s, m in enumerate(ms)]
    (g,) = paired_gain(rows, "x", "y")
    assert np.isclose(g["change"], -0.25) and g["low"] < -0.25 < g["high"] and g["seeds"] == 2
    assert paired_gain(rows[:3], "x", "y") == []
