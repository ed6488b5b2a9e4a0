"""Mixtures: the order of the parts never shows, splits keep their promise, baselines answer and refuse."""
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm.adapt.mixtures import LinearMixing, MixtureDescriptor, MixtureForest, MixtureRidge, NearestMixture, PairDescriptor, descriptor_for, sides
from matfm.core import BadInput
from matfm.data.mixtures import NOVELTY, blocks, component_set_split, component_sets, condition_columns, ideal_mixing, leave_one_component_out, mixture_vector, new_component_split, novelty
from matfm.data.records import Mixture, from_values, molecules
from matfm.data.splits import Split, leakage_report, official_split
from matfm.registry import baselines, representations, splitters
from matfm.represent.descriptors import Ecfp, MoleculeDescriptors, matrix

QUICK = settings(max_examples=60, deadline=None)
PARTS = ["O", "CCO", "CC(C)=O", "c1ccccc1", "[Li+].[Br-]", "CS(C)=O"]
SMALL = MoleculeDescriptors(("MolWt", "TPSA", "MolLogP"))
parts = st.tuples(st.sampled_from(PARTS), st.one_of(st.just(math.nan), st.just(0.0), st.floats(1e-6, 10)), st.sampled_from(["solvent", "salt"]))
mixtures = st.lists(parts, min_size=1, max_size=7).filter(lambda p: any(f != 0 for _, f, _ in p)).map(lambda p: Mixture(*zip(*p, strict=True)))


def vectors(smiles):
    return np.random.default_rng(PARTS.index(smiles)).normal(size=5)


def table(n=80, seed=0, temperature=True):
    "Binary and pure mixtures whose value is linear in fractions and in 1/T."
    rng = np.random.default_rng(seed)
    made, y, at = [], [], []
    for k in range(n):
        a, b = rng.choice(PARTS, 2, replace=False).tolist()
        x = 1.0 if k % 4 == 0 else float(rng.uniform(.1, .9))
        t = float(rng.choice([280, 300, 320]))
        made.append(Mixture((a,), (x,)) if x == 1 else Mixture((a, b), (x, 1 - x)))
        y.append(x * PARTS.index(a) + (1 - x) * PARTS.index(b) + (1000 / t if temperature else 0))
        at.append(t)
    records, _ = from_values(made, "mixture", {"y": y}, {"y": "eV"}, basis="mole", name="linear")
    return records.with_columns({"T": at}, conditions={"T": "K"}) if temperature else records


def shuffled(m, seed):
    p = np.random.default_rng(seed).permutation(len(m)).tolist()
    return Mixture(*(tuple(v[k] for k in p) for v in (m.components, m.fractions, m.roles)))


@QUICK
@given(mixtures, st.integers(0, 99))
def test_order_never_shows(m, seed):
    for roles in ((), ("salt", "solvent")):
        one, other = (mixture_vector(x, vectors, 5, roles, ("mean", "std", "min", "max")) for x in (m, shuffled(m, seed)))
        assert one.tobytes() == other.tobytes() and np.isfinite(one).all()


@QUICK
@given(mixtures)
def test_weights_add_up(m):
    for b in blocks(m, ("salt", "solvent")):
        assert len(b) == len(set(b.components)) and list(b.components) == sorted(b.components)
        assert len(b) == 0 or abs(b.weights.sum() - 1) < 1e-12 and (b.weights > 0).all()
        assert b.known or np.all(b.weights == b.weights[0])


@QUICK
@given(mixtures, st.floats(0.01, 100))
def test_weights_do_not_depend_on_the_whole(m, factor):
    scaled = Mixture(m.components, tuple(f * factor for f in m.fractions), m.roles)
    np.testing.assert_allclose(blocks(m)[0].weights, blocks(scaled)[0].weights, rtol=1e-9)


@QUICK
@given(st.integers(5, 60), st.integers(0, 999), st.sampled_from([(.6, .2, .2), (.8, 0, .2), (.5, .5, 0)]))
def test_splits_keep_their_promise(n, seed, fractions):
    records = table(n, seed)
    sets = component_sets(records)
    whole, new = component_set_split(records, fractions, seed), new_component_split(records, fractions, seed)
    for s in (whole, new):
        assert sorted(s.train + s.valid + s.test) == list(range(n)) and Split.from_json(s.to_json()) == s and "component" in s.card()
    where = {}
    for p in ("train", "valid", "test"):
        for i in getattr(whole, p): assert where.setdefault(sets[i], p) == p
    for later, earlier in ((new.test, new.train + new.valid), (new.valid, new.train)):
        seen = {c for i in earlier for c in sets[i]}
        assert all(set(sets[i]) - seen for i in later)
    assert not new.test or set(novelty(records.take(new.train), records.take(new.test))) <= set(NOVELTY[3:])


def test_no_component_has_gone_missing():
    records = table()
    out = leave_one_component_out(records, most=.9)
    assert {s.parameters["component"] for s in out} == {c for s in component_sets(records) for c in s}
    for s in out:
        assert all((s.parameters["component"] in component_sets(records)[i]) == (i in s.test) for i in range(len(records)))
    assert [len(s.test) for s in out] == sorted((len(s.test) for s in out), reverse=True)
    with pytest.raises(BadInput, match="no component"): leave_one_component_out(records, least=1000)


def test_a_fraction_of_zero_is_no_component():
    records, _ = from_values([Mixture(("O", "CCO"), (1, 0)), Mixture(("O",), (1,))], "mixture")
    assert component_sets(records) == [("O",), ("O",)] and novelty(records.take([0]), records.take([1])) == ["same mixture"]


def test_novelty_goes_up():
    before, _ = from_values([Mixture(("O", "CCO"), (.5, .5)), Mixture(("C",), (1,))], "mixture")
    after, _ = from_values([Mixture(("CCO", "O"), (.5, .5)), Mixture(("O", "CCO"), (.4, .6)), Mixture(("O", "C"), (.5, .5)), Mixture(("O", "N"), (.5, .5)), Mixture(("N",), (1,))], "mixture")
    assert novelty(before, after) == list(NOVELTY)
    assert leakage_report(before, after)["identical"] == 1


def test_conditions():
    records = table(4).with_columns({"T": [7.0, None, -300.0, float("nan")], "salt": [1, 2, 3, 4]}, conditions={"T": "degC", "salt": "mol/kg"})
    c = condition_columns(records)
    assert c["T [K]"].tolist() == pytest.approx([280.15, 0, 0, 0]) and c["T missing"].tolist() == [0, 1, 1, 1] and c["salt [mol/kg]"].tolist() == [1, 2, 3, 4]
    assert all(np.isfinite(v).all() for v in c.values()) and condition_columns(table(4, temperature=False)) == {}


def test_ideal_mixing_is_exact_where_it_should_be():
    records = table(200)
    ideal, y = ideal_mixing(records, records, "y"), records.y("y")[:, 0]
    there = np.isfinite(ideal)
    assert there.sum() > 150
    np.testing.assert_allclose(ideal[there], y[there], atol=1e-9)
    between = records.with_columns({"T": [290.0] * len(records)})
    curved = ideal_mixing(records, between, "y") - y + 1000 / records.frame["T"].to_numpy()
    np.testing.assert_allclose(curved[np.isfinite(curved)], 1000 / 290, atol=1e-9)  # linear in 1/T
    assert np.isnan(ideal_mixing(records, records.with_columns({"T": [500.0] * len(records)}), "y")).all()


@pytest.mark.parametrize("roles,kind", [((), MixtureDescriptor), (("solvent", "salt"), MixtureDescriptor), (("1", "2"), PairDescriptor)])
def test_descriptor_follows_roles(roles, kind):
    records, _ = from_values([Mixture(("O", "CCO"), (.4, .6), roles)], "mixture")
    d = descriptor_for(records, SMALL)
    assert isinstance(d, kind) and representations.build(representations.describe(d)) == d and len(d.names) == d(records.structures()[0])["x"].size
    assert len(set(d.names)) == len(d.names)


@QUICK
@given(mixtures, mixtures)
def test_pairs_may_change_places(a, b):
    def pair(x, y):
        return Mixture(x.components + y.components, x.fractions + y.fractions, ("1",) * len(x) + ("2",) * len(y))
    d = PairDescriptor(MixtureDescriptor(SMALL, statistics=("mean",)))
    assert d(pair(a, b))["x"].tobytes() == d(pair(b, a))["x"].tobytes()
    assert [s.components for s in sides(pair(a, b))] == [a.components, b.components]
    assert d(pair(a, a))["x"][-1] == 1


def test_bad_rows_are_set_aside():
    records, _ = from_values([Mixture(("O", "CCO"), (.5, .5), ("solvent", "salt")), Mixture(("O",), (1,), ("drug",))], "mixture")
    X, kept, rejected = matrix(MixtureDescriptor(Ecfp(bits=32), ("solvent", "salt")), records)
    assert kept.tolist() == [0] and "unknown role" in rejected.frame["reason"][0] and X.shape == (1, 2 * (2 * 32 + 3))


@pytest.mark.parametrize("model", [lambda: MixtureForest(n_estimators=10), MixtureRidge, LinearMixing, NearestMixture], ids=["forest", "ridge", "linear", "nearest"])
def test_baselines(model):
    records = table(120)
    train, test = records.take(range(90)), records.take(range(90, 120))
    made = model().fit(train, "y")
    p, std = made.predict(test, return_std=True)
    again = baselines.build(baselines.describe(made)).fit(train, "y")
    turned, _ = from_values([shuffled(m, k) for k, m in enumerate(test.structures())], "mixture")
    turned = turned.with_columns({"T": test.frame["T"]}, conditions={"T": "K"})
    assert p.tobytes() == again.predict(turned).tobytes() and np.isfinite(std).all() and (std >= 0).all()
    y = test.y("y")[:, 0]
    assert np.abs(p - y).mean() < .7 * np.abs(train.y("y").mean() - y).mean()
    with pytest.raises(BadInput, match="other conditions"): made.predict(table(5, temperature=False))
    with pytest.raises(BadInput): model().fit(molecules(["O", "C"], {"y": [1, 2]})[0], "y")


def test_linear_mixing_finds_the_line():
    records = table(300)
    train, test = records.take(range(200)), records.take(range(200, 300))
    np.testing.assert_allclose(LinearMixing().fit(train, "y").predict(test), test.y("y")[:, 0], atol=.02)


def test_equal_rows_of_different_value_are_averaged():
    records, _ = from_values([Mixture(("O",), (1,)), Mixture(("O",), (1,)), Mixture(("C",), (1,))], "mixture", {"y": [1.0, 2.0, 9.0]}, {"y": ""})
    assert NearestMixture().fit(records, "y").predict(records).tolist() == [1.5, 1.5, 9.0]


def test_registered():
    assert {"mixture", "mixture_pair"} <= set(representations) and {"mixture_forest", "mixture_ridge", "linear_mixing", "nearest_mixture"} <= set(baselines) and {"component_sets", "new_components"} <= set(splitters)
    with pytest.raises(BadInput, match="molecule records"): component_set_split(molecules(["O"])[0])


def test_flash_points_and_olfactory_pairs(mirror):
    from matfm.data.sources import load
    flash = load("flash_point_mixtures")
    assert np.isfinite(ideal_mixing(flash, flash, "FP (°C)")).mean() > .9
    with pytest.raises(BadInput, match="comes without a split"): official_split(flash)
    smell = load("chemixhub_olfactory_similarity").take(range(30))
    d = descriptor_for(smell, SMALL)
    X, kept, rejected = matrix(d, smell)
    assert isinstance(d, PairDescriptor) and len(kept) == 30 and not len(rejected) and np.isfinite(X).all() and X[:, d.names.index("average equal shares")].all()
