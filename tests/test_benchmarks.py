"Benchmarks: frozen and pinned, any model, failures as rows, results that the site can show."
import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from matfm.core import BadInput, ChecksumMismatch
from matfm.evaluate import benchmarks as bm
from matfm.evaluate.benchmarks import BENCHMARKS, Benchmark, Entry, bench, benchmark, leaderboard, model_for, pinned, boards
from matfm.evaluate.protocols import protocol
from matfm.run.results import Result
from matfm.run.sheets import FactSheet, problems, result_problems

TINY = Benchmark("tiny", (Entry("matfm_molecules", "gap", "mae", protocol("random", folds=2), rows=40), Entry("matfm_molecules", "dipole", "rmse", protocol("random", folds=2), rows=40)))


@pytest.fixture(scope="module")
def report(): return bench(TINY, Ridge(10.0), against=["dummy"])


def test_every_part_moves_the_hash():
    e = TINY.entries[0]
    for change in (dict(metric="rmse"), dict(rows=41), dict(protocol=protocol("random", folds=3)), dict(target="dipole"), dict(pin="x")):
        assert TINY.replace(entries=(e.replace(**change),)).digest != TINY.replace(entries=(e,)).digest
    assert Benchmark.from_json(TINY.to_json()) == TINY and len({b.digest for b in BENCHMARKS.values()}) == len(BENCHMARKS)
    assert all(e.pin for b in BENCHMARKS.values() for e in b.entries)


def test_a_pin_is_checked():
    good = pinned(TINY.entries[0])
    assert len(good.open()[0]) == 40
    with pytest.raises(ChecksumMismatch, match="rows or splits"): good.replace(rows=39).open()
    lost = bench(Benchmark("moved", (good.replace(rows=39), TINY.entries[1])), Ridge(), against=[])
    assert list(lost.failed) == ["matfm_molecules/gap"] and "ChecksumMismatch" in lost.failed["matfm_molecules/gap"] and len(lost.rows) == 1
    with pytest.warns(UserWarning, match="not those of the benchmark"): bench(Benchmark("moved", (good.replace(rows=39),)), Ridge(), against=[], strict=False)


def test_report_is_what_the_predictions_say(report):
    first = report.rows[0]
    p = report.runs["matfm_molecules/gap"].predictions.filter(pl.col("model") == "Ridge")
    assert first["value"] == pytest.approx((p["y"] - p["prediction"]).abs().mean()) and first["low"] <= first["value"] <= first["high"] and first["n"] == 40
    assert {r["model"] for r in report.rows} == {"Ridge", "dummy"} and len(report.comparison()) == 2


def test_saved_report_is_complete(report, tmp_path):
    report.save(tmp_path)
    assert not result_problems(tmp_path / "result.json") and not problems(FactSheet.load(tmp_path).to_dict())
    r = Result.load(tmp_path)
    assert r.spec.parameters["hash"] == TINY.digest and {m.tags["benchmark"] for m in r.metrics} == {"tiny"}
    page = leaderboard([r])
    assert "## tiny" in page and "(current)" not in page and page.count("| Ridge ") == 1 and "Ridge" in next(iter(boards([r]).values()))
    assert leaderboard([r.replace(status="failed")]) == ""


def test_finished_folds_are_kept(tmp_path):
    bench(TINY, Ridge(), against=[], folder=tmp_path)
    files = sorted(tmp_path.rglob("*.npz"))
    before = [f.stat().st_mtime_ns for f in files]
    bench(TINY, Ridge(), against=[], folder=tmp_path)
    assert len(files) == 4 and before == [f.stat().st_mtime_ns for f in files]
    bench(TINY, Ridge(2.0), against=[], folder=tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 8


def test_models_by_kind_and_name():
    e = TINY.entries[0]
    assert isinstance(model_for({"regression": Ridge(), "binary": LogisticRegression()}, e), Ridge) and model_for("ecfp_svm", e) == "ecfp_svm"
    assert isinstance(model_for("light", e), bm.Shipped)
    with pytest.raises(BadInput): model_for("no such model", e)
    with pytest.raises(BadInput): benchmark("no-such-benchmark")
    with pytest.raises(BadInput): Benchmark("twice", (e, e))


def test_models_on_records_and_bad_ones():
    class Mine:
        def fit(self, records, target): self.m = float(records.y(target).mean()); return self
        def predict(self, records): return np.full(len(records), self.m)

    class Short(Mine):
        def predict(self, records): return np.zeros(1)

    got = bench(TINY, Mine(), against=["dummy"], descriptor="records")
    values = {(r["set"], r["model"]): r["value"] for r in got.rows}
    assert all(values[s, "Mine"] == pytest.approx(values[s, "dummy"]) for s in ("matfm_molecules/gap", "matfm_molecules/dipole"))
    with pytest.raises(BadInput, match="every set.*shape"): bench(TINY, Short(), against=[], descriptor="records")
    with pytest.raises(BadInput, match=r"no fit\(\)"): bench(TINY, type("Nothing", (), {"predict": lambda s, X: X})(), against=[])
