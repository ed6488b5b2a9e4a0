"""Deep InfoMax for crystals: draws from elsewhere, the bound and its baseline, symmetry of what is computed. Physics as a teacher: labels, bounds, spoilt crystals."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.core import Encoded
from matfm.data.records import Crystal
from matfm.models.crystalgraph import CrystalGNN
from matfm.models.sitenet import CrystalPairs, SiteNet
from matfm.pretrain.infomax import KINDS, Infomax, elsewhere, near_mean, told_apart
from matfm.pretrain.physics import LAST, SPOILS, Plausible, SymmetryHeads, class_entropy, implausible, room, space_groups, symmetry_class
from matfm.represent.crystal import CrystalGraph

QUICK = settings(max_examples=30, deadline=None)
BASELINE = 2 * math.log(2)
GRAPH, PAIRS = CrystalGraph(cutoff=4.5, max_neighbors=8), CrystalPairs(sites=8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded(): torch.manual_seed(0)


def crystals(n, seed=0):
    "Two-ion cells in which the size follows from the elements."
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        a, x = rng.choice([3, 11, 19, 37, 12, 20, 38]), rng.choice([8, 9, 16, 17, 35])
        size = 2.6 + 0.012 * a + 0.02 * x
        out.append(Crystal(np.diag([size, size * 1.05, size * 1.1]), [a, x], [[0, 0, 0], [0.5, 0.5, 0.5 + rng.uniform(-0.03, 0.03)]]))
    return out


def batch_of(cells, rep=GRAPH):
    return rep.collate([rep(c) for c in cells])


def seeded(s):
    return torch.Generator().manual_seed(s)


@QUICK
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 2**31))
def test_parts_come_from_another_crystal(counts, seed):
    counts = torch.tensor(counts)
    graph = torch.repeat_interleave(torch.arange(len(counts)), counts)
    got = elsewhere(graph, counts, seeded(seed))
    assert got.min() >= 0 and got.max() < len(graph) and (graph[got] != graph).all()


def test_every_part_is_as_likely():
    counts = torch.tensor([1, 3, 2])
    graph = torch.repeat_interleave(torch.arange(3), counts)
    drawn = torch.stack([elsewhere(graph, counts, seeded(s)) for s in range(2000)])
    for k in range(6):
        seen = torch.bincount(drawn[:, k], minlength=6).float() / 2000
        assert torch.allclose(seen, (graph != graph[k]).float() / (graph != graph[k]).sum(), atol=0.06)


@QUICK
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_near_mean_is_that_of_a_loop(n, seed):
    g = seeded(seed)
    graph = torch.arange(n) // 2
    centre = torch.cat([torch.arange(n), torch.randint(n, (7,), generator=g)])
    values, distance = torch.randn(n + 7, generator=g), 5 * torch.rand(n + 7, generator=g)
    sites = []
    for i in range(n):
        w = 1 / (distance[centre == i] + 1) ** 2
        sites.append((w * values[centre == i]).sum() / w.sum())
    want = torch.stack([torch.stack([s for s, b in zip(sites, graph.tolist(), strict=True) if b == c]).mean() for c in range(int(graph[-1]) + 1)]).mean()
    assert torch.isclose(near_mean(values, distance, centre, graph, int(graph[-1]) + 1), want, atol=1e-5)


@pytest.mark.parametrize("rep,make", [(GRAPH, lambda: CrystalGNN(width=16, depth=1, cutoff=4.5)), (PAIRS, lambda: SiteNet(width=16, depth=1, pair=8))])
def test_begins_at_the_baseline(rep, make):
    encoder, batch = make(), batch_of(crystals(12), rep)
    out = Infomax.for_encoder(encoder, rep)(encoder, batch, seeded(0))
    assert abs(out["local_loss"] - BASELINE) < 0.05 and abs(out["global_loss"] - BASELINE) < 0.05
    assert {f"told_apart_{k}" for k in (*KINDS, "sites")} <= set(out) and all(0.3 < out[f"told_apart_{k}"] < 0.7 for k in KINDS)


def test_order_of_sites_does_not_matter():
    encoder = CrystalGNN(width=16, depth=1, cutoff=4.5)
    objective, cells = Infomax(16), crystals(6)
    turned = [Crystal(c.lattice, c.numbers[::-1], c.frac[::-1]) for c in cells]
    scores = []
    for these in (cells, turned):
        b = batch_of(these)
        e = encoder(b)
        near = objective.neighbours(e.states[e.mask], b)["true"]
        scores.append(near_mean(*near, b["edge_index"][1], b["graph"], 6))
    assert torch.isclose(*scores, atol=1e-5)


def test_the_critic_reads_inputs_of_the_neighbour_not_its_state():
    objective, b = Infomax(16), batch_of(crystals(4))
    (j, i), states = b["edge_index"], torch.randn(8, 16)
    before = objective.neighbours(states, b)["true"][0]
    changed = states.clone()
    changed[0] += 1
    differs = (objective.neighbours(changed, b)["true"][0] - before).abs() > 1e-7
    assert (j == 0)[i != 0].any() and differs[i == 0].all() and not differs[i != 0].any()


def test_no_gradient_through_the_local_half_of_the_global_question():
    objective, b = Infomax(16), batch_of(crystals(4))
    states, embedding = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    (true, false) = objective.sites(embedding, states, b, seeded(0))
    (true.sum() + false.sum()).backward()
    assert states.grad is None and embedding.grad.abs().sum() > 0


def test_equal_crystals_leave_nothing_to_tell():
    "A site of one crystal is as much at home in an equal one: no training gets below the baseline."
    cells = crystals(1) * 12
    b, encoder, objective = batch_of(cells), CrystalGNN(width=16, depth=1, cutoff=4.5), Infomax(16, local_weight=0.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=3e-3)
    for step in range(15):
        out = objective(encoder, b, seeded(step))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert objective(encoder, b, seeded(99))["global_loss"] > BASELINE - 1e-3


def test_learns_to_tell_held_out_pairs_apart():
    train, held_out = batch_of(crystals(60, seed=1)), batch_of(crystals(40, seed=2))
    encoder, objective = CrystalGNN(width=24, depth=2, basis=16, cutoff=4.5), Infomax(24)
    optimizer = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=3e-3)
    for step in range(40):
        out = objective(encoder, train, seeded(step))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        out = objective(encoder, held_out, seeded(1000))
    assert out["told_apart_all"] > 0.6 and out["told_apart_sites"] > 0.6 and out["local_loss"] < BASELINE and out["global_loss"] < BASELINE


def test_a_blind_critic_cannot_tell_independent_pairs():
    "With empty states, pairs from elsewhere have the distribution of the true ones."
    class Blind(torch.nn.Module):
        def forward(self, batch):
            n = len(batch["counts"])
            return Encoded(torch.zeros(n, 16), torch.zeros(n, 2, 16), torch.ones(n, 2, dtype=torch.bool))
    b, objective = batch_of(crystals(40)), Infomax(16, negatives=["all"])
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    for step in range(20):
        out = objective(Blind(), b, seeded(step))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        rows = [objective(Blind(), b, seeded(1000 + s)) for s in range(8)]
    assert abs(np.mean([r["told_apart_all"] for r in rows]) - 0.5) < 0.05 and np.mean([r["local_loss"] for r in rows]) > BASELINE - 0.03


def test_told_apart_counts_ties_half():
    assert told_apart(torch.zeros(4), torch.zeros(4)) == 0.5 and told_apart(torch.zeros(0), torch.zeros(0)).isnan()


# ---- physics ---------------------------------------------------------------------------------------------------------

def test_classes_are_those_of_the_international_tables():
    import moyopy
    every = torch.arange(1, 231)
    for what, theirs in (("crystal_system", "crystal_system"), ("point_group", "geometric_crystal_class")):
        pairs = set(zip(symmetry_class(every, what).tolist(), [getattr(moyopy.SpaceGroupType(k), theirs) for k in range(1, 231)], strict=True))
        assert len(pairs) == len(LAST[what]) and {k for k, _ in pairs} == set(range(len(LAST[what])))


def test_space_group_of_a_cell_and_of_the_cell_in_another_order():
    salt = Crystal((np.ones((3, 3)) - np.eye(3)) * 2.82, [11, 17], [[0, 0, 0], [0.5] * 3])
    flipped = Crystal(salt.lattice, salt.numbers[::-1], salt.frac[::-1] + 0.1)
    stretched = Crystal(salt.lattice @ np.diag([1, 1, 1.1]), salt.numbers, salt.frac)
    b = batch_of([salt, flipped, stretched])
    assert space_groups(b).tolist() == [225, 225, 139]
    assert torch.allclose(room(b)[0], room(b)[1], atol=1e-5) and torch.allclose(room(b)[2, 0] - room(b)[0, 0], torch.tensor(1.1).log(), atol=1e-4)


def test_symmetry_is_asked_of_the_crystal_before_it_was_shaken():
    b, encoder, heads = batch_of(crystals(6)), CrystalGNN(width=16, depth=1, cutoff=4.5), SymmetryHeads(16)
    first, second = (heads(encoder, b, seeded(s)) for s in (0, 1))
    assert first["loss"] != second["loss"] and all(torch.equal(first[k], second[k]) for k in first if k.endswith("_baseline"))
    calm = SymmetryHeads(16, noise=0.0)
    assert torch.equal(calm(encoder, b, seeded(0))["loss"], calm(encoder, b, seeded(1))["loss"])


def test_an_unknown_group_is_left_out():
    b, encoder, heads = batch_of(crystals(4)), CrystalGNN(width=16, depth=1, cutoff=4.5), SymmetryHeads(16, weights={"space_group": 1.0})
    some, none = ({**b, "space_group": torch.tensor(g)} for g in ([1, 0, 0, 0], [0] * 4))
    loss = heads(encoder, none, seeded(0))["loss"]
    loss.backward()
    assert loss == 0 and all(p.grad is not None for p in heads.parameters()) and heads(encoder, some, seeded(0))["loss"] > 0
    assert class_entropy(torch.tensor([-100, -100])) == 0


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("seed", range(3))
def test_spoilt_crystals_are_spoilt_in_their_way_only(k, seed):
    b = batch_of(crystals(8, seed))
    s = implausible(b, torch.full((8,), k), seeded(seed))
    same = {key: torch.allclose(s[key].float(), b[key].float(), atol=1e-5) for key in ("numbers", "frac", "lattice")}
    assert same == {"numbers": SPOILS[k] != "swapped", "frac": SPOILS[k] not in ("moved", "overlapping"), "lattice": SPOILS[k] != "strained"}
    changed = torch.stack([(s[key] != b[key]).flatten(1).any(1) if key == "lattice" else torch.bincount(b["graph"][(s[key] != b[key]).flatten(1).any(1) if key == "frac" else s[key] != b[key]], minlength=8) > 0
                           for key in ("numbers", "frac", "lattice")])
    assert changed.any(0).all() and torch.allclose(s["distance"], s["vector"].norm(dim=-1), atol=1e-5)
    if SPOILS[k] == "overlapping": assert (room(s)[:, 1] < room(b)[:, 1] - 0.5).all()


def test_a_crystal_of_one_site_cannot_overlap():
    b = batch_of([Crystal(np.eye(3) * 2.5, [29], [[0, 0, 0]])] * 3)
    s = implausible(b, torch.full((3,), SPOILS.index("overlapping")), seeded(0))
    assert torch.allclose(s["distance"], b["distance"], atol=1e-5)
    outs = [Plausible(16)(CrystalGNN(width=16, depth=1, cutoff=4.5), b, seeded(s)) for s in range(12)]
    assert all(o["overlapping_loss"] == 0 and o["overlapping_told_apart"].isnan() for o in outs) and any(o["loss"] > 0 for o in outs)
