"""Encoders of compositions, pairs and summed potentials: the cell in which a crystal is written leaves no trace, sums are what they claim, training runs end to end."""
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm import testing
from matfm.core import BadInput
from matfm.data.loading import BatchPlan, Loader, featurise, sizes_of
from matfm.data.records import SYMBOLS, Crystal, Records, compositions, crystals
from matfm.models.potnet import CrystalPotentials, lattice_points, pair_sums, pauli_radius
from matfm.models.sitenet import CrystalPairs, pair_images
from matfm.models.zoo import from_scratch, load_pretrained, save_pretrained
from matfm.represent.composition import Composition
from matfm.represent.primitive import primitive_cell, short_basis

CASES = {"composition_transformer": (Composition(), dict(width=16, depth=1, heads=2)),
         "sitenet": (CrystalPairs(sites=12), dict(width=16, depth=1, heads=2, pair=8, basis=16)),
         "potnet": (CrystalPotentials(cutoff=5.0), dict(width=16, depth=1, basis=16, sums=8))}
OF_STRUCTURES = ["sitenet", "potnet"]


pytestmark = pytest.mark.usefixtures("one_thread")


def low(seed: int, n: int = 4) -> Crystal:
    "Sites without symmetry, no two of them near; two or three elements."
    rng = np.random.default_rng(seed)
    grid = rng.permutation(np.indices((2, 2, 2)).reshape(3, -1).T / 2)[:n] + rng.uniform(-.08, .08, (n, 3))
    numbers = rng.choice([8, 12, 22], n)
    numbers[:2] = 8, 12
    return Crystal(np.diag([5.0, 5.6, 6.3]) + rng.uniform(-.5, .5, (3, 3)), numbers, grid)


HIGH = {"iron": Crystal(np.eye(3) * 2.866, [26, 26], [[0, 0, 0], [.5, .5, .5]]),
        "copper": Crystal(np.eye(3) * 3.61, [29] * 4, [[0, 0, 0], [0, .5, .5], [.5, 0, .5], [.5, .5, 0]]),
        "diamond": Crystal(np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * 1.78, [6, 6], [[0, 0, 0], [.25, .25, .25]]),
        "magnesium": Crystal([[3.2, 0, 0], [-1.6, 2.7713, 0], [0, 0, 5.2]], [12, 12], [[1/3, 2/3, .25], [2/3, 1/3, .75]]),
        "perovskite": Crystal(np.eye(3) * 4.0, [56, 22, 8, 8, 8], [[0, 0, 0], [.5, .5, .5], [.5, .5, 0], [.5, 0, .5], [0, .5, .5]])}


def rewritten(c: Crystal, seed: int, edges: tuple[int, int, int] = (1, 1, 1)) -> Crystal:
    "The same crystal in a random cell of `edges` multiplied as many cells, moved, turned, its sites in another order."
    rng, (a, b, d) = np.random.default_rng(seed), edges
    coarse = np.array([[a, 0, 0], [rng.integers(a), b, 0], [rng.integers(a), rng.integers(b), d]])  # every sublattice of that size has such a basis
    shear = np.eye(3, dtype=int)
    for i, j in ((0, 1), (1, 2), (2, 0)): shear[i] += rng.integers(-2, 3) * shear[j]
    corners = np.indices(edges).reshape(3, -1).T
    frac = (c.frac[None] + corners[:, None]).reshape(-1, 3) @ np.linalg.inv(shear @ coarse)
    made = Crystal(shear @ coarse @ c.lattice, np.tile(c.numbers, len(corners)), frac % 1.0)
    return testing.reordered(testing.translated(testing.rotated(made, seed), rng.random(3)), seed)


def cell(c: Crystal) -> tuple[np.ndarray, np.ndarray, np.ndarray]: return primitive_cell(c.lattice, c.frac, c.numbers)


# ---- cells -----------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_short_basis_spans_the_same_lattice(seed):
    rng = np.random.default_rng(seed)
    lattice, m = np.diag([3.0, 4.0, 9.0]) + rng.uniform(-.8, .8, (3, 3)), np.eye(3, dtype=int)
    for _ in range(6):
        i, j = rng.permutation(3)[:2]
        m[i] += rng.integers(-4, 5) * m[j]
    found = short_basis(m @ lattice)
    whole = found @ np.linalg.inv(lattice)
    assert np.allclose(whole, np.rint(whole), atol=1e-6) and np.isclose(abs(np.linalg.det(whole)), 1) and np.linalg.det(found) > 0
    shortest = np.linalg.norm(lattice_points(short_basis(lattice), 12.0), axis=1)[1:]
    assert np.isclose(np.linalg.norm(found[0]), shortest[0]), "the first vector is the shortest there is"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.tuples(*[st.integers(1, 3)] * 3))
def test_primitive_cell_of_any_cell(seed, edges):
    c = low(seed)
    lattice, frac, numbers = cell(rewritten(c, seed, edges))
    reference = cell(c)
    assert sorted(numbers) == sorted(c.numbers) and np.isclose(np.linalg.det(lattice), c.volume) and ((frac >= 0) & (frac < 1)).all()
    np.testing.assert_allclose(np.linalg.norm(lattice, axis=1), np.linalg.norm(reference[0], axis=1), atol=1e-6)


@pytest.mark.parametrize("name,sites", [("iron", 1), ("copper", 1), ("diamond", 2), ("magnesium", 2), ("perovskite", 5)])
def test_primitive_cell_of_symmetric_crystals(name, sites):
    for seed, edges in enumerate([(1, 1, 1), (2, 1, 2), (1, 3, 1)]): assert len(cell(rewritten(HIGH[name], seed, edges))[2]) == sites


def test_primitive_cells_agree_with_symmetry_search(root):
    import polars as pl
    from matfm.data.splits import space_group
    some = [Crystal(*r) for r in pl.read_parquet(root / "data/crystals/crystals.parquet").sample(150, seed=0).select("lattice", "numbers", "frac").rows()]
    ours, theirs = np.array([[len(cell(c)[2]), space_group(c, 0.01)[1]] for c in some]).T
    twice = np.array([len(cell(testing.supercell(c, (1, 2, 1)))[2]) for c in some])
    assert (ours == theirs).all() and (twice == ours).all() and ours.max() > 2


def test_a_distorted_supercell_stays_one():
    c = testing.supercell(low(1), (2, 1, 1))
    for push, sites in ((.002, 4), (.03, 8)):
        assert len(cell(Crystal(c.lattice, c.numbers, c.frac + np.eye(8, 3) * [push / 10, 0, 0]))[2]) == sites


# ---- pairs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("c", [low(0), low(1, 7), HIGH["perovskite"], Crystal(np.diag([3.0, 3.2, 28.0]), [14, 8], [[0, 0, 0], [.4, .1, .07]])])
def test_pairs_are_the_nearest_images(c):
    k = 3
    (j, i), image = pair_images(c.lattice, c.frac, k * len(c))
    distance, far = np.linalg.norm((c.frac[j] + image - c.frac[i]) @ c.lattice, axis=1), lattice_points(short_basis(c.lattice), 60.0)
    for a, b in product(range(len(c)), repeat=2):
        all_of_them = np.sort(np.linalg.norm((c.frac[b] - c.frac[a]) @ c.lattice + far, axis=1))
        all_of_them = all_of_them[all_of_them > 1e-6]
        np.testing.assert_allclose(np.sort(distance[(i == a) & (j == b)]), all_of_them[all_of_them <= all_of_them[k - 1] + 1e-3], atol=1e-8)


def test_batches_of_pairs_are_not_padded():
    rows, _ = crystals([low(k, 2 + k % 6) for k in range(12)])
    rep = CrystalPairs(sites=12)
    items, _, _ = featurise(rep, rows)
    for batch in Loader(rep, items, BatchPlan(sizes_of(rep, items), 4)):
        chosen = [items[i] for i in batch["index"].tolist()]
        assert batch["edge_index"].shape[1] == batch["distance"].shape[0] == sum(rep.size(i) for i in chosen)


# ---- sums ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_all_images(seed):
    c = low(seed, 3 + seed)
    found, far = pair_sums(c.lattice, c.frac, 2.0), lattice_points(c.lattice, 50.0)
    r = np.linalg.norm(((c.frac[None] - c.frac[:, None]) @ c.lattice)[:, :, None] + far, axis=-1)
    r[r < 1e-9] = np.inf
    assert np.abs(found[..., 1] - (r ** -6).sum(-1)).max() < 1e-6 and np.abs(found[..., 2] - np.exp(-2.0 * r).sum(-1)).max() < 1e-7
    np.testing.assert_allclose(found, found.transpose(1, 0, 2), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_coulomb_sums_agree_with_pymatgen(seed):
    from pymatgen.analysis.ewald import EwaldSummation
    c = low(seed)
    charges = np.array([2, -1, 1, -2.0])
    structure = c.to_pymatgen()
    structure.add_oxidation_state_by_site(charges.tolist())
    ewald = EwaldSummation(structure, eta=0.2, acc_factor=14)
    phi = pair_sums(c.lattice, c.frac, 3.0)[..., 0]
    unit = 14.399645  # eV Å, e²/4πε₀
    theirs = ewald.total_energy_matrix * 2 / (unit * np.outer(charges, charges)) - np.pi / (0.2 * c.volume)
    assert np.abs(theirs - phi).max() < 1e-4
    assert abs(unit / 2 * charges @ phi @ charges - ewald.total_energy) < 1e-3


def test_coulomb_sums_average_to_zero():
    "A neutralised potential has no mean: sampled on a fine grid around one site."
    c = low(4, 2)
    grid = (np.indices((8, 8, 8)).reshape(3, -1).T + .5) / 8
    from matfm.models.potnet import image_sums
    assert abs(image_sums(c.lattice, np.concatenate([np.zeros((1, 3)), grid]), 3.0)[1:, 0].mean()) < 5e-3


@pytest.mark.parametrize("alpha", [0.5, 1.5, 3.0, 8.0])
@pytest.mark.parametrize("lattice", [np.eye(3) * 3.0, np.diag([3.0, 3.2, 28.0]), low(2).lattice])
def test_what_the_pauli_sum_leaves_out_is_below_the_tolerance(lattice, alpha):
    R = pauli_radius(lattice, alpha, 1e-5)
    lengths = np.linalg.norm(lattice_points(lattice, R + 12.0), axis=1)
    assert np.exp(-alpha * lengths[lengths > R]).sum() < 1e-5


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 1, 1), (1, 3, 1), (2, 2, 1)]))
def test_sums_over_copies_add_up(seed, edges):
    c, n = low(seed), int(np.prod(edges))
    big = testing.supercell(c, edges)
    added = pair_sums(big.lattice, big.frac, 2.0)[:4].reshape(4, n, 4, 3).sum(1)
    np.testing.assert_allclose(added, pair_sums(c.lattice, c.frac, 2.0), atol=1e-6)


# ---- encoders --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OF_STRUCTURES)
def test_invariant(name):
    rep, config = CASES[name]
    p = from_scratch(rep, name, **config)
    for seed in range(2): testing.assert_invariant(p.encoder, rep, low(seed))
    for c in HIGH.values():
        a, b, d = p.encoder(testing.collated(rep, [c, rewritten(c, 3), rewritten(c, 4, (2, 1, 2))])).embedding
        testing.ensure_close(a, b, "embedding in another cell"), testing.ensure_close(a, d, "embedding in a supercell", 1e-4)


def test_an_atom_far_away_is_seen():
    "Two chains 7 Å apart: the sums and the pairs know where the second one stands."
    def chains(x): return Crystal(np.diag([14.0, 14.0, 3.0]), [11, 17], [[0, 0, 0], [x, .5, 0]])
    for name in OF_STRUCTURES:
        rep, config = CASES[name]
        a, b = from_scratch(rep, name, **config).encoder(testing.collated(rep, [chains(.5), chains(.8)])).embedding
        assert (a - b).abs().max() > 1e-3, name


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(SYMBOLS[1:]), st.integers(1, 40), min_size=1, max_size=9), st.randoms(use_true_random=False), st.integers(2, 7))
def test_composition_is_a_set_of_shares(amounts, random, times):
    rep = Composition()
    shuffled = list(amounts.items())
    random.shuffle(shuffled)
    a, b = rep("".join(f"{s}{n}" for s, n in amounts.items())), rep(" ".join(f"{s}{n * times}" for s, n in shuffled))
    assert all(np.array_equal(a[k], b[k]) for k in a) and abs(a["amounts"].sum() - 1) < 1e-5 and len(a["numbers"]) == len(amounts)


def test_composition_of_crystals_and_formulas_is_one():
    rows, _ = crystals([*HIGH.values(), low(0)])
    plain, grouped = Composition(), Composition(space_group=True)
    for a, b, c in zip(featurise(plain, rows)[0], map(plain, rows.structures()), map(plain, rows.frame["formula"]), strict=True):
        assert all(np.array_equal(a[k], b[k]) and np.array_equal(a[k], c[k]) for k in a)
    assert [int(i["space_group"][0]) for i in featurise(grouped, rows)[0]] == [229, 225, 227, 194, 221, 1]


@pytest.mark.parametrize("pooling", ["mean", "weighted"])
def test_space_groups_are_heard(pooling):
    rep = Composition(space_group=True)
    p = from_scratch(rep, "composition_transformer", pooling=pooling, **CASES["composition_transformer"][1])
    testing.check_encoder(p.encoder, rep, [*HIGH.values(), "Fe2O3", low(0)])
    bcc, fcc, unknown = p.encoder(testing.collated(rep, [HIGH["iron"], Crystal(HIGH["copper"].lattice, [26] * 4, HIGH["copper"].frac), "Fe"])).embedding
    assert min((bcc - fcc).norm(), (bcc - unknown).norm(), (fcc - unknown).norm()) > 1e-2
    assert len({int(p.representation(c)["numbers"][0]) for c in (HIGH["iron"], "Fe")}) == 1


# ---- through the house -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def twenty() -> Records:
    "Crystals whose target is their number density and the share of oxygen in them."
    cells = [low(k, 2 + k % 5) for k in range(20)]
    return crystals(cells, {"y": [len(c) / c.volume * 50 + (c.numbers == 8).mean() for c in cells]}, {"y": ""})[0]


@pytest.mark.parametrize("name", CASES)
def test_finetune_end_to_end(name, twenty, tmp_path):
    from matfm.adapt.finetune import FinetuneSpec, finetune, load_model
    from matfm.models.heads import Output, Task
    rep, config = CASES[name]
    spec = FinetuneSpec(epochs=1, batch_size=8, accelerator="cpu", threads=1)
    model = finetune(from_scratch(rep, name, **config), Task((Output("y", reference="elements"),)), twenty.take(range(14)), twenty.take(range(14, 20)), spec)
    predicted = model.predict(twenty)[0]["y"].to_numpy()
    assert np.isfinite(predicted).all() and np.ptp(predicted) > 0 and len(model.history) == 1
    again = load_model(model.save_pretrained(tmp_path / "m")).predict(twenty)[0]["y"].to_numpy()
    np.testing.assert_allclose(again, predicted, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_checkpoints(name, tmp_path, twenty):
    import torch
    rep, config = CASES[name]
    p = from_scratch(rep, name, seed=1, **config)
    q = load_pretrained(save_pretrained(tmp_path / "m", p))
    batch = testing.collated(rep, twenty.structures()[:3])
    assert torch.equal(p.encoder(batch).embedding, q.encoder(batch).embedding) and q.representation == rep


@pytest.mark.parametrize("name,objective", [("composition_transformer", "ElementShuffling"), ("sitenet", "ElementShuffling"), ("sitenet", "CoordinateDenoising"), ("potnet", "ElementShuffling")])
def test_pretraining_objectives(name, objective):
    from matfm.pretrain import crystals as page
    rep, config = CASES[name]
    testing.check_objective(getattr(page, objective), from_scratch(rep, name, **config).encoder, rep, [low(k, 5) for k in range(8)])


def test_what_cannot_be_used_is_set_aside(twenty):
    wide = Crystal(np.eye(3) * 15, [54], [[0, 0, 0]])
    rows, _ = crystals([low(0, 7), wide, low(1, 2)])
    items, kept, rejected = featurise(CrystalPairs(sites=8, largest=4), rows)
    assert kept.tolist() == [1, 2] and "7 sites in the primitive cell, at most 4" in rejected.frame["reason"][0]
    items, kept, rejected = featurise(CrystalPotentials(cutoff=5.0), rows)
    assert kept.tolist() == [0, 2] and "no neighbour within 5 Å" in rejected.frame["reason"][0]
    good, bad = compositions(["NaCl", "Xx2", "", "Fe0.5Ni0.5"])
    assert len(featurise(Composition(), good)[0]) == 2 and len(bad) == 2
    with pytest.raises(BadInput, match="reads the representation"): from_scratch("crystal_graph", "sitenet")
