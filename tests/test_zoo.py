"""Checkpoint folders: the same encoder comes back, damaged or strange folders are refused, nothing is executed."""
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matfm.core import BadInput, UnknownName


@pytest.fixture(scope="module")
def tiny():
    from matfm.models.zoo import from_scratch
    p = from_scratch("smiles", "transformer", seed=3, width=16, depth=1, heads=2)
    p.info["objective"] = "masked_tokens"
    return p


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    from matfm.models.zoo import save_pretrained
    return save_pretrained(tmp_path / "model", tiny)


def edit(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path) -> str:
    from matfm.models.zoo import load_pretrained
    with pytest.raises(BadInput) as e:
        load_pretrained(folder)
    return str(e.value)


@pytest.mark.parametrize("representation,encoder,config,record", [
    ("smiles", "transformer", dict(width=16, depth=1, heads=2), "CCO"),
    ("molecule_graph", "molecule_gnn", dict(width=16, depth=1), "CCO"),
    ("crystal_graph", "crystal_gnn", dict(width=16, depth=1, basis=8), "salt")])
def test_round_trip(representation, encoder, config, record, tmp_path):
    import torch
    from matfm.data.records import Crystal
    from matfm.models.zoo import from_scratch, load_pretrained, save_pretrained
    record = Crystal(np.eye(3) * 4.1, [55, 17], [[0, 0, 0], [.5, .5, .5]]) if record == "salt" else record
    p = from_scratch(representation, encoder, seed=1, **config)
    q = load_pretrained(save_pretrained(tmp_path / "m", p))
    batch = p.representation.collate([p.representation(record)])
    assert torch.equal(p.encoder(batch).embedding, q.encoder(batch).embedding)
    assert q.representation == p.representation and q.info == p.info and not q.encoder.training


def test_folder_holds_no_pickle(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    raw = (folder / "model.safetensors").read_bytes()
    assert json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(raw)


def test_a_pickle_in_disguise_is_not_run(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "cannot be read" in refused(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 4, 50, 1000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors cannot be read (cut off?)" in refused(folder)


def test_changed_weights(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "checksum differs" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert f"no {name}" in refused(folder)


@pytest.mark.parametrize("text,message", [("", "is not JSON"), ("[]", "must hold an object"), ("{}", "lacks format"), ("\x00", "is not JSON")])
def test_broken_config(folder, text, message):
    (folder / "config.json").write_text(text)
    assert message in refused(folder)


def test_unknown_fields(folder, tiny):
    edit(folder, notes="x")
    assert "unknown field of config.json 'notes'" in refused(folder)


@pytest.mark.parametrize("change,message", [
    (dict(encoder={"name": "transformr"}), "did you mean 'transformer'"),
    (dict(encoder="transformer"), "needs a 'name'"),
    (dict(encoder={"name": "transformer", "vocab_size": 9, "widht": 3}), "did you mean 'width'"),
    (dict(encoder={"name": "transformer"}), "cannot build encoder"),
    (dict(encoder={"name": "transformer", "vocab_size": 9, "width": 10, "heads": 3}), "not a multiple of heads"),
    (dict(encoder={"name": "transformer", "vocab_size": 9, "width": 16, "heads": 2}), "does not fit TransformerEncoder"),
    (dict(representation={"name": "smiles", "vocabs": []}), "did you mean 'vocab'"),
    (dict(format=99), "reads format 1")])
def test_strange_description(folder, change, message):
    edit(folder, **change)
    assert message in refused(folder)


def test_an_interrupted_save_leaves_the_old_checkpoint(folder, tiny, monkeypatch):
    import safetensors.torch
    from matfm.models.zoo import load_pretrained, save_pretrained

    def cut_off(weights, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(safetensors.torch, "save_file", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(folder, tiny)
    assert load_pretrained(folder).info == tiny.info


def test_sheets_travel(tiny, tmp_path):
    from matfm.models.zoo import save_pretrained
    sheet = tmp_path / "sheet"
    sheet.mkdir()
    (sheet / "FACTSHEET.md").write_text("# Tiny")
    with pytest.raises(BadInput, match="has no factsheet.json"):
        save_pretrained(tmp_path / "a", tiny, factsheet=sheet)
    (sheet / "factsheet.json").write_text("{}")
    out = save_pretrained(tmp_path / "b", tiny, factsheet=sheet)
    assert (out / "FACTSHEET.md").read_text() == "# Tiny" and (out / "factsheet.json").is_file()


def test_names(tmp_path, tiny, monkeypatch):
    from matfm.models.zoo import checkpoints, load_pretrained, save_pretrained
    (tmp_path / "settings.ini").write_text("[run]\nstore = runs\n")
    monkeypatch.setenv("MATFM_SETTINGS", str(tmp_path / "settings.ini"))
    save_pretrained(tmp_path / "data" / "checkpoints" / "my-small-one", tiny)
    assert "my-small-one" in checkpoints()
    assert load_pretrained("my-small-one").info == tiny.info
    with pytest.raises(UnknownName, match="did you mean 'my-small-one'"):
        load_pretrained("my-smal-one")
    with pytest.raises(BadInput, match="there is no folder"):
        load_pretrained(tmp_path / "nowhere")


def test_shipped_checkpoints_load(root):
    from matfm.models.zoo import checkpoints, load_pretrained
    for path in sorted((root / "data" / "checkpoints").glob("*/config.json")):
        assert path.parent.name in checkpoints()
        p = load_pretrained(path.parent)
        assert all(bool(v.isfinite().all()) for v in p.encoder.state_dict().values() if v.is_floating_point())
        assert (path.parent / "FACTSHEET.md").is_file() and (path.parent / "factsheet.json").is_file(), f"{path.parent.name} has no FactSheet"


def test_from_scratch_depends_on_its_seed_alone():
    import torch
    from matfm.models.zoo import from_scratch
    make = lambda seed: torch.cat([p.detach().flatten() for p in from_scratch("smiles", "transformer", seed=seed, width=16, depth=1, heads=2).encoder.parameters()])
    torch.manual_seed(1)
    a, state = make(0), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(a, make(0)) and not torch.equal(a, make(1))
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state()), "from_scratch must leave the caller's random state alone"


def test_testing_and_registry_import_light():
    code = "import sys, matfm.testing; print([m for m in ('torch', 'rdkit', 'pymatgen', 'lightning', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
