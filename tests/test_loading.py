"""Featurising, caching and batches that are a function of seed and step alone."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput, Spec
from matfm.data import loading
from matfm.data.loading import BatchPlan, Bulk, Loader, cache_key, collate, featurise, load_items, save_items, sizes_of
from matfm.data.records import Crystal, compositions, crystals, molecules

QUICK = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Letters(Spec):
    domain: ClassVar[str] = "molecule"
    longest: int = 12

    def __call__(self, text):
        if len(text) > self.longest: raise BadInput(f"too long: {len(text)}")
        if "N" in text: raise RuntimeError("the engine gave up")
        return {"tokens": np.array([ord(c) for c in text]), "grid": np.ones((len(text), 2), np.float32)}

    def size(self, item): return len(item["tokens"])

    def collate(self, items):
        import torch
        return {"tokens": torch.nn.utils.rnn.pad_sequence([torch.as_tensor(i["tokens"]) for i in items], batch_first=True)}


MOLS = molecules([f"{'C' * n}{x}" for n in range(1, 16) for x in "ON"], {"n": [n for n in range(1, 16) for _ in "ON"]})[0]


def same(a, b):
    assert len(a[0]) == len(b[0]) and (a[1] == b[1]).all() and a[2].frame.equals(b[2].frame)
    for x, y in zip(a[0], b[0], strict=True):
        assert set(x) == set(y) and all(np.array_equal(x[k], y[k]) and np.asarray(x[k]).dtype == y[k].dtype for k in x)


def test_every_row_is_kept_or_rejected():
    items, kept, rejected = featurise(Letters(), MOLS)
    assert sorted([*kept, *rejected.frame["row"]]) == list(range(30)) and len(items) == 11
    assert rejected.reasons() == {"RuntimeError": 11, "too long": 8}


def test_processes_and_progress_change_nothing(capsys):
    same(featurise(Letters(), MOLS, jobs=2, progress=True), featurise(Letters(), MOLS))


def test_mistakes_in_the_representation_are_raised():
    class Wrong(Letters):
        def __call__(self, text): return len(text) + "a"
    with pytest.raises(TypeError): featurise(Wrong(), MOLS)


def test_domains():
    with pytest.raises(BadInput, match="reads molecule records"): featurise(Letters(), compositions(["NaCl"])[0])

    class Formula(Letters):
        domain: ClassVar[str] = "composition"
        def __call__(self, record): return {"x": np.array([len(record.formula if isinstance(record, Crystal) else record)])}
    salt = Crystal(np.eye(3) * 3.4, np.array([11, 17]), np.array([[0, 0, 0], [.5, .5, .5]]))
    assert featurise(Formula(), crystals([salt])[0])[0][0]["x"] == featurise(Formula(), compositions(["NaCl"])[0])[0][0]["x"] == 4


# -- many at once --

class FastLetters(Letters):
    asked: ClassVar[list] = []

    def many(self, structures):
        text = list(structures)
        self.asked.append(len(text))
        if any("Br" in t for t in text): raise RuntimeError("one of them breaks all")
        return [None if len(t) > self.longest or "N" in t else self(t) for t in text]


@pytest.mark.parametrize("block, jobs, progress", [(256, 1, False), (7, 1, False), (7, 2, False), (7, 1, True)])
def test_many_at_once_changes_nothing(block, jobs, progress, monkeypatch, capsys):
    monkeypatch.setattr(loading, "BLOCK", block)
    assert isinstance(FastLetters(), Bulk) and not isinstance(Letters(), Bulk)
    same(featurise(FastLetters(), MOLS, jobs=jobs, progress=progress), featurise(Letters(), MOLS))


def test_blocks(monkeypatch):
    monkeypatch.setattr(loading, "BLOCK", 7)
    FastLetters.asked.clear()
    featurise(FastLetters(), MOLS)
    assert FastLetters.asked == [7, 7, 7, 7, 2]


def test_a_row_that_breaks_a_block_is_found():
    mols, _ = molecules(["CO", "CBr", "N"])
    items, kept, rejected = featurise(FastLetters(), mols)
    assert kept.tolist() == [0, 1] and len(items) == 2 and rejected.frame["reason"].to_list() == ["RuntimeError: the engine gave up"]
    same((items, kept, rejected), featurise(Letters(), mols))


def test_a_mistake_in_many_is_raised():
    class Wrong(Letters):
        def many(self, structures): return structures.no_such_method()
    with pytest.raises(AttributeError): featurise(Wrong(), MOLS)


def test_a_table_with_a_row_that_is_no_structure():
    from dataclasses import replace

    import polars as pl

    class Atoms(Letters):
        domain: ClassVar[str] = "crystal"
        def __call__(self, crystal): return {"n": np.array(len(crystal))}
    records, _ = crystals([Crystal(np.eye(3) * 3.4, [11, 17], [[0, 0, 0], [.5, .5, .5]])] * 3)
    broken = replace(records, frame=records.frame.with_columns(pl.Series("frac", [[0.0] * 6, [0.0], [0.0] * 6])))
    items, kept, rejected = featurise(Atoms(), broken)
    assert kept.tolist() == [0, 2] and rejected.frame["row"].to_list() == [1] and "'frac': [0.0]" in rejected.frame["value"][0] and "frac" in rejected.frame["reason"][0]


# -- cache --

def test_cache_is_used_and_keyed(tmp_path, monkeypatch):
    fresh = featurise(Letters(), MOLS, cache=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(loading, "_featurise_some", lambda *a: pytest.fail("featurised again"))
        same(fresh, featurise(Letters(), MOLS, cache=tmp_path))
        same(fresh, featurise(Letters(), MOLS.with_columns({"other": [0.0] * 30}), cache=tmp_path))
    keys = {cache_key(Letters(), MOLS), cache_key(Letters(13), MOLS), cache_key(Letters(), MOLS.take(range(29))), cache_key(Letters(), MOLS.take(range(29, -1, -1)))}
    assert len(keys) == 4


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"", lambda b: b[:-40] + b"x" * 40, lambda b: b"PK\x03\x04" + b"\0" * 50])
def test_damaged_cache_is_made_anew(damage, tmp_path):
    fresh = featurise(Letters(), MOLS, cache=tmp_path)
    file, = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"): same(fresh, featurise(Letters(), MOLS, cache=tmp_path))
    same(fresh, featurise(Letters(), MOLS, cache=tmp_path))


def test_cache_is_not_unpickled(tmp_path):
    featurise(Letters(), MOLS, cache=tmp_path)
    file, = tmp_path.iterdir()
    with open(file, "wb") as f: np.savez(f, n=np.array(1), **{"data.a": np.array([{"evil": 1}], dtype=object), "shape.a": np.array([[1]])})
    with pytest.raises(ValueError, match="allow_pickle"): load_items(file)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(loading, "save_items", full)
    with pytest.warns(UserWarning, match="could not be cached"): assert len(featurise(Letters(), MOLS, cache=tmp_path)[0]) == 11
    assert not list(tmp_path.iterdir())


@QUICK
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8))
def test_items_round_trip(shapes):
    import tempfile
    from pathlib import Path
    items = [{"a": np.arange(n, dtype=np.int64), "b": np.full((n, m), .5, np.float32), "c": np.array(m)} for n, m in shapes]
    with tempfile.TemporaryDirectory() as d: back, _ = load_items(save_items(Path(d) / "x.npz", items))
    assert len(back) == len(items)
    for x, y in zip(items, back, strict=True): assert all(np.array_equal(x[k], y[k]) and x[k].shape == y[k].shape and x[k].dtype == y[k].dtype for k in x)


# -- batches --

PLANS = {"sizes": st.lists(st.integers(1, 200), min_size=1, max_size=120), "batch": st.integers(1, 40), "seed": st.integers(0, 2**32), "shuffle": st.booleans(), "buckets": st.booleans(), "block": st.integers(1, 4)}


@QUICK
@given(**PLANS)
def test_an_epoch_holds_everything_once(sizes, batch, seed, shuffle, buckets, block):
    plan = BatchPlan(sizes, batch, seed, shuffle, buckets, block)
    for epoch in (0, 2):
        batches = plan.batches(epoch)
        assert sorted(np.concatenate(batches)) == list(range(len(sizes))) and len(batches) == plan.steps_per_epoch == len(plan)
        assert all(0 < len(b) <= batch for b in batches)


@QUICK
@given(step=st.integers(0, 500), history=st.lists(st.integers(0, 500), max_size=5), **PLANS)
def test_a_step_depends_on_nothing_but_itself(step, history, sizes, batch, seed, shuffle, buckets, block):
    used, fresh = (BatchPlan(sizes, batch, seed, shuffle, buckets, block) for _ in range(2))
    for h in history: used.at(h)
    assert (used.at(step) == fresh.at(step)).all()
    assert shuffle or (used.at(step) == used.at(step % len(used))).all()


def test_these_very_batches():
    "Guards resumed runs against a silent change of the order."
    plan = BatchPlan([5, 3, 8, 1, 9, 2, 7], 3, seed=0)
    assert [plan.at(k).tolist() for k in range(6)] == [[0, 6, 2], [4], [3, 5, 1], [0, 6, 2], [3, 5, 1], [4]]
    in_order = BatchPlan([5, 3, 8, 1, 9, 2, 7], 3, shuffle=False)
    assert [b.tolist() for b in in_order.batches()] == [[3, 5, 1], [0, 6, 2], [4]]
    assert [b.tolist() for b in BatchPlan([5, 3, 8], 2, shuffle=False, buckets=False).batches()] == [[0, 1], [2]]


def test_buckets_save_padding():
    sizes = np.random.default_rng(0).integers(5, 120, 3000)
    assert BatchPlan(sizes, 32).padding() < 0.1 < 0.4 < BatchPlan(sizes, 32, buckets=False).padding()


@pytest.mark.parametrize("kwargs, message", [({"sizes": []}, "nothing"), ({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed")])
def test_wrong_plans(kwargs, message):
    with pytest.raises(BadInput, match=message): BatchPlan(**{"sizes": [1, 2], "batch_size": 1, **kwargs})


def test_loader():
    rep = Letters()
    items, kept, _ = featurise(rep, MOLS)
    y = MOLS.y()[kept]
    plan = BatchPlan(sizes_of(rep, items), 4, seed=3)
    batches = list(Loader(rep, items, plan, y))
    assert len(batches) == len(Loader(rep, items, plan)) == 3
    for b in batches:
        assert b["y"].dtype.is_floating_point and tuple(b["y"].shape) == (len(b["index"]), 1)
        assert (b["y"].ravel().numpy() == y[b["index"].numpy(), 0]).all() and ((b["tokens"] > 0).sum(1) == b["y"].ravel() + 1).all()
    assert [b["index"].tolist() for b in Loader(rep, items, plan, start=1, stop=8)][3:] == [b["index"].tolist() for b in Loader(rep, items, plan, start=4, stop=8)]
    with pytest.raises(BadInput, match="targets for"): Loader(rep, items, plan, y[:3])
    with pytest.raises(BadInput, match="the plan is for"): Loader(rep, items[:3], plan)
    with pytest.raises(BadInput, match="empty batch"): collate(rep, items, [])
    assert collate(rep, items, [0, 1], np.array([[1.0, np.nan]] * 11))["y"].isnan().sum() == 2
