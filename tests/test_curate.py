"""Curation: idempotent, nothing lost, every refusal with its reason, and known noise is found again."""
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput
from matfm.data.curate import Curation, convert_label, curate, harmonise, identity, merge, neighbour_noise, repeat_noise, standardise
from matfm.data.records import Crystal, compositions, crystals, molecules

QUICK = settings(max_examples=40, deadline=None)
SMILES = ["CCO", "OCC", "CC(=O)[O-].[Na+]", "CC(=O)O", "C[NH3+].[Cl-]", "[Na+].[Cl-]", "C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "CC(N)C(=O)O", "F/C=C/F", "F/C=C\\F", "c1ccccc1.c1ccncc1", "CN(=O)=O",
          "C[N+](C)(C)C.[Br-]", "O=C([O-])C(=O)[O-].[K+].[K+]", "Oc1ccccn1", "O=c1cccc[nH]1", "[2H]C([2H])[2H]", "CC(=O)O[Na]", "OB(O)c1ccccc1"]
rules = st.builds(Curation, salts=st.sampled_from(["parent", "keep", "reject"]), neutralise=st.booleans(), tautomers=st.booleans(), stereo=st.booleans(),
                  repeats=st.sampled_from(["median", "first"]), conflicts=st.sampled_from(["median", "first", "drop"]), tolerance=st.sampled_from([{}, {"y": 0.5}]))
tables = st.lists(st.tuples(st.sampled_from(SMILES), st.floats(-5, 5).map(lambda v: round(v, 1))), min_size=1, max_size=25).map(lambda v: molecules([s for s, _ in v], {"y": [y for _, y in v]}, canonical=False)[0])


@QUICK
@given(st.sampled_from(SMILES), rules)
def test_standard_form_is_a_fixed_point(smiles, rule):
    try: once, _ = standardise(smiles, rule)
    except BadInput: return
    assert standardise(once, rule) == (once, ())


@QUICK
@given(tables, rules)
def test_nothing_is_lost_and_nothing_repeats(records, rule):
    clean, rejected, report = curate(records, rule)
    assert sorted([*clean.ids, *rejected.frame["id"]]) == sorted(records.ids) and all(rejected.frame["reason"])
    assert len(set(identity(clean))) == len(clean) and all(records.ids[r] == i for i, r in zip(rejected.frame["id"], rejected.frame["row"], strict=True))
    assert report.steps["rows"][0] == len(records) and report.steps["rows"][-1] == len(clean) and report.steps["removed"].sum() == len(rejected)
    again, none, _ = curate(clean, rule)
    assert again.ids == clean.ids and len(none) == 0 and np.array_equal(again.y(), clean.y())
    assert Curation.from_json(rule.to_json()) == rule


@QUICK
@given(tables)
def test_conflicts_are_exactly_the_groups_that_differ(records):
    _, _, report = curate(records, Curation(tolerance={"y": 0.5}))
    keep, _, _ = curate(records, Curation(repeats="keep"))
    groups: dict[str, list[float]] = {}
    for k, y in zip(identity(keep), keep.y("y")[:, 0], strict=True): groups.setdefault(k, []).append(y)
    wrong = {k: max(v) - min(v) for k, v in groups.items() if max(v) - min(v) > 0.5}
    assert dict(zip(report.conflicts["identity"], report.conflicts["difference"], strict=True)) == pytest.approx(wrong)


def test_stereo_and_isotopes_are_kept():
    mirror_images, _ = molecules(["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "CC(N)C(=O)O", "F/C=C/F", "F/C=C\\F"])
    assert len(curate(mirror_images)[0]) == 5 and len(curate(mirror_images, Curation(stereo=False))[0]) == 2
    assert len(curate(mirror_images, Curation(tautomers=True))[0]) == 5
    assert standardise("[2H]C([2H])[2H]")[0] != "C"


@pytest.mark.parametrize("smiles,rule,why", [("c1ccccc1.c1ccncc1", {}, "a mixture"), ("CCO.Cl", {"salts": "reject"}, "several fragments"), ("CCBr", {"elements": ("C", "H")}, "element that is not allowed: Br"),
                                             ("CCCCCCCC", {"atoms": (1, 4)}, "heavy atoms outside"), ("CCCCCCCC", {"mass": (0, 50)}, "mass in g/mol outside")])
def test_each_refusal_names_its_reason(smiles, rule, why):
    clean, rejected, _ = curate(molecules([smiles, "C"])[0], Curation(**rule))
    assert clean.ids == ["1"] and rejected.frame["reason"][0].startswith(why)


@pytest.mark.parametrize("make", [
    lambda: Curation(salts="x"), lambda: Curation(conflicts="keep"), lambda: Curation(elements=("Zz",)), lambda: Curation(bounds={"y": (2, 1)}), lambda: Curation(atoms=(1, 2, 3)), lambda: Curation(tolerance={"y": float("nan")}),
    lambda: curate(compositions(["NaCl"])[0], Curation(bounds={"y": (0, 1)})), lambda: merge([]), lambda: merge({"a": molecules(["C"])[0], "b": compositions(["C"])[0]}),
    lambda: merge({"a": molecules(["C"], {"y": [1]}, {"y": "eV"})[0], "b": molecules(["C"], {"y": [1]}, {"y": "kelvin"})[0]}), lambda: merge({"a": molecules(["C"])[0]}, names={"b": {}}),
    lambda: harmonise(molecules(["C"], {"y": [1]})[0], {"y": "smiles"}), lambda: convert_label(np.array([-1.0]), "eV", "log10(eV)"), lambda: standardise("C1CC")])
def test_bad_input_is_refused(make):
    with pytest.raises(BadInput): make()


def test_units_and_sources_meet():
    a, _ = molecules(["CCO", "CCN"], {"s": [-1.0, 0.5]}, {"s": "log10(mol/L)"}, name="a")
    b, _ = molecules(["OCC", "CCC"], {"sol": [100.0, 10.0]}, {"sol": "mmol/L"}, name="b")
    merged, rejected, report = merge([a, b], Curation(tolerance={"s": 1e-6}), {"b": {"sol": "s"}}, {"s": "log10(mol/L)"})
    assert len(merged) == 3 and np.allclose(merged.y("s").ravel(), [-1, 0.5, -2]) and len(report.conflicts) == 0
    assert rejected.frame["id"].to_list() == ["b:0"] and rejected.frame["row"].to_list() == [0] and merged.frame["source"].to_list() == ["a", "a", "b"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_is_found_again(seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 500, 1500)
    y = rng.normal(size=500)[keys] * 2 + rng.normal(size=1500) * 0.7
    found, = [r for r in repeat_noise(y, keys.tolist()) if r["from"] == "repeats"]
    assert abs(found["std"] - 0.7) < 0.06 and found["low"] < found["std"] < found["high"] and abs(found["best_r2"] - (1 - 0.49 / y.var())) < 0.03
    half_copied = repeat_noise(np.r_[y, y[:200]], [*keys.tolist(), *(1000 + np.arange(200)).tolist()])
    assert half_copied[0]["identical"] >= 0 and repeat_noise(np.array([1.0, 1.0]), ["a", "a"])[0]["std"] == 0


def test_neighbours_see_added_noise():
    metals, anions = ["Li", "Na", "K", "Mg", "Ca", "Ti", "Fe", "Ni", "Zn", "Al"], ["O", "S", "Cl", "F", "N"]
    formulas = [f"{m}{i}{x}{j}" for m in metals for x in anions for i in (1, 2, 3) for j in (1, 2, 4)]
    records, _ = compositions(formulas, {"y": np.linspace(0, 1, len(formulas))})
    noisy = records.with_columns(y=records.y("y")[:, 0] + np.random.default_rng(0).normal(size=len(records)))
    low, high = (neighbour_noise(r, "y")[0]["std"] for r in (records, noisy))
    assert low < 0.5 < 0.9 < high < 1.3


def test_crystals_in_other_settings_are_one():
    cscl = Crystal(np.eye(3) * 4.12, [55, 17], [[0, 0, 0], [.5, .5, .5]])
    double = Crystal(np.diag([4.12, 4.12, 8.24]), [17, 55, 17, 55], [[.1, 0, 0], [.6, .5, .25], [.1, 0, .5], [.6, .5, .75]])
    rock = Crystal([[0, 3.4, 3.4], [3.4, 0, 3.4], [3.4, 3.4, 0]], [55, 17], [[0, 0, 0], [.5, .5, .5]])
    clean, rejected, _ = curate(crystals([cscl, double, rock], {"e": [1.0, 1.2, 2.0]}, {"e": "eV/atom"})[0])
    assert clean.ids == ["0", "2"] and np.allclose(clean.y("e").ravel(), [1.1, 2.0]) and rejected.frame["reason"][0] == "repeat: the structure of 0"



@pytest.mark.filterwarnings("ignore:aqsoldb")
def test_the_rule_for_salts_decides_the_noise_of_solubility(mirror):
    from matfm.data.sources import load
    esol, aqsol = load("esol"), load("aqsoldb", limit=4000)
    names = {"esol": {next(iter(esol.targets)): "logS"}, "aqsoldb": {"Solubility": "logS"}}
    std = {}
    for salts in ("parent", "reject"):
        merged, rejected, report = merge({"esol": esol, "aqsoldb": aqsol}, Curation(salts=salts, tolerance={"logS": 0.1}), names)
        assert len(merged) + len(rejected) == len(esol) + len(aqsol) and len(report.conflicts) > 10
        std[salts] = report.noise.filter(pl.col("from") == "repeats")["std"][0]
        assert Counter(i.split(":")[0] for i in [*merged.ids, *rejected.frame["id"]]) == {"esol": len(esol), "aqsoldb": len(aqsol)}
    assert std["parent"] > 2 * std["reject"] > 0, std


def test_melting_points_repeat(mirror):
    from matfm.data.sources import load_with_rejected
    records, _ = load_with_rejected("melting_bradley")
    by = np.argsort(records.structures(), kind="stable")  # repeats side by side
    records = records.take(by[records.frame["smiles"].is_duplicated().to_numpy()[by]][:3000])
    clean, rejected, report = curate(records, Curation(salts="reject", tolerance={"mpC": 5.0}))
    noise = report.noise.filter(pl.col("from") == "repeats").row(0, named=True)
    assert len(clean) + len(rejected) == len(records) and noise["groups"] > 100 and 0 < noise["std"] < 40 and 0.5 < noise["best_r2"] < 1


@pytest.mark.parametrize("name", ["mp_20", "perov_5"])
def test_public_crystals(name, mirror):
    from matfm.data.sources import load_with_rejected
    records, _ = load_with_rejected(name, limit=800)
    clean, rejected, report = curate(records)
    assert len(clean) + len(rejected) == len(records) and len(rejected) < 0.05 * len(records) and report.steps["rows"][-1] == len(clean)
