"""Relational pretraining and fusion: similarities agree with RDKit, losses with their definition, fusions live on when an encoder is taken away."""
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from matfm.adapt.finetune import FinetuneSpec, fit_labelled, label, load_model
from matfm.core import BadInput, UnknownName
from matfm.data.records import molecules
from matfm.models.fusion import Fusion, drop_parts, fuse, gates, without
from matfm.models.heads import Output, Task
from matfm.models.molgraph import MoleculeGNN
from matfm.models.zoo import Pretrained, from_scratch, load_pretrained, save_pretrained
from matfm.pretrain.objectives import Mixed
from matfm.pretrain.relational import (KEYS, MODALITIES, SIMILARITIES, TEMPERATURES, MoleculeViews, NtXent, Relational, distorted, fit_views, hashed_words, log_shares, molecule_in_words,
                                       nt_xent_loss, relational_loss, shares, target_entropy, view_shares, without_views)
from matfm.represent.molecule import MoleculeGraph

QUICK = settings(max_examples=40, deadline=None)
SMILES = ["CCO", "c1ccccc1O", "CC(=O)N", "C[N+](C)(C)C", "C", "OC(=O)C1CC1", "C/C=C/Cl", "N[C@@H](C)C(=O)O", "CCCCCC", "Clc1ccncc1", "OCC(O)CO", "CC(C)(C)O"]
GRAPH, VIEWS = MoleculeGraph(), MoleculeViews()
matrices = st.integers(2, 7).flatmap(lambda n: st.lists(st.floats(-1, 1), min_size=n * n, max_size=n * n).map(lambda v: torch.tensor(v, dtype=torch.float64).view(n, n)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch_of(smiles, representation=VIEWS):
    return representation.collate([representation(s) for s in smiles])


def encoders_by_view(width=16):
    return {m: from_scratch(GRAPH, "molecule_gnn", seed=k, width=width, depth=2).encoder for k, m in enumerate(MODALITIES)}


# ---- views -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("a,b", [("OCC", "CCO"), ("Oc1ccccc1", "c1ccccc1O"), ("C(=O)(N)C", "CC(=O)N")])
def test_views_do_not_depend_on_how_a_molecule_is_written(a, b):
    assert molecule_in_words(a) == molecule_in_words(b)
    for m in MODALITIES:
        np.testing.assert_allclose(VIEWS.vector(m, a), VIEWS.vector(m, b), rtol=1e-5, atol=1e-5)


@QUICK
@given(st.text(alphabet="abc12; -", max_size=60), st.sampled_from([16, 64, 1024]))
def test_hashed_words_count_every_gram_once(text, size):
    words = [p.split() for p in text.split(";")]
    v = hashed_words(text, size)
    assert v.shape == (size,) and v.sum() == sum(len(w) + max(0, len(w) - 1) for w in words)


def test_fitted_descriptors_are_standardised_and_survive_json():
    views = fit_views(SMILES)
    x = np.stack([views.vector("descriptors", s) for s in SMILES])
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-3)
    std = x.std(0)
    assert ((std < 2e-3) | (abs(std - 1) < 0.05)).all() and (std > 0.9).sum() > 30 and MoleculeViews.from_json(views.to_json()) == views
    with pytest.raises(BadInput): views("C1CC")


def test_text_and_fingerprint_tell_molecules_apart():
    for m in MODALITIES:
        s = SIMILARITIES[m](batch_of(SMILES)[KEYS[m]])
        off = s[~torch.eye(len(s), dtype=torch.bool)]
        assert off.max() < 1 - 1e-4 and off.std() > 0.02, m


# ---- losses ----------------------------------------------------------------------------------------------------------

@QUICK
@given(matrices, st.sampled_from([0.05, 0.3, 2.0]))
def test_shares_are_a_distribution_without_the_diagonal(s, tau):
    p = shares(s, tau)
    assert torch.allclose(p.sum(-1), torch.ones(len(s), dtype=p.dtype)) and p.diagonal().abs().max() == 0 and (p >= 0).all()
    by_hand = torch.stack([torch.softmax(torch.cat([r[:i], r[i + 1:]]) / tau, 0) for i, r in enumerate(s)])
    assert torch.allclose(p[~torch.eye(len(s), dtype=torch.bool)].view(len(s), -1), by_hand)
    assert log_shares(s, tau).isfinite().all()


@QUICK
@given(matrices)
def test_relational_loss_is_above_the_entropy(s):
    target = shares(s, 0.2)
    z = torch.randn(len(s), 5, dtype=torch.float64)
    assert relational_loss(z, target) >= target_entropy(target) - 1e-9


def test_relational_loss_has_a_finite_gradient_even_for_equal_embeddings():
    z = torch.ones(4, 3, requires_grad=True)
    relational_loss(z, shares(torch.eye(4), 0.1)).backward()
    assert z.grad.isfinite().all()


def test_early_target_is_the_mean_of_the_views():
    batch, early = batch_of(SMILES), Relational(16)
    mean = torch.stack([view_shares(m, batch[KEYS[m]]) for m in MODALITIES]).mean(0)
    assert torch.allclose(early.target(batch), mean) and early.reads[-3:] == tuple(KEYS.values()) and set(TEMPERATURES) == set(MODALITIES)


def test_nt_xent_prefers_the_right_partner():
    a = torch.randn(8, 6)
    assert nt_xent_loss(a, a + 0.01 * torch.randn(8, 6)) < nt_xent_loss(a, torch.randn(8, 6))
    assert torch.isclose(nt_xent_loss(a, -a), nt_xent_loss(-a, a))


def test_distortion_is_reproducible_and_leaves_single_atoms_alone():
    batch = batch_of(["C", "CCO"], GRAPH)
    a, b, c = (distorted(batch, 0.5, torch.Generator().manual_seed(s)) for s in (0, 0, 3))
    assert torch.equal(a["atoms"], b["atoms"]) and torch.equal(a["edge_index"], b["edge_index"])
    assert not (torch.equal(a["atoms"], c["atoms"]) and a["edge_index"].shape == c["edge_index"].shape)
    assert torch.equal(batch["counts"], a["counts"]) and a["bonds"].shape[0] == a["edge_index"].shape[1]
    for objective in (NtXent(16), Relational(16)):
        encoder = MoleculeGNN.for_representation(GRAPH, width=16, depth=1)
        assert objective(encoder, batch_of(["C", "CC"]))["loss"].isfinite()


def test_relational_mixes_with_others():
    encoder = MoleculeGNN.for_representation(GRAPH, width=16, depth=1)
    mixed = Mixed([Relational(16, ("text",)), NtXent(16)], [1.0, 0.5])
    out = mixed(encoder, batch_of(SMILES), torch.Generator().manual_seed(0))
    assert out["loss"].item() == pytest.approx(out["relational_loss"].item() + 0.5 * out["nt_xent1_loss"].item(), rel=1e-5)


def test_views_are_absent_at_inference(tmp_path):
    views = fit_views(SMILES)
    plain = without_views(Pretrained(from_scratch(GRAPH, "molecule_gnn", width=16, depth=1).encoder, views))
    again = load_pretrained(save_pretrained(tmp_path / "p", plain))
    batch = again.representation.collate([again.representation(s) for s in SMILES])
    assert not [k for k in batch if k.startswith("modality_")] and torch.equal(again.encoder(batch).embedding, plain.encoder(batch).embedding)


# ---- fusion ----------------------------------------------------------------------------------------------------------

@QUICK
@given(st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.9]))
def test_never_all_encoders_are_dropped(n, p):
    w = drop_parts(torch.randn(n, 20), p).softmax(0)
    assert torch.allclose(w.sum(0), torch.ones(20)) and not w.isnan().any()


@pytest.mark.parametrize("how", ["concat", "gate"])
def test_a_missing_encoder_is_the_same_as_a_silent_one(how):
    fusion, batch = fuse(encoders_by_view(), how=how), batch_of(SMILES, GRAPH)
    for away in MODALITIES:
        left = without(fusion, away)
        ported = torch.stack([left.ports[n](left.parts[n](batch).embedding) for n in left.names])
        weights = gates(fusion, batch)[:, [n != away for n in fusion.names]]
        fused = ((weights / weights.sum(1, keepdim=True)).T[..., None] * ported).sum(0)
        assert torch.allclose(left(batch).embedding, fused + left.mix(left.norm(fused)), atol=1e-5)
        assert left.names == [n for n in fusion.names if n != away] and left.width == fusion.width


def test_without_keeps_the_width_of_the_first():
    parts = {"narrow": dict(name="molecule_gnn", width=8, depth=1), "wide": dict(name="molecule_gnn", width=20, depth=1)}
    fusion = Fusion.for_representation(GRAPH, parts)
    assert without(fusion, "narrow").width == fusion.width == 8
    with pytest.raises(UnknownName): without(fusion, "broad")


@pytest.mark.parametrize("how", ["concat", "gate"])
def test_a_fusion_is_finetuned_saved_and_tested_with_an_encoder_away(how, tmp_path):
    rows, _ = molecules(SMILES, {"y": np.linspace(-1, 1, len(SMILES)).tolist()}, canonical=False)
    task = Task((Output("y"),))
    data = label(GRAPH, task, rows)
    fusion = fuse(encoders_by_view(), how=how, modality_dropout=0.3)
    model = fit_labelled(Pretrained(fusion, GRAPH), task, data, data, FinetuneSpec(epochs=3, accelerator="cpu", threads=1))
    assert model.predictor.encoder.config["dropout"] == 0.1 and model.predictor.encoder.parts["text"].config["dropout"] == 0.1
    model.save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m")
    whole = again.predict(rows)[0]["y"].to_numpy()
    np.testing.assert_allclose(whole, model.predict(rows)[0]["y"].to_numpy(), rtol=1e-5, atol=1e-6)
    again.predictor.encoder = without(again.predictor.encoder, "text").eval()
    less = again.predict(rows)[0]["y"].to_numpy()
    assert np.isfinite(less).all() and np.abs(less - whole).max() > 1e-6


def test_config_is_json():
    fusion = fuse(encoders_by_view(), how="gate")
    twin = Fusion(**json.loads(json.dumps(fusion.config)))
    twin.load_state_dict(fusion.state_dict())
    batch = batch_of(SMILES, GRAPH)
    assert torch.equal(twin.eval()(batch).embedding, fusion(batch).embedding)
