"Protocols: no leak whatever the table, the statistics against scikit-learn, and runs that can be cut off."
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold

from matfm.core import BadInput
from matfm.data.records import molecules
from matfm.evaluate.protocols import (BY, PROTOCOLS, OnVectors, Plan, Protocol, as_loss, deal, held, keys_by, load_plan, null_rejections, one_each, opened,
                                      plan, run_protocol, set_losses, with_holm)
from matfm.evaluate.result_tables import caution, standing_of, verdicts

RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCOC1", "C1CC1", "C1CCC1")
SMILES = [ring + t for t in ("O", "N", "CCCO", "CC(=O)O", "CCN", "CCl") for ring in RINGS]


@pytest.fixture(scope="module")
def table():
    y = [len(s) + 0.3 * s.count("O") for s in SMILES]
    kept, _ = molecules(SMILES, {"y": y, "c": [float(s.count("O") > 0) for s in SMILES]}, {"y": "eV", "c": ""})
    return kept


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=30, max_size=90), st.integers(2, 4), st.integers(0, 5))
def test_groups_stay_whole_and_folds_even(groups, folds, seed):
    if len(set(groups)) < folds: return
    fold = deal(groups, folds, seed)
    assert all(len(set(fold[np.array(groups) == g])) == 1 for g in set(groups)) and set(fold) == set(range(folds))
    theirs = [len(t) for _, t in GroupKFold(folds).split(groups, groups=groups)]
    assert np.ptp(np.bincount(fold)) <= max(np.ptp(theirs), max(np.bincount(groups)))


@pytest.mark.parametrize("name", [n for n in PROTOCOLS if n not in ("official", "formula", "chemsys")])
def test_no_held_out_row_teaches(name, table):
    made = plan(name, table, **({"test": 0.25} if name in ("scaffold", "random") else {}))
    for s in made.splits:
        assert not set(s.train) & set(held(s)) and s.train and held(s)
        if made.protocol.by not in ("row", "time"):
            keys = keys_by(table, made.protocol.by)
            assert not {keys[i] for i in s.train} & {keys[i] for i in held(s)}
            if made.final: assert not {keys[i] for i in made.final.train} & {keys[i] for i in made.final.test}
    if not made.final and made.protocol.by != "time" and not made.protocol.sizes:
        assert sorted(i for s in made.splits for i in s.test) == sorted(list(range(len(table))) * made.protocol.repeats)


def test_by_is_checked(table):
    with pytest.raises(BadInput, match="crystals or compositions"): plan("formula", table)
    with pytest.raises(BadInput, match="column"): plan("official", table)
    assert set(BY) >= {p.by for p in PROTOCOLS.values()}


def test_plan_round_trip_and_tampering(table, tmp_path):
    made = plan("holdout", table, inner=2)
    assert load_plan(made.save(tmp_path)) == made == Plan.from_json(made.to_json())
    (tmp_path / "final.json").write_text((tmp_path / "final.json").read_text().replace('"seed":0', '"seed":1'))
    with pytest.raises(BadInput, match="final.json"): load_plan(tmp_path)
    with pytest.raises(BadInput, match="inner"): made.replace(inner=(made.inner[1], *made.inner[1:]))


def test_a_run_is_what_scikit_learn_does(table):
    made = plan("kfold", table, folds=4)
    run = run_protocol(made, table, {"ridge": Ridge(2.0), "mean": DummyRegressor()}, "y", "rmse")
    X, rows = OnVectors(Ridge(), "ecfp").vectors(table)
    y = table.y("y")[:, 0]
    hand = [np.sqrt(np.mean((Ridge(2.0).fit(X[list(s.train)], y[list(s.train)]).predict(X[list(s.test)]) - y[list(s.test)]) ** 2)) for s in made.splits]
    assert np.allclose(run.losses("ridge"), hand, rtol=1e-5) and run.unit == "eV"
    assert run.predictions.height == 2 * len(table)


def test_classes_are_scored_by_probability(table):
    run = run_protocol(plan("kfold", table, folds=3), table, {"logistic": LogisticRegression()}, "c")
    assert run.metric == "auroc" and np.isfinite(run.losses("logistic")).all() and as_loss("auroc", 0.75) == 0.25
    assert run.predictions["prediction"].is_between(0, 1).all()


def test_nested_choice_never_sees_the_judge(table):
    seen = []

    class Spy(Ridge):
        on_records = True
        def fit(self, records, target): seen.append(set(records.ids)); self.m = records.y(target).mean(); return self
        def predict(self, records): return np.full(len(records), self.m)

    made = plan("nested", table, folds=3, inner=2)
    run_protocol(made, table, {"spy": {"1": Spy(1.0), "2": Spy(2.0)}}, "y")
    ids = np.array(table.ids)
    for k, s in enumerate(made.splits):
        mine = seen[k * 5:(k + 1) * 5]  # 2 settings × 2 inner folds, and the refit
        assert all(not fit & set(ids[list(s.test)]) for fit in mine) and mine[-1] == set(ids[list(s.train)])


def test_bad_estimators(table):
    with pytest.raises(BadInput, match=r"no predict\(\)"): run_protocol(plan("kfold", table), table, {"x": type("X", (), {"fit": lambda s, X, y: s})()}, "y")
    nan = type("Nan", (), {"fit": lambda s, X, y: s, "predict": lambda s, X: np.full(len(X), np.nan)})()
    short = type("Short", (), {"fit": lambda s, X, y: s, "predict": lambda s, X: np.zeros(3)})()
    run = run_protocol(plan("kfold", table), table, {"nan": nan, "short": short}, "y")
    assert all("NaN" in c["error"] for c in run.cells if c["model"] == "nan") and all("shape" in c["error"] for c in run.cells if c["model"] == "short")
    assert run.summary()[0]["mean"] is None and run.summary()[0]["failed"] == 5
    with pytest.raises(BadInput): one_each([[1, 2]], 1, "x")


def test_the_ledger_of_the_test(table, tmp_path):
    made = plan("holdout", table)
    assert opened(made, "a", "alpha=1", tmp_path) == [] == opened(made, "a", "alpha=1", tmp_path) == opened(made, "b", "alpha=1", tmp_path)
    with pytest.warns(UserWarning, match="2 different settings of a"): assert opened(made, "a", "alpha=2", tmp_path)
    assert opened(plan("holdout", table, seed=5), "a", "alpha=3", tmp_path) == []


def test_corrected_t_keeps_its_size_where_the_plain_one_does_not():
    from scipy.stats import binom
    for repeats in (2, 8):
        size = null_rejections(250, 50, 5, repeats, seed=repeats)
        assert size["corrected"] <= binom.ppf(0.999, 250, 0.05) / 250 < 0.12 < size["plain"], size


def test_many_comparisons_warn_and_sets_are_compared():
    with pytest.warns(UserWarning, match="6 comparisons"): rows = with_holm([{"p": p} for p in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)])
    assert rows[0]["p_holm"] == pytest.approx(0.06) and all(r["p_holm"] >= r["p"] for r in rows)
    losses = {"a": {s: 1.0 + k / 10 for k, s in enumerate("uvwxyz")}, "b": {s: 2.0 + k / 7 for k, s in enumerate("uvwxyz")}}
    stand = standing_of({**losses, "c": {**losses["b"], "t": 1.0}})
    rows = verdicts(stand)
    assert stand.methods[0] == "a" and stand.sets == tuple("uvwxyz") and rows[0]["won"] == 6 and rows[0]["p"] == pytest.approx(2 / 2**6) and set_losses({}) == {}
    assert stand.ranks["b"] == stand.ranks["c"] == 2.5 and {r["against"]: r["p_holm"] for r in rows} == pytest.approx({"b": 4 / 2**6, "c": 4 / 2**6}) and "left out: t" in " ".join(caution(stand))


def test_protocol_fields():
    assert Protocol().digest == Protocol(folds=5).digest != Protocol(folds=4).digest


def test_a_final_test_of_the_newest_rows_when_most_are_new(table):
    from matfm.data.records import Records
    dated = lambda years: Records(table.frame.with_columns(year=pl.Series(years, dtype=pl.Float64)), "molecule", table.targets)
    n = len(table)
    made = plan("time", dated([2000 + i % 3 for i in range(n // 2)] + [2003] * (n - n // 2)), column="year", folds=2, test=0.2)
    assert len(made.final.test) == n - n // 2 and min(made.final.test) == n // 2
    with pytest.raises(BadInput, match="older"): plan("time", dated([2000] * n), column="year", folds=2, test=0.2)
