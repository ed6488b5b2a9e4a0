"Tables: bad files, crystals and classes, one row out for each row in, and the command line's defaults."
import inspect

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matfm.adapt.finetune import FinetuneSpec
from matfm.adapt.tables import RATE, asked_for, configured, finetune_table, load_predictor, predict_table, pretrain_table, read_labelled, read_unlabelled
from matfm.core import BadInput
from matfm.data.records import Crystal, molecules
from matfm.data.splits import random_split
from matfm.models.zoo import from_scratch
from matfm.pretrain.training import PretrainSpec
from matfm.run.results import Result
from matfm.run.sheets import FactSheet

torch.set_num_threads(1)
SPEC = FinetuneSpec(epochs=2, batch_size=16, accelerator="cpu", threads=1)
CHAINS = [f"{a}{'C' * n}{b}" for n in range(1, 9) for a in ("", "O", "N", "F") for b in ("", "Cl")]


@pytest.fixture(scope="module")
def tiny(): return from_scratch("molecule_graph", "molecule_gnn", seed=0, width=16, depth=1)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    "A model with one number and one class."
    records, rejected = molecules(CHAINS, {"length": [float(len(s)) for s in CHAINS], "polar": [float(s[0] in "ON") for s in CHAINS]}, units={"length": "angstrom"}, name="chains")
    out = tmp_path_factory.mktemp("model")
    finetune_table(records, out, tiny, "random", 1, SPEC, rejected)
    return out


def test_numbers_and_classes(folder):
    result, sheet = Result.load(folder), FactSheet.load(folder)
    kinds = {m.tags["output"]: set() for m in result.metrics}
    for m in result.metrics: kinds[m.tags["output"]].add(m.name)
    assert "mae" in kinds["length"] and "coverage" in kinds["length"] and "auroc" in kinds["polar"] and not kinds["polar"] & {"mae", "coverage"}
    assert any("early stopping" in line for line in sheet.limits)
    found, rejected = predict_table(folder, pl.DataFrame({"smiles": ["OCC", "CC"]}))
    assert found.columns == ["row", "smiles", "length", "length_lower", "length_upper", "polar", "reason"] and not len(rejected)
    assert found["polar"].is_between(0, 1).all()


def test_classes_alone_promise_no_intervals(tiny, tmp_path):
    records, _ = molecules(CHAINS, {"polar": [float(s[0] in "ON") for s in CHAINS]}, name="chains")
    finetune_table(records, tmp_path, tiny, random_split(records, seed=1), spec=SPEC)
    assert not any("early stopping" in line for line in FactSheet.load(tmp_path).limits) and not load_predictor(tmp_path).conformal
    assert Result.load(tmp_path).spec.parameters["split"] == "random"


def test_a_second_training_leaves_nothing_of_the_first(tiny, tmp_path):
    given = [*CHAINS, "C1CC"]
    records, rejected = molecules(given, {"length": [float(len(s)) for s in given]}, name="chains")
    finetune_table(records, tmp_path, tiny, "random", 1, SPEC, rejected)
    assert (tmp_path / "rejected.csv").is_file()
    finetune_table(records, tmp_path, tiny, "random", 1, SPEC)
    assert not (tmp_path / "rejected.csv").exists() and Result.load(tmp_path).notes.startswith("0 rows")


def test_crystals(tmp_path):
    cells = [Crystal(4.2 * (1 + 0.01 * i) * np.eye(3), [a] * 4 + [b] * 4, [[0, 0, 0], [0, .5, .5], [.5, 0, .5], [.5, .5, 0], [.5, 0, 0], [0, .5, 0], [0, 0, .5], [.5, .5, .5]])
             for a in (3, 11, 19, 37) for b in (9, 17, 35, 53) for i in range(2)]
    cifs = [c.to_cif() for c in cells]
    pl.DataFrame({"text": [*cifs, "no crystal"], "v": [c.volume for c in cells] + [1.0]}).write_csv(tmp_path / "salts.csv")
    records, rejected = read_labelled(tmp_path / "salts.csv", {"v": "angstrom^3"}, cif="text")
    net = from_scratch("crystal_graph", "crystal_gnn", seed=0, width=16, depth=1)
    result = finetune_table(records, tmp_path / "model", net, spec=SPEC, rejected=rejected)
    assert {m.tags["model"] for m in result.metrics} == {"fine-tuned", "dummy", "composition_forest"} and result.spec.parameters["split"] == "composition"
    found, aside = predict_table(tmp_path / "model", pl.DataFrame({"cif": [cifs[0], None, "x"]}))
    assert found["v"].is_null().to_list() == [False, True, True] and len(aside) == 2
    with pytest.raises(BadInput, match="the model reads crystals"): predict_table(tmp_path / "model", pl.DataFrame({"smiles": ["C"]}), smiles="smiles")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sampled_from(["CCO", "C1CC", "", "c1ccccc1", "[U]", "C.C", "nan", " CC "]), st.none(), st.text(max_size=8)), min_size=1, max_size=12))
def test_one_row_out_for_each_row_in(folder, structures):
    table = pl.DataFrame({"smiles": structures}, schema={"smiles": pl.String})
    found, rejected = predict_table(folder, table)
    assert found["smiles"].to_list() == structures and found["row"].to_list() == [str(i) for i in range(len(structures))]
    assert (found["length"].is_null() == found["reason"].is_not_null()).all() and sorted(rejected.frame["row"]) == found["reason"].is_not_null().arg_true().to_list()


@pytest.mark.parametrize("content,message", [(b"", "is empty"), (b"\n \n", "is empty"), (b"smiles,y\n", "header but no rows"), (b"a,y\nC,1\n", "no structure column"), (b"smiles,z\nC,1\n", "unknown column 'y'"),
                                             (b"smiles,y\nC,large\nCC,1\nCCC,\n", "2 of 3 rows"), (b"formula,y\nNaCl,1\n", "this table has compositions only")])
def test_bad_tables(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(BadInput, match=message): finetune_table(read_labelled(tmp_path / "t.csv", "y")[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("column", ["row", "reason"])
def test_columns_of_the_prediction_are_taken(tiny, tmp_path, column):
    records, _ = molecules(CHAINS, {column: [1.0] * len(CHAINS)})
    with pytest.raises(BadInput, match="rename it"): finetune_table(records, tmp_path / "out", tiny)


def test_pretraining_continues(tmp_path):
    pl.DataFrame({"smiles": CHAINS}).write_csv(tmp_path / "t.csv")
    records, _ = read_unlabelled(tmp_path / "t.csv", limit=40)
    words, spec = from_scratch("smiles", "transformer", seed=0, width=16, depth=1, heads=2), configured(PretrainSpec, steps=4, batch_size=8, threads=1)
    one, again = (pretrain_table(records, "masked_tokens", tmp_path / "out", words, spec) for _ in range(2))
    assert len(records) == 40 and one.steps == again.steps == 4 and one.history == again.history


def test_what_was_asked_is_recorded():
    assert asked_for(FinetuneSpec(), file="t") == {"file": "t", "epochs": 60, "strategy": "full", "lr": FinetuneSpec().lr, "seed": 0}
    assert asked_for(FinetuneSpec(threads=3, accelerator="cpu", hidden=8, precision="bf16-mixed")).items() >= {"hidden": 8, "precision": "bf16-mixed"}.items()
    assert not {"threads", "accelerator"} & set(asked_for(FinetuneSpec(threads=3, accelerator="cpu")))


def test_command_line_and_python_have_the_same_defaults():
    from matfm.app import cli
    defaults = {k: p.default for k, p in inspect.signature(cli.finetune).parameters.items()}
    assert defaults["lr"] == RATE and all(defaults[k] == getattr(FinetuneSpec(), k) for k in ("strategy", "epochs", "seed"))
    assert defaults["ensemble"] == inspect.signature(finetune_table).parameters["ensemble"].default
    options = inspect.signature(cli.pretrain).parameters
    assert all(options[k].default == getattr(PretrainSpec(), k) for k in ("steps", "batch_size", "lr", "seed"))
