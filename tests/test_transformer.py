"""Transformers: old checkpoints give the old numbers, padding never matters, a cache changes nothing, sampling follows the model, runs resume."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from matfm.core import BadInput
from matfm.models.layers import attend, attend_linear, attend_padded, attend_runs, segments
from matfm.models.sampling import SamplingSpec, beam_search, draw, probabilities, sample, write
from matfm.models.transformer import Seq2Seq, TransformerDecoder, TransformerEncoder, extend, new_cache, pack
from matfm.models.zoo import from_scratch, load_pretrained, save_pretrained
from matfm.pretrain.language import DenoiseSpans, DescriptorTargets, MaskedTokens, NextToken, choose_spans, cut_out
from matfm.pretrain.objectives import Mixed
from matfm.pretrain.training import PretrainSpec, pretrain

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", "CCO", "CC(C)Cc1ccc(cc1)[C@@H](C)C(=O)O", "C1CCCCC1", "[Na+].[Cl-]", "CC#N"]
STYLES = [dict(), dict(norm="rms", feed_forward="swiglu", pool="mean"), dict(norm="rms", pool="cls")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded(): torch.manual_seed(0)


@pytest.fixture(scope="module")
def smiles():
    from matfm.represent.sequence import SmilesTokens
    return SmilesTokens.default()


def batch_of(smiles, texts=SMILES):
    return smiles.collate([smiles(s) for s in texts])


def livelier(model, scale=5.0):
    "Larger weights, so that attention is far from uniform and a mistake is seen."
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.mul_(scale)
    return model.eval()


# ---- the numbers of old checkpoints ----------------------------------------------------------------------------------

def written_out(config, w, tokens):
    "One record, its tokens [L], through a pre-norm transformer as the textbook has it: states [L, d]."
    d, h, n = config["width"], config["heads"], len(tokens)
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    def norm(x, name):
        if config["norm"] == "rms": return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
    angle = torch.outer(torch.arange(n).double(), 10_000.0 ** (-torch.arange(0, d // h, 2).double() / (d // h))).float()
    def turned(x):  # [h, L, d/h], channel i paired with channel i + d/2h
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    x = w["embed.weight"][tokens]
    for k in range(config["depth"]):
        q, k_, v = linear(norm(x, f"blocks.{k}.norm1"), f"blocks.{k}.attention.qkv").view(n, 3, h, d // h).permute(1, 2, 0, 3)
        weight = (turned(q) @ turned(k_).transpose(1, 2) / (d // h) ** 0.5).softmax(-1)
        x = x + linear((weight @ v).transpose(0, 1).reshape(n, d), f"blocks.{k}.attention.out")
        y = linear(norm(x, f"blocks.{k}.norm2"), f"blocks.{k}.feed_forward.up")
        if config["feed_forward"] == "swiglu":
            gate, y = y.chunk(2, -1)
            y = gate * gate.sigmoid() * y
        else: y = F.gelu(y)
        x = x + linear(y, f"blocks.{k}.feed_forward.down")
    return norm(x, "norm")


def same_as_written_out(encoder, smiles):
    out, w = encoder(batch_of(smiles)), encoder.state_dict()
    for k, s in enumerate(SMILES):
        tokens = torch.tensor(smiles(s)["tokens"])
        states = written_out(encoder.config, w, tokens)
        embedding = states[0] if encoder.config["pool"] == "cls" else states.mean(0)
        torch.testing.assert_close(out.states[k, :len(tokens)], states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.embedding[k], embedding, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_encoder_is_what_the_formulas_say(style, smiles):
    with torch.no_grad(): same_as_written_out(livelier(TransformerEncoder(168, 48, 3, 4, **style), 3.0), smiles)


def test_shipped_checkpoint_gives_its_numbers():
    p = load_pretrained("matfm-smiles-small")
    with torch.no_grad(): same_as_written_out(p.encoder, p.representation)


@pytest.mark.parametrize("style", STYLES)
def test_names_of_weights_are_those_of_shipped_checkpoints(style):
    parts = ["norm1", "norm2", "attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"]
    bias = lambda part: style.get("norm") != "rms" or "norm" not in part
    names = {"embed.weight"} | {f"{n}.{k}" for n in ["norm", *(f"blocks.{i}.{p}" for i in range(2) for p in parts)] for k in ("weight", "bias") if k == "weight" or bias(n)}
    assert set(TransformerEncoder(20, 16, 2, 2, **style).state_dict()) == names


def test_a_configuration_without_the_newer_arguments_still_builds(smiles, tmp_path):
    import json
    p = from_scratch(smiles, "transformer", width=16, depth=1, heads=2)
    folder = save_pretrained(tmp_path / "m", p)
    config = json.loads((folder / "config.json").read_text())
    del config["encoder"]["attention"]
    (folder / "config.json").write_text(json.dumps(config))
    batch = batch_of(smiles)
    assert torch.equal(load_pretrained(folder).encoder(batch).embedding, p.encoder(batch).embedding)


# ---- padding ---------------------------------------------------------------------------------------------------------

MODELS = {"encoder": lambda: TransformerEncoder(168, 48, 2, 4), "linear": lambda: TransformerEncoder(168, 48, 2, 4, attention="linear"),
          "decoder": lambda: TransformerDecoder(168, 48, 2, 4, norm="rms"), "seq2seq": lambda: Seq2Seq(168, 48, 1, 4)}


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_padded(name, smiles):
    "States, embeddings and gradients, whatever else stands in the batch and however much padding there is."
    model, batch = livelier(MODELS[name](), 3.0), batch_of(smiles)
    wider = {"tokens": F.pad(batch["tokens"], (0, 9)), "mask": F.pad(batch["mask"], (0, 9))}
    grads, outs, weight = [], [], None
    for form in (batch, pack(batch), wider):
        out = model(form)
        states = out.states[out.mask]
        weight = torch.randn_like(states) if weight is None else weight
        model.zero_grad(); (states * weight).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()]); outs.append((states.detach(), out.embedding.detach()))
    for g, o in zip(grads[1:], outs[1:], strict=True):
        for a, b in zip((*g, *o), (*grads[0], *outs[0]), strict=True): torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("causal", [False, True])
def test_ways_of_attention_agree(seed, causal):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (7,), generator=g).sort().values if seed % 2 else torch.randint(1, 12, (7,), generator=g)
    others = lengths if causal else torch.randint(1, 9, (7,), generator=g)
    at, to = (segments(torch.arange(12) < n[:, None]) for n in (lengths, others))
    q, k, v = (torch.randn(int(n.sum()), 2, 4, generator=g) for n in (lengths, others, others))
    a, b = attend_runs(q, k, v, at, to, causal), attend_padded(q, k, v, at, to, causal)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert torch.equal(attend(q, k, v, at, to, causal), a)
    last = torch.softmax(q[-1:].transpose(0, 1) @ k[-int(others[-1]):].permute(1, 2, 0) / 2, -1) @ v[-int(others[-1]):].transpose(0, 1)
    torch.testing.assert_close(a[-1], last[:, 0], atol=1e-5, rtol=1e-5)


def test_linear_attention_sees_its_record_alone():
    at = segments(torch.arange(9) < torch.tensor([9, 4])[:, None])
    q, k, v = (torch.randn(13, 2, 8) for _ in range(3))
    before = attend_linear(q, k, v, at)
    v[9:] += 1
    after = attend_linear(q, k, v, at)
    assert torch.equal(before[:9], after[:9])
    torch.testing.assert_close(after[9:], before[9:] + 1, atol=1e-5, rtol=1e-5)  # weights sum to one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [False, True])
def test_kernel_of_records_end_to_end(causal):
    mask = torch.arange(60, device="cuda") < torch.randint(1, 61, (20, 1), device="cuda")
    at = segments(mask)
    q, k, v = (torch.randn(int(mask.sum()), 4, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, at, at, causal), attend_padded(q, k, v, at, at, causal), atol=0.03, rtol=0.03)


# ---- cache -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_cached_is_uncached(seed):
    g = torch.Generator().manual_seed(seed)
    model, tokens = livelier(TransformerDecoder(20, 32, 3, 4, norm="rms", feed_forward="swiglu"), 3.0), torch.randint(5, 20, (3, 11), generator=g)
    whole = model({"tokens": tokens, "mask": tokens > 0}).states
    cuts = sorted({0, 11, *torch.randint(1, 11, (3,), generator=g).tolist()})
    cache = new_cache(model, 3, 11)
    for n, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if n == 1: tokens, whole = tokens[[2, 0]], whole[[2, 0]]; cache.select(torch.tensor([2, 0]))
        torch.testing.assert_close(extend(model, tokens[:, a:b], cache), whole[:, a:b], atol=1e-5, rtol=1e-4)


def test_cached_is_uncached_with_a_source(smiles):
    model, source = livelier(Seq2Seq(168, 32, 2, 4), 3.0), batch_of(smiles)
    target = torch.randint(5, 100, (len(SMILES), 7))
    with torch.no_grad():
        whole = model(source, {"tokens": target, "mask": target > 0}).states
        cache = new_cache(model.decoder, len(SMILES), 7, model.encoder(source))
        some = torch.tensor([4, 1, 1])
        first = extend(model.decoder, target[:, :3], cache)
        cache.select(some)
        rest = torch.cat([extend(model.decoder, target[some, k:k + 1], cache) for k in range(3, 7)], 1)
    torch.testing.assert_close(first, whole[:, :3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rest, whole[some, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["transformer_decoder", "seq2seq"])
def test_saved_models_write_the_same(name, smiles, tmp_path):
    p = from_scratch(smiles, name, seed=1, width=16, depth=1, heads=2)
    q = load_pretrained(save_pretrained(tmp_path / "m", p))
    u, prompt = torch.rand(4, 9), torch.full((4, 1), smiles.cls_id)
    source = lambda m: m.encoder(batch_of(smiles, SMILES[:4])) if name == "seq2seq" else None
    a, b = (write(m.encoder, prompt, u, SamplingSpec(max_length=10), source=source(m.encoder)) for m in (p, q))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- sampling --------------------------------------------------------------------------------------------------------

def test_draws_follow_the_probabilities():
    p = torch.tensor([0.0, 0.1, 0.25, 0.0, 0.65, 0.0])
    n = 20_000
    counts = torch.bincount(draw(p.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(1))), minlength=6)
    assert counts[p == 0].sum() == 0
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_first_tokens_of_samples_follow_the_model(smiles):
    model = livelier(TransformerDecoder(168, 16, 1, 2), 8.0)
    spec, n, prompt = SamplingSpec(temperature=0.8, top_p=0.9, max_length=2), 4000, torch.full((4000, 1), smiles.cls_id)
    out = write(model, prompt, torch.rand(n, 1, generator=torch.Generator().manual_seed(0)), spec)
    with torch.no_grad(): logits = model.logits(model({"tokens": prompt[:1], "mask": prompt[:1] > 0}).states[:, 0])
    logits[:, [0, 1, 3, 4]] = -torch.inf
    p = probabilities(logits, spec)[0]
    share = torch.bincount(out.tokens[:, 1], minlength=168) / n
    assert 0 < (p > 0).sum() < 164 and share[p == 0].sum() == 0
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


@pytest.mark.parametrize("spec", [SamplingSpec(max_length=30), SamplingSpec(temperature=0.7, top_k=9, max_length=30), SamplingSpec(top_p=0.8, max_length=30)])
def test_what_is_written_depends_on_the_seed_alone(spec, smiles):
    few = type(smiles).fit(SMILES)  # so few tokens that the end is likely enough
    model = livelier(TransformerDecoder(few.vocab_size, 32, 2, 2), 2.0)
    a, b, c = sample(model, few, 50, spec), sample(model, few, 50, spec, batch_size=7), sample(model, few, 50, spec, seed=1)
    assert a.texts == b.texts and a.texts != c.texts and len(a.texts) + a.cut_off == 50 and 10 < len(a.texts)
    assert not any(name in t for t in a.texts for name in few.vocab[:5])
    np.testing.assert_allclose(a.log_p, b.log_p, atol=1e-3)


def test_a_beam_of_one_is_greedy_and_a_wider_one_no_worse(smiles):
    model, begin = livelier(TransformerDecoder(168, 32, 2, 2), 6.0), torch.tensor([[1, 6], [1, 9], [1, 20]])
    line = write(model, begin, torch.zeros(3, 10), SamplingSpec(temperature=0, max_length=12))
    one, p = beam_search(model, begin, 1, 12)
    assert torch.equal(one[:, 0], line.tokens)
    torch.testing.assert_close(p[:, 0], line.log_p, atol=1e-3, rtol=1e-3)
    wide, q = beam_search(model, begin, 6, 12)
    assert (q.diff(dim=1) <= 0).all() and all(len({tuple(t) for t in rows}) == 6 for rows in wide.tolist())


# ---- objectives ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_spans_put_back_give_the_record(seed, smiles):
    batch, g = batch_of(smiles), torch.Generator().manual_seed(seed)
    chosen = choose_spans(batch["mask"] & (batch["tokens"] > 4), 0.3, 2.0, g)
    assert chosen.any(1).all() and not (chosen & ~batch["mask"]).any()
    source, target = cut_out(batch["tokens"], batch["mask"], chosen, smiles.mask_id, smiles.eos_id)
    for k, s in enumerate(SMILES):
        spans, whole = target["tokens"][k][target["mask"][k]].tolist(), []
        assert spans[0] == smiles.mask_id and spans[-1] == smiles.eos_id
        pieces = iter("".join(chr(t) for t in spans[:-1]).split(chr(smiles.mask_id))[1:])
        for t in source["tokens"][k][source["mask"][k]].tolist(): whole += map(ord, next(pieces)) if t == smiles.mask_id else [t]
        assert whole == smiles(s)["tokens"].tolist() and next(pieces, None) is None


def test_unknown_descriptors_teach_nothing(smiles):
    model, batch = TransformerEncoder(168, 16, 1, 2), batch_of(smiles)
    objective = DescriptorTargets(16, [0.0, 10.0], [1.0, 5.0])
    aux = torch.randn(len(SMILES), 2)
    aux[:, 1] = torch.nan
    objective(model, {**batch, "aux": aux})["loss"].backward()
    grad = objective.head[-1].weight.grad
    assert grad[0].any() and not grad[1].any() and grad.isfinite().all()
    out = objective(model, {**batch, "aux": torch.full_like(aux, torch.nan)})
    assert out["loss"].item() == 0 and int(out["count"]) == 0


def made(name, smiles):
    torch.manual_seed(0)
    net = from_scratch(smiles, {"next_token": "transformer_decoder", "denoise_spans": "seq2seq"}.get(name, "transformer"), seed=0, width=16, depth=1, heads=2, dropout=0.1)
    if name == "next_token": return net, NextToken.for_encoder(net.encoder, smiles, hide=0.1, ahead=2)
    if name == "denoise_spans": return net, DenoiseSpans.for_encoder(net.encoder, smiles)
    masked = MaskedTokens.for_encoder(net.encoder, smiles)
    return net, masked if name == "masked_tokens" else Mixed([masked, MaskedTokens.for_encoder(net.encoder, smiles, p=0.4)], [1.0, 0.3])


@pytest.mark.parametrize("name", ["next_token", "denoise_spans", "mixed"])
def test_cut_off_runs_continue_bit_for_bit(name, smiles, tmp_path, monkeypatch):
    items, spec = [smiles(s) for s in SMILES], PretrainSpec(steps=9, batch_size=3, lr=1e-3, log_every=1, valid_every=0, checkpoint_every=4, accelerator="cpu", threads=1)
    net, objective = made(name, smiles)
    whole = pretrain(net, objective, items, spec, tmp_path / "whole", progress=False)
    forward, calls = type(objective).forward, []

    def fails(self, *a):
        calls.append(1)
        if len(calls) == 7: raise KeyError("power cut")
        return forward(self, *a)

    with monkeypatch.context() as m:
        m.setattr(type(objective), "forward", fails)
        with pytest.raises(KeyError): pretrain(net, objective, items, spec, tmp_path / "cut", progress=False)
    resumed = pretrain(net, objective, items, spec, tmp_path / "cut", progress=False)
    assert resumed.history == whole.history and resumed.steps == 9
    for a, b in ((resumed.pretrained.encoder, whole.pretrained.encoder), (resumed.objective, whole.objective)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_models_that_do_not_fit_are_refused(smiles):
    encoder, batch = TransformerEncoder(168, 16, 1, 2), batch_of(smiles)
    with pytest.raises(BadInput, match="does not look ahead"): NextToken(16, 168)(encoder, batch)
    with pytest.raises(BadInput, match="an encoder with a decoder"): DenoiseSpans(16, 168)(encoder, batch)
    with pytest.raises(BadInput, match="unknown attention"): TransformerEncoder(168, attention="sparse")
