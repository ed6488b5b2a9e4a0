"""Potentials, relaxation, the hull and the shipped crystal set."""
import dataclasses
import json
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.core import BadInput, MissingExtra, Potential, sha256_file
from matfm.recipes.prototypes import ELEMENTAL, ELEMENTS, PROTOTYPES, decorations, place, prototype, split_of
from matfm.data.records import Crystal, Records
from matfm.potentials.potential import GPA, CHGNet, LennardJones
from matfm.potentials.relax import EOS, Job, NotRelaxed, at_volume, equation_of_state, find_volume, relax_all, relax_cell, relax_volume, symmetry
from matfm.potentials.stability import TARGETS, above_hull, formation_energies, load_references, references
from matfm.registry import potentials

FCC = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2


@pytest.fixture(scope="module")
def crooked():
    rng = np.random.default_rng(3)
    frac = np.array([[0, 0, 0], [.5, .5, 0], [.5, 0, .5], [0, .5, .5]]) + rng.normal(0, .02, (4, 3))
    return Crystal(np.eye(3) * 4.3 + rng.normal(0, .12, (3, 3)), [29, 29, 47, 29], frac)


@pytest.fixture(scope="module", params=["lennard_jones", "chgnet"])
def potential(request):
    if request.param == "chgnet":
        pytest.importorskip("chgnet")
    return potentials.build(request.param)


# every potential: the Protocol, its derivatives, its invariances

def test_protocol(potential, crooked):
    assert isinstance(potential, Potential)
    out, = potential.efs([crooked])
    assert out["forces"].shape == (4, 3) and out["stress"].shape == (3, 3)
    assert np.isclose(potential.energies([crooked])[0], out["energy"], atol=1e-4)
    assert potentials.build(potentials.describe(potential)) == potential
    assert len(potential.energies([])) == 0


def test_derivatives(potential, crooked):
    exact = isinstance(potential, LennardJones)
    h, tolerance = (1e-4, 1e-5) if exact else (2e-3, 2e-2)
    out, = potential.efs([crooked])
    moves = []
    for k in range(3):
        for sign in (1, -1):
            cart = crooked.frac @ crooked.lattice
            cart[1, k] += sign * h
            moves.append(Crystal(crooked.lattice, crooked.numbers, cart @ np.linalg.inv(crooked.lattice)))
    for sign in (1, -1):
        strain = np.eye(3)
        strain[0, 1] += sign * h
        moves.append(Crystal(crooked.lattice @ strain, crooked.numbers, crooked.frac))
    e = potential.energies(moves).reshape(4, 2)
    slope = (e[:, 0] - e[:, 1]) / (2 * h)
    assert np.allclose(-slope[:3], out["forces"][1], atol=tolerance)
    assert abs(slope[3] / crooked.volume * GPA - out["stress"][0, 1]) < 100 * tolerance


def test_invariances(potential, crooked):
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    order = np.array([2, 0, 3, 1])
    double = Crystal(crooked.lattice * [[2], [1], [1]], np.tile(crooked.numbers, 2), np.concatenate([crooked.frac / [2, 1, 1], crooked.frac / [2, 1, 1] + [.5, 0, 0]]))
    same = [crooked, Crystal(crooked.lattice @ turn, crooked.numbers, crooked.frac), Crystal(crooked.lattice, crooked.numbers[order], crooked.frac[order]),
            Crystal(crooked.lattice, crooked.numbers, crooked.frac + [.3, -.2, 1.7])]
    e = potential.energies([*same, double], batch=2)
    assert np.allclose(e[:4], e[0], atol=2e-4) and np.isclose(e[4], 2 * e[0], atol=5e-4)
    out, turned = potential.efs(same[:2])
    assert np.allclose(out["forces"] @ turn, turned["forces"], atol=1e-3) and np.allclose(turn.T @ out["stress"] @ turn, turned["stress"], atol=2e-2)


# bad input

def test_bad_crystals_are_named():
    no_atoms = "data_x\n_cell_length_a 4\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha 90\n_cell_angle_beta 90\n_cell_angle_gamma 90\n"
    for text in (no_atoms, "", "data_x\nloop_\n_atom_site_label\n"):
        with pytest.raises(BadInput):
            Crystal.from_cif(text)
    with pytest.raises(BadInput, match="without atoms"):
        Crystal(np.eye(3), [], np.zeros((0, 3)))


def test_chgnet_refuses_what_it_cannot_describe():
    pytest.importorskip("chgnet")
    lonely, crushed = Crystal(np.eye(3) * 9, [11], [[0, 0, 0]]), Crystal(np.eye(3) * 3, [1, 1], [[0, 0, 0], [.1, 0, 0]])
    for bad, why in ((lonely, "no neighbour"), (crushed, "Å apart")):
        with pytest.raises(BadInput, match=why):
            CHGNet().energies([bad])
    good = Crystal(3.6 * FCC, [29], [[0, 0, 0]])
    results = relax_volume(CHGNet(), [lonely, good])
    assert not results[0].ok and results[1].ok           # the bad one does not take the good one with it


def test_missing_package_says_what_to_install(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "chgnet"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "chgnet", None)
    with pytest.raises(MissingExtra, match=r"pip install 'matfm\[potentials\]'"):
        CHGNet().efs([Crystal(3.6 * FCC, [29], [[0, 0, 0]])])


def test_importing_the_pages_is_light():
    code = "import sys, matfm.potentials.stability; print([m for m in ('torch', 'chgnet', 'ase', 'rdkit') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# equation of state and relaxation

@settings(max_examples=60, deadline=None)
@given(V0=st.floats(5, 500), B0=st.floats(1, 500), B1=st.floats(1, 9), E0=st.floats(-100, 10), n=st.integers(5, 12))
def test_equation_of_state_inverts_its_own_curve(V0, B0, B1, E0, n):
    v = V0 * np.linspace(0.93, 1.08, n)
    fit = equation_of_state(v, EOS(V0, E0, B0, B1).energy(v))
    assert np.allclose([fit.V0, fit.B0], [V0, B0], rtol=1e-4) and abs(fit.B1 - B1) < 0.05 and abs(fit.E0 - E0) < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=9))
def test_equation_of_state_answers_or_refuses(e):
    try:
        fit = equation_of_state(np.linspace(9, 11, len(e)), e)
    except (BadInput, NotRelaxed):
        return
    assert 9 < fit.V0 < 11


def test_relaxation_keeps_the_space_group():
    lj = LennardJones()
    for name in ("wurtzite", "nias", "cdi2", "alb2", "delafossite"):
        p = prototype(name)
        guess = place(p, ("Cu", "Ag", "Au")[:len(p.roles)])
        at, = find_volume(lj, [guess])
        r = relax_cell(lj, at_volume(guess, at), steps=150, fmax=1e-3, smax=0.02)
        assert symmetry(r.crystal, 1e-3).number == p.space_group or symmetry(r.crystal, 1e-3).number > p.space_group
        if r.ok:
            out, = lj.efs([r.crystal])
            assert np.abs(out["forces"]).max() < 2e-3 and np.abs(out["stress"]).max() < 0.03


class Interrupted:
    "Lennard-Jones that is cut off after so many energies."
    def __init__(self, left):
        self.left, self.inner = left, LennardJones()

    def energies(self, crystals, batch=16):
        self.left -= len(crystals)
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.energies(crystals, batch)

    def __str__(self): return "lennard_jones"


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    jobs = [Job(f"{e}-{a}", Crystal(a * FCC, [z], [[0, 0, 0]]), 225, False) for e, z in (("Cu", 29), ("Ag", 47)) for a in (3.2, 3.5, 3.8, 4.2)]
    whole = [r for part in relax_all(Interrupted(10**6), jobs, tmp_path / "whole", chunk=2) for r in part]
    got = []
    with pytest.raises(KeyboardInterrupt):
        for part in relax_all(Interrupted(90), jobs, tmp_path / "cut", chunk=2):
            got += part
    finished = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert 0 < len(got) < len(jobs) and len(finished) == len(got) // 2          # whole shards only, no leftovers
    before = {n: (tmp_path / "cut" / n).stat().st_mtime_ns for n in finished}
    again = [r for part in relax_all(Interrupted(10**6), jobs, tmp_path / "cut", chunk=2) for r in part]
    assert again == whole and all((tmp_path / "cut" / n).stat().st_mtime_ns == t for n, t in before.items())
    assert not [p for p in (tmp_path / "cut").iterdir() if not p.name.endswith(".json")]


# prototypes

@pytest.mark.parametrize("p", [*PROTOTYPES.values(), *ELEMENTAL.values()], ids=lambda p: p.name)
def test_prototype_has_its_space_group(p):
    c = place(p, ("Cu", "O", "Ba")[:len(p.roles)])
    assert symmetry(c).number == p.space_group
    free = symmetry(c).number != 0 and any(len(x) > k for x, k in zip(_free(c), (0, 1), strict=True))
    assert free == p.free, f"{p.name} is marked free={p.free}"


def _free(c):
    from matfm.potentials.relax import free_coordinates
    return free_coordinates(c)


def test_decorations_are_the_same_everywhere():
    small = {"rocksalt": (20, 5), "half_heusler": (10, 10)}
    a, b = decorations(small), decorations(dict(reversed(small.items())))
    assert [d.id for d in a] == [d.id for d in b] and len(a) == 45 and sum(d.plausible for d in a) == 30
    assert {d.id for d in decorations({"rocksalt": (10, 0)})} < {d.id for d in a}
    assert [d.id for d in decorations(small, seed=1)] != [d.id for d in a]


# the shipped set

@pytest.fixture(scope="module")
def shipped(root):
    folder = root / "data" / "crystals"
    if not (folder / "crystals.parquet").is_file():
        pytest.skip("data/crystals is not here")
    return folder, Records.load(folder / "crystals.parquet"), load_references(folder / "elements.json")


def test_shipped_files(shipped):
    folder, records, refs = shipped
    sums = json.loads((folder / "checksums.json").read_text())
    assert {k: sha256_file(folder / k) for k in sums} == sums and "crystals.parquet" in sums
    assert all(f.stat().st_size < 20e6 for f in folder.iterdir())
    assert len(records) >= 3000 and records.targets == TARGETS and set(refs) == set(ELEMENTS)
    assert np.isfinite(records.y()).all() and (records.y("e_above_hull") >= 0).all() and (records.y("bulk_modulus") > 0).all()


def test_no_material_straddles_the_split(shipped):
    _, records, _ = shipped
    sides = defaultdict(set)
    for system, formula, side in records.frame.select("chemical_system", "formula", "split").rows():
        sides[system].add(side)
        sides[formula].add(side)
        assert side == split_of(system)
    assert all(len(s) == 1 for s in sides.values())
    shares = records.frame["split"].value_counts(normalize=True)
    assert dict(shares.rows())["test"] == pytest.approx(0.1, abs=0.03)


def test_shipped_formation_energies_and_hull_follow_from_its_energies(shipped):
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
    from pymatgen.core import Composition, Element
    _, records, refs = shipped
    frame = records.frame
    compositions = [c.composition for c in records.structures()]
    total = frame["energy_per_atom"].to_numpy() * [sum(c.values()) for c in compositions]
    formation = frame["formation_energy"].to_numpy()
    assert np.allclose(formation_energies(compositions, total, refs), formation, atol=2e-5)
    crowded = frame["chemical_system"].value_counts(sort=True)["chemical_system"].head(4).to_list()
    for system in [s for s in crowded if s.count("-")] + [next(s for s in frame["chemical_system"] if s.count("-") == 2)]:
        inside = [k for k, c in enumerate(compositions) if set(c) <= set(system.split("-"))]
        entries = [PDEntry(Composition(compositions[k]), formation[k] * sum(compositions[k].values())) for k in inside]
        diagram = PhaseDiagram([*entries, *(PDEntry(Composition(e), 0.0) for e in system.split("-"))], [Element(e) for e in system.split("-")])
        theirs = [diagram.get_e_above_hull(e) for e in entries]
        assert np.allclose(frame["e_above_hull"].to_numpy()[inside], theirs, atol=3e-5)
        assert np.allclose(above_hull([compositions[k] for k in inside], formation[inside]), theirs, atol=1e-6)


def test_a_dozen_shipped_rows_come_out_again(shipped, tmp_path):
    pytest.importorskip("chgnet")
    import torch
    torch.set_num_threads(1)
    _, records, refs = shipped
    known = {d.id: d for d in decorations()}
    rows = [records[int(k)] for k in np.linspace(0, len(records) - 1, 12)]
    made = [known[r["id"]] for r in rows]
    jobs = [Job(d.id, place(prototype(d.prototype), d.elements, d.charges), prototype(d.prototype).space_group, prototype(d.prototype).free) for d in made]
    again = [r for part in relax_all(CHGNet(), jobs, tmp_path) for r in part]
    for old, new in zip(rows, again, strict=True):
        c, n = Crystal(old["lattice"], old["numbers"], old["frac"]), len(new["numbers"])
        assert not new["reason"], f"{old['id']}: {new['reason']}"
        assert abs(new["V0"] / n / old["volume_per_atom"] - 1) < 2e-3, old["id"]
        assert abs(formation_energies([c.composition], [new["energy"]], refs)[0] - old["formation_energy"]) < 1e-3, old["id"]
        assert abs(new["B0"] / old["bulk_modulus"] - 1) < 0.03, old["id"]
        assert symmetry(c, 0.01).number == old["space_group"], old["id"]


def test_references_are_the_lowest_of_what_was_tried(shipped):
    _, _, refs = shipped
    assert all(r.gap >= 0 and r.form != r.runner_up for r in refs.values())
    rows = [{"id": "Cu-fcc", "energy": -4.0, "numbers": [29], "lattice": (3.6 * FCC).ravel().tolist(), "reason": ""},
            {"id": "Cu-hcp", "energy": -9.0, "numbers": [29, 29], "lattice": (3.6 * FCC).ravel().tolist(), "reason": "not relaxed in 60 steps: 1 eV/Å"}]
    assert references(rows)["Cu"].form == "fcc"          # the lower one did not converge and does not count
    assert dataclasses.asdict(references(rows)["Cu"])["energy"] == -4.0
