"""Powder patterns against pymatgen, on random cells; vectors that do not depend on how a crystal is written."""
import numpy as np
import pytest

from matfm.core import BadInput
from matfm.data.records import Crystal
from matfm.represent.spectra import CU_KA, Xrd, dos_tokens, merged, reflections

pytest.importorskip("pymatgen")


def random_crystal(seed: int) -> Crystal:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 7))
    return Crystal(np.diag(rng.uniform(3, 6, 3)) + rng.normal(0, 0.4, (3, 3)), rng.integers(1, 84, n), rng.random((n, 3)))


@pytest.mark.parametrize("seed", range(4))
def test_pattern_is_pymatgens(seed):
    from pymatgen.analysis.diffraction.xrd import XRDCalculator
    from pymatgen.core import Structure
    c = random_crystal(seed)
    theirs = XRDCalculator(wavelength=CU_KA).get_pattern(Structure(c.lattice, c.numbers, c.frac))
    angle, height = merged(*reflections(c.lattice, c.numbers, c.frac))
    assert len(angle) == len(theirs.x)
    assert np.abs(angle - theirs.x).max() < 1e-4
    assert np.abs(height - theirs.y).max() < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_cell_order_and_origin_do_not_matter(seed):
    c, rng = random_crystal(seed), np.random.default_rng(seed)
    m, order = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]]), rng.permutation(len(c.numbers))
    other = Crystal(m @ c.lattice, c.numbers[order], ((c.frac + rng.random(3)) @ np.linalg.inv(m))[order])
    x = Xrd()
    assert np.abs(x(c)["x"] - x(other)["x"]).max() < 1e-4


def test_wavelength_moves_the_peaks():
    c = random_crystal(0)
    copper, molybdenum = (reflections(c.lattice, c.numbers, c.frac, w)[0].min() for w in (CU_KA, 0.71073))
    assert np.isclose(np.sin(np.radians(molybdenum / 2)) / np.sin(np.radians(copper / 2)), 0.71073 / CU_KA)


def test_dos_refuses_what_it_cannot_use():
    e = np.linspace(-5, 5, 50)
    for energy, density in ((e, e[:-1]), (e, np.full(50, np.nan)), (e + 100, e)):
        with pytest.raises(BadInput): dos_tokens(energy, density)


# ---- the text of a crystal -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_text_does_not_depend_on_how_a_crystal_is_written(seed):
    from matfm.represent.crystal_text import CrystalText
    from matfm.testing import rotated
    c, rng = random_crystal(seed), np.random.default_rng(seed)
    m, order = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 2]]), rng.permutation(2 * len(c.numbers))
    frac = np.concatenate([c.frac, c.frac + [0, 0, 1]]) + rng.random(3)                # two cells in one, in another basis
    other = rotated(Crystal(m @ c.lattice, np.tile(c.numbers, 2)[order], (frac @ np.linalg.inv(m))[order] % 1), seed)
    for how in (CrystalText(), CrystalText(hide_formula=True)): assert how.read(c) == how.read(other)


def test_voronoi_shares_are_scipys():
    from scipy.spatial import Voronoi

    from matfm.represent.crystal_text import face_shares
    points = np.random.default_rng(0).normal(0, 2, (60, 3))
    share, far = face_shares(points)
    v = Voronoi(np.concatenate([np.zeros((1, 3)), points]))
    region = v.regions[v.point_region[0]]
    assert np.isclose(far, np.linalg.norm(v.vertices[region], axis=1).max())
    for (a, b), ridge in zip(v.ridge_points, v.ridge_vertices, strict=True):
        if a != 0 and b != 0: continue
        corners, neighbour = v.vertices[ridge], max(a, b) - 1
        u = corners / np.linalg.norm(corners, axis=1, keepdims=True)
        n = np.cross(u, np.roll(u, -1, axis=0))
        n /= np.linalg.norm(n, axis=1, keepdims=True)
        inner = np.pi - np.arccos(np.clip((n * np.roll(n, -1, axis=0)).sum(1), -1, 1))
        assert np.isclose(share[neighbour], (inner.sum() - (len(u) - 2) * np.pi) / (4 * np.pi), atol=1e-6)


def test_every_element_is_masked_and_no_word():
    from matfm.data.records import SYMBOLS
    from matfm.represent.crystal_text import CrystalText, crystal_facts
    import re
    for seed in range(4):
        c = random_crystal(seed)
        text, symbols = CrystalText(hide_formula=True).read(c), {SYMBOLS[z] for z in crystal_facts(c).counts}
        assert not symbols - set("ABCDEF") & set(re.findall(r"\b[A-Z][a-z]?\b", text))
        assert "primitive cell" in text and "neighbours in" in text
