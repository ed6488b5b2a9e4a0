"""Crystal strings: the table of Wyckoff positions, strings that come back as they went, nets that do not depend on how the crystal is written."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm import testing
from matfm.core import BadInput
from matfm.data.records import Crystal, crystals
from matfm.represent.crystal_strings import (MaterialTokens, canonical_graph, crystal_of, graph_string, locate, material_string, operations, parse_graph, parse_material_string,
                                             quotient_graph, standard_realisation, wyckoff_positions)

KNOWN = {"rock salt": "SG225 5.64 Cl a Na b", "perovskite": "SG221 3.905 Sr a Ti b O d", "rutile": "SG136 4.594 2.959 Ti a O f .3053",
         "wurtzite": "SG186 3.82 6.26 S b .0000 Zn b .3740", "zinc blende": "SG216 5.4 S a Zn c", "corundum": "SG167 4.76 12.99 Al c .1478 O e .3062"}
COUNTS = {1: 1, 2: 9, 5: 3, 14: 5, 33: 1, 62: 4, 99: 7, 136: 11, 160: 3, 186: 4, 191: 18, 194: 12, 198: 2, 216: 9}  # International Tables A


def disguised(c: Crystal, seed: int) -> Crystal:
    "The same crystal in another cell, from another origin, in another order, turned."
    rng, u = np.random.default_rng(seed), np.eye(3, dtype=int)
    for i, j in ((0, 1), (1, 2), (2, 0)): u[i] += rng.integers(-1, 2) * u[j]
    order, turn = rng.permutation(len(c)), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return Crystal(u @ c.lattice @ (turn * np.linalg.det(turn)), c.numbers[order], ((c.frac + rng.random(3)) @ np.linalg.inv(u) % 1)[order])


@pytest.mark.parametrize("number", COUNTS)
def test_table_of_positions(number):
    table = wyckoff_positions(number)
    assert "".join(table) == "abcdefghijklmnopqrstuvwxyz"[:COUNTS[number]]
    assert list(table.values())[-1].multiplicity == len(operations(number)[0]) and len({str(p) for p in table.values()}) == len(table)
    sizes = [p.multiplicity for p in table.values()]
    assert sizes == sorted(sizes)                       # the Tables go from special to general
    for p in table.values():
        x = p.base + np.array([.0713, .1931, .3967])[list(p.axes)] @ p.along
        assert locate(number, list(table.values()), x)[0] is p


def test_positions_agree_with_spglib():
    spglib = pytest.importorskip("spglib")
    for text in KNOWN.values():
        c = crystal_of(text, primitive=False)
        d = spglib.get_symmetry_dataset((c.lattice, c.frac, c.numbers), symprec=1e-3)
        assert d.number == parse_material_string(text)[0] and len(set(d.crystallographic_orbits.tolist())) == len(parse_material_string(text)[2])


@pytest.mark.parametrize("name", KNOWN)
def test_known_crystals(name):
    c = crystal_of(KNOWN[name])
    assert material_string(c) == KNOWN[name]
    other = disguised(c, 3)
    assert material_string(other) == KNOWN[name]
    net = graph_string(c)
    assert net == graph_string(other) == str(canonical_graph(parse_graph(net)))
    drawn = standard_realisation(quotient_graph(c))
    assert sorted(drawn.numbers.tolist()) == sorted(c.numbers.tolist()) and drawn.volume > 0


def test_digits_and_hand():
    quartz = "SG154 4.913 5.405 Si a .4697 O c .4135 .2669 .1191"
    c = crystal_of(quartz)
    mirrored = Crystal(c.lattice, c.numbers, -c.frac % 1)
    a, b = material_string(c), material_string(mirrored)
    assert {a.split()[0], b.split()[0]} == {"SG152", "SG154"} and graph_string(c) == graph_string(mirrored)
    assert len(material_string(c, digits=6)) > len(a) and material_string(crystal_of(a)) == a
    with pytest.raises(BadInput, match="digits"): material_string(c, digits=1)


@given(st.sampled_from(list(KNOWN.values())), st.data())
@settings(max_examples=60, deadline=None)
def test_broken_strings_say_where(text, data):
    words = text.split()
    k = data.draw(st.integers(0, len(words) - 1))
    for broken in (" ".join([*words[:k], "?", *words[k + 1:]]), " ".join([*words[:k], "?", *words[k:]])):
        with pytest.raises(BadInput) as e: parse_material_string(broken)
        assert f"'?' at position {broken.index('?')}" in str(e.value)


@pytest.mark.parametrize("text", ["SG136 4.594 2.959 O f 0", "SG2 5 5 5 20 20 120 Si i .1 .2 .3", "SG225 5.64", "SG0 1 Na a", "", None])
def test_no_crystal(text):
    with pytest.raises(BadInput): crystal_of(text)


def test_tokens():
    r = MaterialTokens.default()
    rows, rejected = crystals([crystal_of(t) for t in KNOWN.values()])
    assert len(rejected) == 0
    testing.check_representation(r, rows)
    for c, text in zip(rows.structures(), KNOWN.values(), strict=True):
        ids = r(c)["tokens"]
        assert r.decode(ids) == text and r.unk_id not in ids and np.array_equal(ids, r(text)["tokens"])
    with pytest.raises(BadInput, match="max_length"): MaterialTokens.default(max_length=5)(KNOWN["rutile"])


def test_on_measured_crystals(mirror):
    from matfm.data.sources import load
    some = load("mp_20", limit=10).structures()
    r, same, turned, nets = MaterialTokens.default(), 0, 0, 0
    for k, c in enumerate(some):
        text = material_string(c)
        back = crystal_of(text)
        same += material_string(back) == text and len(back) == len(c)
        assert r.unk_id not in r.encode(text)
        turned += material_string(disguised(c, k)) == text
        nets += graph_string(disguised(c, k)) == graph_string(c)
    assert same >= .9 * len(some) and turned >= .7 * len(some) and nets >= .9 * len(some), (same, turned, nets)
