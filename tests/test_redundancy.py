"""MD-HIT: the fast selection equals its definition, whatever the table, the distance and the order."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput
from matfm.data.records import Crystal, compositions, crystals, molecules, parse_formula
from matfm.data.redundancy import SAME, SCALES, Fingerprints, MdHit, Vectors, composition_cdf, elmd, greedy_plain, md_hit, morgan_bits, ofm_vector, sweep, vectors, xrd_vector

QUICK = settings(max_examples=60, deadline=None)
ELEMENTS = ["H", "Li", "Na", "La", "Pr", "Th", "Ti", "Zr", "Fe", "O", "S", "Cl"]
formulas = st.lists(st.lists(st.tuples(st.sampled_from(ELEMENTS), st.integers(1, 4)), min_size=1, max_size=3).map(lambda v: "".join(f"{s}{n}" for s, n in v)), min_size=1, max_size=40)
TAUS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 7.0, 200.0])


def same(fast, plain, tau):
    assert np.array_equal(fast.cover, plain.cover) and np.allclose(fast.distance, plain.distance, atol=1e-12)
    assert np.array_equal(fast.cover[fast.kept], fast.kept) and (fast.distance <= tau + SAME).all() and fast.sizes.sum() == len(fast)


@QUICK
@given(formulas, TAUS, st.integers(0, 99), st.sampled_from(sorted(SCALES)))
def test_compositions_equal_the_definition(texts, tau, seed, scale):
    records, _ = compositions(texts)
    x = np.array([composition_cdf(parse_formula(f), scale) for f in records.structures()])
    finder, order = Vectors(x, tau, "cityblock"), np.random.default_rng(seed).permutation(len(x))
    plain = greedy_plain(finder.distances, order, tau)
    same(sweep(finder, order), plain, tau)
    r = md_hit(records, MdHit(tau, order="random", seed=seed, scale=scale))
    assert np.array_equal(r.cover, plain.cover) and len(r.kept) + len(r.rejected) == len(records) and r.records.ids == [records.ids[i] for i in r.kept]
    assert all(np.isclose(elmd(records.structures()[i], records.structures()[k], scale), d) for i, (k, d) in enumerate(zip(r.cover, r.distance, strict=True)))


@QUICK
@given(st.integers(1, 60), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0, 3.0]), st.sampled_from(["euclidean", "cityblock"]), st.sampled_from([np.float32, np.float64]), st.integers(0, 99))
def test_vectors_equal_the_definition(n, d, tau, metric, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).round(1).astype(dtype)  # rounded: ties and copies
    finder, order = Vectors(x, tau, metric), rng.permutation(n)
    same(sweep(finder, order), greedy_plain(finder.distances, order, tau), tau)


@QUICK
@given(st.integers(1, 60), st.sampled_from([0.0, 0.2, 0.5, 0.75, 0.99]), st.floats(0.01, 0.5), st.integers(0, 99))
def test_bit_sets_equal_the_definition(n, tau, density, seed):
    rng = np.random.default_rng(seed)
    bits = rng.random((n, 128)) < density
    bits[:, 0] = True  # never empty, as with molecules
    finder, order = Fingerprints(np.packbits(bits, axis=1).view(np.uint64), tau), rng.permutation(n)
    same(sweep(finder, order), greedy_plain(finder.distances, order, tau), tau)


def test_counting_bits_without_numpy_2(monkeypatch):
    from matfm.data import redundancy
    packed = morgan_bits(["CCO", "c1ccccc1", "C"])
    fast = redundancy._ones(packed)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert np.array_equal(redundancy._ones(packed), fast)


def test_order_decides_who_stays():
    records, _ = compositions(["CaTiO3", "SrTiO3", "NaCl"], {"e": [-1.0, -2.0, np.nan]}, {"e": "eV/atom"})
    assert len(records) == 2  # a row without any target is no record
    records, _ = compositions(["CaTiO3", "SrTiO3", "NaCl"], {"e": [-1.0, -2.0, np.nan], "g": [1, 1, 1]}, {"e": "eV/atom"})
    assert md_hit(records, MdHit(0.2)).kept.tolist() == [0, 2] and md_hit(records, MdHit(0.2, order="e")).kept.tolist() == [1, 2]
    assert md_hit(records, MdHit(0.2, order="atoms")).kept.tolist() == [0, 2]
    assert md_hit(records, MdHit(0.2, order="random", seed=1)).kept.tolist() == md_hit(records, MdHit(0.2, order="random", seed=1)).kept.tolist()


@pytest.mark.parametrize("make", [
    lambda: MdHit(-0.1), lambda: MdHit(float("nan")), lambda: MdHit(1, distance="elmdd"), lambda: MdHit(1, scale="x"), lambda: MdHit(1, seed=-1), lambda: MdHit(1.0, distance="tanimoto"),
    lambda: Vectors(np.zeros(4), 1), lambda: Vectors(np.full((2, 2), np.inf), 1), lambda: Vectors(np.array([["a"]]), 1), lambda: Vectors(np.zeros((2, 2)), 1, "cosine"),
    lambda: Fingerprints(morgan_bits(["C"]), -0.1), lambda: morgan_bits(["not one"]), lambda: sweep(Vectors(np.zeros((3, 1)), 1), [0, 1]), lambda: elmd("NaCl", "Qq"),
    lambda: md_hit(molecules(["CCO"])[0], MdHit(1.0)), lambda: md_hit(compositions(["NaCl"])[0], MdHit(0.5, "tanimoto")), lambda: md_hit(compositions(["NaCl"])[0], MdHit(0.5, order="energy"))])
def test_bad_input_is_refused(make):
    with pytest.raises(BadInput): make()


def test_empty_and_unreadable():
    r = md_hit(compositions([])[0], MdHit(1.0))
    assert len(r.records) == len(r.rejected) == len(r.kept) == 0
    r = md_hit(compositions(["OgO2", "NaCl"])[0], MdHit(1.0))
    assert r.kept.tolist() == [1] and r.cover.tolist() == [-1, 1] and "Og has no place" in r.rejected.frame["reason"][0]
    assert md_hit(molecules([])[0], MdHit(0.5, "tanimoto")).kept.tolist() == []


def test_structures_do_not_depend_on_the_setting():
    one = Crystal(np.eye(3) * 4.12, [55, 17], [[0, 0, 0], [.5, .5, .5]])
    two = Crystal(np.diag([4.12, 4.12, 8.24]), [55, 17, 55, 17], [[.1, 0, 0], [.6, .5, .25], [.1, 0, .5], [.6, .5, .75]])
    for vector in (xrd_vector, ofm_vector): assert np.allclose(vector(one), vector(two), atol=2e-3)
    records, _ = crystals([one, two, Crystal(np.eye(3) * 3.0, [29], [[0, 0, 0]])])
    for distance in ("xrd", "ofm"): assert md_hit(records, MdHit(0.3, distance)).kept.tolist() == [0, 2]
    x, rows, none = vectors(records, MdHit(0.3), jobs=2)
    assert x.shape == (3, 102) and rows.tolist() == [0, 1, 2] and len(none) == 0 and np.array_equal(x, vectors(records, MdHit(0.3))[0])


def test_all_formulas_of_matbench(mirror):
    from matfm.data.sources import load
    records = load("matbench_mp_e_form")
    kept = {tau: len(md_hit(records, MdHit(tau)).kept) for tau in (1.0, 2.0)}
    assert kept == {1.0: 22809, 2.0: 8168}, "an exact selection in a fixed order is one number"
    sample = records.take(np.random.default_rng(1).permutation(len(records))[:2000])
    x, _, _ = vectors(sample, MdHit(1.0))
    for tau in kept: assert np.array_equal(md_hit(sample, MdHit(tau)).cover, greedy_plain(Vectors(x, tau, "cityblock").distances, range(2000), tau).cover)
