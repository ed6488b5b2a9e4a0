"""Fine-tuning: overfits, repeats, keeps rows in order, survives bad input, saves and loads; ensembles with intervals."""
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from matfm.adapt.finetune import Ensemble, FinetuneSpec, Model, as_vectors, finetune, finetune_ensemble, label
from matfm.core import BadInput, TooManyRejected
from matfm.data.records import Crystal, crystals, molecules
from matfm.models.heads import Output, Task
from matfm.models.zoo import from_scratch

torch.set_num_threads(1)
SMILES = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCCCC", "OCCO", "ClCCl", "CC#N", "CCCO", "CCCCO", "CCOCC", "C1CCCCC1", "Cc1ccccc1", "CC(C)=O", "CCS", "BrCC"]
HEAVY = [float(sum(c in "CNOSFBc" or c == "l" for c in s) - s.count("Cl")) for s in SMILES]
TASK = Task((Output("heavy"),))
SPEC = FinetuneSpec(epochs=4, batch_size=8, lr=2e-3, head_lr=5e-3, dropout=0.0, accelerator="cpu", threads=1)


def table(smiles=SMILES, y=HEAVY, name="heavy", **more):
    return molecules(smiles, {name: y, **more}, name="test")[0]


@pytest.fixture(scope="module")
def words(): return from_scratch("smiles", "transformer", seed=0, width=32, depth=2, heads=4)


@pytest.fixture(scope="module")
def model(words): return finetune(words, TASK, table(), table(), SPEC)


@pytest.fixture(scope="module")
def salts():
    "Rock salts whose energy per atom is nearly the sum of their elements."
    g, cells, energy = np.random.default_rng(0), [], []
    reference = {3: -1.9, 11: -1.3, 19: -1.1, 9: -3.5, 17: -2.2, 35: -1.8}
    for a in (3, 11, 19):
        for b in (9, 17, 35):
            for strain in (0.98, 1.0, 1.02):
                side = strain * (2.0 + 0.04 * (a + b)) * 2
                cells.append(Crystal(side * np.eye(3), [a] * 4 + [b] * 4, [[0, 0, 0], [0, .5, .5], [.5, 0, .5], [.5, .5, 0], [.5, 0, 0], [0, .5, 0], [0, 0, .5], [.5, .5, .5]]))
                energy.append((reference[a] + reference[b]) * 10 + 20 * (strain - 1) ** 2 + 0.001 * g.normal())
    return crystals(cells, {"energy": energy}, units={"energy": "eV/atom"}, name="salts")[0]


@pytest.mark.parametrize("representation,encoder,config", [("smiles", "transformer", dict(width=32, depth=2, heads=4)), ("molecule_graph", "molecule_gnn", dict(width=32, depth=2))])
def test_eight_molecules_are_learnt_by_heart(representation, encoder, config):
    few = table(SMILES[:8], HEAVY[:8])
    m = finetune(from_scratch(representation, encoder, seed=0, **config), TASK, few, few, SPEC.replace(epochs=60, patience=60))
    error = np.abs(m.predict(few)[0]["heavy"].to_numpy() - few.y()[:, 0]).mean()
    assert error < 0.2 * np.abs(few.y() - np.median(few.y())).mean()


def test_element_references_start_near_the_truth(salts):
    net = from_scratch("crystal_graph", "crystal_gnn", seed=0, width=32, depth=2)
    with_reference, without = (finetune(net, Task((Output("energy", unit="eV/atom", reference=r),)), salts, salts, SPEC.replace(epochs=2)) for r in ("elements", "none"))
    assert with_reference.step0[0]["error"] < 0.05 * without.step0[0]["error"]
    assert with_reference.step0[0]["error"] < 0.1 * with_reference.step0[0]["constant"]
    assert 0.8 < without.step0[0]["error"] / without.step0[0]["constant"] < 1.3


def test_frozen_crystals_with_element_references(salts):
    net = from_scratch("crystal_graph", "crystal_gnn", seed=0, width=32, depth=2)
    task = Task((Output("energy", unit="eV/atom", reference="elements"),))
    m = finetune(net, task, salts, salts, SPEC.replace(strategy="frozen", epochs=5))
    assert all(torch.equal(p, q) for p, q in zip(m.predictor.encoder.parameters(), net.encoder.parameters(), strict=True))
    pred = m.predict(salts)[0]["energy"].to_numpy()
    assert np.isclose(np.abs(pred - salts.y()[:, 0]).mean(), m.info["valid"]["energy"], rtol=1e-2, atol=1e-4), "the whole model predicts what its heads were trained to"


def test_embeddings_are_computed_once(words):
    calls = []
    hook = words.encoder.register_forward_hook(lambda *a: calls.append(1))
    data = label(words.representation, TASK, table())
    first = as_vectors(words, data)
    n = len(calls)
    assert as_vectors(words, data).items is first.items and len(calls) == n > 0
    hook.remove()


def test_same_seed_same_numbers_whatever_the_global_state(words):
    torch.manual_seed(1)
    a = finetune(words, TASK, table(), table(), SPEC.replace(dropout=0.2))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = finetune(words, TASK, table(), table(), SPEC.replace(dropout=0.2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.history == b.history and a.predict(table())[0].equals(b.predict(table())[0])
    assert finetune(words, TASK, table(), table(), SPEC.replace(dropout=0.2, seed=1)).history != a.history


def test_best_epoch_comes_back_and_patience_stops(words):
    valid = table(y=list(np.random.default_rng(0).permutation(HEAVY)))  # labels that cannot be learnt from the training part
    m = finetune(words, TASK, table(), valid, SPEC.replace(epochs=40, patience=3, lr=5e-3))
    losses = [r["valid_loss"] for r in m.history]
    assert len(losses) < 40 and m.info["best_epoch"] == int(np.argmin(losses)) + 1 == len(losses) - 3
    error = np.abs(m.predict(valid)[0]["heavy"].to_numpy() - valid.y()[:, 0]).mean()
    assert np.isclose(error, m.history[m.info["best_epoch"] - 1]["heavy"], rtol=1e-4)


def test_rows_keep_their_place(model):
    asked = molecules(["CCCO", "C" * 300, "CO", "C" * 301, "c1ccccc1"], ids=list("abcde"))[0]
    frame, rejected = model.predict(asked)
    assert frame["id"].to_list() == list("abcde") and frame.columns == ["id", "heavy"]
    assert np.isnan(frame["heavy"].to_numpy()).tolist() == [False, True, False, True, False]
    assert rejected.frame["row"].to_list() == [1, 3] and all("max_length" in r for r in rejected.frame["reason"])
    one_by_one = [model.predict(asked.take([i]))[0]["heavy"][0] for i in (0, 2, 4)]
    assert np.allclose(one_by_one, frame["heavy"].to_numpy()[[0, 2, 4]], atol=1e-4)


def test_nothing_but_bad_rows(model):
    frame, rejected = model.predict(molecules(["C" * 300, "C" * 400])[0])
    assert len(frame) == len(rejected) == 2 and frame["heavy"].is_nan().all()


def test_wrong_domain_is_named(model, salts):
    with pytest.raises(BadInput, match="reads molecule records, these are crystal records"): model.predict(salts)


def test_training_on_mostly_unusable_rows_is_refused(words):
    long = table(["C" * n for n in range(254, 262)], [1.0] * 8)
    with pytest.raises(TooManyRejected): finetune(words, TASK, long, table(), SPEC)


def test_labels_must_be_there(words):
    with pytest.raises(BadInput, match="did you mean 'heavy'"): finetune(words, Task((Output("heavi"),)), table(), table(), SPEC)
    with pytest.raises(BadInput, match="validation records have no row"): finetune(words, TASK, table(), table().with_columns(heavy=np.full(16, np.nan)), SPEC)


def test_a_constant_target_does_not_explode(words):
    flat = table(y=[3.0] * 16)
    m = finetune(words, TASK, flat, flat, SPEC.replace(epochs=2))
    assert np.abs(m.predict(flat)[0]["heavy"].to_numpy() - 3).max() < 1.5


def test_missing_labels_cost_nothing(words):
    binary = [1.0 if "O" in s else 0.0 for s in SMILES]
    holes = [v if i % 2 else float("nan") for i, v in enumerate(HEAVY)]
    data = table(y=holes, has_oxygen=binary)
    task = Task((Output("heavy"), Output("has_oxygen", kind="binary")))
    m = finetune(words, task, data, data, SPEC.replace(epochs=30, patience=30))
    frame = m.predict(data)[0]
    assert ((frame["has_oxygen"] >= 0) & (frame["has_oxygen"] <= 1)).all()
    assert ((frame["has_oxygen"].to_numpy() > 0.5) == np.array(binary, bool)).mean() > 0.8
    names = {(x.tags["output"], x.name) for x in m.evaluate(data)}
    assert ("heavy", "mae") in names and ("has_oxygen", "auroc") in names


def test_folder_holds_no_code_and_predicts_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    again = Model.load(tmp_path / "m")
    assert again.predict(table())[0].equals(model.predict(table())[0]) and again.spec == model.spec and again.history == model.history
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "hedas": 1}))
    with pytest.raises(BadInput, match="did you mean 'heads'"): Model.load(tmp_path / "m")


def test_predicting_does_not_load_lightning(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    script = textwrap.dedent("""
        import sys
        from matfm.adapt.finetune import Model
        from matfm.data.records import molecules
        frame, _ = Model.load(sys.argv[1]).predict(molecules(["CCO"])[0])
        assert frame["heavy"].is_finite().all()
        assert not any(m == "lightning" or m.startswith("lightning.") for m in sys.modules), "lightning was imported"
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_ensembles(words, tmp_path):
    crowd = finetune_ensemble(words, TASK, table(), table(), SPEC.replace(epochs=3), n=2, bag=True)
    assert [m.spec.seed for m in crowd.models] == [0, 1] and len(crowd) == 2
    plain, _ = crowd.predict(table())
    assert plain.columns == ["id", "heavy", "heavy_std"] and (plain["heavy_std"] > 0).all()
    members = np.stack([m.predict(table())[0]["heavy"].to_numpy() for m in crowd.models])
    assert np.allclose(members.mean(0), plain["heavy"].to_numpy()) and np.allclose(members.std(0, ddof=1), plain["heavy_std"].to_numpy())
    for scaled in (False, True):
        frame, _ = crowd.calibrate(table(), scaled=scaled).predict(table())
        y = table().y()[:, 0]
        low, high = frame["heavy_lower"].to_numpy(), frame["heavy_upper"].to_numpy()
        assert ((low <= y) & (y <= high)).mean() >= 0.9, "on its own calibration rows the promise holds by construction"
        crowd.save_pretrained(tmp_path / str(scaled))
        assert Ensemble.load(tmp_path / str(scaled)).predict(table())[0].equals(frame)


def test_ensembles_of_fresh_networks_and_of_one():
    starts = []
    def fresh(seed):
        starts.append(seed)
        return from_scratch("smiles", "transformer", seed=seed, width=16, depth=1, heads=2)
    crowd = finetune_ensemble(fresh, TASK, table(), table(), SPEC.replace(epochs=1, seed=5), n=2)
    assert starts == [5, 6] and not torch.equal(*(next(m.predictor.encoder.parameters()) for m in crowd.models))
    one = finetune_ensemble(fresh, TASK, table(), table(), SPEC.replace(epochs=1), n=1).calibrate(table(), scaled=True)
    assert (one.predict(table())[0]["heavy_upper"] > one.predict(table())[0]["heavy"]).all()
    with pytest.raises(BadInput, match="n ≥ 1"): finetune_ensemble(fresh, TASK, table(), table(), n=0)


def test_bad_settings_are_named():
    for changes, message in [({"strategy": "forzen"}, "did you mean 'frozen'"), ({"epochs": 0}, "epochs must be ≥ 1"), ({"lr": 0.0}, "lr must be > 0"),
                             ({"dropout": 1.0}, "dropout must be at least 0 and below 1"), ({"layer_decay": 2.0}, "layer_decay")]:
        with pytest.raises(BadInput, match=message): SPEC.replace(**changes)
