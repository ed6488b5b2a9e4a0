"Tables: bad files, crystals and classes, one row out for each row in, tables of any size, and the command line's defaults."
import gzip
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from clumsy import clumsy, mute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matfm.adapt.finetune import FinetuneSpec
from matfm.adapt.tables import RATE, asked_for, configured, finetune_table, load_predictor, predict_table, pretrain_table, read_labelled, read_unlabelled
from matfm.adapt.stacked import StackedSpec, fit_stacked
from matfm.app.bulk import Piece, added_columns, answered, fit_table, load_domain, open_answers, predict_file, save_domain
from matfm.core import BadInput, MatfmError
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
                                             (b"smiles,y\nC,large\nCC,1\nCCC,\n", "2 of 3 rows"), (b"rxn,y\nCCO>>CC=O,1\n", "this table has reactions")])
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


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    records, _ = molecules(CHAINS, {"length": [float(len(s)) for s in CHAINS], "polar": [float(s[0] in "ON") for s in CHAINS]}, name="chains")
    return fit_stacked(records, StackedSpec(members=("kernel",))).save_pretrained(tmp_path_factory.mktemp("stack"))


@pytest.mark.parametrize("bad,reason", [("BOOM", "died"), ("HANG", "no answer within"), ("ODD", "RuntimeError: odd")])
def test_a_structure_that_ends_the_worker_costs_its_row(bad, reason):
    rows = [f"S{i}" for i in range(10)] + [bad] + ["7", "LAST"]
    cells, why = [[] for _ in rows], {}
    for piece, (got, reasons) in answered([Piece(0, 0, rows), Piece(1, 0, ["NEXT"])], clumsy, "", jobs=2, patience=2.0):
        if piece.chunk: assert got == [["next"]]
        else:
            cells[piece.first:piece.first + len(got)] = got
            why |= {piece.first + i: r for i, r in reasons.items()}
    assert [c[0] if c else None for c in cells] == [None if s == bad else s.lower() for s in rows]
    assert set(why) == {10, 11} and reason in why[10] and why[11] == "digit"


def test_a_model_that_cannot_be_opened_is_an_error_and_not_a_loop():
    with pytest.raises(MatfmError, match="before it had opened the model"): list(answered([Piece(0, 0, ["C"])], mute, "", jobs=1))


def test_every_row_and_column_comes_back_in_order(stack, tmp_path):
    odd = ["C1CC", "", "CCO", "not one", " CC "]
    lines = [f'"{i}, or so";{s};"say ""{i}"""' for i, s in enumerate(CHAINS + odd)] + ["x;CCO;y;too many"]
    with gzip.open(tmp_path / "t.csv.gz", "wt") as f: f.write("\n".join(["name;smiles;note", *lines]) + "\n")
    done = predict_file(stack, tmp_path / "t.csv.gz", tmp_path / "p.csv", jobs=2, rows=10)
    made, aside = pl.read_csv(tmp_path / "p.csv"), pl.read_csv(tmp_path / "p.rejected.csv")
    assert made.columns == ["name", "smiles", "note", *added_columns(["length", "polar"])] and (done.rows, done.rejected) == (len(lines), 4)
    assert made["name"].to_list() == [*(f"{i}, or so" for i in range(len(lines) - 1)), "x"] and made["note"][3] == 'say "3"'
    empty = [i for i in range(len(lines)) if made["length_pred"][i] is None]
    n = len(CHAINS)
    assert empty == aside["row"].to_list() == [n, n + 1, n + 3, n + 5] and "4 cells in a row" in aside["reason"][-1] and made["in_domain"].is_null().to_list() == made["length_pred"].is_null().to_list()
    assert made["polar_lower"].is_null().all() and made["polar_pred"].drop_nulls().is_between(0, 1).all() and (made["length_lower"] < made["length_pred"]).drop_nulls().all()
    alone = fit_stacked(*[molecules(CHAINS, {"length": [float(len(s)) for s in CHAINS], "polar": [float(s[0] in "ON") for s in CHAINS]}, name="chains")[0]], StackedSpec(members=("kernel",))).predict(molecules(CHAINS)[0])[0]
    assert np.allclose(made["length_pred"][:n].to_numpy(), alone["length"].to_numpy(), rtol=1e-5)


@pytest.mark.parametrize("ending", ["csv", "tsv", "smi", "parquet", "jsonl"])
def test_kinds_of_files_agree(stack, tmp_path, ending):
    frame, file = pl.DataFrame({"smiles": CHAINS[:12], "name": [f"m{i}" for i in range(12)]}), tmp_path / f"t.{ending}"
    if ending == "parquet": frame.write_parquet(file)
    elif ending == "jsonl": frame.write_ndjson(file)
    else: frame.write_csv(file, separator={"csv": ",", "tsv": "\t", "smi": " "}[ending], include_header=ending != "smi")
    predict_file(stack, file, tmp_path / "p.csv", jobs=1)
    answer = open_answers(str(stack))(CHAINS[:12])[0]
    assert [[str(c) if c is not None else "" for c in r] for r in pl.read_csv(tmp_path / "p.csv", infer_schema=False).select(added_columns(["length", "polar"])).rows()] == answer


def test_kill_9_and_the_same_command_again(stack, tmp_path):
    table = tmp_path / "t.csv"
    pl.DataFrame({"smiles": [CHAINS[i % len(CHAINS)] + "C" * (i % 7) for i in range(400)], "i": range(400)}).write_csv(table)
    predict_file(stack, table, tmp_path / "whole.csv", jobs=1, rows=20)
    code = f"from matfm.app.bulk import predict_file\nfrom clumsy import slow\nprint('resumed', predict_file({str(stack)!r}, {str(table)!r}, {str(tmp_path / 'p.csv')!r}, jobs=2, rows=20, opener=slow).resumed)"
    command, where = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    parts, seen = tmp_path / "p.csv.parts", 0
    for more in (2, 3):  # killed twice
        run = subprocess.Popen(command, env=where, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while time.monotonic() < until and run.poll() is None and len(list(parts.glob("???????.csv"))) < seen + more: time.sleep(0.02)
        run.kill()
        run.wait()
        assert run.returncode == -signal.SIGKILL and not (tmp_path / "p.csv").exists()
        seen = len(list(parts.glob("???????.csv")))
        assert 2 <= seen < 20
    stamps = {p.name: p.stat().st_mtime_ns for p in parts.glob("???????.csv")}
    time.sleep(1.5)  # orphans notice that nobody listens
    assert stamps == {p.name: p.stat().st_mtime_ns for p in parts.glob("???????.csv")}
    last = subprocess.run(command, env=where, capture_output=True, text=True, check=True)
    assert int(re.search(r"resumed (\d+)", last.stdout)[1]) == 20 * seen
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes() and not parts.exists()


def test_another_table_does_not_continue_the_first(stack, tmp_path):
    for text in ("CCO", "CCCO"):
        (tmp_path / "t.csv").write_text(f"smiles\n{text}\n")
        (tmp_path / "p.csv.parts").mkdir()
        (tmp_path / "p.csv.parts" / "plan.json").write_text("{}")
        (tmp_path / "p.csv.parts" / "0000000.csv").write_text("of another plan\n")
        assert predict_file(stack, tmp_path / "t.csv", tmp_path / "p.csv", jobs=1).resumed == 0
        assert pl.read_csv(tmp_path / "p.csv")["smiles"].to_list() == [text]


def test_networks_answer_in_the_same_columns(folder, tmp_path):
    records, _ = molecules(CHAINS, name="chains")
    save_domain(records, folder)
    assert load_domain(folder).holds(["C1CC", CHAINS[3], "[Na+].[Cl-]"]) == [None, True, False]
    (tmp_path / "t.csv").write_text("smiles,z\nOCC,1\nC1CC,2\nCC,3\n")
    done = predict_file(folder, tmp_path / "t.csv", tmp_path / "p.csv", jobs=1)
    made = pl.read_csv(tmp_path / "p.csv")
    assert made.columns == ["smiles", "z", *added_columns(["length", "polar"])] and made["z"].to_list() == [1, 2, 3] and done.rejected == 1
    assert made["length_pred"].is_null().to_list() == [False, True, False] and made["in_domain"].to_list() == [True, None, True]


def test_a_table_is_fitted_in_the_time_and_tested(tmp_path):
    records, _ = molecules(CHAINS, {"length": [float(len(s)) for s in CHAINS], "polar": [float(s[0] in "ON") for s in CHAINS]}, units={"length": "angstrom"}, name="chains")
    begun = time.perf_counter()
    result = fit_table(records, tmp_path / "m", budget=1.0, split="random")
    assert time.perf_counter() - begun < 60 and result.spec.parameters["budget"] == 1.0 and {"members of length", "members of polar", "errors of length by group"} < set(result.tables)
    assert {m.tags["model"] for m in result.metrics} == {"stacked", "dummy", "ecfp_forest"} and {m.n for m in result.metrics} == {len(result.metrics) and round(len(CHAINS) * 0.1)}
    assert FactSheet.load(tmp_path / "m").name == "chains_length_polar"
    with pytest.raises(BadInput, match="holds a stacked predictor"): load_predictor(tmp_path / "m")


def test_a_light_model_is_fitted_by_its_name_and_predicts_without_torch(tmp_path):
    import subprocess
    import sys

    from typer.testing import CliRunner

    from matfm.app.cli import app
    (tmp_path / "t.csv").write_text("smiles,length\n" + "".join(f"{s},{len(s)}\n" for s in CHAINS))
    ask = ["finetune", str(tmp_path / "t.csv"), "--target", "length", "--out", str(tmp_path / "m"), "--split", "random", "--model", "light"]
    done = CliRunner().invoke(app, ask)
    assert done.exit_code == 0 and "circular" in done.output, done.output
    assert "one kernel on circular fingerprints" in FactSheet.load(tmp_path / "m").summary
    refused = CliRunner().invoke(app, [*ask, "--epochs", "3"])
    assert refused.exit_code == 2 and "--epochs belongs to networks" in refused.output
    code = f"import sys; from matfm.app.bulk import open_answers; cells, why = open_answers({str(tmp_path / 'm')!r})(['OCC', 'C1CC']); assert cells[0][0] and not cells[1][0] and list(why) == [1]; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_shared_descriptors_are_those_of_rdkit():
    from rdkit import rdBase

    from matfm.data.sources import load
    from matfm.represent.descriptors import _number, _rdkit_descriptors, descriptor_values
    from matfm.represent.molecule import read_molecule
    functions = {n: f for n, f in _rdkit_descriptors().items() if not n.startswith(("BCUT2D", "qed", "SPS"))}
    odd = ["[H][H]", "[2H]O[2H]", "[H+]", "[Cu+2].[O-]S(=O)(=O)[O-]", "C1CC1C1CCC1", "C12C3C4C1C5C2C3C45", "[CH2]C", "*c1ccc(*)cc1", "[NH3]->[Pt](Cl)(Cl)<-[NH3]", "C" * 70, "O=[N+]([O-])c1ccccc1", "B", "[Xe]", "C~C"]
    with rdBase.BlockLogs(), np.errstate(all="ignore"):
        for s in [*load("esol").structures()[::25], *odd]:
            shared = descriptor_values(read_molecule(s), tuple(functions))
            wanted = read_molecule(s)
            for name, f in functions.items(): np.testing.assert_allclose(shared[name], _number(f, wanted), rtol=1e-6, atol=1e-8, err_msg=f"{name} of {s}")
