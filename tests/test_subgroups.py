"""Errors by chemical group: planted ones are found, others are not, and the report of a fit says so."""
import numpy as np
import pytest

from matfm.core import BadInput
from matfm.data.records import compositions, molecules
from matfm.data.sources import load
from matfm.evaluate.subgroups import bootstrap_mean, errors_by_group, group_lines, labels_of, named_groups, permutation_p, worse_groups

CORES = ["C1CCCCC1{}", "c1ccccc1{}", "c1ccncc1{}", "CC(C)C{}", "C1CCOC1{}", "CCCC{}", "CCCCCC{}", "c1ccc2ccccc2c1{}"]
ENDS = ["", "C", "CC", "O", "N", "F", "Cl", "C(=O)O", "C#N", "OC", "C(=O)C", "NC", "CO", "CN", "CCO", "S", "Br", "C(F)(F)F", "OCC", "CC(=O)O", "CF", "CCF"]
SMILES = [c.format(e) for c in CORES for e in ENDS]


def table(noise, seed):
    "Molecules whose numbers are their atoms' sum, and noise that may depend on the molecule."
    rng = np.random.default_rng(seed)
    smiles = [SMILES[i] for i in rng.permutation(len(SMILES))]
    y = np.array([sum(s.upper().count(x) for x in "CNOS") for s in smiles]) / 3 + rng.normal(size=len(smiles)) * np.array([noise(s) for s in smiles])
    return molecules(smiles, {"y": y}, {"y": "eV"}, name="made")[0]


def test_false_alarms_keep_their_rate(mirror):
    "Errors that have nothing to do with the molecule: of sixty tables one in twenty may name a group, though forty overlapping ones are tested."
    rows = load("esol").take(np.arange(0, 1128, 3))
    groups, hits, n = named_groups(rows), 0, 60
    assert sum(map(len, groups.values())) > 15
    for seed in range(n):
        rng = np.random.default_rng(seed)
        error = rng.exponential(size=len(rows)) if seed % 2 else np.abs(rng.standard_t(3, size=len(rows)))
        hits += bool(worse_groups(errors_by_group(error, np.zeros(len(rows)), groups, draws=2, seed=seed)))
    assert hits <= 6, f"{hits} of {n} tables without a worse group named one"


def test_planted_groups_are_found(mirror):
    rows, found = load("esol").take(np.arange(0, 1128, 3)), 0
    groups, chlorine = named_groups(rows), np.array(["Cl" in s for s in rows.structures()])
    for seed in range(6):
        rng = np.random.default_rng(seed)
        error = rng.normal(size=len(rows)) * np.where(chlorine, 2.0, 1.0)
        worse = worse_groups(errors_by_group(error, np.zeros(len(rows)), groups, draws=50, seed=seed))
        found += "with Cl" in {e.group for _, e in worse}
        assert all(e.low <= e.mae <= e.high for _, e in worse)
    assert found >= 5


@pytest.mark.parametrize("planted", [True, False])
def test_the_report_of_a_fit_names_them(planted, tmp_path):
    from matfm.app.bulk import fit_table
    from matfm.run.sheets import FactSheet
    named = 0
    for seed in range(2):
        records = table((lambda s: 3.0 if "F" in s else 0.3) if planted else (lambda s: 1.0), seed)
        result = fit_table(records, tmp_path / f"m{seed}", split="random", seed=seed, light=True)
        limits = [line for line in FactSheet.load(tmp_path / f"m{seed}").limits if line.startswith("y by group, rows left out of the fit in turn")]
        assert limits and len(result.tables["errors of y by group"]) > 5 and len(limits) == len(result.tables["groups with larger errors"])
        named += any("with F:" in line or "halogen" in line or "halide" in line for line in limits)
        if not planted: assert len(limits) == 1 and "no group of" in limits[0]
    assert named == (2 if planted else 0)


def test_networks_look_at_rows_that_taught_them_nothing(tmp_path):
    from matfm.adapt.finetune import FinetuneSpec
    from matfm.adapt.tables import LARGER, finetune_table
    from matfm.models.zoo import from_scratch
    tiny = from_scratch("molecule_graph", "molecule_gnn", seed=0, width=8, depth=1)
    result = finetune_table(table(lambda s: 1.0, 0), tmp_path / "m", model=tiny, split="random", spec=FinetuneSpec(epochs=1, threads=1))
    rows, n = result.tables["errors of y by group"], round(0.2 * len(SMILES))
    assert all(r["n"] < n for r in rows) and {r["rows"] for r in result.tables[LARGER]} == {"validation and test rows"}


def test_labels_of_molecules_and_materials(mirror):
    two = labels_of(molecules(["CC(=O)OCl", "c1ccccc1"])[0])
    assert ("element", "with Cl") in two[0] and ("scaffold", "no ring") in two[0] and ("scaffold", "scaffold c1ccccc1") in two[1] and ("element", "with C") not in two[1]
    salts = labels_of(compositions(["NaCl", "SrTiO3"])[0].with_columns({"space_group": [225, 0]}))
    assert {("crystal system", "cubic"), ("number of elements", "two elements"), ("element", "with Na")} <= salts[0] and not any(d == "crystal system" for d, _ in salts[1])
    solids = load("matfm_crystals").take(np.arange(4))
    assert all(any(d == "crystal system" for d, _ in each) for each in labels_of(solids))


def test_permutations_are_exact_where_all_can_be_counted():
    from itertools import combinations
    error, inside = np.array([5.0, 4.0, 1.0, 0.5, 0.2, 3.0]), np.array([True, True, False, False, False, False])
    gaps = [abs(error[list(c)].mean() - np.delete(error, c).mean()) for c in combinations(range(6), 2)]
    exact = np.mean(np.array(gaps) >= gaps[0] - 1e-12)
    assert abs(permutation_p(error, inside[:, None], draws=20_000)[0] - exact) < 0.01
    low, high = bootstrap_mean(np.arange(101.0), 4000, np.random.default_rng(0))
    assert abs(low - (50 - 1.96 * 2.9)) < 0.4 and abs(high - (50 + 1.96 * 2.9)) < 0.4


def test_names_masks_and_bad_input():
    y, pred = np.arange(40.0), np.arange(40.0) + np.where(np.arange(40) < 20, 3.0, 0.1)
    by_name = errors_by_group(y, pred, {"half": ["a"] * 20 + ["b"] * 20})
    by_mask = errors_by_group(y, pred, {"half": {"a": np.arange(40) < 20}})
    assert [e.group for _, e in by_name] == ["a", "b"] and by_mask[0][1].mae == pytest.approx(by_name[0][1].mae) and by_mask[0][1].p_holm <= by_name[0][1].p_holm
    gone = np.where(np.arange(40) < 20, np.nan, y)
    assert [e.group for _, e in errors_by_group(gone, pred, {"half": ["a"] * 20 + ["b"] * 20})] == ["b"] and "too few rows" in group_lines(errors_by_group(y[:12], pred[:12], {"h": ["a"] * 9 + ["b"] * 3}))[0]
    for groups in ({"half": ["a"]}, {"half": {"a": np.ones(3, bool)}}):
        with pytest.raises(BadInput, match="group names"): errors_by_group(y, pred, groups)
