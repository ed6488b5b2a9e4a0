"""One site of each kind is enough: the folded network is the whole one."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.data.records import Crystal
from matfm.models.crystalgraph import ALIKE, CrystalGNN, fold, kinds_of, shells_of
from matfm.represent.crystal import CrystalGraph

GRAPH = CrystalGraph(cutoff=5.0)
SALT = Crystal(np.eye(3) * 5.64, [11] * 4 + [17] * 4, [[0, 0, 0], [.5, .5, 0], [.5, 0, .5], [0, .5, .5], [.5, .5, .5], [0, 0, .5], [0, .5, 0], [.5, 0, 0]])


def network(**more) -> CrystalGNN:
    torch.manual_seed(0)
    return CrystalGNN.for_representation(GRAPH, **{"width": 16, "depth": 2, "basis": 12} | more).eval()


def whole(net: CrystalGNN, batch: dict) -> torch.Tensor:
    net.can_fold = lambda batch: False
    try: return net(batch).embedding
    finally: del net.can_fold


def drawn(seed: int, copies: int = 1) -> Crystal:
    "A crystal without symmetry, repeated along its first axis."
    rng = np.random.default_rng(seed)
    n, lattice = rng.integers(1, 5), np.diag(rng.uniform(3, 5, 3)) + rng.uniform(-.3, .3, (3, 3))
    frac, numbers = rng.random((n, 3)), rng.integers(1, 90, n)
    frac = np.concatenate([(frac + [k, 0, 0]) / [copies, 1, 1] for k in range(copies)])
    return Crystal(lattice * [[copies], [1], [1]], np.tile(numbers, copies), frac)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_folded_is_whole(seed, copies, depth):
    batch, net = GRAPH.collate([GRAPH(c) for c in (drawn(seed, copies), SALT, drawn(seed + 1))]), network(depth=depth)
    assert torch.allclose(net(batch).embedding, whole(net, batch), atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_copies_of_a_cell_are_alike(seed, copies):
    one, many = (fold(GRAPH.collate([GRAPH(drawn(seed, k))]), 3) for k in (1, copies))
    assert len(many.site) <= len(one.site) and int(many.times.sum()) == sum(np.bincount(many.kind[GRAPH.collate([GRAPH(drawn(seed, copies))])["edge_index"][1]].numpy()) // np.bincount(many.kind.numpy()))


def test_a_crystal_does_not_depend_on_its_batch():
    net, items = network(), [GRAPH(c) for c in (SALT, drawn(1), drawn(2, 2))]
    together = net(GRAPH.collate(items)).embedding
    assert torch.allclose(together, torch.cat([net(GRAPH.collate([i])).embedding for i in items]), atol=1e-5)


def test_rock_salt_is_two_kinds_with_two_or_more_shells():
    f = fold(GRAPH.collate([GRAPH(SALT)]), 3)
    assert len(f.site) == 2 and f.edge_index.shape[1] == 2 * len(f.distance) and set(f.kind[:4].tolist()) != set(f.kind[4:].tolist())


def test_gradients_are_those_of_the_whole():
    net, batch, grads = network(), GRAPH.collate([GRAPH(SALT), GRAPH(drawn(3, 2))]), []
    for forward in (net, lambda b: type("E", (), {"embedding": whole(net, b)})):
        net.zero_grad(); forward(batch).embedding.pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(*grads, atol=1e-4 * float(grads[0].abs().max()))


def test_hidden_atoms_and_moved_ones_stand_alone():
    batch = GRAPH.collate([GRAPH(SALT)])
    hidden = {**batch, "numbers": batch["numbers"].clone()}
    hidden["numbers"][2] = 0
    moved = {**batch, "distance": batch["distance"] + 0.01 * torch.rand(len(batch["distance"]), generator=torch.Generator().manual_seed(0))}
    for changed in (hidden, moved):
        assert len(fold(changed, 2).site) > 2
        assert torch.allclose(network()(changed).embedding, whole(network(), changed), atol=1e-5)


@pytest.mark.parametrize("gap, n", [(0.5 * ALIKE, 1), (20 * ALIKE, 2)])
def test_shells(gap, n):
    shell, mean = shells_of(torch.zeros(2, dtype=torch.long), torch.tensor([3.0, 3.0 + gap]))
    assert len(mean) == n == len(set(shell.tolist()))


def test_no_bonds_and_dropout_and_differentiable_distances():
    alone = {"numbers": torch.tensor([2, 2]), "edge_index": torch.zeros(2, 0, dtype=torch.long), "distance": torch.zeros(0), "graph": torch.tensor([0, 1]), "counts": torch.tensor([1, 1])}
    assert torch.isfinite(network()(alone).embedding).all() and not network().can_fold(alone)
    batch = GRAPH.collate([GRAPH(SALT)])
    assert network().can_fold(batch) and not network(dropout=0.1).train().can_fold(batch) and network(dropout=0.1).can_fold(batch)
    distance = batch["distance"].clone().requires_grad_()
    network()({**batch, "distance": distance}).embedding[0, 0].backward()
    assert (distance.grad != 0).sum() > len(distance) / 2
    assert len(kinds_of(batch["numbers"], batch["edge_index"], torch.zeros(len(distance), dtype=torch.long), 0).unique()) == 2
