"""Featurising: the same bytes whatever is killed, fatal rows named, features aligned with their table, read with numpy alone."""
import gzip
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from matfm.core import BadInput, ChecksumMismatch, DataUnavailable, MatfmError, TooManyRejected
from matfm.data.corpora import local_dask
from matfm.data.records import compositions, molecules
from matfm.registry import representations
from matfm.represent.descriptors import CompositionStats, Concat, Descriptor, Ecfp, Fingerprint, MoleculeDescriptors, matrix
from matfm.represent.featurise import BLOCK, Features, Packer, cached_features, fatal_rows, featurise, unpack_columns, vectors, write_part
from matfm.settings import load_settings

SMILES = [f"{'C' * n}{x}" for n in range(1, 50) for x in ("O", "N(C)C", "c1ccccc1", "C1CC", "[Na+].[Cl-]")]
BAD = [i for i, s in enumerate(SMILES) if s.endswith("C1CC")]
QUIET = {"progress": False}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@representations.register("test_featurise_deadly")
@dataclass(frozen=True)
class Deadly(Descriptor):
    "Length and number of C; some rows do what no exception can stop."
    domain: ClassVar[str] = "molecule"
    wait: float = 0.0
    names = ("length", "carbons")

    def read(self, record):
        if record == "read segfault": os.kill(os.getpid(), signal.SIGSEGV)
        if record == "read hang": re.match("(a+)+b", "a" * 60)  # holds the interpreter lock
        if record == "hungry":
            kept = []
            while True: kept.append(bytearray(b"x" * 2**24)); time.sleep(0.01)
        if record == "no good": raise KeyError("no good")
        time.sleep(self.wait)
        return record

    def rows(self, parsed):
        if "rows segfault" in parsed: os.abort()
        if "rows hang" in parsed: time.sleep(10**6)
        if "rows error" in parsed: raise RuntimeError("in a batch")
        return np.array([[len(s), s.count("C") if s != "not finite" else np.inf] for s in parsed], np.float32)


# ---- columns ---------------------------------------------------------------------------------------------------------

columns = st.sampled_from([st.sampled_from([0, 1]), st.integers(0, 255), st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0])])


@given(st.data(), st.integers(0, 9), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_any_finite_matrix_round_trips_bit_by_bit(data, n, width):
    x = np.column_stack([data.draw(hnp.arrays(np.float32, n, elements=data.draw(columns))) for _ in range(width)]).astype(np.float32)
    packer = Packer(width)
    for s in range(0, n, 4): packer.add(x[s:s + 4])
    packed = packer.arrays()
    assert unpack_columns(packed, slice(None)).reshape(x.shape).tobytes() == np.ascontiguousarray(x).tobytes()
    if n: assert unpack_columns(packed, np.array([n - 1, 0])).tobytes() == x[[n - 1, 0]].tobytes()


def test_fingerprints_take_bits_and_counts_bytes(tmp_path):
    for descriptor, most in [(Ecfp(), 2048 / 8), (Ecfp(counts=True), 2048), (Fingerprint("maccs"), 21)]:
        f = featurise(["CCO", "c1ccccc1"] * 200, descriptor, tmp_path / descriptor.digest, jobs=0, **QUIET)
        sizes = {p.name: p.stat().st_size - 128 for p in (tmp_path / descriptor.digest / "shard-000000").glob("b*.npy")}
        assert sum(sizes.values()) <= 400 * most and f.take([1]).dtype == np.float32


# ---- rows ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("descriptor", [Ecfp(bits=128), MoleculeDescriptors(), Fingerprint("avalon", bits=64), Concat((Ecfp(bits=32), MoleculeDescriptors(("MolWt", "TPSA"))))], ids=lambda d: d.registry_name)
def test_equals_the_matrix_in_memory(tmp_path, descriptor):
    records, _ = molecules([s for i, s in enumerate(SMILES) if i not in BAD], ids=[f"m{i}" for i in range(len(SMILES) - len(BAD))])
    X, kept, rejected = matrix(descriptor, records)
    f = featurise(records, descriptor, tmp_path / "f", rows_per_part=37, jobs=0, **QUIET)
    assert f.matrix().tobytes() == X.tobytes() and f.rows.tolist() == kept.tolist() and f.ids == records.ids and len(f.rejected()) == len(rejected) == 0
    assert f.columns == descriptor.names and f.descriptor == descriptor and np.array_equal(np.concatenate([x for _, x in f.iter(10)]), X)


def test_compositions(tmp_path):
    alloys, _ = compositions(["Fe0.6Ni0.4", "Og2", "NaCl", "La1.85Sr0.15CuO4"] * 30)
    f = featurise(alloys, CompositionStats(), tmp_path / "f", rows_per_part=50, jobs=0, **QUIET)
    X, kept, rejected = matrix(CompositionStats(), alloys)
    assert np.allclose(f.matrix(), X, rtol=1e-6) and f.rows.tolist() == kept.tolist() and f.rejected().frame.equals(rejected.frame)


def test_rows_are_aligned_and_rejected_ones_say_why(tmp_path):
    f = featurise(SMILES, Ecfp(bits=64), tmp_path / "f", rows_per_part=33, jobs=0, **QUIET)
    good = [i for i in range(len(SMILES)) if i not in BAD]
    assert f.rows.tolist() == good and f.rejected().frame["row"].to_list() == BAD and f.total == len(SMILES)
    rng = np.random.default_rng(0)
    some = rng.choice(good, 50)
    assert np.array_equal(f.take(some), np.stack([Ecfp(bits=64)(SMILES[i])["x"] for i in some]))
    assert np.array_equal(f.take(some, ["bit 7", "bit 3"]), f.take(some)[:, [7, 3]]) and f.take([]).shape == (0, 64)
    mask = np.zeros(len(SMILES), bool); mask[good[5:9]] = True
    assert np.array_equal(f.take(mask), f.take(good[5:9])) and np.array_equal(f.matrix(["bit 9"])[:, 0], f.matrix()[:, 9])
    for row in BAD[:3] + BAD[-1:]:
        with pytest.raises(BadInput, match=f"row {row} was rejected .*SMILES syntax"): f.take([good[0], row])
    for row in (-1, len(SMILES)):
        with pytest.raises(BadInput, match="row numbers must lie in 0"): f.take([row])
    with pytest.raises(BadInput, match="unknown column 'bit 64'; did you mean"): f.take([0], ["bit 64"])
    with pytest.raises(BadInput, match="batch must be"): next(f.iter(0))


def test_what_raises_is_found_by_halving():
    rows = ["C"] * 5 + ["rows error", "CC", "no good", "not finite", "rows error", "CCC"]
    x, bad = vectors(Deadly(), dict(enumerate(rows)), 2)
    assert x.tolist() == [[1, 1]] * 5 + [[2, 2], [3, 3]] and sorted(bad) == [5, 7, 8, 9]
    assert bad[5] == "RuntimeError: in a batch" and bad[7] == "KeyError: 'no good'" and bad[8] == "not finite: carbons"


def test_nothing_readable_and_nothing_at_all(tmp_path):
    empty = featurise([], Ecfp(), tmp_path / "a", jobs=0, **QUIET)
    assert len(empty) == 0 and empty.matrix().shape == (0, 2048) and empty.rows.tolist() == [] and list(empty.iter()) == []
    none = featurise(["C1CC"] * 4, Ecfp(), tmp_path / "b", jobs=0, limit=1.0, rows_per_part=3, **QUIET)
    assert len(none) == 0 and none.matrix().shape == (0, 2048) and len(none.rejected()) == 4
    with pytest.raises(BadInput, match="row 3 was rejected"): none.take([3])
    with pytest.raises(TooManyRejected, match="4 of 4"): featurise(["C1CC"] * 4, Ecfp(), tmp_path / "b", jobs=0, rows_per_part=3, **QUIET)


# ---- sources and refusals --------------------------------------------------------------------------------------------

def test_files_give_the_same_as_lists(tmp_path):
    import polars as pl
    frame = pl.DataFrame({"code": [f"k{i}" for i in range(len(SMILES))], "smiles": SMILES})
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=19)
    with gzip.open(tmp_path / "t.csv.gz", "wb") as f: f.write(frame.write_csv().encode())
    made = [featurise(s, Ecfp(bits=64), tmp_path / f"f{k}", rows_per_part=40, jobs=0, **QUIET) for k, s in enumerate((SMILES, tmp_path / "t.parquet", tmp_path / "t.csv.gz"))]
    assert contents(made[0].folder) == contents(made[1].folder) == contents(made[2].folder)
    named = featurise(str(tmp_path / "t.csv.gz"), Ecfp(bits=64), tmp_path / "named", ids="code", jobs=0, **QUIET)
    assert named.ids == [f"k{i}" for i in range(len(SMILES)) if i not in BAD] and named.rejected().frame["id"][0] == f"k{BAD[0]}"
    with pytest.raises(BadInput, match="no column 'cod'"): featurise(tmp_path / "t.csv.gz", Ecfp(), tmp_path / "x", ids="cod", jobs=0, **QUIET)
    with pytest.raises(DataUnavailable, match="not there"): featurise(tmp_path / "none.csv", Ecfp(), tmp_path / "y", jobs=0, **QUIET)


def test_bad_arguments(tmp_path):
    records, _ = molecules(["C", "CC"])
    with pytest.raises(BadInput, match="rows_per_part must be"): featurise(records, Ecfp(), tmp_path / "a", rows_per_part=0)
    with pytest.raises(BadInput, match="timeout must be"): featurise(records, Ecfp(), tmp_path / "a", timeout=0)
    with pytest.raises(BadInput, match="jobs must be"): featurise(records, Ecfp(), tmp_path / "a", jobs=-1)
    with pytest.raises(BadInput, match="a descriptor .* is needed, got MoleculeGraph"): featurise(records, representations.build("molecule_graph"), tmp_path / "a")
    with pytest.raises(BadInput, match="reads composition records"): featurise(records, CompositionStats(), tmp_path / "a")
    (tmp_path / "b").mkdir(); (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"): featurise(records, Ecfp(), tmp_path / "b", jobs=0)
    featurise(records, Ecfp(), tmp_path / "c", jobs=0, **QUIET)
    with pytest.raises(BadInput, match="another descriptor"): featurise(records, Ecfp(bits=64), tmp_path / "c", jobs=0)
    with pytest.raises(BadInput, match="another rows_per_part"): featurise(records, Ecfp(), tmp_path / "c", rows_per_part=9, jobs=0)
    with pytest.raises(BadInput, match="made from other rows"): featurise(["C", "N"], Ecfp(), tmp_path / "c", jobs=0, **QUIET)
    with pytest.raises(DataUnavailable, match="no complete features"): Features(tmp_path / "nowhere")


def test_damage_is_found_and_mended(tmp_path):
    f = featurise(SMILES, Ecfp(bits=64), tmp_path / "f", rows_per_part=50, jobs=0, **QUIET)
    before, file = contents(f.folder), tmp_path / "f" / "shard-000002" / "bits.npy"
    f.verify()
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ChecksumMismatch, match="shard-000002/bits.npy"): Features(f.folder).verify()
    file.write_bytes(b"short")
    with pytest.raises(ChecksumMismatch, match="bits.npy has 5 of"): Features(f.folder).matrix()
    with pytest.warns(UserWarning, match="made again"): featurise(SMILES, Ecfp(bits=64), tmp_path / "f", rows_per_part=50, jobs=0, **QUIET)
    assert contents(f.folder) == before


def test_nothing_is_unpickled(tmp_path):
    f = featurise(["CCO"] * 4, Ecfp(bits=64), tmp_path / "f", jobs=0, **QUIET)
    file, facts = f.folder / "shard-000000" / "bits.npy", f.folder / "shard-000000" / "shard.json"
    length = file.stat().st_size
    with open(file, "wb") as h: np.save(h, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    facts.write_text(facts.read_text().replace(f'"bits.npy":{{"bytes":{length}', f'"bits.npy":{{"bytes":{file.stat().st_size}'))
    with pytest.raises(ValueError, match="allow_pickle=False|object"): Features(f.folder).matrix()


# ---- fatal rows ------------------------------------------------------------------------------------------------------

def test_fatal_rows_are_named_one_by_one():
    values = ["C", "no good", "CC", "rows segfault", "rows error", "CCC"]
    assert fatal_rows(Deadly(), values, timeout=20) == {3: "the process died (SIGABRT)"}


def test_hungry_rows_are_stopped():
    assert fatal_rows(Deadly(), ["C", "hungry"], timeout=60, memory=600e6) == {1: "needs more than 0.56 GiB of memory"}


def test_a_process_that_cannot_begin_is_no_fault_of_a_row():
    class Broken(Ecfp):
        @property
        def names(self): raise SystemExit("broken at the door")
    with pytest.raises(MatfmError, match="could not begin.*broken at the door"): fatal_rows(Broken(), ["C"], timeout=5)


def test_a_death_in_this_process_is_remembered(tmp_path):
    code = ("import sys; sys.path.insert(0, {!r})\nfrom test_featurise import Deadly, featurise\n"
            "featurise(['C', 'read segfault', 'CC'], Deadly(), {!r}, jobs=0, progress=False)").format(str(Path(__file__).parent), str(tmp_path / "f"))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGSEGV
    f = featurise(["C", "read segfault", "CC"], Deadly(), tmp_path / "f", jobs=0, **QUIET)
    assert f.rows.tolist() == [0, 2] and f.rejected().frame["reason"].to_list() == ["the process died (SIGSEGV)"]
    assert not list(f.folder.glob(".*"))


# ---- killed ----------------------------------------------------------------------------------------------------------

WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_featurise import SMILES, Deadly, featurise
featurise(SMILES, Deadly(wait=0.003), {folder!r}, rows_per_part=20, jobs=0, progress=False)
"""


def test_killed_and_continued_gives_identical_bytes(tmp_path):
    cut = tmp_path / "cut"
    writer = subprocess.Popen([sys.executable, "-c", WRITER.format(tests=str(Path(__file__).parent), folder=str(cut))])
    until = time.monotonic() + 120
    while len(list(cut.glob("shard-*"))) < 3:
        assert writer.poll() is None and time.monotonic() < until, "the writer ended before it could be killed"
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    made = list(cut.glob("shard-*"))
    with pytest.raises(DataUnavailable, match="parts are there"): Features(cut)
    before = {p: p.stat().st_mtime_ns for p in cut.glob("shard-*/*")}
    featurise(SMILES, Deadly(wait=0.003), cut, rows_per_part=20, jobs=0, **QUIET)
    featurise(SMILES, Deadly(wait=0.003), tmp_path / "whole", rows_per_part=20, jobs=0, **QUIET)
    assert 3 <= len(made) < 12 and contents(cut) == contents(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "finished parts are not written again"


def test_killed_and_hanging_workers_change_nothing(tmp_path):
    rows = [s for i, s in enumerate(SMILES) if i not in BAD]
    rows[30] = "read hang"
    killed = []

    class Kills(list):
        def __iter__(self):
            for i, s in enumerate(list.__iter__(self)):
                if i == 150 and not killed:
                    killed.append(next(w.pid for w in client.cluster.workers.values() if w.pid))
                    os.kill(killed[0], signal.SIGKILL)
                yield s
    with local_dask(2, folder=tmp_path / "spill") as client:
        client.upload_file(__file__)
        f = featurise(Kills(rows), Deadly(wait=0.001), tmp_path / "dask", rows_per_part=25, client=client, timeout=2, **QUIET)
    assert killed and f.rejected().frame.select("row", "reason").rows() == [(30, "took longer than 2 s")]
    assert np.array_equal(f.matrix(), Deadly().rows([s for s in rows if s != "read hang"])) and not list(f.folder.glob(".*"))
    again = featurise(rows, Deadly(wait=0.001), tmp_path / "dask", rows_per_part=25, jobs=2, timeout=2, **QUIET)  # nothing is left to do, so no process is started
    assert again.digest == f.digest
    here = featurise([s if s != "read hang" else "no good" for s in rows], Deadly(wait=0.001), tmp_path / "here", rows_per_part=25, jobs=0, **QUIET)
    ours, theirs = contents(f.folder), contents(here.folder)
    assert {p: b for p, b in ours.items() if p.startswith("shard") and "000001/" not in p} == {p: b for p, b in theirs.items() if p.startswith("shard") and "000001/" not in p}


def test_workers_with_several_threads_are_refused(tmp_path):
    class Client:
        def nthreads(self): return {"tcp://a": 1, "tcp://b": 4}
    with pytest.raises(BadInput, match="threads_per_worker=1.*tcp://b"): featurise(SMILES, Ecfp(), tmp_path / "f", client=Client(), **QUIET)


# ---- cache and reading -----------------------------------------------------------------------------------------------

def test_the_cache_computes_once(tmp_path, monkeypatch):
    mine = load_settings().replace(data_cache=str(tmp_path))
    records, _ = molecules(SMILES[:3] * 1, targets={"y": [1.0, 2.0, 3.0]})
    first = cached_features(records, Ecfp(bits=64), settings=mine)
    monkeypatch.setattr(Ecfp, "rows", lambda *_: pytest.fail("computed again"))
    assert cached_features(records, Ecfp(bits=64), settings=mine).digest == first.digest
    assert cached_features(records.with_columns({"z": [1, 2, 3]}), Ecfp(bits=64), settings=mine).folder == first.folder, "targets do not change the features"
    monkeypatch.undo()
    folders = {cached_features(r, d, settings=mine).folder for r in (records, records.take([0, 2]), records.take([2, 0])) for d in (Ecfp(bits=64), Ecfp(bits=32))}
    assert len(folders) == 6 and first.folder in folders
    (first.folder / "shard-000000" / "bits.npy").write_bytes(b"x")
    with pytest.warns(UserWarning, match="made again"): mended = cached_features(records, Ecfp(bits=64), settings=mine)
    assert np.array_equal(mended.matrix(), matrix(Ecfp(bits=64), records)[0])


def test_two_at_once_compute_once(tmp_path):
    mine = load_settings().replace(data_cache=str(tmp_path))
    records, _ = molecules([s for i, s in enumerate(SMILES) if i not in BAD])
    made: list[Features] = []
    threads = [threading.Thread(target=lambda: made.append(cached_features(records, Deadly(wait=0.002), settings=mine))) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(made) == 3 and len({f.digest for f in made}) == 1
    times = {p.stat().st_mtime_ns for p in made[0].folder.glob("shard-*/shard.json")}
    assert len(times) == 1


ALONE = """
import sys
for name in {blocked!r}: sys.modules[name] = None
import numpy as np, pickle
from matfm.represent.featurise import Features
f = pickle.loads(pickle.dumps(Features({folder!r})))
X = f.take(f.rows[[3, 1]])
assert X.shape == (2, 64) and np.array_equal(f.matrix()[[3, 1]], X) and f.columns[5] == "bit 5"
f.verify()
print(f.ids[3], len(f), sum(len(x) for _, x in f.iter(7)))
"""


def test_reading_needs_numpy_alone(tmp_path):
    f = featurise(SMILES, Ecfp(bits=64), tmp_path / "f", rows_per_part=50, jobs=0, **QUIET)
    blocked = ["rdkit", "pymatgen", "polars", "pyarrow", "pandas", "scipy", "sklearn", "torch", "joblib", "dask", "distributed", "pint", "tqdm", "psutil", "filelock"]
    r = subprocess.run([sys.executable, "-c", ALONE.format(blocked=blocked, folder=str(f.folder))], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.split() == ["4", str(len(f)), str(len(f))]


def test_a_part_depends_on_its_rows_alone(tmp_path):
    featurise(SMILES, Ecfp(bits=64), tmp_path / "a", rows_per_part=BLOCK + 5, jobs=0, **QUIET)
    (tmp_path / "b").mkdir()
    n = BLOCK + 5
    write_part(str(tmp_path / "b"), 2, 2 * n, [(str(i), SMILES[i]) for i in range(2 * n, 3 * n)], Ecfp(bits=64), 60.0, True)
    assert contents(tmp_path / "a" / "shard-000002") == contents(tmp_path / "b" / "shard-000002")
