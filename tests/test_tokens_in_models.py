"Every kind of token trains the same transformer: pretraining, embedding and checkpoint."
import numpy as np
import pytest
import torch

from matfm.data.sources import load
from matfm.models.zoo import from_scratch, load_pretrained, save_pretrained
from matfm.pretrain.objectives import suited
from matfm.pretrain.training import PretrainSpec, pretrain
from matfm.registry import objectives, representations
from matfm.represent.sequence import GpeTokens

MOLECULES = ["CCO", "c1ccccc1O", "CC(=O)N", "C[C@H](N)C(=O)O", "[NH4+].[Cl-]", "FC(F)(F)c1ccncc1", "OCC#N", "C1CCOC1"]


def made(name):
    if name == "material_string": return representations.build({"name": name}), load("matfm_crystals").take(np.arange(8)).structures()
    if name == "gpe": return GpeTokens.fit(MOLECULES, 190), MOLECULES
    return representations.get(name).default() if hasattr(representations.get(name), "default") else representations.build({"name": name}), MOLECULES


@pytest.mark.parametrize("name", ["smiles", "smirk", "selfies", "gpe", "material_string"])
def test_masked_tokens_train_and_are_kept(name, tmp_path):
    rep, records = made(name)
    start = from_scratch(rep, "transformer", width=16, depth=1, heads=2)
    assert "masked_tokens" in suited(rep) and start.encoder.config["vocab_size"] == rep.vocab_size
    objective = objectives.get("masked_tokens").for_encoder(start.encoder, rep)
    items = [rep(r) for r in records]
    done = pretrain(start, objective, items, PretrainSpec(steps=3, batch_size=4, valid_every=0), out=tmp_path / "run", progress=False)
    save_pretrained(tmp_path / "kept", done.pretrained)
    again, batch = load_pretrained(str(tmp_path / "kept")), rep.collate(items)
    with torch.no_grad(): a, b, before = (p.encoder(batch).embedding for p in (done.pretrained, again, start))
    assert torch.equal(a, b) and not torch.allclose(a, before) and again.representation == rep


def test_tokens_are_no_graph():
    with pytest.raises(ValueError, match="reads the representation 'crystal_graph', got 'smirk'"): from_scratch("smirk", "crystal_gnn")
    assert not {"masked_tokens", "next_token"} & set(suited("molecule_graph"))
