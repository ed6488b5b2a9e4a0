"""Probabilistic heads and processes: likelihoods against scipy and scikit-learn, known noise found again, mixtures, several outputs, bad input, round trips."""
import numpy as np
import pytest
import scipy.stats
import torch

from matfm.adapt.finetune import Ensemble, FinetuneSpec, Labelled, Ready, Vectors, finetune
from matfm.adapt.probabilistic import (LEVELS, PARAMETERS, DistributionHeads, Forecast, GaussianProcessModel, Probabilistic, constrained, distribution_loss, fit_distribution, fit_gp,
                                       fit_gp_model, fit_labelled_distribution, forecast, forecast_items, load_distribution)
from matfm.core import BadInput
from matfm.data.records import Rejected, molecules
from matfm.models.heads import Output, Task
from matfm.models.zoo import Pretrained, from_scratch

SPEC = FinetuneSpec(epochs=20, head_lr=2e-2, batch_size=64, hidden=16, dropout=0.0, patience=6, accelerator="cpu", threads=1)
START = Pretrained(Ready(2), Vectors())


def noisy(n, seed, columns=1):
    "Two features: the first is the mean, the second says which half is four times as noisy."
    rng = np.random.default_rng(seed)
    x, loud = rng.normal(size=n), rng.integers(0, 2, n)
    sd = np.where(loud == 1, 2.0, 0.5)
    y = 10 + 3 * x + sd * rng.normal(size=n)
    E = np.column_stack([x, loud]).astype(np.float32)
    return Labelled(Vectors(), [{"embedding": e} for e in E], np.column_stack([y] * columns), Rejected.empty()), E, y, sd


@pytest.fixture(scope="module")
def sets(): return noisy(600, 0), noisy(200, 1), noisy(500, 2)


@pytest.mark.parametrize("kind", PARAMETERS)
def test_known_spread_is_found(kind, sets):
    (train, *_), (valid, *_), (test, E, y, sd) = sets
    m = fit_labelled_distribution(START, Task((Output("y"),)), train, valid, kind, SPEC)
    f = forecast_items(m, test.items)
    loud, quiet = (np.median(f.std[sd == s, 0]) for s in (2.0, 0.5))
    assert loud / quiet > 2 and 1.4 < loud < 2.8 and 0.35 < quiet < 0.9
    low, high = (v[:, 0] for v in f.interval(0.9))
    for s in (2.0, 0.5): assert 0.82 < ((low <= y) & (y <= high))[sd == s].mean() <= 0.99
    assert np.abs(f.mean[:, 0] - y).mean() < 1.15 * np.abs(y - (10 + 3 * E[:, 0])).mean()
    assert (f.epistemic > 0).all() == (kind == "evidential")


def test_likelihoods_are_those_of_scipy():
    torch.manual_seed(0)
    raw, y = torch.randn(50, 4, 2), torch.randn(50, 2)
    g, nu, alpha, beta = (v.numpy() for v in constrained("evidential", raw))
    assert np.allclose(distribution_loss("evidential", raw, y), -scipy.stats.t.logpdf(y, 2 * alpha, g, np.sqrt(beta * (1 + nu) / nu / alpha)), atol=1e-4)
    for kind, p in PARAMETERS.items():
        raw = torch.randn(20, p, 1, requires_grad=True)
        distribution_loss(kind, raw, torch.randn(20, 1) * 100, train=True).sum().backward()
        assert torch.isfinite(raw.grad).all(), f"{kind}: gradient far from the data"


def test_weights_of_rows_do_not_move_the_optimum():
    "Weighted by the spread or not, mean 0 and spread 1 are where the gradient over standard normal rows vanishes."
    y = torch.tensor(scipy.stats.norm.ppf((np.arange(4000) + 0.5) / 4000), dtype=torch.float32)[:, None]
    raw = torch.zeros(1, 2, 1, requires_grad=True)
    distribution_loss("gaussian", raw.expand(4000, 2, 1), y, train=True).mean().backward()
    assert raw.grad.abs().max() < 5e-3


def test_a_mixture_has_the_variance_of_a_mixture():
    (train, *_), (valid, *_) = noisy(80, 0), noisy(40, 1)
    parts = [fit_labelled_distribution(START, Task((Output("y"),)), train, valid, "gaussian", SPEC.replace(epochs=2, seed=s)) for s in (0, 1, 2)]
    each, f = [forecast_items(m, valid.items) for m in parts], forecast_items(Ensemble(parts), valid.items)
    assert np.allclose(f.mean, np.mean([e.mean for e in each], 0)) and np.allclose(f.epistemic, np.std([e.mean for e in each], 0, ddof=1))
    assert np.allclose(f.std**2, np.mean([e.std**2 for e in each], 0) + f.epistemic**2)
    assert forecast_items(Ensemble(parts), []).mean.shape == (0, 1)


def test_missing_values_and_classes_beside_numbers():
    data, E, y, _ = noisy(200, 3, columns=2)
    data.y[:, 1] = E[:, 0] > 0
    data.y[::3, 0], data.y[1::3, 1] = np.nan, np.nan
    task = Task((Output("y", unit="eV"), Output("positive", "binary", weight=0.5)))
    for kind in PARAMETERS:
        m = fit_labelled_distribution(START, task, data, data, kind, SPEC.replace(epochs=6))
        f = forecast_items(m, data.items)
        p = f.mean[:, 1]
        assert ((p >= 0) & (p <= 1)).all() and p[E[:, 0] > 0.5].min() > p[E[:, 0] < -0.5].max() and np.allclose(f.std[:, 1], np.sqrt(p * (1 - p)))
        assert np.isfinite(f.quantile(0.9)[:, 0]).all()


def test_quantiles_do_not_cross_and_extrapolate():
    levels = tuple(sorted(LEVELS))
    f = Forecast(["y"], np.zeros((1, 1)), np.ones((1, 1)), np.zeros((1, 1)), None, levels, scipy.stats.norm.ppf(levels)[None, None])
    asked = np.linspace(0.005, 0.995, 60)
    found = [f.quantile(q)[0, 0] for q in asked]
    assert (np.diff(found) > 0).all() and np.allclose(found, scipy.stats.norm.ppf(asked), atol=1e-6)


def test_processes_agree_with_scikit_learn_after_its_own_search():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    _, E, y, _ = noisy(60, 4)
    new = noisy(20, 6)[1]
    gp = fit_gp(E, y)
    theirs = GaussianProcessRegressor(ConstantKernel(1.0) * Matern(1.0, nu=2.5) + WhiteKernel(0.1), n_restarts_optimizer=1, random_state=0).fit(gp.X, (y - gp.middle) / gp.spread)
    mean, std = theirs.predict((new - gp.mean) / gp.scale, return_std=True)
    m, s, _ = gp(new)
    assert np.allclose(m, gp.middle + gp.spread * mean, atol=0.02 * gp.spread) and np.allclose(s, gp.spread * std, rtol=0.03)


def test_a_process_without_noise_passes_through_its_points():
    x = np.linspace(-2, 2, 25)[:, None]
    gp = fit_gp(x, np.sin(2 * x[:, 0]))
    assert np.abs(gp(x)[0] - np.sin(2 * x[:, 0])).max() < 0.01 and gp(np.array([[30.0]]))[2][0] > 20 * gp(x)[2].max()
    assert np.isfinite(fit_gp(np.hstack([x, np.ones((25, 1))]), np.ones(25))(np.array([[0.0, 1.0]]))).all()  # a constant feature, a constant target


@pytest.fixture(scope="module")
def boiling():
    smiles = ["C" * k for k in range(3, 11)] + ["C" * k + "O" for k in range(1, 9)] + ["C" * k + "N" for k in range(1, 9)]
    y = np.array([25.0 * len(s) + 80 * ("O" in s) + 200 for s in smiles])
    return molecules(smiles, {"t": y}, units={"t": "K"})[0], from_scratch("smiles", "transformer", seed=0, width=16, depth=1, heads=2), Task((Output("t", unit="K"),))


def test_records_in_and_out(boiling, tmp_path):
    table, net, task = boiling
    spec = FinetuneSpec(epochs=2, batch_size=8, accelerator="cpu", threads=1, dropout=0.2)
    m = fit_distribution(net, task, table, table, "evidential", spec)
    asked, _ = molecules(["CCCCO", "C" * 400])
    f, rejected = forecast(m, asked)
    assert np.isfinite(f.std[0, 0]) and np.isnan([f.mean[1, 0], f.std[1, 0], f.dof[1, 0]]).all() and len(rejected) == 1
    frame, _ = m.predict(asked)
    assert frame.columns == ["id", "t", "t_std", "t_lower", "t_upper"] and {v.name for v in m.evaluate(table)} >= {"mae", "rmse"}
    m.save_pretrained(tmp_path / "a")
    assert Probabilistic.load(tmp_path / "a").predict(table)[0].equals(m.predict(table)[0])
    plain = finetune(net, task, table, table, spec)
    one, many = forecast(plain, table)[0], forecast(plain, table, passes=8)[0]
    assert (one.std == 0).all() and (many.epistemic > 0).all() and np.allclose(many.std, many.epistemic)
    plain.save_pretrained(tmp_path / "b")
    with pytest.raises(BadInput, match="without a distribution"): load_distribution(tmp_path / "b")
    with pytest.raises(BadInput, match="one pass with dropout"): forecast(plain, table, passes=1)


def test_a_process_on_records(boiling, tmp_path):
    table, net, task = boiling
    m = fit_gp_model(net, task, table)
    m.save_pretrained(tmp_path)
    assert GaussianProcessModel.load(tmp_path).predict(table)[0]["t"].to_numpy() == pytest.approx(m.predict(table)[0]["t"].to_numpy(), rel=1e-5)
    (tmp_path / "processes.safetensors").write_bytes((tmp_path / "processes.safetensors").read_bytes()[:-9])
    with pytest.raises(BadInput, match="cut off"): GaussianProcessModel.load(tmp_path)
    with pytest.raises(BadInput, match="for regression outputs"): fit_gp_model(net, Task((Output("t", "binary"),)), table)


def test_stacked_answers_the_same_call(boiling):
    from matfm.adapt.stacked import StackedSpec, fit_stacked
    table, _, _ = boiling
    made = fit_stacked(table, StackedSpec(members=("kernel",), encoder=""))
    f, _ = forecast(made, table)
    assert (f.std > 0).all() and f.mean[:, 0].tolist() == made.predict(table)[0]["t"].to_list()


def test_refusals():
    with pytest.raises(BadInput, match="did you mean 'quantile'"): DistributionHeads(4, Task((Output("y"),)), "quantiles")
    with pytest.raises(BadInput, match="5 to 6,000 rows"): fit_gp(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(BadInput, match="finite embeddings"): fit_gp(np.full((9, 1), np.nan), np.zeros(9))
    with pytest.raises(BadInput, match="no forecast from a int"): forecast(3, None)


def test_the_plain_reader_says_what_to_call(boiling, tmp_path):
    from matfm.adapt.finetune import load_model
    from matfm.adapt.probabilistic import load_deep_ensemble
    from matfm.adapt.tables import load_predictor
    table, net, task = boiling
    made = fit_distribution(net, task, table, table, "gaussian", FinetuneSpec(epochs=1, batch_size=8, accelerator="cpu", threads=1))
    made.save_pretrained(tmp_path / "one")
    Ensemble([made, made]).save_pretrained(tmp_path / "many")
    for read, folder in ((load_model, "one"), (load_predictor, "one"), (Ensemble.load, "many")):
        with pytest.raises(BadInput, match="load_distribution"): read(tmp_path / folder)
    assert len(load_deep_ensemble(tmp_path / "many")) == 2


def test_stacked_forecasts_are_its_own_errors_and_not_a_normal_distribution():
    from matfm.adapt.stacked import LIGHT, fit_stacked
    rng = np.random.default_rng(0)
    smiles = ["C" * a + x + "C" * b for a in range(1, 7) for b in range(7) for x in ("O", "N", "S", "C(=O)")]
    y = np.array([len(s) + rng.standard_t(2) for s in smiles])
    table, _ = molecules(smiles, {"y": y, "c": (y > np.median(y)).astype(float)})
    made = fit_stacked(table, LIGHT)
    f, _ = forecast(made, table)
    for level in (0.5, 0.9, 0.95):
        p = made.predict(table, level)[0]
        assert f.interval(level)[0][:, 0] == pytest.approx(p["y_lower"].to_numpy()) and f.interval(level)[1][:, 0] == pytest.approx(p["y_upper"].to_numpy())
    low, high = f.interval(0.5)
    assert (high[:, 0] - low[:, 0] < 1.3 * f.std[:, 0]).all(), "heavy tails: the middle half is narrower than a normal distribution's"
    assert np.isfinite(f.quantile(0.001)).all() and f.quantile(0.5) == pytest.approx(f.mean)
