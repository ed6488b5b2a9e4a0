"""Every experiment runs at smoke size and saves a result with everything that a result needs."""
import json
import re
from contextlib import nullcontext

import pytest
from pages import CAN_FORK
from warm_kernel import warm_kernels

from matfm.run.runner import experiments, run

PICTURE = re.compile(r'<img[^>]+src="data:image/png')

SMOKE = {
    "e00_quickstart": dict(n_molecules=40, n_crystals=40, n_test=40, epochs=1, ensemble=2),
    "e01_pretrain_molecules": dict(limit=200, valid=40, steps=6),
    "e02_pretrain_crystals": dict(limit=60, steps=6, exclude="matfm_crystals"),
    "e03_make_molecules": dict(n_molecules=200, n_labels=2, check=2),
    "e04_make_crystals": dict(limit=2),
    "e10_data_audit": dict(limit=300, near=100),
    "e11_embedded_data": dict(sample=300),
    "e12_redundancy": dict(limit=300, trees=5, molecules=300),
    "e13_ood": dict(limit=80, criteria="chemsys+group", outer=2, epochs=1, trees=10),
    "e14_throughput": dict(n_molecules=60, n_crystals=20, n_conformers=1, n_corpus=200, repeats=2, train_steps=1),
    "e15_mixtures": dict(limit=160, seeds=2, trees=10),
    "e16_corpora": dict(limit=400, rows_per_shard=100, batches=10, train_steps=1),
    "e17_transformer_speed": dict(limit=200, width=32, depth=1, repeats=2),
    "e21_scaling": dict(sizes="16:1 24:1", data="60 120", valid=40, draws=3),
    "e22_scage": dict(n_pretrain=30, steps=2, limit=60, epochs=1, seeds=1),
    "e23_fgr": dict(datasets="esol", corpus=150, mined=150, support=15, patterns=40, steps=4, width=16, epochs=1, limit=80, seeds=2, trees=5),
    "e24_relational": dict(n_pretrain=40, steps=2, limit=60, epochs=1, seeds=1, trees=5),
    "e20_objectives": dict(limit=60, rows=80, steps=3, seeds=1),
    "e30_finetune_molecules": dict(limit=100, epochs=1),
    "e31_finetune_crystals": dict(n_train=50, n_test=50, epochs=1),
    "e32_moleculenet": dict(trees=5, draws=50),
    "e33_moleculeace": dict(limit=60, trees=5, draws=50),
    "e34_low_data": dict(limit=70, seeds=1, sizes="30", models="kernel svm"),
    "e35_versus_peers": dict(sizes="30 40"),
    "e05_pretrain_compositions": dict(limit=120, steps=6, trees=5, forest_rows=60, small=""),
    "e42_multimodal": dict(limit=40, held=16, pool=30, valid=12, labels=20, epochs=1, batch_size=20, sample=24, sample_epochs=1, trees=5),
    "e44_small_data": dict(limit=60, trees=5, draws=30, sets="matbench_steels"),
    "e47_small_crystals": dict(limit=60, trees=5, folds="0", sets="dielectric_constant:n"),
    "e51_uncertainty": dict(sets="matbench_steels", seeds=1, limit=110, train_rows=60, trees=8, members=2, epochs=1),
    "e36_bulk_prediction": dict(limit=60, speed_rows=60, rows=150, broken=3, check_rows=40),
    "e40_shuffling": dict(targets="band_gap", limit=60, steps=2, pool_limit=120, n_test=20, sizes="20", seeds=2, arms="shuffling", tuned_sizes="20", tuned_seeds=1, epochs=1, lrs="0.001"),
    "e41_infomax": dict(limit=60, steps=2, pool_limit=120, n_test=20, sizes="20", seeds=2),
    "e43_physics": dict(limit=60, steps=2, pool_limit=120, n_test=20, sizes="20", seeds=2, arms="symmetry"),
    "e50_protocols": dict(sets="esol matbench_steels", limit=40, small=40, seeds=1, trees=4, folds=2),
    "e45_ood": dict(limit=40, n_train=25, trees=5, sets="dielectric_constant:n", criteria="chemsys", contenders="stacked forest", outer=4),
    "e52_qspr_antimalarials": dict(models="mlr", simulations=10, external=30),
    "e53_malaria": dict(limit=120, rows=80, potency=0, models="avalon_forest qspr_mlr", trees=5, repeats=1, seeds=2),
    "e55_explanations": dict(seeds=1, n_train=40, n_test=2, n_crystals=16, n_solubility=40, n_explained=4, epochs=1, trees=5, randomised=1, samples=15),
    "e54_selection": dict(sets="esol freesolv", limit=40, folds=2, epochs=1, trees=5, members="kernel"),
    "e56_foundation_vs_qspr": dict(sources="e32 e44 e31"),
    "e37_train_peers": dict(datasets="freesolv ace_CHEMBL2835_Ki"),
    "e46_throughput": dict(n_graphs=20, n_train=24, n_valid=8, batch_size=8, turns=1, n_files=8, n_folder=25),
}


def test_every_experiment_has_a_smoke_case():
    assert set(SMOKE) == set(experiments())


def pictures(name):
    "How many pictures the experiment's notebook was saved with."
    cells = json.loads(experiments()[name].read_text(encoding="utf-8"))["cells"]
    return sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    with warm_kernels(tmp_path_factory.mktemp("warm")) if CAN_FORK else nullcontext(): yield


@pytest.mark.parametrize("name", sorted(SMOKE))
def test_experiment_runs_at_smoke_size(name, tmp_path, monkeypatch, warm):
    monkeypatch.setenv("MATFM_RUN_STORE", str(tmp_path))
    monkeypatch.setenv("MATFM_TRAIN_THREADS", "1")
    result = run(name, SMOKE[name], progress=False)
    assert result.status == "ok" and result.metrics and result.data and result.versions and result.hardware, result
    assert all(m.value is not None or m.tags.get("reason") for m in result.metrics)
    (report,) = tmp_path.rglob("report.html")
    drawn, wanted = len(PICTURE.findall(report.read_text())), pictures(name)
    assert drawn >= wanted > 0, f"{drawn} pictures in the report, the notebook was saved with {wanted}"
