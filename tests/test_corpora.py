"""Corpora: identical bytes after kill -9 and a killed Dask worker, no item lost between processes, training without a table or chemistry library."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput, DataUnavailable, Spec
from matfm.data.corpora import Corpus, CorpusPlan, Ragged, local_dask, pack, pack_items, write_corpus, write_shard
from matfm.data.records import Crystal, crystals, molecules
from matfm.registry import representations
from matfm.represent.crystal import CrystalGraph
from matfm.represent.sequence import SmilesTokens

QUICK = settings(max_examples=60, deadline=None)
SMILES = [f"{'C' * n}{x}" for n in range(1, 40) for x in ("O", "N(C)C", "c1ccccc1", " bad", "[Na+].[Cl-]")]
TOKENS = SmilesTokens()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@representations.register("test_corpora_slow")
@dataclass(frozen=True)
class Slow(Spec):
    domain: ClassVar[str] = "molecule"
    wait: float = 0.002

    def __call__(self, text):
        time.sleep(self.wait)
        return {"x": np.arange(len(text), dtype=np.int16), "pair": np.ones((2, len(text)), np.float32)}

    def size(self, item): return len(item["x"])


# ---- layout ----------------------------------------------------------------------------------------------------------

shapes = st.integers(0, 3).flatmap(lambda d: st.lists(st.tuples(*[st.integers(0, 4)] * d), min_size=1, max_size=8))


@given(shapes, st.sampled_from(["<i8", "<f4", "|b1", "<u2"]))
@QUICK
def test_any_shape_round_trips(tmp_path_factory, shapes, dtype):
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 2, s).astype(dtype) for s in shapes]
    folder = tmp_path_factory.mktemp("pack")
    files, layout = pack(values)
    for part, a in files.items(): np.save(folder / f"k.{part}.npy", a)
    ragged = Ragged(folder, "k", layout, [f"k.{p}.npy" for p in files])
    for i, v in enumerate(values):
        assert ragged[i].shape == v.shape and ragged[i].dtype == v.dtype and np.array_equal(ragged[i], v)


def test_crystal_graphs_unchanged(tmp_path):
    rep = CrystalGraph(cutoff=6.0)
    cells = [Crystal(np.eye(3) * (3.5 + k / 10), [11, 17][:1 + k % 2], np.array([[0, 0, 0], [.5, .5, .5]])[:1 + k % 2]) for k in range(7)]
    records, _ = crystals(cells)
    corpus = write_corpus(tmp_path / "c", rep, records, rows_per_shard=3)
    for a, b in zip(corpus, map(rep, records.structures()), strict=True):
        assert set(a) == set(b) and all(np.array_equal(a[k], b[k]) and a[k].dtype == np.asarray(b[k]).dtype for k in b)
    assert np.asarray(corpus.sizes).tolist() == [rep.size(i) for i in corpus]
    batch, same = rep.collate(corpus[:5]), rep.collate([rep(s) for s in records.structures()[:5]])
    assert all(bool((batch[k] == same[k]).all()) for k in same)


def test_nothing_is_unpickled(tmp_path):
    corpus = write_corpus(tmp_path / "c", TOKENS, ["CCO"] * 4)
    file = tmp_path / "c" / "shard-000000" / "tokens.data.npy"
    with open(file, "wb") as f: np.save(f, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    import json
    facts = json.loads((file.parent / "shard.json").read_text())
    facts["files"][file.name]["bytes"] = file.stat().st_size
    (file.parent / "shard.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="allow_pickle=False|object"): Corpus(corpus.folder)[0]


# ---- sources and refusals --------------------------------------------------------------------------------------------

def test_records_keep_their_ids(tmp_path):
    records, _ = molecules(["CCO", "CCN", "CCCl"], ids=["ethanol", "ethylamine", "chloroethane"])
    corpus = write_corpus(tmp_path / "c", SmilesTokens(max_length=5), records)
    assert corpus.rejected().frame["id"].to_list() == [] and len(corpus) == 3
    small = write_corpus(tmp_path / "d", SmilesTokens(max_length=4), records, limit=1.0)
    assert small.rejected().frame["id"].to_list() == ["ethanol", "ethylamine", "chloroethane"] and len(small) == 0


def test_bad_arguments(tmp_path):
    with pytest.raises(BadInput, match="rows_per_shard"): write_corpus(tmp_path / "a", TOKENS, ["C"], rows_per_shard=0)
    with pytest.raises(DataUnavailable, match="not there"): write_corpus(tmp_path / "b", TOKENS, tmp_path / "none.csv")
    with pytest.raises(BadInput, match="too|at most|set aside"): write_corpus(tmp_path / "c", TOKENS, ["C C", "C C", "C"])
    (tmp_path / "d").mkdir(); (tmp_path / "d" / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"): write_corpus(tmp_path / "d", TOKENS, ["C"])
    with pytest.raises(DataUnavailable, match="no complete corpus"): Corpus(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="differ in their keys"): pack_items([{"a": np.ones(1)}, {}])
    corpus = write_corpus(tmp_path / "e", TOKENS, ["C", "CC"])
    for i in (2, -3):
        with pytest.raises(IndexError): corpus[i]
    assert len(write_corpus(tmp_path / "f", TOKENS, [])) == 0


def test_parquet_and_processes_give_the_same(tmp_path):
    import polars as pl
    pl.DataFrame({"smiles": SMILES}).write_parquet(tmp_path / "t.parquet", row_group_size=17)
    write_corpus(tmp_path / "a", TOKENS, tmp_path / "t.parquet", rows_per_shard=40, jobs=2)
    write_corpus(tmp_path / "b", TOKENS, SMILES, rows_per_shard=40)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---- killed ----------------------------------------------------------------------------------------------------------

WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_corpora import SMILES, Slow
from matfm.data.corpora import write_corpus
write_corpus({folder!r}, Slow(), SMILES, rows_per_shard=20)
"""


def test_killed_and_continued_gives_identical_bytes(tmp_path):
    code = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "cut"))
    writer = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 120
    while len(list((tmp_path / "cut").glob("shard-*"))) < 3:
        assert writer.poll() is None and time.monotonic() < until, "the writer ended before it could be killed"
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    made = len(list((tmp_path / "cut").glob("shard-*")))
    with pytest.raises(DataUnavailable, match="shards are there"): Corpus(tmp_path / "cut")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard-*/*")}
    write_corpus(tmp_path / "cut", Slow(), SMILES, rows_per_shard=20)
    write_corpus(tmp_path / "whole", Slow(wait=0.002), SMILES, rows_per_shard=20)
    assert 3 <= made < 10 and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "finished shards are not written again"


def test_what_a_killed_writer_left_is_removed_before_the_index_is_written(tmp_path):
    def rows():
        for i, x in enumerate(SMILES[:20]):
            if i == 15: (tmp_path / "a" / ".shard-000000.xyz.part").mkdir()
            yield x
    class Source:
        def __iter__(self): return rows()
    write_corpus(tmp_path / "a", TOKENS, Source(), rows_per_shard=5)
    write_corpus(tmp_path / "b", TOKENS, SMILES[:20], rows_per_shard=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and not list((tmp_path / "a").glob(".*"))


def test_a_killed_dask_worker_changes_nothing(tmp_path):
    def rows(client):
        for i, s in enumerate(SMILES):
            if i == 90: os.kill(list(client.run(os.getpid).values())[0], signal.SIGKILL)
            yield s
    with local_dask(2, folder=tmp_path / "spill") as client:
        client.upload_file(__file__)
        write_corpus(tmp_path / "dask", Slow(), rows(client), rows_per_shard=20, client=client)
    write_corpus(tmp_path / "here", Slow(), SMILES, rows_per_shard=20)
    assert contents(tmp_path / "dask") == contents(tmp_path / "here")


# ---- order -----------------------------------------------------------------------------------------------------------

class Lengths:
    def __init__(self, n): self.sizes = np.random.default_rng(n).integers(1, 50, n)
    def __len__(self): return len(self.sizes)


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 5), st.integers(1, 90), st.integers(1, 30), st.integers(0, 3))
@QUICK
def test_no_item_lost_or_doubled_between_processes(n, batch, world, window, chunk, seed):
    items = Lengths(n)
    plans = [CorpusPlan(items, batch, seed, r, world, window, chunk, block=2) for r in range(world)]
    one = CorpusPlan(items, batch, seed, window=window, chunk=chunk, block=2)
    per = one.batches_per_epoch
    steps = -(-3 * per // world)
    stream = [plans[s % world].at(s // world) for s in range(steps * world)]
    for e in range(3):
        assert sorted(np.concatenate(stream[e * per:(e + 1) * per]).tolist()) == list(range(n))
    for s in (0, per - 1, 2 * per, 1):  # in any order of asking, and from a fresh plan
        fresh = CorpusPlan(items, batch, seed, s % world, world, window, chunk, block=2)
        assert np.array_equal(fresh.at(s // world), stream[s]) and np.array_equal(one.at(s), stream[s])
    assert {len(b) for b in stream[:per]} <= {batch, n % batch}


# ---- training without chemistry --------------------------------------------------------------------------------------

ALONE = """
import sys
blocked = {blocked!r}
for name in blocked: sys.modules[name] = None
import numpy as np, torch
torch.set_num_threads(1)
from matfm.data.corpora import Corpus, CorpusPlan
from matfm.data.loading import Loader
from matfm.models.transformer import TransformerEncoder
from matfm.pretrain.language import MaskedTokens
corpus = Corpus({folder!r})
corpus.verify() if {verify!r} else None
tokens = corpus.representation
torch.manual_seed(0)
encoder = TransformerEncoder.for_representation(tokens, width=24, depth=1, heads=2)
objective = MaskedTokens.for_encoder(encoder, tokens)
optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=1e-2)
losses = []
for batch in Loader(tokens, corpus, CorpusPlan(corpus, 16), stop=30):
    loss = objective(encoder, batch, torch.Generator().manual_seed(0))["loss"]
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(float(loss))
assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
print(sorted(m for m in sys.modules if m.split(".")[0] in blocked and sys.modules[m] is not None))
"""


def test_training_needs_torch_and_numpy_alone(tmp_path):
    corpus = write_corpus(tmp_path / "c", TOKENS, SMILES, rows_per_shard=50)
    blocked = ["rdkit", "pymatgen", "polars", "pyarrow", "pandas", "scipy", "sklearn", "lightning", "joblib", "dask", "distributed", "pint", "ase", "matplotlib", "tqdm"]
    code = ALONE.format(blocked=blocked, folder=str(corpus.folder), verify=False)
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert r.stdout.strip() == "[]"


LIGHTNING = """
import sys
for name in ("rdkit", "pymatgen", "polars", "pyarrow"): sys.modules[name] = None
import torch
from matfm.data.corpora import Corpus
from matfm.models.zoo import from_scratch
from matfm.pretrain.language import MaskedTokens
from matfm.pretrain.training import PretrainSpec, pretrain
torch.set_num_threads(1)
def go(steps, out):
    corpus = Corpus({folder!r})
    tiny = from_scratch(corpus.representation, "transformer", seed=0, width=24, depth=1, heads=2)
    torch.manual_seed(0)
    objective = MaskedTokens.for_encoder(tiny.encoder, tiny.representation)
    spec = PretrainSpec(steps=12, batch_size=8, checkpoint_every=4, log_every=4, valid_every=0, accelerator="cpu")
    stop = Stop(objective, steps)
    try: return pretrain(tiny, stop, corpus, spec, out=out, valid_items=corpus[:8], progress=False)
    except OSError: return None
from matfm.registry import objectives
@objectives.register("stops")
class Stop(MaskedTokens):
    left = 10**9
    def __init__(self, inner, steps):
        super().__init__(**inner.config); self.load_state_dict(inner.state_dict()); Stop.left = steps
    def forward(self, *a):
        Stop.left -= 1
        if Stop.left < 0: raise OSError("gone")
        return super().forward(*a)
whole = go(10**9, {folder!r} + "-whole")
assert go(7, {folder!r} + "-cut") is None
again = go(10**9, {folder!r} + "-cut")
for a, b in zip(whole.pretrained.encoder.state_dict().values(), again.pretrained.encoder.state_dict().values()): assert torch.equal(a, b)
print("same", again.pretrained.info["items"])
"""


def test_pretrain_reads_a_corpus_and_resumes_exactly(tmp_path):
    corpus = write_corpus(tmp_path / "c", TOKENS, SMILES[:60], rows_per_shard=25)
    r = subprocess.run([sys.executable, "-c", LIGHTNING.format(folder=str(corpus.folder))], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert r.stdout.strip() == f"same {len(corpus)}"


def test_a_shard_depends_on_its_rows_alone(tmp_path):
    write_corpus(tmp_path / "a", TOKENS, SMILES, rows_per_shard=30)
    (tmp_path / "b").mkdir()
    write_shard(str(tmp_path / "b"), 2, 60, [(str(i), SMILES[i]) for i in range(60, 90)], TOKENS, {"tokens": "uint8"})
    assert contents(tmp_path / "a" / "shard-000002") == contents(tmp_path / "b" / "shard-000002")
