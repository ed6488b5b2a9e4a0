"""Pretraining: exact resumption after kill -9, data-parallel runs, damaged checkpoints, objectives as a matrix."""
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from matfm.core import BadInput
from matfm.models.zoo import from_scratch
from matfm.pretrain.crystals import CoordinateDenoising, ElementShuffling, choose_sites, foreign, shuffled
from matfm.pretrain.language import MaskedTokens
from matfm.pretrain.objectives import Mixed
from matfm.pretrain.training import PretrainSpec, evaluate_objective, load_state, parameter_groups, pretrain

SMILES = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "C1CCCCC1", "OC(=O)c1ccccc1O", "CC#N", "O=Cc1ccccc1"]

# a run in a process of its own: argv = folder, number of the call at which it kills itself (0: never)
SCRIPT = textwrap.dedent("""
    import os, signal, sys, torch
    torch.set_num_threads(1)
    from matfm.models.zoo import from_scratch
    from matfm.pretrain.language import MaskedTokens
    from matfm.pretrain.training import PretrainSpec, pretrain

    class Killed(MaskedTokens):
        calls = 0
        def forward(self, *a):
            Killed.calls += 1
            if Killed.calls == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(*a)

    net = from_scratch("smiles", "transformer", seed=0, width=32, depth=2, heads=4, dropout=0.1)
    torch.manual_seed(0)
    objective = Killed.for_encoder(net.encoder, net.representation)
    items = [net.representation(s) for s in %r]
    spec = PretrainSpec(steps=24, batch_size=4, lr=3e-3, log_every=3, valid_every=8, checkpoint_every=5, accelerator="cpu", threads=1)
    run = pretrain(net, objective, items, spec, sys.argv[1], valid_items=items[:3], progress=False)
    print("done", run.steps)
""") % (SMILES,)


def started(script: Path, folder: Path, kill_at: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(script), str(folder), str(kill_at)], capture_output=True, text=True, timeout=600)


def flat(state: dict) -> list[torch.Tensor]:
    return [v for k in ("module", "optimizer") for v in _leaves(state[k])]


def _leaves(x):
    if isinstance(x, torch.Tensor): return [x]
    if isinstance(x, dict): return [leaf for k in sorted(x, key=str) for leaf in _leaves(x[k])]
    return [leaf for v in x for leaf in _leaves(v)] if isinstance(x, (list, tuple)) else []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_run_continues_bit_for_bit(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    whole = started(script, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    killed = started(script, tmp_path / "cut", 18)
    assert killed.returncode == -signal.SIGKILL
    assert load_state(tmp_path / "cut" / "checkpoint.pt")[1]["step"] < 18
    (tmp_path / "cut" / "history.jsonl").open("a").write('{"step": 18, "part": "tr')  # half a row, as a kill may leave it
    resumed = started(script, tmp_path / "cut", 0)
    assert resumed.returncode == 0, resumed.stderr
    (a, facts_a), (b, facts_b) = (load_state(tmp_path / d / "checkpoint.pt") for d in ("whole", "cut"))
    assert len(flat(a)) == len(flat(b)) > 50
    assert all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
    assert facts_a["history"] == facts_b["history"] and facts_a["step"] == facts_b["step"] == 24
    rows = [json.loads(line) for line in (tmp_path / "cut" / "history.jsonl").read_text().splitlines()]
    assert rows == facts_b["history"] and [r["step"] for r in rows if r["part"] == "valid"] == [8, 16, 24]


def small():
    net = from_scratch("smiles", "transformer", seed=0, width=32, depth=2, heads=4)
    torch.manual_seed(0)
    return net, MaskedTokens.for_encoder(net.encoder, net.representation), [net.representation(s) for s in SMILES]


def test_two_processes_share_the_batches(tmp_path):
    "Two processes with batches of 4 see what one process sees with steps 2k and 2k+1; both end with the same weights."
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent("""
        import sys, torch, json
        torch.set_num_threads(1)
        from tests_shared import small
        from matfm.pretrain.training import PretrainSpec, pretrain
        if __name__ == "__main__":
            net, objective, items = small()
            spec = PretrainSpec(steps=6, batch_size=4, lr=1e-3, log_every=1, valid_every=0, accelerator="cpu", threads=1, devices=2, strategy="ddp")
            run = pretrain(net, objective, items, spec, sys.argv[1], progress=False)
    """))
    (tmp_path / "tests_shared.py").write_text("import torch\nfrom matfm.models.zoo import from_scratch\nfrom matfm.pretrain.language import MaskedTokens\n"
                                              f"SMILES = {SMILES!r}\n" + textwrap.dedent("""
        def small():
            net = from_scratch("smiles", "transformer", seed=0, width=32, depth=2, heads=4)
            torch.manual_seed(0)
            return net, MaskedTokens.for_encoder(net.encoder, net.representation), [net.representation(s) for s in SMILES]
    """))
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    state, facts = load_state(tmp_path / "out" / "checkpoint.pt")
    assert facts["step"] == 6 and [r["step"] for r in facts["history"]] == [1, 2, 3, 4, 5, 6]
    net, objective, items = small()
    spec = PretrainSpec(steps=12, batch_size=4, lr=1e-3, log_every=1, valid_every=0, accelerator="cpu", threads=1)
    first = pretrain(net, objective, items, spec, progress=False).history[0]
    assert facts["history"][0]["count"] == first["count"] and abs(facts["history"][0]["loss"] - first["loss"]) < 1e-5


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path):
    net, objective, items = small()
    spec = PretrainSpec(steps=4, batch_size=4, accelerator="cpu", threads=1)
    pretrain(net, objective, items, spec, tmp_path, progress=False)
    with pytest.raises(BadInput, match="different spec"): pretrain(net, objective, items, spec.replace(seed=1), tmp_path, progress=False)
    with pytest.raises(BadInput, match="different items, data"): pretrain(net, objective, items[:-1], spec, tmp_path, progress=False)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(BadInput, match="is no checkpoint"): pretrain(net, objective, items, spec, tmp_path, progress=False)


def test_global_random_state_and_arguments_are_left_alone():
    net, objective, items = small()
    weights = [p.clone() for p in (*net.encoder.parameters(), *objective.parameters())]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pretrain(net, objective, items, PretrainSpec(steps=2, batch_size=4, accelerator="cpu"), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, q) for p, q in zip(weights, (*net.encoder.parameters(), *objective.parameters()), strict=True))


def test_seed_decides():
    net, objective, items = small()
    spec = PretrainSpec(steps=3, batch_size=4, log_every=1, accelerator="cpu", threads=1)
    a, b, c = (pretrain(net, objective, items, spec.replace(seed=s), progress=False).history for s in (0, 0, 1))
    assert a == b != c


def test_no_decay_on_vectors_and_embeddings():
    net, _, _ = small()
    decayed, plain = parameter_groups(net.encoder, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decayed["params"]) and any(p is net.encoder.embed.weight for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.encoder.parameters()))


def crystal_batch(seed=0, crystals=6):
    "Random sites of two to four elements, and one pure element."
    g = np.random.default_rng(seed)
    counts = torch.tensor([*g.integers(2, 12, crystals - 1), 4])
    numbers = [torch.tensor(g.permutation([*range(3, 5), *g.integers(3, 7, int(n) - 2)])) for n in counts[:-1]] + [torch.full((4,), 29)]
    n = int(counts.sum())
    edge = torch.tensor(g.integers(0, n, (2, 6 * n)))
    vector = torch.tensor(g.normal(0, 2, (6 * n, 3)), dtype=torch.float32)
    return {"numbers": torch.cat(numbers), "counts": counts, "graph": torch.arange(crystals).repeat_interleave(counts), "edge_index": edge, "vector": vector, "distance": vector.norm(dim=1)}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_shuffles_keep_composition_and_always_move_something(seed, fraction):
    b, g = crystal_batch(seed), torch.Generator().manual_seed(seed)
    chosen = choose_sites(b["numbers"], b["graph"], b["counts"], fraction, g)
    new = shuffled(b["numbers"], b["graph"], chosen, g)
    alien = foreign(b["numbers"], b["graph"], chosen, torch.full((119,), 1 / 119), g)
    for k in range(len(b["counts"])):
        here = b["graph"] == k
        before, after = b["numbers"][here], new[here]
        assert sorted(before.tolist()) == sorted(after.tolist())
        one_element = len(set(before.tolist())) == 1
        assert ((before != after).sum() == 0) if one_element else ((before != after).sum() >= 2)
        assert not set(alien[here & chosen].tolist()) & set(before.tolist())
        assert int(chosen[here].sum()) == (0 if one_element else max(2, round(fraction * int(b["counts"][k]))))


@pytest.mark.parametrize("make", [lambda w: ElementShuffling(w), lambda w: ElementShuffling(w, foreign=True), lambda w: CoordinateDenoising(w),
                                  lambda w: Mixed([ElementShuffling(w), CoordinateDenoising(w)], [1, 0.3])])
def test_crystal_objectives_train_and_leave_the_batch_alone(make):
    net = from_scratch("crystal_graph", "crystal_gnn", seed=0, width=32, depth=2)
    torch.manual_seed(0)
    objective, batch = make(32), crystal_batch()
    before = {k: v.clone() for k, v in batch.items()}
    parameters = [*net.encoder.train().parameters(), *objective.parameters()]
    opt, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for _ in range(40):
        out = objective(net.encoder, batch, torch.Generator().manual_seed(7))
        opt.zero_grad()
        out["loss"].backward()
        assert all(p.grad is not None for p in parameters)
        opt.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(v, batch[k]) for k, v in before.items())
    assert all(not v.requires_grad for k, v in out.items() if k != "loss")


def test_validation_does_not_depend_on_the_batch_size_for_one_record_batches():
    net, objective, items = small()
    a, b = (evaluate_objective(net.encoder, objective, net.representation, items[:1], batch_size=n) for n in (1, 8))
    assert a == b
