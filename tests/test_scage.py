"""Graph transformer and SCAGE: paths agree with networkx and RDKit, masks with numpy's percentiles, angles with RDKit, weights with their definition; shapes may turn."""
import json

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput
from matfm.data.loading import load_items, save_items
from matfm.data.records import molecules
from matfm.models.graph_transformer import BiasedAttention, ConformerTransformer, GraphTransformer, bonded, near_masks, path_lengths
from matfm.models.zoo import Pretrained, from_scratch, load_pretrained, save_pretrained
from matfm.pretrain.scage import (TASKS, AdaptiveWeights, MoleculeConformer, PairHead, Scage, angle_classes, bends_of, bond_angles, collate_conformers, focal_loss, random_partners,
                                  scage_targets, without_targets)
from matfm.pretrain.training import PretrainSpec, pretrain
from matfm.represent.conformers import Molecule3D
from matfm.represent.groups import GROUPS
from matfm.represent.molecule import MoleculeGraph

QUICK = settings(max_examples=40, deadline=None)
SMILES = ["CC(=O)Nc1ccc(O)cc1", "C[C@H](N)C(=O)O", "C", "CC#N", "OCC(O)CO", "c1ccc2ccccc2c1"]
GRAPH, SHAPE, LEARN = MoleculeGraph(), MoleculeConformer(count=1), MoleculeConformer(count=1, targets=True, bits=128)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def items():
    return [LEARN(s) for s in SMILES]


def renumbered(item, order):
    "The same molecule with atom `order[k]` at place k."
    place = np.argsort(order)
    out = {**item, "atoms": item["atoms"][order], "edge_index": place[item["edge_index"]].astype(np.int32), "positions": item["positions"][order]}
    return {**out, "atom_group": item["atom_group"][order], "bends": place[item["bends"]].astype(np.int32)} if "bends" in item else out


def turned(item, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))[0]
    return {**item, "positions": (item["positions"] @ q + [3, -2, 1]).astype(np.float32)}


# ---- paths and masks -------------------------------------------------------------------------------------------------

@QUICK
@given(st.integers(2, 9), st.integers(0, 2**31), st.integers(1, 6), st.floats(0.1, 0.6))
def test_paths_are_those_of_networkx(n, seed, longest, density):
    rng = np.random.default_rng(seed)
    a = np.triu(rng.random((2, n, n)) < density, 1)
    a = a | a.transpose(0, 2, 1)
    got = path_lengths(torch.tensor(a), longest).numpy()
    for g, matrix in zip(got, a, strict=True):
        lengths = dict(nx.all_pairs_shortest_path_length(nx.from_numpy_array(matrix)))
        assert (g == [[min(lengths[i].get(j, longest), longest) for j in range(n)] for i in range(n)]).all()


def test_bonds_stand_in_the_right_record():
    batch = GRAPH.collate([GRAPH(s) for s in ("CO", "CCC", "C")])
    got = bonded(batch["edge_index"], batch["graph"], batch["counts"])
    assert got.shape == (3, 3, 3) and got.sum((1, 2)).tolist() == [2, 4, 0] and got[1, 0].tolist() == [False, True, False]


@QUICK
@given(st.integers(2, 8), st.integers(0, 2**31), st.sampled_from([(0.2,), (0.2, 0.5), (0.5, 1.0), (0.1, 0.37, 0.9)]))
def test_masks_are_percentiles(n, seed, scales):
    xyz = np.random.default_rng(seed).standard_normal((n, 3)).astype(np.float32)
    got = near_masks(torch.tensor(xyz)[None], torch.ones(1, n, dtype=torch.bool), scales)
    d = np.linalg.norm(xyz[:, None] - xyz[None], axis=-1)
    for m, s in zip(got, scales, strict=True):
        pairs = d[np.triu_indices(n, 1)]
        limit = np.quantile(pairs, s, method="inverted_cdf")
        assert (m[0].numpy() == (d <= limit + 1e-6)).all() and m[0].diagonal().all()


def test_scales_grow():
    m = near_masks(torch.randn(3, 7, 3), torch.arange(7) < torch.tensor([[7], [4], [1]]), (0.2, 0.5, 1.0))
    assert (m[0] <= m[1]).all() and (m[1] <= m[2]).all()
    assert m[2].sum((1, 2)).tolist() == [49, 16 + 3, 7]   # all real pairs, and each place itself


# ---- encoders --------------------------------------------------------------------------------------------------------

def test_attention_of_one_open_scale_is_torch_attention():
    mine, torchs = BiasedAttention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    torchs.load_state_dict({"in_proj_weight": mine.qkv.weight, "in_proj_bias": mine.qkv.bias, "out_proj.weight": mine.out.weight, "out_proj.bias": mine.out.bias})
    x = torch.randn(2, 5, 12)
    assert torch.allclose(mine(x, [torch.zeros(2, 3, 5, 5)]), torchs(x, x, x)[0], atol=1e-6)


@pytest.mark.parametrize("scales", [(), (0.2, 0.5, 1.0)])
def test_shape_may_turn_and_atoms_change_places(items, scales):
    encoder = ConformerTransformer.for_representation(SHAPE, width=32, depth=2, heads=4, scales=scales).eval()
    embed = lambda i: encoder(collate_conformers([i])).embedding[0]
    for item in items:
        order = np.random.default_rng(1).permutation(len(item["atoms"]))
        assert torch.allclose(embed(item), embed(renumbered(item, order)), atol=1e-5)
        assert torch.allclose(embed(item), embed(turned(item)), atol=1e-5)


def test_coordinates_matter_only_with_scales(items):
    other = {**items[0], "positions": items[0]["positions"][::-1].copy()}
    for scales, differs in (((0.2, 0.5), True), ((), False)):
        encoder = ConformerTransformer.for_representation(SHAPE, width=32, depth=2, heads=4, scales=scales).eval()
        e = encoder(collate_conformers([items[0], other])).embedding
        assert ((e[0] - e[1]).abs().max() > 1e-4) == differs


def test_graph_transformer_needs_no_coordinates_and_says_what_is_wrong():
    assert "positions" not in GRAPH(SMILES[0])
    GraphTransformer.for_representation(GRAPH, width=16, depth=1)(GRAPH.collate([GRAPH(SMILES[0])]))
    for wrong in (dict(width=0), dict(scales=(1.5,)), dict(width=10, heads=4)):
        with pytest.raises(BadInput): GraphTransformer((4,), (4,), **wrong)


def test_a_far_bond_is_seen_in_one_layer():
    encoder = GraphTransformer.for_representation(GRAPH, width=16, depth=1, heads=2).eval()
    a, b = (encoder(GRAPH.collate([GRAPH(s)])).states[0, 0] for s in ("CCCCCCCCO", "CCCCCCCCN"))
    assert (a - b).abs().max() > 1e-4


def test_checkpoint_round_trip(tmp_path, items):
    p = from_scratch(SHAPE, "conformer_transformer", width=16, depth=1, heads=2, scales=(0.3, 1.0))
    save_pretrained(tmp_path, p)
    again = load_pretrained(tmp_path)
    assert again.representation == SHAPE and again.encoder.config == p.encoder.config
    batch = collate_conformers(items)
    assert torch.equal(again.encoder(batch).embedding, p.encoder(batch).embedding)


# ---- the representation ----------------------------------------------------------------------------------------------

def test_coordinates_are_those_of_the_conformer_page(items):
    for s, item in zip(SMILES, items, strict=True):
        xyz = Molecule3D(count=1)(s)["positions"][:len(item["atoms"])]
        assert np.allclose(item["positions"], xyz - xyz.mean(0), atol=1e-5)
        assert all(np.array_equal(v, LEARN.placed(s, GRAPH(s), xyz)[k]) or k == "positions" for k, v in item.items())


def test_items_survive_the_cache(items, tmp_path):
    again, _ = load_items(save_items(tmp_path / "x.npz", items))
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(items, again, strict=True) for k in a)


def test_angles_are_rdkits(items):
    from rdkit.Chem import rdMolTransforms
    from matfm.represent.conformers import ensemble
    mol = ensemble(SMILES[0], SHAPE).mol()
    conformer = mol.GetConformer()
    bends = items[0]["bends"].astype(int)
    want = [rdMolTransforms.GetAngleRad(conformer, *map(int, b)) for b in bends.T]
    assert np.allclose(bond_angles(torch.tensor(items[0]["positions"]), torch.tensor(bends)), want, atol=1e-4)
    degrees = [a.GetDegree() for a in mol.GetAtoms() if a.GetAtomicNum() > 1]
    heavy = GRAPH(SMILES[0])["edge_index"]
    assert bends.shape[1] == sum(int(d * (d - 1) / 2) for d in np.bincount(heavy[1], minlength=len(degrees)))


def test_bends_of_a_batch_point_at_their_own_molecule(items):
    batch = collate_conformers(items)
    assert (batch["graph"][batch["bends"]] == batch["graph"][batch["bends"][1]]).all()
    assert batch["bends"].shape[1] == sum(i["bends"].shape[1] for i in items)


def test_refused_molecules_are_reported():
    from matfm.data.loading import featurise
    rows = molecules(["CCO", "C1#CC1", "*CC"], canonical=False)[0]
    items, kept, rejected = featurise(SHAPE, rows)
    assert kept.tolist() == [0] and rejected.frame["row"].to_list() == [1, 2] and "embedding failed" in rejected.frame["reason"][0]
    with pytest.raises(BadInput, match="is no molecule"): SHAPE("C(")


def test_groups_are_numbered_from_one():
    targets = scage_targets("CC(=O)O", GRAPH("CC(=O)O"), 64)
    assert targets["morgan"].shape == (64,) and GROUPS[targets["atom_group"][1] - 1].name == "carboxylic acid"
    assert scage_targets("[Na+]", GRAPH("[Na+]"), 64)["atom_group"].max() <= len(GROUPS)


# ---- losses and weights ----------------------------------------------------------------------------------------------

@QUICK
@given(st.integers(1, 6), st.integers(2, 5), st.floats(0, 4), st.integers(0, 2**31))
def test_focal_loss_is_its_definition(m, classes, gamma, seed):
    g = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(m, classes, generator=g, dtype=torch.float32), torch.randint(classes, (m,), generator=g)
    p = logits.double().softmax(-1)[torch.arange(m), target]
    assert torch.allclose(focal_loss(logits, target, gamma).double(), -((1 - p) ** gamma) * p.log(), atol=1e-5)


def test_angle_bins_cover_the_range():
    edges = angle_classes(torch.linspace(0, torch.pi, 1001))
    assert edges.min() == 0 and edges.max() == 19 and (edges.diff() >= 0).all() and set(edges.tolist()) == set(range(20))


@QUICK
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 60), st.integers(0, 2**31))
def test_weights_are_their_definition(tasks, window, steps, seed):
    losses = np.random.default_rng(seed).uniform(0.1, 3, (steps, tasks)).astype(np.float32)
    w = AdaptiveWeights(tasks, window)
    for row in losses: w.update(torch.tensor(row))
    done = [losses[k:k + window].mean(0) for k in range(0, steps - window + 1, window)]
    ratio = done[-1] / done[-2] if len(done) > 1 else np.ones(tasks)
    want = np.exp(ratio) / np.exp(ratio).sum()
    assert np.allclose(w.weights().numpy(), want, atol=1e-4)
    if steps:
        decay = 0.99 ** np.arange(steps)[::-1]
        assert np.allclose(w.mean().numpy(), (decay[:, None] * losses).sum(0) / decay.sum(), rtol=1e-3)


def test_weights_move_only_with_a_gradient(items):
    encoder = ConformerTransformer.for_representation(LEARN, width=16, depth=1, heads=2)
    objective = Scage.for_encoder(encoder, LEARN, bits=128)
    batch = collate_conformers(items)
    with torch.no_grad(): objective(encoder, batch)
    objective(encoder, batch)
    assert objective.balance.steps == 0
    objective(encoder, batch)["loss"].backward()
    assert objective.balance.steps == 1 and (objective.balance.mean() != 1).all()
    objective.eval()
    objective(encoder, batch)["loss"].backward()
    assert objective.balance.steps == 1


def test_partners_are_uniform():
    counts = torch.tensor([3, 1, 5])
    graph = torch.arange(3).repeat_interleave(counts)
    a, b = random_partners(graph, counts, 4000, torch.Generator().manual_seed(0))
    table = torch.zeros(9, 9).index_put((a, b), torch.ones(len(a)), accumulate=True) / 4000
    want = (graph[:, None] == graph).float() / counts[graph][:, None]
    assert (table - want).abs().max() < 0.03


def test_pair_head_knows_no_order():
    head = PairHead(6, 4)
    a, b = torch.randn(2, 3, 6)
    assert torch.allclose(head(a, b), head(b, a), atol=1e-6) and not torch.allclose(head(a, b), head(a, a))


def test_tasks_are_the_same_for_renumbered_and_turned_molecules(items):
    encoder = ConformerTransformer.for_representation(LEARN, width=16, depth=1, heads=2).eval()
    objective = Scage.for_encoder(encoder, LEARN, tasks=("fingerprint", "group", "angle"), bits=128, adaptive=False)
    order = lambda i: np.random.default_rng(2).permutation(len(i["atoms"]))
    a, b = (objective(encoder, collate_conformers(x)) for x in (items, [turned(renumbered(i, order(i))) for i in items]))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a if k.endswith("_loss"))


@pytest.mark.parametrize("tasks", [("fingerprint",), ("angle", "path"), TASKS])
def test_any_choice_of_tasks(items, tasks):
    encoder = ConformerTransformer.for_representation(LEARN, width=16, depth=1, heads=2)
    objective = Scage.for_encoder(encoder, LEARN, tasks=tasks, bits=128)
    out = objective(encoder, collate_conformers(items))
    assert {k.rsplit("_", 1)[0] for k in out if k != "loss"} == set(tasks) and json.loads(json.dumps(objective.config)) == objective.config


def test_a_run_that_was_cut_off_goes_on(items, tmp_path, monkeypatch):
    p = from_scratch(LEARN, "conformer_transformer", width=16, depth=1, heads=2)
    objective = Scage.for_encoder(p.encoder, LEARN, bits=128, window=3)
    spec = PretrainSpec(steps=8, batch_size=3, lr=1e-3, log_every=1, valid_every=0, checkpoint_every=1, accelerator="cpu", threads=1)
    whole = pretrain(p, objective, items, spec, progress=False)
    forward, calls = Scage.forward, []

    def cut(self, *args):
        calls.append(1)
        if len(calls) > 5: raise RuntimeError("cut off")
        return forward(self, *args)
    monkeypatch.setattr(Scage, "forward", cut)
    with pytest.raises(RuntimeError, match="cut off"): pretrain(p, objective, items, spec, tmp_path, progress=False)
    monkeypatch.setattr(Scage, "forward", forward)
    again = pretrain(p, objective, items, spec, tmp_path, progress=False)
    assert whole.objective.balance.steps == again.objective.balance.steps == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.objective.state_dict().values(), again.objective.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.pretrained.encoder.parameters(), again.pretrained.encoder.parameters(), strict=True))


def test_without_targets_fits_a_model(items, tmp_path):
    from matfm.adapt.finetune import FinetuneSpec, finetune
    from matfm.models.heads import Output, Task
    y = [1.0, 2.0, 0.5, 1.5, 2.5, 3.0]
    rows = molecules(SMILES, {"y": y}, {"y": ""}, canonical=False)[0]
    p = without_targets(Pretrained(from_scratch(LEARN, "conformer_transformer", width=16, depth=1, heads=2).encoder, LEARN))
    model = finetune(p, Task(outputs=(Output(name="y"),)), rows, rows, FinetuneSpec(epochs=2, batch_size=3, accelerator="cpu", threads=1))
    frame, rejected = model.predict(rows)
    assert len(rejected) == 0 and np.isfinite(frame["y"].to_numpy()).all()
    with pytest.raises(BadInput, match="expected molecule conformers"): without_targets(from_scratch("molecule_graph", "molecule_gnn", width=8, depth=1))


def test_bends_of_a_star():
    star = np.array([[0, 1, 0, 2, 0, 3], [1, 0, 2, 0, 3, 0]])
    assert sorted(map(tuple, bends_of(star).T.tolist())) == [(1, 0, 2), (1, 0, 3), (2, 0, 3)]
