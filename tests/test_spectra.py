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
