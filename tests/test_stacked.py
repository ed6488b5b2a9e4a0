"""The stacked predictor: what it promises about batches, seeds, missing values, budgets, bad input and folders; and the support vector baseline."""
import json
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from matfm.adapt import features
from matfm.core import BadInput, MissingExtra
from matfm.data.records import Crystal, Records, compositions, crystals, molecules
from matfm.data.sources import load
from matfm.evaluate.baselines import Dummy, EcfpForest, EcfpSvm, Platt, dealt_folds, svm_settings, tanimoto
from matfm.evaluate.metrics import auroc, rmse
from matfm.evaluate.uncertainty import coverage

stacked = pytest.importorskip("matfm.adapt.stacked")
Stacked, StackedSpec, fit_stacked = stacked.Stacked, stacked.StackedSpec, stacked.fit_stacked

CORES = ["C1CCCCC1{}", "c1ccccc1{}", "c1ccncc1{}", "CC(C)C{}", "C1CCOC1{}", "CCCC{}"]
ENDS = ["", "C", "CC", "O", "N", "F", "Cl", "C(=O)O", "C#N", "OC", "C(=O)C", "NC", "CO", "CN", "CCO", "S", "Br", "C(F)(F)F", "OCC", "CC(=O)O"]
SMILES = [c.format(e) for c in CORES for e in ENDS]


def logp(smiles: str) -> float:
    from rdkit.Chem import Crippen, MolFromSmiles
    return Crippen.MolLogP(MolFromSmiles(smiles))


@pytest.fixture(scope="module")
def table() -> Records:
    "Molecules with a number, a class and a column with gaps; the order is random."
    rng = np.random.default_rng(0)
    smiles = [SMILES[i] for i in rng.permutation(len(SMILES))]
    y = np.array([logp(s) for s in smiles])
    noisy = y + 0.1 * rng.normal(size=len(y))
    gaps = np.where(rng.random(len(y)) < 0.3, np.nan, 3 * y + 1)
    return molecules(smiles, {"logp": noisy, "greasy": (y > np.median(y)).astype(float), "sparse": gaps}, name="made")[0]


@pytest.fixture(scope="module")
def model(table):
    return fit_stacked(table.take(np.arange(80)), StackedSpec(folds=2))


def test_it_learns_and_says_who_did_the_work(model, table):
    held = table.take(np.arange(80, len(table)))
    p, rejected = model.predict(held)
    assert p.columns == ["id", "logp", "logp_std", "logp_lower", "logp_upper", "greasy", "sparse", "sparse_std", "sparse_lower", "sparse_upper", "similarity", "in_domain"]
    y = held.y("logp")[:, 0]
    assert rmse(y, p["logp"].to_numpy()) < 0.5 * y.std() and not len(rejected)
    assert auroc(held.y("greasy")[:, 0], p["greasy"].to_numpy()) > 0.9 and p["greasy"].is_between(0, 1).all()
    for t in model.targets:
        rows = t.about["members"]
        assert [r["member"] for r in rows] == ["kernel", "boosting"] and np.isclose(t.weights.sum(), 1) and t.weights.min() >= 0
        assert all(r["error of all"] <= r["error without it"] * 1.05 for r in rows)
    assert "logp (regression, 80 rows): kernel" in repr(model) and "boosting" in model._repr_html_()
    assert {m.name for m in model.evaluate(held)} >= {"rmse", "auroc"}


def test_missing_values_are_left_out(model, table):
    assert model.targets[2].about["rows"] == np.isfinite(table.take(np.arange(80)).y("sparse")).sum() < 80
    alone = table.take(np.arange(80))
    alone = replace(alone, targets={"sparse": ""})
    alone = alone.take(np.flatnonzero(np.isfinite(alone.y("sparse")[:, 0])))
    again = fit_stacked(alone, StackedSpec(members=("kernel",), folds=3))
    both = fit_stacked(replace(table.take(np.arange(80)), targets={"logp": "", "sparse": ""}), StackedSpec(members=("kernel",), folds=3))
    probe = table.take(np.arange(80, 100))
    np.testing.assert_allclose(both.predict(probe)[0]["sparse"], again.predict(probe)[0]["sparse"], rtol=1e-9)


def test_intervals_hold_their_share_and_wide_ones_are_the_doubtful(table):
    rng = np.random.default_rng(3)
    hits, n = 0, 0
    for seed in range(3):
        order = rng.permutation(len(table))
        one = replace(table, targets={"logp": ""})
        p = fit_stacked(one.take(order[:80]), StackedSpec(members=("kernel",), seed=seed)).predict(one.take(order[80:]))[0]
        hits += coverage(one.take(order[80:]).y("logp")[:, 0], p["logp_lower"], p["logp_upper"]) * 40
        n += 40
        assert (p["logp_lower"] < p["logp"]).all() and p["logp_std"].min() > 0
    assert 0.78 < hits / n <= 1


def test_batches_do_not_matter_and_streams_agree(model, table):
    whole = model.predict(table)[0]
    small = Stacked(**{**vars(model), "batch": 7}).predict(table)[0]
    # the encoder calculates in single precision, and its last digits depend on the shape of the batch
    for name in whole.columns[1:-1]: np.testing.assert_allclose(whole[name], small[name], rtol=1e-4, atol=1e-4)
    made = pl.concat(Stacked(**{**vars(model), "batch": 11}).stream(iter(table.structures())))
    np.testing.assert_allclose(made["logp"], whole["logp"], rtol=1e-4)
    assert made["id"].to_list() == [str(i) for i in range(len(table))]
    assert list(model.stream([])) == [] and len(model.predict(table.take(np.arange(0)))[0]) == 0


def test_rows_that_cannot_be_read_keep_their_place(model, table):
    frame = pl.DataFrame({"id": ["a", "b", "c"], "smiles": ["CCO", "C1CC", "c1ccccc1"]})
    p, rejected = Stacked(**{**vars(model), "batch": 1}).predict(Records(frame, "molecule", {}, canonical=False))
    assert p["id"].to_list() == ["a", "b", "c"] and np.isnan(p["logp"][1]) and p["in_domain"][1] is None and np.isfinite(p["logp"][2])
    assert rejected.frame["row"].to_list() == [1] and rejected.frame["id"].to_list() == ["b"]


def test_far_molecules_are_out_of_the_domain(model, table):
    assert model.predict(table.take(np.arange(80)))[0]["in_domain"].mean() >= 0.95
    far, _ = molecules(["[Na+].[I-]", "F[P-](F)(F)(F)(F)F", "O=S(=O)(O)O"])
    assert not any(model.predict(far)[0]["in_domain"])


def test_same_seed_same_model_and_the_order_of_calls_does_not_matter(table):
    some = replace(table.take(np.arange(40)), targets={"logp": ""})
    spec = StackedSpec(members=("boosting",), folds=2, seed=4)
    np.random.seed(1)
    a = fit_stacked(some, spec).predict(table)[0]
    np.random.seed(2)
    assert a.equals(fit_stacked(some, spec).predict(table)[0])
    assert not a.equals(fit_stacked(some, spec.replace(seed=5)).predict(table)[0])


def test_folder_gives_the_same_bits(model, table, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "model.safetensors", "stacked.json"]
    back = Stacked.load(tmp_path)
    assert back.predict(table)[0].equals(model.predict(table)[0], null_equal=True) and back.spec == model.spec
    assert [t.about for t in back.targets] == [t.about for t in model.targets]


def test_the_light_model_predicts_alone_what_it_was_asked_for(table, tmp_path):
    spec = stacked.LIGHT.replace(folds=2)
    light = fit_stacked(table.take(np.arange(80)), spec)
    assert [list(t.members) for t in light.targets] == [["circular"]] * 3 and light.reader.descriptors is None and light.reader.encoder is None and light.uses == {"prints"}
    held = table.take(np.arange(80, len(table)))
    p = light.predict(held)[0]
    y = held.y("logp")[:, 0]
    assert rmse(y, p["logp"].to_numpy()) < 0.8 * y.std() and coverage(y, p["logp_lower"], p["logp_upper"]) > 0.7
    light.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", "stacked.json"] and Stacked.load(tmp_path).predict(held)[0].equals(p)
    assert len(light.predict(table.take(np.arange(0)))[0]) == 0 and list(light.task.names) == ["logp", "greasy", "sparse"]


def test_features_that_nothing_depends_on_are_not_calculated(model, table):
    "The answers are those of all features and all members."
    t = model.targets[0]
    kernel = t.members["kernel"]
    plain = replace(t, members={"kernel": replace(kernel, spec=kernel.spec.replace(share=1.0, learnt=0.0)), "boosting": t.members["boosting"]}, weights=np.array([1.0, 0.0]), spread=t.spread.replace(apart=0.0))
    lean = replace(model, targets=[plain])
    assert lean.uses == {"prints"} and list(plain.active) == ["kernel"] and model.uses >= {"descriptors"}
    F, kept, _ = model.reader(table)
    similar = features.print_similarity(F, model.train)
    scores = np.column_stack([m.scores(F, similar, model.train) for m in plain.members.values()])
    wanted = plain.predict(scores, stacked.nearest(F, model.train))
    made = lean.predict(table)[0]
    for name, values in wanted.items(): np.testing.assert_allclose(made[name], values, rtol=1e-9)
    assert replace(plain, spread=t.spread.replace(apart=0.5)).active == plain.members, "disagreement needs everyone"


def test_damaged_folders_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "stacked.json").read_text()
    for change, message in [({"format": 3}, "format 3"), ({"weights_sha256": "0"}, "checksum"), ({"targets": [{}]}, "not complete")]:
        (tmp_path / "stacked.json").write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(BadInput, match=message): Stacked.load(tmp_path)
    (tmp_path / "stacked.json").write_text(text[:100])
    with pytest.raises(BadInput, match="cannot be read"): Stacked.load(tmp_path)
    (tmp_path / "stacked.json").unlink()
    with pytest.raises(BadInput, match="no stacked.json"): Stacked.load(tmp_path)


def test_budget_leaves_a_working_model(table):
    some = replace(table.take(np.arange(60)), targets={"logp": "", "sparse": ""})
    made = fit_stacked(some, StackedSpec(budget=1e-6))
    assert [list(t.members) for t in made.targets] == [["kernel"]] * 2 and made.predict(table)[0]["sparse"].is_finite().all()
    first = fit_stacked(replace(some, targets={"logp": ""}), StackedSpec(members=("boosting", "kernel"), budget=1e-6, folds=2))
    assert list(first.targets[0].members) == ["boosting"], "the first member is fitted whatever it takes"


def test_more_rows_than_landmarks(table):
    some = replace(table, targets={"logp": ""})
    few = fit_stacked(some.take(np.arange(100)), StackedSpec(members=("kernel",), kernel_rows=50))
    held = some.take(np.arange(100, len(some)))
    assert len(few.targets[0].members["kernel"].beta) == 50
    assert rmse(held.y("logp")[:, 0], few.predict(held)[0]["logp"].to_numpy()) < 0.8 * held.y("logp").std()


def test_bad_input_is_named(table):
    for change, message in [(dict(members=("svm",)), "unknown member"), (dict(budget=-1), "budget"), (dict(kernel_rows=3), "kernel_rows"), (dict(level=1.0), "level"),
                            (dict(members=("kernel", "kernel")), "twice"), (dict(seed=-1), "seed")]:
        with pytest.raises(BadInput, match=message): StackedSpec(**change)
    with pytest.raises(BadInput, match="no targets"): fit_stacked(replace(table, targets={}))
    with pytest.raises(BadInput, match="unknown target"): fit_stacked(table, kinds={"logd": "binary"})
    with pytest.raises(BadInput, match="not binary"): fit_stacked(table, kinds={"logp": "binary"})
    with pytest.raises(BadInput, match="at least 10"): fit_stacked(table.take(np.arange(6)))
    salt = Records(pl.DataFrame({"id": ["a"], "formula": ["NaCl"]}), "composition", {})
    with pytest.raises(BadInput, match="kind of record"): features.molecule_features(salt, features.quick_descriptors())


def test_constant_and_rare_targets(table):
    same = table.with_columns({"same": np.ones(len(table)) * 3.5, "rare": (np.arange(len(table)) < 3).astype(float)})
    same = replace(same, targets={"same": "", "rare": ""})
    p = fit_stacked(same, StackedSpec(members=("kernel",))).predict(table)[0]
    np.testing.assert_allclose(p["same"], 3.5, atol=1e-6)
    assert p["rare"].is_finite().all() and p["rare"].mean() < 0.2


def test_unary_bits_are_the_minimum_of_counts():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**40, 30)
    for _ in range(20):
        a, b = ({int(c): int(n) for c, n in zip(codes, rng.integers(0, 8, 30), strict=True) if n} for _ in range(2))
        both = sum(min(a.get(c, 0), b.get(c, 0)) for c in set(a) | set(b))
        either = sum(max(a.get(c, 0), b.get(c, 0)) for c in set(a) | set(b))
        A, B = features.unary_bits([a]), features.unary_bits([b])
        assert tanimoto(A, B)[0, 0] == pytest.approx(both / either)
        assert np.array_equal(features.Overlap(features.unary_bits([b, a, {}]))(A), tanimoto(A, features.unary_bits([b, a, {}])))


# ---- materials -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def oxides() -> Records:
    "Made-up numbers of oxides that depend on composition and space group, half of them zero."
    metals, groups = ["Li", "Na", "K", "Mg", "Ca", "Sr", "Ba", "Ti", "Zr", "Al", "Ga", "Fe", "Ni", "Zn"], [225, 167, 62, 136]
    formulas = [f"{a}{n}O{m}" for a in metals for n, m in ((1, 1), (2, 3), (1, 2), (2, 1))]
    group = [groups[i % 4] for i in range(len(formulas))]
    y = np.array([max(0.0, (g == 225) * 2.0 + 0.1 * len(f) - 0.6) for f, g in zip(formulas, group, strict=True)])
    frame = pl.DataFrame({"id": [str(i) for i in range(len(formulas))], "formula": formulas, "space_group": group, "gap": y})
    return Records(frame, "composition", {"gap": "eV"})


def test_compositions_with_space_groups_are_learnt_kept_and_streamed(oxides, tmp_path):
    from matfm.app.bulk import predict_file
    rows = np.arange(len(oxides))
    made = fit_stacked(oxides.take(rows[rows % 5 != 0]), stacked.MATERIALS.replace(encoder=""))
    assert list(made.targets[0].members) == ["kernel", "trees"] and made.reader.columns == ("formula", "space_group")
    test = oxides.take(rows[rows % 5 == 0])
    p = made.predict(test)[0]
    y = test.y("gap")[:, 0]
    assert np.abs(y - p["gap"].to_numpy()).mean() < 0.7 * np.abs(y - np.median(oxides.y("gap"))).mean()
    made.save_pretrained(tmp_path / "model")
    back = Stacked.load(tmp_path / "model")
    assert back.predict(test)[0].equals(p) and back.spec.aim == "absolute"
    test.frame.select("formula", pl.col("space_group").cast(pl.String)).vstack(pl.DataFrame({"formula": ["Qq2O"], "space_group": [""]})).write_csv(tmp_path / "new.csv")
    done = predict_file(tmp_path / "model", tmp_path / "new.csv", tmp_path / "out.csv", jobs=1)
    found = pl.read_csv(tmp_path / "out.csv")
    assert (done.rows, done.rejected) == (len(test) + 1, 1) and found["gap_pred"][-1] is None
    np.testing.assert_allclose(found["gap_pred"].to_numpy()[:-1], p["gap"].to_numpy(), rtol=1e-4, atol=1e-5)
    test.frame.select("formula").write_csv(tmp_path / "bare.csv")
    with pytest.raises(BadInput, match="space_group"): predict_file(tmp_path / "model", tmp_path / "bare.csv", tmp_path / "out2.csv", jobs=1)


def test_further_columns_are_learnt_kept_and_asked_for(oxides, tmp_path):
    from matfm.app.bulk import predict_file
    kelvin = np.random.default_rng(0).permutation(np.linspace(300.0, 900.0, len(oxides)))
    warm = Records(oxides.frame.with_columns(kelvin=pl.Series(kelvin), gap=pl.Series(kelvin / 300)), "composition", {"gap": "eV"})
    rows, spec = np.arange(len(warm)), stacked.MATERIALS.replace(encoder="", also=("kelvin",))
    train, test = warm.take(rows[rows % 5 != 0]), warm.take(rows[rows % 5 == 0])
    made, blind = (fit_stacked(train, s) for s in (spec, spec.replace(also=())))
    error = [float(np.abs(m.predict(test)[0]["gap"].to_numpy() - test.y("gap")[:, 0]).mean()) for m in (made, blind)]
    assert error[0] < 0.5 * error[1] and made.reader.columns == ("formula", "space_group", "kelvin")
    made.save_pretrained(tmp_path / "model")
    assert Stacked.load(tmp_path / "model").spec.also == ("kelvin",)
    table = test.frame.select("formula", pl.col("space_group").cast(pl.String), pl.col("kelvin").cast(pl.String))
    table.vstack(pl.DataFrame({"formula": ["CaO"], "space_group": ["225"], "kelvin": ["hot"]})).write_csv(tmp_path / "new.csv")
    done = predict_file(tmp_path / "model", tmp_path / "new.csv", tmp_path / "out.csv", jobs=1)
    assert (done.rows, done.rejected) == (len(test) + 1, 1)
    np.testing.assert_allclose(pl.read_csv(tmp_path / "out.csv")["gap_pred"].to_numpy()[:-1], made.predict(test)[0]["gap"].to_numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="kelvin"): made.predict(Records(test.frame.drop("kelvin"), "composition", {}))
    with pytest.raises(BadInput, match="target"): fit_stacked(train, spec.replace(also=("gap",)))


def test_a_row_with_a_hole_is_kept_with_its_reason_and_a_wrong_column_costs_no_model(oxides, tmp_path):
    from typer.testing import CliRunner
    from matfm.app.cli import app
    table = oxides.frame.select("formula", "gap", kelvin=pl.Series([*("" if i % 9 == 4 else str(300 + i) for i in range(len(oxides)))]))
    table.vstack(pl.DataFrame({"formula": ["Og2O3"], "gap": [1.0], "kelvin": ["300"]})).write_csv(tmp_path / "t.csv")
    fit = lambda *also: CliRunner().invoke(app, ["finetune", str(tmp_path / "t.csv"), "--formula", "formula", "--target", "gap", "--out", str(tmp_path / "model"), *(a for c in also for a in ("--also", c))])
    assert (done := fit("kelvin")).exit_code == 0, done.output
    lost = pl.read_csv(tmp_path / "model" / "rejected.csv", schema_overrides={"id": pl.String})
    assert lost["id"].to_list() == [str(i) for i in range(len(table) + 1) if i % 9 == 4 and i < len(table) or i == len(table)]
    assert set(lost["reason"][:-1]) == {"no number in column 'kelvin'"} and "Og" in lost["reason"][-1]
    split = json.loads((tmp_path / "model" / "split.json").read_text())
    assert sum(len(split[k]) for k in ("train", "valid", "test")) + len(lost) == len(table) + 1
    before = (tmp_path / "model" / "stacked.json").read_bytes()
    for also in ("kelwin", "gap"): assert fit(also).exit_code != 0
    assert (tmp_path / "model" / "stacked.json").read_bytes() == before


# ---- the baseline ----------------------------------------------------------------------------------------------------

def test_svm_beats_the_mean_and_chooses_inside_the_training_part(table):
    y = table.y("logp")[:, 0]
    train, test = table.take(np.arange(80)), table.take(np.arange(80, len(table)))
    svm = EcfpSvm().fit(train, "logp")
    p, std = svm.predict(test, return_std=True)
    assert rmse(y[80:], p) < 0.7 * rmse(y[80:], Dummy().fit(train, "logp").predict(test)) and std.min() > 0
    assert svm.models[0][0].setting in svm_settings("regression") and np.array_equal(EcfpSvm().fit(train, "logp").predict(test), p)
    q = EcfpSvm("binary").fit(train, "greasy").predict(test)
    assert auroc(test.y("greasy")[:, 0], q) > 0.8 and 0 < q.min() and q.max() < 1
    assert EcfpForest("binary", n_estimators=20).fit(train, "greasy").predict(test).shape == q.shape


def test_svm_with_hardly_any_rows(table):
    few = table.take(np.arange(3))
    assert np.isfinite(EcfpSvm().fit(few, "logp").predict(table)).all()
    one = few.with_columns({"one": np.array([1.0, 0.0, 0.0])}, targets={"one": ""})
    np.testing.assert_allclose(EcfpSvm("binary").fit(one, "one").predict(table), 1 / 3)
    with pytest.raises(BadInput, match="not binary"): EcfpSvm("binary").fit(table, "logp")


def test_folds_are_even_and_curves_rise():
    y = np.random.default_rng(0).normal(size=103)
    fold = dealt_folds(y, 5, seed=1)
    assert np.bincount(fold).min() >= 20 and max(abs(y[fold == k].mean() - y.mean()) for k in range(5)) < 0.15
    classes = (np.arange(50) < 10).astype(float)
    assert {int(classes[dealt_folds(classes, 5) == k].sum()) for k in range(5)} == {2}
    falling = Platt.fit(-y, (y > 0).astype(float))
    assert falling.slope == 0 and np.allclose(falling(y), (y > 0).mean())


@pytest.fixture(scope="module")
def solids():
    made = load("matfm_crystals", 70, targets=("formation_energy",))
    return made.take(np.arange(55)), made.take(np.arange(55, 70))


def test_crystals_are_looked_at_and_whole_formulas_left_out(solids, tmp_path):
    train, test = solids
    spec = stacked.CRYSTALS.replace(members=("kernel",), encoder="")
    made, blind = fit_stacked(train, spec), fit_stacked(train, spec.replace(structure=False))
    assert made.train.descriptors.shape[1] > blind.train.descriptors.shape[1] and "crystals" in made._repr_html_()
    squeezed = [Crystal(c.lattice * 0.9, c.numbers, c.frac) for c in test.structures()]
    near = crystals(squeezed, {"formation_energy": test.y()[:, 0]}, {"formation_energy": "eV/atom"})[0]
    assert not np.allclose(made.predict(test)[0]["formation_energy"], made.predict(near)[0]["formation_energy"]), "the structure counts"
    assert np.allclose(blind.predict(test)[0]["formation_energy"], blind.predict(near)[0]["formation_energy"]), "here it does not, but for the space group"
    made.save_pretrained(tmp_path)
    back = stacked.load_stacked(tmp_path)
    assert back.predict(test)[0].equals(made.predict(test)[0], null_equal=True) and back.representation.domain == "crystal" and not hasattr(back, "targets")
    with pytest.raises(BadInput, match="these are compositions"): fit_stacked(compositions(["NaCl", "KCl"] * 9, {"v": range(18)})[0], stacked.CRYSTALS)


@pytest.mark.parametrize("how", ["table", "folder"])
def test_crystals_from_the_shell(solids, tmp_path, how):
    from typer.testing import CliRunner

    from matfm.app.cli import app
    (train, test), shell = solids, CliRunner()
    texts = [[c.to_pymatgen().to(fmt="cif") for c in r.structures()] for r in (train, test)]
    y = train.y()[:, 0]
    if how == "table":
        pl.DataFrame({"cif": texts[0], "e": y, "kelvin": y}).write_csv(tmp_path / "train.csv")
        pl.DataFrame({"note": range(16), "cif": [*texts[1], "no crystal"]}).write_csv(tmp_path / "new.csv")
        learn, new, target = ["train.csv", "--cif", "cif"], "new.csv", "e"
    else:
        for name, found in zip(("train", "new"), texts, strict=True):
            (tmp_path / name).mkdir()
            for i, t in enumerate(found): (tmp_path / name / f"{i}.cif").write_text(t)
        (tmp_path / "train" / "id_prop.csv").write_text("".join(f"{i},{v}\n" for i, v in enumerate(y)))
        (tmp_path / "new" / "broken.cif").write_text("data_x\n_cell no")
        learn, new, target = ["train"], "new", "target"
    ask = ["finetune", str(tmp_path / learn[0]), *learn[1:], "--target", target, "--split", "random", "--out", str(tmp_path / "m")]
    said = shell.invoke(app, [*ask, "--budget", "1s"])
    assert said.exit_code == 0 and f"members of {target}" in said.output and (tmp_path / "m" / "stacked.json").is_file(), said.output
    said = shell.invoke(app, ["predict", str(tmp_path / "m"), str(tmp_path / new), "--out", str(tmp_path / "p.csv"), "--jobs", "1"])
    assert said.exit_code == 0, said.output
    found = pl.read_csv(tmp_path / "p.csv")
    assert len(found) == 16 and found[f"{target}_pred"].null_count() == 1 and (found[f"{target}_lower"] <= found[f"{target}_upper"]).sum() == 15 and found["in_domain"].null_count() == 1
    if how == "table":
        for more, why in [(["--also", "kelvin"], "registered descriptor of their structures"), (["--model", "light"], "these are crystals"), (["--budget", "9s", "--epochs", "2"], "to networks")]:
            refused = shell.invoke(app, [*ask, *more])
            assert refused.exit_code == 2 and why in refused.output, refused.output


def test_a_missing_package_is_named(solids, monkeypatch):
    monkeypatch.setitem(sys.modules, "chgnet", None)
    for name in [n for n in sys.modules if n.startswith("chgnet.")]: monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="potentials"): fit_stacked(solids[0], stacked.CRYSTALS.replace(members=("kernel",), encoder="", also=("chgnet_features",)))


def test_a_table_too_large_for_all_pairs_gives_the_same_model(table, model, monkeypatch):
    "Similarities computed when asked for, and blocks smaller than the table."
    monkeypatch.setattr(features, "DENSE", 10)
    assert isinstance(features.pairs(model.train), features.Pairs)
    again = fit_stacked(table.take(np.arange(80)), model.spec)
    a, b = model.predict(table)[0], again.predict(table)[0]
    assert again.limit == model.limit and a.columns == b.columns
    for name in (n for n in a.columns if a[n].dtype.is_numeric()): np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=2e-3)


def test_rows_are_left_out_in_rows_or_in_features():
    rng = np.random.default_rng(0)
    A, z = rng.normal(size=(60, 7)), rng.normal(size=60)
    W = np.linalg.solve(np.linalg.cholesky(A.T @ A + 0.3 * np.eye(7)), A.T)
    r = z - W.T @ W @ z
    for h in (np.arange(5), np.arange(20)):
        rest = np.setdiff1d(np.arange(60), h)
        w = np.linalg.solve(A[rest].T @ A[rest] + 0.3 * np.eye(7), A[rest].T @ z[rest])
        np.testing.assert_allclose(stacked.left_out(W[:, h], r[h]), z[h] - A[h] @ w, atol=1e-9)


@pytest.mark.parametrize("m", [40, 15])
def test_noise_is_chosen_by_refits(m):
    rng = np.random.default_rng(1)
    X, marks, folds = rng.normal(size=(40, 3)), np.sort(rng.permutation(40)[:m]), np.arange(40)[None] % 4
    K = np.exp(-((X[:, None] - X[None]) ** 2).sum(axis=2) / 4)
    z, noises = np.sin(X[:, 0]) + 0.3 * rng.normal(size=40), [0.01, 0.1, 1.0]
    def refit(noise, rest):
        A, B = K[np.ix_(rest, marks)], K[np.ix_(marks, marks)] + 1e-6 * np.eye(m)
        return np.linalg.solve(A.T @ A + noise * B, A.T @ z[rest])
    apart = {s: np.concatenate([[K[i, marks] @ refit(s, np.flatnonzero(folds[0] != folds[0, i]))] for i in range(40)]) for s in noises}
    best = min(noises, key=lambda s: ((apart[s] - z) ** 2).mean())
    noise, beta, oof = stacked.solve_kernel(K[:, marks], marks, z, noises, folds)
    assert noise == best
    np.testing.assert_allclose(oof, apart[best], atol=1e-4)
    np.testing.assert_allclose(K[:, marks] @ beta, K[:, marks] @ refit(best, np.arange(40)), atol=1e-4)


# ---- a fit that was cut off ------------------------------------------------------------------------------------------

def test_targets_with_gaps_are_kept(tmp_path):
    "Landmarks of a target that some rows do not have are counted among all rows, whether it was fitted or read."
    records = replace(load("matfm_molecules", limit=90), targets={})
    y = records.frame["gap"].to_numpy()
    records = records.with_columns({"gap": np.where(np.arange(90) % 3 == 0, np.nan, y), "high": (y > np.median(y)).astype(float)}, targets={"gap": "eV", "high": ""})
    spec = StackedSpec(encoder="")
    fitted, read, straight = (fit_stacked(records, spec, keep=folder) for folder in (tmp_path, tmp_path, ""))
    assert len(list(tmp_path.iterdir())) == 2
    for other in (read, straight):
        assert other.predict(records)[0].equals(fitted.predict(records)[0], null_equal=True)
        for t in fitted.unseen: np.testing.assert_array_equal(other.unseen[t], fitted.unseen[t])
    fit_stacked(records, spec.replace(seed=1), keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


# ---- intervals at any level ------------------------------------------------------------------------------------------

def test_coverage_at_every_level():
    "Over seeds within three points, where a normal distribution of the same spread is ten points too wide at the median."
    from matfm.evaluate.uncertainty import SplitConformal
    levels, held, normal = (0.5, 0.8, 0.9, 0.95), [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        size, apart, near = 1200, rng.lognormal(size=1200) + 0.1, rng.random(1200)
        error = rng.standard_t(3, size=size) * 0.3 * apart**0.5 * np.exp(1.2 * (1 - near))
        fit, new = slice(0, 600), slice(600, size)
        spread = stacked.Spread.fit(error[fit], apart[fit], near[fit])
        std = spread(apart, near)
        t = stacked.Target("y", "regression", "", {}, np.ones(1), {}, spread=spread, conformal=SplitConformal(0.9).fit(error[fit], np.zeros(600), std[fit]), errors=np.sort(np.abs(error[fit]) / std[fit]))
        ends = [t.at_level(v).interval(np.zeros(600), std[new]) for v in levels]
        held.append([coverage(error[new], *e) for e in ends])
        normal.append(coverage(error[new], -0.6745 * std[new], 0.6745 * std[new]))
        assert t.at_level(0.9) is t.conformal and t.at_level() is t.conformal
    assert np.abs(np.mean(held, axis=0) - levels).max() < 0.03 and np.mean(normal) - 0.5 > 0.1


def test_levels_of_a_fitted_model(table, tmp_path):
    one = replace(table, targets={"logp": ""})
    made = fit_stacked(one.take(np.arange(80)), StackedSpec(members=("kernel",)))
    held = one.take(np.arange(80, len(one)))
    widths = [(lambda p: float((p["logp_upper"] - p["logp_lower"]).mean()))(made.predict(held, v)[0]) for v in (0.3, 0.5, 0.8, 0.9, 0.95)]
    assert widths == sorted(widths) and widths[1] < 0.7 * widths[3] and made.predict(held)[0].equals(made.predict(held, 0.9)[0])
    assert np.isinf(made.predict(held, 0.99)[0]["logp_upper"].to_numpy()).all(), "eighty errors cannot promise 99 %"
    made.save_pretrained(tmp_path)
    assert Stacked.load(tmp_path).predict(held, 0.5)[0].equals(made.predict(held, 0.5)[0])
    assert pl.concat(made.stream(held.structures(), 0.5))["logp_lower"].to_list() == pytest.approx(made.predict(held, 0.5)[0]["logp_lower"].to_list())
    for wrong in (0.0, 1.0, -1, 50):
        with pytest.raises(BadInput, match="between 0 and 1"): made.predict(held, wrong)


def test_models_that_were_saved_before_load_and_keep_their_level(table, tmp_path):
    from safetensors.numpy import load_file, save_file

    from matfm.core import sha256_file
    one = replace(table, targets={"logp": ""})
    made = fit_stacked(one.take(np.arange(80)), StackedSpec(members=("kernel",)))
    made.save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert len(arrays.pop("0.errors")) == 80
    save_file(arrays, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "stacked.json").read_text())
    (tmp_path / "stacked.json").write_text(json.dumps({**config, "weights_sha256": sha256_file(tmp_path / "model.safetensors")}))
    old, held = Stacked.load(tmp_path), one.take(np.arange(80, len(one)))
    assert old.predict(held)[0].equals(made.predict(held)[0]) and old.predict(held, 0.9)[0].equals(made.predict(held)[0])
    with pytest.raises(BadInput, match="hold 90%.*fit it again"): old.predict(held, 0.5)


def test_the_level_of_a_table(table, tmp_path):
    from typer.testing import CliRunner

    from matfm.app.bulk import predict_file
    from matfm.app.cli import app
    made = fit_stacked(table.take(np.arange(80)), stacked.LIGHT.replace(folds=2))
    made.save_pretrained(tmp_path / "m")
    table.take(np.arange(80, 100)).frame.select("smiles").write_csv(tmp_path / "new.csv")
    said = CliRunner().invoke(app, ["predict", str(tmp_path / "m"), str(tmp_path / "new.csv"), "--out", str(tmp_path / "half.csv"), "--jobs", "1", "--level", "0.5"])
    assert said.exit_code == 0, said.output
    predict_file(tmp_path / "m", tmp_path / "new.csv", tmp_path / "whole.csv", jobs=1)
    half, whole = pl.read_csv(tmp_path / "half.csv"), pl.read_csv(tmp_path / "whole.csv")
    assert half["logp_pred"].equals(whole["logp_pred"]) and (half["logp_upper"] < whole["logp_upper"]).all() and half["greasy_lower"].is_null().all()
    said = CliRunner().invoke(app, ["predict", str(tmp_path / "m"), str(tmp_path / "new.csv"), "--out", str(tmp_path / "x.csv"), "--level", "50"])
    assert said.exit_code == 2 and "between 0 and 1" in said.output and not (tmp_path / "x.csv").exists()


# ---- nothing left ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("light", [True, False])
def test_compositions_of_which_none_can_be_read(oxides, light):
    made = fit_stacked(oxides, stacked.LIGHT if light else stacked.MATERIALS.replace(encoder=""))
    bad = Records(pl.DataFrame({"id": ["a", "b"], "formula": ["Qq2O", "??"], "space_group": [1, 2]}), "composition", {})
    p, rejected = made.predict(bad)
    assert p.columns == made.predict(oxides)[0].columns and p["id"].to_list() == ["a", "b"] and p["gap"].is_nan().all() and p["in_domain"].is_null().all()
    assert rejected.frame["row"].to_list() == [0, 1] and made.predict(bad.take(np.arange(0)))[0].columns == p.columns and len(made.predict(bad.take(np.arange(0)))[0]) == 0


def test_crystals_of_which_none_are_left(solids):
    made = fit_stacked(solids[0], stacked.CRYSTALS.replace(members=("kernel", "trees"), encoder=""))
    p, rejected = made.predict(solids[1].take(np.arange(0)))
    assert len(p) == 0 and not len(rejected) and p.columns == made.predict(solids[1])[0].columns
    assert [len(f) for f in made.stream(["no crystal"])] == [1]
