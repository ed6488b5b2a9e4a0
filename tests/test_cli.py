"The command line: quick, readable, one line for a mistake, and the whole way from a table to predictions."
import json
import os
import subprocess
import sys

import nbformat
import polars as pl
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from matfm.app.cli import app
from matfm.run.results import ExperimentSpec, Metric, Result

shell = CliRunner()
GROUPS = [[], ["run"], ["pretrain"], ["finetune"], ["predict"], ["models"], ["card"], ["site"], ["lab"], ["runs"], ["runs", "list"], ["runs", "show"],
          ["runs", "compare"], ["bench"], ["data"], ["data", "list"], ["data", "get"], ["data", "card"], ["data", "read"]]


def matfm(*arguments, code=0):
    got = shell.invoke(app, [str(a) for a in arguments], prog_name="matfm")
    if got.exception and not isinstance(got.exception, SystemExit): raise got.exception
    assert got.exit_code == code, got.output
    return got


@pytest.fixture
def space(tmp_path, monkeypatch):
    root = tmp_path / "a space"
    (root / "nbs" / "experiments").mkdir(parents=True)
    (root / "settings.ini").write_text("[run]\nstore = runs\n")
    monkeypatch.chdir(root)
    for k in [k for k in os.environ if k.startswith("MATFM_")]: monkeypatch.delenv(k)
    return root


def toy(seed, dataset, mae): return Result(ExperimentSpec("e01_toy", {"seed": seed, "dataset": dataset}), metrics=(Metric("mae", mae, n=9, unit="eV"),))


@pytest.mark.parametrize("command", GROUPS, ids=" ".join)
def test_help_is_readable(command):
    lines = matfm(*command, "--help").output.splitlines()
    assert lines[0].startswith("Usage: matfm") and max(map(len, lines)) <= 80
    assert not [line for line in lines[1:] if line.endswith("...")], "a summary is cut off"


def test_help_answers_at_once_and_loads_nothing_heavy():
    heavy = "{'torch', 'rdkit', 'pymatgen', 'polars', 'papermill', 'numpy', 'lightning', 'nbformat', 'distributed'}"
    code = f"import sys, matfm.run.results, matfm.run.runner, matfm.run.sheets, matfm.app.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    before = os.times()
    subprocess.run([sys.executable, "-c", "from matfm.app.cli import main; main()", "--help"], capture_output=True, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0, "processor time, s"


def test_a_mistake_is_one_red_line(space):
    for arguments, message in [(["run", "e99"], "no experiments in"), (["data", "get", "esoll"], "did you mean 'esol'"), (["runs", "show", "abc"], "unknown run"),
                               (["data", "list", "--domain", "molecul"], "did you mean 'molecule'"), (["predict", "nowhere", "x.csv", "--out", "y.csv"], "nowhere")]:
        got = matfm(*arguments, code=2)
        assert got.stderr.startswith("error: ") and message in got.stderr and len(got.stderr.strip().splitlines()) == 1 and not got.stdout
    debug = subprocess.run([sys.executable, "-c", "from matfm.app.cli import main; main()", "--debug", "run", "e99"], capture_output=True, text=True)
    assert debug.returncode != 0 and "Traceback" in debug.stderr


def test_run_list_show_compare(space):
    cells = [new_code_cell("seed = 0", metadata={"tags": ["parameters"]}), new_code_cell(
        "from matfm.run.results import record\nrec = record('e01_toy', dict(seed=seed))\nrec.metric('mae', 1 / seed, n=5, unit='eV')\nrec.save()")]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Toy"), *cells]), space / "nbs/experiments/e01_toy.ipynb")
    assert "did you mean 'seed'" in matfm("run", "e01_toy", "-p", "sed=1", code=2).stderr
    assert "0.5" in matfm("run", "e01_toy", "-p", "seed=2").stdout
    again = matfm("run", "e01_toy", "-p", "seed=2")
    assert "is done (--force runs it again)" in again.stderr and "0.5" in again.stdout
    assert "ZeroDivisionError" in matfm("run", "e01_toy", code=1).stderr
    cells[1].source = cells[1].source.replace("1 / seed", "2 / seed")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Toy"), *cells]), space / "nbs/experiments/e01_toy.ipynb")
    assert "the notebook has changed since" in matfm("run", "e01_toy", "-p", "seed=2").stderr
    listed = matfm("runs", "list").stdout
    assert listed.count("e01_toy-") == 2 and "failed" in listed and "ZeroDivisionError" in listed
    shown = matfm("runs", "show", next(line for line in listed.splitlines() if " ok " in line).split()[0]).stdout
    assert "seed = 2" in shown and "energy: " in shown and "processor hours" in shown


def test_compare_reads_committed_results(space):
    for seed, dataset, mae in [(0, "esol", 0.5), (1, "esol", 0.7), (0, "lipo", 0.9), (1, "lipo", 1.1)]:
        toy(seed, dataset, mae).save(space / "data" / "results" / f"e01_toy-{dataset}-{seed}.json")
    out = matfm("runs", "compare", "e01_toy", "--store", "data/results").stdout.splitlines()
    assert out[0].split() == ["dataset", "mae", "mae_sd", "mae_n"] and out[1].split() == ["esol", "0.6", "0.1414", "2"]
    assert "lipo" in matfm("runs", "compare", "--columns", "dataset", "--metric", "mae", "--store", "data/results").stdout.splitlines()[0]


def test_a_report_compares_methods_over_data_sets(space):
    metrics = tuple(Metric("mae", value + seed / 100, n=9, tags={"dataset": d, "model": m, "seed": str(seed)})
                    for d, m, value in [("esol", "a", 0.5), ("esol", "b", 0.7), ("lipo", "a", 0.4), ("lipo", "b", 0.8), ("lipo", "c", 0.1), ("qm7", "a", 9.0), ("qm7", "b", 8.0)] for seed in (0, 1))
    Result(ExperimentSpec("e01_toy", {}), metrics=metrics).save(space / "data" / "results" / "e01_toy.json")
    compare = "runs", "compare", "e01_toy", "--store", "data/results", "--report", "out.html"
    out = matfm(*compare, "--metric", "mae").stdout
    assert "0.505 ± 0.0071 *" in out and "report: out.html" in out
    page = (space / "out.html").read_text()
    assert page.count("<img") == 2 and "left out: c: only 1 of 3 data sets" in page
    assert "give --metric" in matfm(*compare, code=2).stderr
    only = matfm(*compare, "--metric", "mae", "--where", "seed=1").stdout
    assert "0.51 *" in only and "0.505" not in only
    assert "--where takes K=V, got 'seed'" in matfm(*compare, "--metric", "mae", "--where", "seed", code=2).stderr


def test_benchmarks_are_listed_and_a_wrong_name_is_told(space):
    assert "molecules-small" in matfm("bench").stdout
    for arguments, message in [(["quick"], "give --model"), (["quik", "--model", "dummy"], "did you mean 'quick'"), (["quick", "--model", "dummy", "--set", "esol"], "unknown set 'esol'")]:
        assert message in matfm("bench", *arguments, code=2).stderr


def test_data_and_cards(space):
    assert "esol" in matfm("data", "list", "--domain", "molecule", "--task", "regression").stdout
    assert "licence" in matfm("data", "card", "esol").stdout
    assert "problems in" in matfm("card", "--check", toy(0, "esol", 1.0).save(space / "data/results/x.json").parents[1], code=2).stderr


def test_from_a_table_to_predictions(tmp_path):
    chains = [f"{a}{'C' * n}{b}" for n in range(1, 11) for a in ("", "O", "N", "F") for b in ("", "O", "Cl")]
    table = pl.DataFrame({"mol": [*chains, "C1CC", "CC"], "length (A)": [*map(str, map(len, chains)), "4", "long"]})
    table.write_csv(tmp_path / "chains.csv")
    pl.DataFrame({"name": ["a", "b", "c"], "mol": ["CCCO", "not a molecule", "NCCC"]}).write_csv(tmp_path / "new.csv")
    out = tmp_path / "a model"
    said = matfm("finetune", tmp_path / "chains.csv", "--smiles", "mol", "--target", "length (A)", "--unit", "angstrom", "--split", "random", "--model", "molecule_gnn",
                 "--epochs", "2", "--ensemble", "2", "--out", out)
    assert "ecfp_forest" in said.stdout and "coverage" in said.stdout and "rejected.csv" in said.stderr
    assert len(pl.read_csv(out / "rejected.csv")) == 2
    sheet, result = json.loads((out / "factsheet.json").read_text()), Result.load(out)
    assert {m["unit"] for m in sheet["metrics"] if m["name"] == "mae"} == {"angstrom"} and "member0/model.safetensors" in sheet["provenance"]
    assert {m.tags["model"] for m in result.metrics} == {"fine-tuned", "dummy", "ecfp_forest"}
    matfm("predict", out, tmp_path / "new.csv", "--smiles", "mol", "--out", tmp_path / "pred.csv")
    made = pl.read_csv(tmp_path / "pred.csv")
    assert made["mol"].to_list() == ["CCCO", "not a molecule", "NCCC"]
    assert made["name"].to_list() == ["a", "b", "c"] and made["length (A)_pred"].is_null().to_list() == [False, True, False] == made["in_domain"].is_null().to_list()
    assert (made["length (A)_lower"] <= made["length (A)_pred"]).to_list() == [True, None, True] and (made["length (A)_pred"] <= made["length (A)_upper"]).to_list() == [True, None, True]
    assert len(pl.read_csv(tmp_path / "pred.rejected.csv")) == 1
    assert "unknown column 'mool'" in matfm("predict", out, tmp_path / "new.csv", "--smiles", "mool", "--out", tmp_path / "x.csv", code=2).stderr


def test_molecules_are_stacked_unless_a_network_is_asked_for(tmp_path):
    chains = [f"{a}{'C' * n}{b}" for n in range(1, 11) for a in ("", "O", "N", "F") for b in ("", "O", "Cl")]
    pl.DataFrame({"smiles": chains, "length": list(map(len, chains)), "polar": [int(s[0] in "ON") for s in chains]}).write_csv(tmp_path / "chains.csv")
    given = ("finetune", tmp_path / "chains.csv", "--target", "length", "--target", "polar", "--split", "random", "--out", tmp_path / "m")
    said = matfm(*given, "--budget", "10s").stdout
    assert "errors of length by group (rows left out of the fit in turn)\n  " in said and "errors of polar by group" in said
    assert "members of length" in said and "members of polar" in said and "kernel" in said and "ecfp_forest" in said and (tmp_path / "m" / "stacked.json").is_file()
    assert f"{len(chains)} of {len(chains)} rows predicted" in matfm("predict", tmp_path / "m", tmp_path / "chains.csv", "--jobs", "1", "--out", tmp_path / "p.csv").stdout
    made = pl.read_csv(tmp_path / "p.csv")
    assert made.columns[3:] == ["length_pred", "length_lower", "length_upper", "polar_pred", "polar_lower", "polar_upper", "in_domain"] and len(made) == len(chains)
    assert (made["length_pred"] - made["length"]).abs().mean() < 1 and made["in_domain"].mean() > 0.9 and not (tmp_path / "p.rejected.csv").exists()
    assert "--epochs to networks" in matfm(*given, "--budget", "10s", "--epochs", "2", code=2).stderr
    assert "say for example 90s" in matfm(*given, "--budget", "soon", code=2).stderr
    assert "rename it" in matfm("predict", tmp_path / "m", tmp_path / "p.csv", "--out", tmp_path / "q.csv", code=2).stderr
