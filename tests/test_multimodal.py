"""Crystals and their other views: losses against a plain loop, missing modalities, any crystal encoder, exact continuation."""
import numpy as np
import pytest

from matfm.core import BadInput
from matfm.data.records import Crystal

pytestmark = pytest.mark.usefixtures("one_thread")


def crystal(k: int) -> Crystal:
    rng = np.random.default_rng(k)
    return Crystal(np.diag(rng.uniform(3.5, 5, 3)), [3 + k, 8 + k % 2], [[0, 0, 0], 0.4 + 0.2 * rng.random(3)])


@pytest.fixture(scope="module")
def made():
    "Views, items of eight crystals (two without a pattern, four with a density of states), batch."
    from matfm.pretrain.multimodal import HAS, CrystalViews, with_views
    views = CrystalViews(("xrd", "text", "dos"), cutoff=5.0, max_neighbors=8, bins=64, length=64, points=64)
    items = [views(crystal(k)) for k in range(8)]
    rng = np.random.default_rng(0)
    items = [with_views(i, views, {"dos": rng.normal(size=(64, 2))} if k < 4 else {}) for k, i in enumerate(items)]
    items = [{**i, HAS["xrd"]: np.array(k > 1)} for k, i in enumerate(items)]
    return views, items, views.collate(items)


def net(views):
    from matfm.models.zoo import from_scratch
    return from_scratch(views.graph, "crystal_gnn", width=16, depth=1)


def test_loss_is_that_of_a_plain_loop(made):
    import torch

    from matfm.pretrain.multimodal import HAS, Multimodal, placed
    views, _, batch = made
    encoder = net(views).encoder
    objective = Multimodal.for_encoder(encoder, views, space=8, inner=16, all_pairs=True, noise=0.0, hide=0.0, temperature=0.2)
    with torch.no_grad():
        loss = float(objective(encoder, batch)["loss"])
        z = {m: v.double().numpy() for m, v in placed(objective, encoder, batch).items()}
    known = {"crystal": np.ones(8, bool), **{m: batch[HAS[m]].numpy() for m in ("xrd", "text", "dos")}}
    by_hand, names = [], list(z)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            rows = np.flatnonzero(known[a] & known[b])
            each = []
            for one, other in ((a, b), (b, a)):
                for r in rows:
                    scores = np.array([z[one][r] @ z[other][s] / 0.2 for s in rows])
                    each.append(np.log(np.exp(scores).sum()) - scores[list(rows).index(r)])
            by_hand.append(np.mean(each))
    assert len(by_hand) == 6 and loss == pytest.approx(np.mean(by_hand), abs=1e-5)


def test_what_stands_for_an_unknown_modality_does_not_matter(made):
    import torch

    from matfm.pretrain.multimodal import HAS, KEYS, Multimodal
    views, _, batch = made
    encoder = net(views).encoder
    objective = Multimodal.for_encoder(encoder, views, space=8, inner=16)
    other = {**batch, KEYS["dos"]: torch.where(batch[HAS["dos"]][:, None, None], batch[KEYS["dos"]], 7.0)}
    losses = [objective(encoder, b, torch.Generator().manual_seed(1))["loss"] for b in (batch, other)]
    assert losses[0].item() == losses[1].item()
    losses[1].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_nobody_has_it_nothing_breaks(made):
    import torch

    from matfm.pretrain.multimodal import HAS, Multimodal
    views, items, _ = made
    encoder = net(views).encoder
    objective = Multimodal.for_encoder(encoder, views, space=8, inner=16)
    batch = views.collate([{**i, **{HAS[m]: np.array(False) for m in views.modalities}} for i in items])
    out = objective(encoder, batch, torch.Generator().manual_seed(0))
    out["loss"].backward()
    assert out["loss"].item() == 0 and np.isnan(out["xrd_loss"].item())


@pytest.mark.parametrize("name", ["crystal_gnn", "sitenet", "potnet"])
def test_any_encoder_of_crystals(name):
    import torch

    from matfm.models.zoo import from_scratch
    from matfm.pretrain.multimodal import CrystalViews, Multimodal
    from matfm.registry import encoders
    views = CrystalViews(bins=64, length=64, crystal=encoders.get(name).representation)
    batch, encoder = views.collate([views(crystal(k)) for k in range(4)]), from_scratch(views.graph, name, width=16, depth=1).encoder
    objective = Multimodal.for_encoder(encoder, views, space=8, inner=16)
    objective(encoder, batch, torch.Generator().manual_seed(0))["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in encoder.parameters()) and objective.log_scale.grad.abs() > 0


def test_cut_off_and_continued_is_the_same(made, tmp_path):
    import torch

    from matfm.models.zoo import Pretrained
    from matfm.pretrain import training
    from matfm.pretrain.multimodal import Multimodal
    views, items, _ = made
    start = Pretrained(net(views).encoder, views)
    torch.manual_seed(0)
    objective = Multimodal.for_encoder(start.encoder, views, space=8, inner=16)
    spec = training.PretrainSpec(steps=6, batch_size=4, log_every=2, valid_every=0, checkpoint_every=2, threads=1, accelerator="cpu")
    whole = training.pretrain(start, objective, items, spec, progress=False)

    class Cut(Exception): pass
    save = training.KeeperHooks.save
    def once(self, trainer, module):
        save(self, trainer, module)
        if module.step == 4: raise Cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.KeeperHooks, "save", once)
        with pytest.raises(Cut): training.pretrain(start, objective, items, spec, out=tmp_path, progress=False)
    rest = training.pretrain(start, objective, items, spec, out=tmp_path, progress=False)
    assert rest.history == whole.history
    for a, b in zip((*whole.pretrained.encoder.parameters(), *whole.objective.parameters()), (*rest.pretrained.encoder.parameters(), *rest.objective.parameters()), strict=True):
        assert bool((a == b).all())


def test_no_modality_at_inference(made):
    from matfm.adapt.finetune import embed_items
    from matfm.models.zoo import Pretrained
    from matfm.pretrain.multimodal import without_modalities
    views, items, _ = made
    p = Pretrained(net(views).encoder, views)
    plain = without_modalities(p)
    assert np.allclose(embed_items(plain, [plain.representation(crystal(k)) for k in range(8)]), embed_items(p, items), atol=1e-6)
    with pytest.raises(BadInput): without_modalities(plain)


def test_ranks():
    from matfm.pretrain.multimodal import ranks
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(20, 5)), rng.normal(size=(20, 5))
    by_hand = [1 + sum(query[k] @ gallery[j] > query[k] @ gallery[k] for j in range(20)) for k in range(20)]
    assert ranks(query, gallery).tolist() == by_hand


@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(noise=-1.0), dict(hide=1.0), dict(shapes={"smell": (3,)})])
def test_refuses_nonsense(options):
    from matfm.pretrain.multimodal import Multimodal
    with pytest.raises(BadInput): Multimodal(**{"width": 8, "shapes": {"xrd": (64,)}, **options})
