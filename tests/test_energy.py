"""Energy: counters where there are some, processor time where there are none, and the method always said."""
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from matfm.core import BadInput, MissingExtra
from matfm.run import results
from matfm.run.results import Energy, ExperimentSpec, Meter, Rapl, Recorder, Result, energy_of, processor_seconds
from matfm.settings import load_settings


@pytest.fixture(autouse=True)
def no_counters(monkeypatch, tmp_path):
    "A machine that counts nothing."
    monkeypatch.setattr(results, "POWERCAP", tmp_path / "powercap")
    monkeypatch.setattr(Rapl.find.__func__, "__defaults__", (tmp_path / "powercap",))
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path / "powercap"


def zone(root, name, said, value, most=1_000_000_000):
    (root / name).mkdir(parents=True, exist_ok=True)
    for file, text in (("name", said), ("max_energy_range_uj", most), ("energy_uj", value)): (root / name / f".{file}").write_text(f"{text}\n"), (root / name / f".{file}").replace(root / name / file)


def burn(seconds):
    begun = time.process_time()
    while time.process_time() - begun < seconds: pass


def test_processor_time_and_not_wall_time_is_the_estimate():
    with energy_of() as m:
        burn(0.3)
        time.sleep(0.5)
    e = m.energy
    assert 0.25 < e.processor_seconds < 0.6 and e.seconds > 0.75 and e.method == "estimated from processor seconds × 10 W"
    assert e.kwh == pytest.approx(e.processor_seconds * 10 / 3.6e6) and e.kg_co2 == pytest.approx(0.4 * e.kwh)


def test_children_count_while_they_live_and_when_they_are_gone():
    work = "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.5: pass\nprint('x', flush=True)\ntime.sleep(20)"
    before = processor_seconds()
    with subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alive = processor_seconds() - before
        child.kill()
    gone = processor_seconds() - before
    assert alive > 0.45 and gone >= alive - 0.05


def test_counters_come_first_and_may_overflow(no_counters, monkeypatch):
    zone(no_counters, "intel-rapl:0", "package-0", 999_000_000)
    zone(no_counters, "intel-rapl:0:0", "core", 0)
    zone(no_counters, "intel-rapl:1", "psys", 0)
    with energy_of() as m:
        zone(no_counters, "intel-rapl:0", "package-0", 2_600_000)
        zone(no_counters, "intel-rapl:0:0", "core", 5_000_000)
    assert m.energy.kwh == pytest.approx(3.6 / 3.6e6) and m.energy.method == "RAPL counters of the whole machine's processors" and m.tracker is None
    fast = Rapl.find().watch(0.01)
    for value in (900_000_000, 100_000_000, 900_000_000):  # it overflows between two readings of ours
        zone(no_counters, "intel-rapl:0", "package-0", value)
        time.sleep(0.15)
    fast.over.set()
    assert fast.read() == pytest.approx((900_000_000 - 2_600_000 + 200_000_000 + 800_000_000) / 1e6)


def test_unreadable_counters_are_passed_over(no_counters, monkeypatch):
    zone(no_counters, "intel-rapl:0", "package-0", 1)
    (no_counters / "intel-rapl:0" / "energy_uj").unlink()
    (no_counters / "intel-rapl:0" / "energy_uj").mkdir()  # reading it is an OSError, as for a file of the administrator
    assert Rapl.find() is None and "estimated" in Meter().read().method
    monkeypatch.setenv("MATFM_ENERGY_METER", "rapl")
    with pytest.raises(BadInput, match="no such counter"): Meter()


def test_cards_are_added(monkeypatch):
    used = iter([5000, 41_000])
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1, nvmlDeviceGetHandleByIndex=lambda k: k, nvmlDeviceGetUUID=lambda c: b"GPU-ab",
                                                               nvmlDeviceGetTotalEnergyConsumption=lambda c: next(used)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with energy_of() as m: pass
    assert m.energy.kwh - m.energy.processor_seconds * 10 / 3.6e6 == pytest.approx(36 / 3.6e6) and m.energy.method.endswith("NVIDIA's counter of 1 GPU")


def test_codecarbon_is_used_where_it_is_installed(monkeypatch):
    class Tracker:
        def __init__(self, **options): self.options = options
        def start(self): self.final_emissions_data = None
        def stop(self): self.final_emissions_data = SimpleNamespace(energy_consumed=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATFM_ENERGY_METER", "codecarbon")
        with pytest.raises(MissingExtra, match=r"matfm\[energy\]"): Meter()
    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=Tracker))
    monkeypatch.setattr(results.metadata, "version", lambda name: "3.3.2")
    monkeypatch.setenv("MATFM_ENERGY_KG_PER_KWH", "0.1")
    m = Meter()
    assert m.read().kwh == 0.25 and m.read().kg_co2 == pytest.approx(0.025) and m.energy.method == "codecarbon 3.3.2, whole machine"
    monkeypatch.setenv("MATFM_ENERGY_METER", "estimate")
    assert Meter().tracker is None


def test_a_result_keeps_it_and_old_results_load(tmp_path):
    rec = Recorder(ExperimentSpec("toy"), tmp_path)
    burn(0.05)
    made = rec.save()
    assert isinstance(made.energy, Energy) and made.energy.processor_seconds > 0.04 and Result.load(tmp_path) == made and "processor hours" in made._repr_html_()
    old = {k: v for k, v in made.to_dict().items() if k != "energy"}
    assert Result.from_dict(old).energy is None


def test_settings_are_checked():
    assert load_settings(env={"MATFM_ENERGY_WATTS_PER_CORE": "7.5"}).energy_watts_per_core == 7.5
    for key, value, message in (("KG_PER_KWH", "-1", "kg_per_kwh must be"), ("KG_PER_KWH", "much", "must be a number"), ("METER", "rappl", "did you mean 'rapl'")):
        with pytest.raises(BadInput, match=message): load_settings(env={f"MATFM_ENERGY_{key}": value})


def test_a_light_import_stays_light():
    out = subprocess.run([sys.executable, "-c", "import sys, matfm.run.results; print([m for m in ('psutil', 'pynvml', 'codecarbon', 'pandas', 'torch') if m in sys.modules])"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
