"FactSheets: complete or refused, and true to the files beside them."
import json
from pathlib import Path

import pytest

from matfm.core import BadInput, UnknownName
from matfm.run.results import ExperimentSpec, Metric, Result, Store
from matfm.run.sheets import FIELDS, FactSheet, check_sheets, problems, schema

REPOSITORY = Path(__file__).resolve().parents[1]
COMPLETE = dict(
    kind="model", name="toy", summary="A toy.", data="toy_data: 10 rows", space="ten toys", splits="random 8/1/1, seed 0", metrics={"mae": 0.5}, limits=["toys only"],
    intended_use="tests", risks="none known", licence="Apache-2.0", citation="none", recipe="tests/test_sheets.py", energy="not measurable", provenance={"code": "x"})


def sheet(**changes): return FactSheet(**{**COMPLETE, **changes})


def result(**changes):
    base = dict(spec=ExperimentSpec("e01_toy", {"seed": 1, "widths": (1, 2)}), metrics=(Metric("mae", 0.5, 0.4, 0.6, n=10, unit="eV", tags={"dataset": "toy"}),),
                tables={"curve": [{"epoch": 1, "loss": None}]}, systems=("P4",), claims=("12 % (somebody, 2020)",), baselines="a constant", seconds=1.5,
                started="2025-01-01T00:00:00+00:00", versions={"python": "3.11"}, hardware={"cpu": "x", "cores": 2}, data={"toy": "0" * 12}, code="git 0")
    return Result(**{**base, **changes})


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "created"])
def test_a_missing_field_is_refused(field):
    sheet()
    with pytest.raises(BadInput, match="is not complete"): FactSheet(**{k: v for k, v in COMPLETE.items() if k != field})
    with pytest.raises(BadInput, match="is not complete"): sheet(**{field: {} if field in ("metrics", "provenance") else ""})


def test_the_schema_is_the_law_for_files_too(tmp_path):
    saved = sheet().save(tmp_path)
    assert FactSheet.load(tmp_path) == saved and problems(saved.to_dict()) == []
    assert schema()["required"] == list(FIELDS)
    file = tmp_path / "factsheet.json"
    for change, message in [({"limits": []}, "limits is missing"), ({"kind": "toy"}, "not one of"), ({"stars": 5}, "stars"), ({"metrics": [{"name": "mae"}]}, "value")]:
        file.write_text(json.dumps({**saved.to_dict(), **change}))
        with pytest.raises(BadInput, match=message): FactSheet.load(tmp_path)
    file.write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"): FactSheet.load(tmp_path)


def test_text_in_a_sheet_is_escaped():
    html = sheet(summary="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_check_sheets_sees_what_is_wrong(tmp_path):
    for name in ("good", "edited", "bare"): (tmp_path / name).mkdir()
    for name in ("good", "edited", "bare"): (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    sheet().save(tmp_path / "good")
    sheet().save(tmp_path / "edited")
    (tmp_path / "edited" / "model.safetensors").write_bytes(b"others")
    result().save(tmp_path / "results" / "e01_toy.json")
    result(metrics=(Metric("mae", 0.5),), hardware={}).save(tmp_path / "results" / "e02_toy.json")
    assert check_sheets(tmp_path) == ["bare/model.safetensors: no factsheet.json in its folder or above", "edited/model.safetensors: its sha256 is not the one in factsheet.json",
                                      "e02_toy.json: hardware is missing", "e02_toy.json: metric mae has no n"]


def test_what_is_shipped_is_complete(): assert check_sheets(REPOSITORY / "data") == []


# --- results ----------------------------------------------------------------------------------------------------------

def test_results_survive_json(tmp_path):
    r = result()
    path = r.save(tmp_path / "a folder" / "e01_toy-small.json")
    assert Result.load(path) == r and Result.from_json(r.to_json()) == r
    assert json.loads(path.read_text())["metrics"][0]["tags"] == {"dataset": "toy"}
    assert Store(path.parent).load("e01_toy") == r and Store(path.parent).find(r.spec) == r
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BadInput, match="not valid JSON"): Result.load(path)


def test_unknown_fields_and_states_are_refused(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'ok'|allowed"): result(status="okay")
    (tmp_path / "x.json").write_text(json.dumps({**result().to_dict(), "metrik": 1}))
    with pytest.raises(BadInput, match="did you mean 'metrics'"): Result.load(tmp_path / "x.json")
