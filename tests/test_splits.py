"""Splits: disjoint, complete, repeatable, and no group on two sides."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput
from matfm.data.records import Crystal, compositions, crystals, molecules
from matfm.data.splits import (Split, chemical_system, column_split, composition_split, fold_split, group_split, identities, leakage, murcko_scaffold, random_split,
                               scaffold_split, space_group)

QUICK = settings(max_examples=60, deadline=None)
RINGS = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccc2ccccc2c1", "C1CCOC1", "c1ccsc1", "C1CC1", "c1cc[nH]c1"]
ELEMENTS = ["Li", "Na", "Mg", "Al", "Ti", "Fe", "Zn"]
FRACTIONS = st.tuples(st.integers(1, 10), st.integers(0, 5), st.integers(0, 5)).map(lambda t: tuple(x / sum(t) for x in t))
molecule_tables = st.lists(st.tuples(st.sampled_from([*RINGS, ""]), st.integers(1, 6)), min_size=1, max_size=40).map(lambda v: molecules([f"{'C' * n}{r}" for r, n in v])[0])
formula_tables = st.lists(st.tuples(st.sampled_from(ELEMENTS), st.sampled_from(["O", "S", "Cl"]), st.integers(1, 3)), min_size=1, max_size=40).map(
    lambda v: compositions([f"{a}{b}{n}" for a, b, n in v])[0])


def proper(split, n):
    rows = [*split.train, *split.valid, *split.test]
    assert sorted(rows) == list(range(n))
    assert all(list(p) == sorted(p) for p in (split.train, split.valid, split.test))
    assert Split.from_json(split.to_json()) == split and Split.from_json(split.to_json()).digest == split.digest


def apart(split, keys):
    where = [{keys[i] for i in p} for p in (split.train, split.valid, split.test)]
    assert not where[0] & where[1] and not where[0] & where[2] and not where[1] & where[2]


@QUICK
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), FRACTIONS, st.integers(0, 2**31))
def test_group_split(groups, fractions, seed):
    s = group_split(groups, fractions, seed)
    proper(s, len(groups))
    apart(s, groups)
    assert s == group_split(groups, fractions, seed)
    largest = max(groups.count(g) for g in groups)
    for part, f in zip((s.train, s.valid, s.test), fractions, strict=True):
        assert abs(len(part) - f * len(groups)) <= largest + 1e-9


@QUICK
@given(molecule_tables, FRACTIONS, st.integers(0, 1000))
def test_random_and_scaffold_split(records, fractions, seed):
    r = random_split(records, fractions, seed)
    proper(r, len(records))
    apart(r, records.structures())
    scaffolds = [murcko_scaffold(s) for s in records.structures()]
    for s in (scaffold_split(records, fractions), scaffold_split(records, fractions, seed)):
        proper(s, len(records))
        apart(s, scaffolds)
        assert sum(map(len, s.parts(records))) == len(records)
    fixed = scaffold_split(records, fractions)
    assert fixed == scaffold_split(records, fractions) and len(fixed.train) <= fractions[0] * len(records) + 1e-9


@QUICK
@given(formula_tables, FRACTIONS, st.integers(0, 1000))
def test_composition_split(records, fractions, seed):
    for by, key in [("formula", str), ("chemsys", chemical_system)]:
        s = composition_split(records, fractions, seed, by)
        proper(s, len(records))
        apart(s, [key(f) for f in records.structures()])
        assert leakage(s, records)[f"{by}_test"] == 0


def deepchem_reference(scaffolds, fractions):
    "The published rule, written down independently."
    n, sets = len(scaffolds), {}
    for i, s in enumerate(scaffolds): sets[s] = [*sets.get(s, []), i]
    ordered = sorted(sorted(sets.values(), key=lambda v: -v[0]), key=lambda v: -len(v))
    train, valid, test = [], [], []
    for group in ordered:
        if len(train) + len(group) <= fractions[0] * n: train += group
        elif len(train) + len(valid) + len(group) <= (fractions[0] + fractions[1]) * n: valid += group
        else: test += group
    return tuple(tuple(sorted(p)) for p in (train, valid, test))


@QUICK
@given(molecule_tables, FRACTIONS)
def test_scaffold_order_is_deepchems(records, fractions):
    s = scaffold_split(records, fractions)
    assert (s.train, s.valid, s.test) == deepchem_reference([murcko_scaffold(x) for x in records.structures()], fractions)


def test_esol_scaffold_split(mirror):
    from matfm.data.sources import load
    esol = load("esol")
    s = scaffold_split(esol)
    assert (len(s.train), len(s.valid), len(s.test)) == (902, 113, 113)
    assert leakage(s, esol)["scaffold_test"] == 0 < leakage(random_split(esol), esol)["scaffold_test"]


def rocksalt(a, cells=1, cation=11):
    base = Crystal(np.array([[0, a, a], [a, 0, a], [a, a, 0]]) / 2, np.array([cation, 17]), np.array([[0, 0, 0], [.5, .5, .5]]))
    if cells == 1: return base
    s = base.to_pymatgen() * (cells, 1, 1)
    return Crystal.from_pymatgen(s)


def test_identical_crystals_stay_together():
    cscl = Crystal(np.eye(3) * 3.4, np.array([11, 17]), np.array([[0, 0, 0], [.5, .5, .5]]))
    r, _ = crystals([rocksalt(5.6), rocksalt(5.6, 2), cscl, rocksalt(6.3, cation=19), rocksalt(5.7)])
    keys = identities(r)
    assert keys[0] == keys[1] == keys[4] and len(set(keys)) == 3
    assert space_group(cscl) == (221, 2) and space_group(rocksalt(5.6, 2)) == (225, 2)
    for seed in range(20): apart(random_split(r, (.4, .3, .3), seed), keys)


def test_molecules_that_are_not_canonical():
    r, _ = molecules(["OCC", "C(O)C", "CCN"], canonical=False)
    assert identities(r)[0] == identities(r)[1] != identities(r)[2]


def test_fractions_not_amounts_make_a_composition():
    keys = identities(compositions(["Fe2O3", "FeO1.5", "FeO"])[0])
    assert keys[0] == keys[1] != keys[2]


def test_tied_to_its_table(tmp_path):
    r, _ = molecules([f"{'C' * n}O" for n in range(1, 31)], {"y": list(range(30))}, name="alcohols")
    s = random_split(r, seed=5)
    assert Split.load(s.save(tmp_path / "s.json")) == s and random_split(r, seed=6) != s
    with pytest.raises(BadInput, match="made for alcohols"): s.parts(r.take(range(29)))
    with pytest.raises(BadInput, match="made for alcohols"): s.parts(r.take(list(range(30))[::-1]))
    assert "alcohols" in s._repr_html_()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"method": "x"}', '{"method":"x","train":[0],"valid":[0],"test":[],"nonsense":1}', '{"method":"x","train":[0],"valid":[0],"test":[]}'])
def test_damaged_split_files(text, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(BadInput): Split.load(tmp_path / "s.json")


@pytest.mark.parametrize("call, message", [
    (lambda m, c: random_split(m, (.9, .2, .1)), "add up to 1"), (lambda m, c: random_split(m, (1.2, -.1, -.1)), "add up to 1"), (lambda m, c: random_split(m, seed=-1), "seed must be"),
    (lambda m, c: scaffold_split(c), "needs molecules"), (lambda m, c: composition_split(m), "needs crystals or compositions"), (lambda m, c: composition_split(c, by="formla"), "did you mean 'formula'"),
    (lambda m, c: group_split([1], records=m), "1 groups for 2 records"), (lambda m, c: column_split(m, "splt"), "unknown column"), (lambda m, c: fold_split(m, 0), "unknown column")])
def test_wrong_arguments(call, message):
    m, c = molecules(["C", "CC"])[0], compositions(["NaCl", "KCl"])[0]
    with pytest.raises(BadInput, match=message): call(m, c)


def test_official_splits():
    r, _ = molecules([f"{'C' * n}O" for n in range(1, 21)])
    r = r.with_columns({"split": ["Train", "val", "TEST", "other"] * 5, "test_fold": [i % 5 for i in range(20)]})
    s = column_split(r)
    assert s.train == (0, 4, 8, 12, 16) and s.valid == (1, 5, 9, 13, 17) and leakage(s, r)["left_out"] == 5
    f = fold_split(r, 3, valid=.25)
    assert f.test == (3, 8, 13, 18) and len(f.valid) == 4
    proper(f, 20)
    with pytest.raises(BadInput, match="no row has test_fold = 9"): fold_split(r, 9)
    with pytest.raises(BadInput, match="names no training rows"): column_split(r, "id")
