"""Phonons against the dynamical matrix written down by hand, their invariances, and what is refused."""
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.core import BadInput, MissingExtra
from matfm.data.records import Crystal, crystals
from matfm.potentials.phonons import NAMES, PhononDescriptors, last_peak, phonon_numbers, phonons, smeared, standard_cell, supercell
from matfm.potentials.potential import LennardJones, lj_pair, pairs
from matfm.registry import representations
from matfm.represent.descriptors import matrix

pytest.importorskip("phonopy")
LJ = LennardJones(sigma=2.2, cutoff=4.5)
MASS = {29: 63.546, 79: 196.96657, 28: 58.6934}


@pytest.fixture(scope="module")
def crooked():
    "Three atoms without symmetry, and not at rest."
    rng = np.random.default_rng(5)
    return Crystal(np.diag([2.6, 3.7, 4.4]) + rng.normal(0, .1, (3, 3)), [29, 79, 28], np.array([[0, 0, 0], [.5, .5, .3], [0, .5, .65]]) + rng.normal(0, .02, (3, 3)))


@pytest.fixture(scope="module")
def crooked_phonons(crooked):
    return phonons(crooked, LJ, reach=6.0, displacement=0.002, mesh=20.0)


def by_hand(crystal, q, h=1e-5):
    "Frequencies [3n], 1/cm, at one point in reciprocal coordinates: second derivatives of every pair, Fourier transformed."
    i, j, image, d = pairs(crystal, LJ.cutoff)
    v = (crystal.frac[j] + image - crystal.frac[i]) @ crystal.lattice
    first = lambda r: lj_pair(r, LJ.epsilon, LJ.sigma)[1] - lj_pair(np.array(LJ.cutoff), LJ.epsilon, LJ.sigma)[1]
    along = np.einsum("ea,eb->eab", v, v) / d[:, None, None]**2
    k = ((first(d + h) - first(d - h)) / (2 * h))[:, None, None] * along + (first(d) / d)[:, None, None] * (np.eye(3) - along)
    n, D = len(crystal), np.zeros((len(crystal), 3, len(crystal), 3), complex)
    for a, b, t, pair in zip(i, j, image, k, strict=True):
        D[a, :, a] += pair
        D[a, :, b] -= pair * np.exp(2j * np.pi * (q @ t))
    root = np.repeat([MASS[int(z)] for z in crystal.numbers], 3)**-0.5
    w2 = np.linalg.eigvalsh(root[:, None] * D.reshape(3 * n, 3 * n) * root) * 1.602176634e-19 * 1e20 / 1.66053906660e-27
    return np.sign(w2) * np.sqrt(abs(w2)) / (2 * np.pi * 2.99792458e10)


def test_frequencies_are_those_of_the_dynamical_matrix(crooked_phonons):
    p = crooked_phonons
    made = p.model.supercell_matrix
    q = np.linalg.inv(made).T @ np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1], [1, -1, 0]]).T  # these the supercell holds exactly
    expected = np.array([by_hand(p.crystal, k) for k in q.T])
    assert np.abs(expected).max() > 100
    np.testing.assert_allclose(p.at(q.T), expected, atol=0.3)
    np.testing.assert_allclose(p.gamma, expected[0], atol=0.3)


def test_shifting_the_crystal_costs_nothing(crooked_phonons):
    still = np.sort(np.abs(crooked_phonons.gamma))
    assert still[2] < 0.01 and still[3] > 1, still
    np.testing.assert_allclose(crooked_phonons.model.force_constants.sum(1), 0, atol=1e-9)


def test_density_counts_every_mode(crooked_phonons):
    p = crooked_phonons
    assert np.isclose(p.density.sum(), 9, atol=1e-6) and np.isclose(p.weights.sum(), 1)
    assert p.grid[0] < p.frequencies.min() and p.grid[-1] > p.frequencies.max() and p.frequencies.shape == (len(p.weights), 9)
    assert p.density[p.grid >= p.peak].argmax() == 0, "after the last peak the density only falls"


@pytest.mark.parametrize("seed", range(3))
def test_cell_order_and_orientation_do_not_matter(crooked, crooked_phonons, seed):
    rng = np.random.default_rng(seed)
    while abs(round(np.linalg.det(cell := rng.integers(-1, 2, (3, 3))))) != 1: pass
    turn, order = np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.permutation(3)
    other = Crystal(cell @ crooked.lattice @ turn, crooked.numbers[order], ((crooked.frac + rng.random(3)) @ np.linalg.inv(cell))[order] % 1)
    p = phonons(other, LJ, reach=6.0, displacement=0.002, mesh=20.0)
    np.testing.assert_allclose(p.gamma, crooked_phonons.gamma, atol=0.3)
    np.testing.assert_allclose(phonon_numbers(p), phonon_numbers(crooked_phonons), rtol=0.02, atol=1.5)


def test_a_doubled_cell_is_the_same_crystal(crooked, crooked_phonons):
    twice = Crystal(np.diag([1, 2, 1]) @ crooked.lattice, np.tile(crooked.numbers, 2), np.concatenate([crooked.frac, crooked.frac + [0, 1, 0]]) / [1, 2, 1])
    p = phonons(twice, LJ, reach=6.0, displacement=0.002, mesh=20.0)
    assert len(p.crystal) == 3 and p.atoms == crooked_phonons.atoms
    np.testing.assert_allclose(p.gamma, crooked_phonons.gamma, atol=0.3)


def test_rounded_sites_move_onto_their_symmetry():
    rough = Crystal(np.array([[3, 0, 0], [-1.5, 2.598, 0], [0, 0, 4.9]]), [29, 29], [[.3333, .6667, .25], [.6667, .3333, .75]])
    cell, conventional = standard_cell(rough)
    shift = cell.frac[1] - cell.frac[0]
    assert np.allclose((3 * shift[:2]) % 1 % 1, 0, atol=1e-6) or np.allclose((3 * shift[:2] + .5) % 1, .5, atol=1e-6)
    assert round(abs(np.linalg.det(conventional))) == 1
    assert len({round(float(x), 6) for x in np.linalg.norm(cell.lattice, axis=1)}) == 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), reach=st.floats(1, 12), atoms=st.integers(2, 400))
def test_supercells_fit(seed, reach, atoms):
    rng = np.random.default_rng(seed)
    p = Crystal(np.diag(rng.uniform(2, 7, 3)) + rng.normal(0, .3, (3, 3)), [29, 79], rng.random((2, 3)))
    conventional = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 1]])
    made = supercell(p, conventional, reach, atoms)
    height = 1 / np.linalg.norm(np.linalg.inv(made @ p.lattice), axis=0)
    count = 2 * round(abs(np.linalg.det(made)))
    assert count <= atoms
    wanted = 1 / np.linalg.norm(np.linalg.inv(conventional @ p.lattice), axis=0)
    fits = 2 * round(abs(np.linalg.det(conventional))) * np.ceil(reach / wanted - 1e-6).prod() <= atoms
    assert height.min() >= reach - 1e-5 or not fits


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=6), st.integers(2, 20))
def test_last_peak_is_at_the_last_line(lines, width):
    grid, density = smeared(np.array([lines], float), np.ones(1), width)
    peak, others = last_peak(grid, density), [x for x in lines if x < max(lines)]
    assert np.isclose(density.sum(), len(lines)) and peak <= max(lines)
    if max(others, default=-999) < max(lines) - 5 * width: assert peak == max(lines), "a line by itself is a peak"


# what is refused

@dataclass(frozen=True)
class Broken(LennardJones):
    "Forces that are not numbers, or none at all."
    how: str = "nan"

    def efs(self, crystals):
        if self.how == "raise": raise IndexError("index out of range in self")
        return [{**out, "forces": out["forces"] * np.nan} for out in super().efs(crystals)]


def test_refusals(crooked, monkeypatch):
    with pytest.raises(BadInput, match="3 atoms, at most 2"): phonons(crooked, LJ, atoms=2)
    with pytest.raises(BadInput, match="a crystal is needed, got dict"): phonons({}, LJ)
    with pytest.raises(BadInput, match="not finite"): phonons(crooked, Broken(), reach=3.0)
    with pytest.raises(BadInput, match=r"no phonons of .*index out of range"): phonons(crooked, Broken(how="raise"), reach=3.0)
    with pytest.raises(BadInput, match="no symmetry"): phonons(Crystal(np.eye(3) * 4, [29, 29], [[0, 0, 0], [0, 0, 0]]), LJ)
    monkeypatch.setitem(sys.modules, "phonopy", None)
    with pytest.raises(MissingExtra, match=r"pip install 'matfm\[potentials\]'"): phonons(crooked, LJ, reach=3.0)


def test_importing_the_page_is_light():
    code = "import sys, matfm.potentials.phonons; print([m for m in ('torch', 'chgnet', 'phonopy', 'rdkit', 'pymatgen', 'scipy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# the descriptor

def test_descriptor_sets_aside_what_it_cannot_read(crooked):
    read = PhononDescriptors(LJ, reach=4.0, mesh=15.0, atoms=40)
    big = Crystal(np.eye(3) * 9, np.arange(1, 42), np.random.default_rng(0).random((41, 3)))
    rows, _ = crystals([big, crooked], {"a": [1.0, 2.0]}, {"a": "eV"})
    X, kept, rejected = matrix(read, rows)
    assert X.shape == (1, len(NAMES)) and X.dtype == np.float32 and kept.tolist() == [1] and np.isfinite(X).all()
    assert "41 atoms, at most 40" in rejected.frame["reason"][0]
    assert representations.build(representations.describe(read)) == read and read.names == NAMES


def test_numbers_are_what_they_say(crooked_phonons):
    p, v = crooked_phonons, dict(zip(NAMES, phonon_numbers(crooked_phonons), strict=True))
    assert len(v) == 15 and v["last peak"] == p.peak and v["highest frequency"] == p.frequencies.max() and v["imaginary share"] == p.imaginary
    assert v["lowest frequency"] < v["10 % quantile"] < v["50 % quantile"] < v["90 % quantile"] < v["highest frequency"]
    assert np.isclose(v["mean"], p.weights @ p.frequencies.mean(1))
    masses, stiff = np.array([MASS[int(z)] for z in p.crystal.numbers]), np.trace(p.held, axis1=1, axis2=2)
    square = (p.weights @ (np.sign(p.frequencies) * p.frequencies**2)).sum()                  # the trace of the dynamical matrix, averaged over the zone
    assert np.isclose(square, 521.4709**2 * (stiff / masses).sum(), rtol=0.02)
    assert v["lowest Einstein frequency"] <= np.sqrt(square / 9) <= v["highest Einstein frequency"]
