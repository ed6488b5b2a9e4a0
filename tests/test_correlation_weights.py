"""Correlation weights: attributes, sets, a search that never loses, thresholds that block, and a model that finds planted weights."""
import numpy as np
import pytest

from matfm.core import BadInput
from matfm.data.records import molecules
from matfm.evaluate.correlation_weights import Attributes, Coral, Parts, Search, attributes, correlation, correlation_weights, hard, ideality, one_pass, smiles_atoms
from matfm.evaluate.metrics import r2

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS, MIDDLES = ["C", "O", "N", "Cl", "F", "S", "Br", "[NH3+]"], ["C", "CC", "C=C", "CCC", "c1ccc(cc1)", "C(=O)", "C(C)"]
SMILES = [f"{a}{m}{b}" for a in ENDS for m in MIDDLES for b in ENDS if b != "[NH3+]"]


def planted(seed=0):
    "A property that is a sum over symbols, with a little noise."
    rng = np.random.default_rng(seed)
    known = Attributes.of(SMILES, 1, ["atoms"])
    effect = rng.normal(size=len(known.names))
    return known, effect, known.counts(SMILES) @ effect + 0.05 * rng.normal(size=len(SMILES))


def test_symbols_join_to_the_string():
    for s in [*SMILES, "C%12CC%12[C@@H](N)Cl"]:
        assert "".join(smiles_atoms(s)) == s.replace(")", "(")
        assert sum(attributes(s, ["atoms"]).values()) == len(smiles_atoms(s)) and sum(attributes(s, ["pairs"]).values()) == len(smiles_atoms(s)) - 1
    assert hard("CBr")[0] == "BOND:-" and "HALO:Br" in hard("CBr") and "HALO:-" in hard("[Na]")


@pytest.mark.parametrize("kind", ["tf0", "tf1"])
def test_the_search_never_loses(kind):
    _, _, y = planted()
    search = Search(target_function=kind)
    parts, known = Parts.deal(y, 0), Attributes.of(SMILES, 3)
    A, w, rng = known.counts(SMILES), np.ones(len(known.names)), np.random.default_rng(0)
    values = [float(parts.objective((A @ w)[None], search)[0])]
    for _ in range(3): values.append(one_pass(A, w, parts, search, 1.0, rng))
    assert all(b >= a for a, b in zip(values, values[1:], strict=False)) and values[-1] > values[0]
    assert values[-1] == pytest.approx(float(parts.objective((A @ w)[None], search)[0]))


def test_planted_weights_are_found():
    known, effect, y = planted()
    model = correlation_weights(SMILES[::2], y[::2], Search(kinds=("atoms",), thresholds=(1,), epochs=40))
    assert r2(y[1::2], model(SMILES[1::2])) > 0.9
    found = dict(zip(model.attributes.names, model.slope * model.weights, strict=True))
    ends = [n for n in known.names if n in ("Cl", "Br", "F", "O", "N", "S")]
    assert np.corrcoef([found[n] for n in ends], [effect[known.names.index(n)] for n in ends])[0, 1] > 0.9


def test_the_three_sets():
    y = np.random.default_rng(0).normal(size=203)
    parts = Parts.deal(y, 3)
    rows = np.concatenate([parts.active, parts.passive, parts.calibration])
    assert sorted(rows) == list(range(203)) and abs(len(parts.active) - 101) <= 1 and abs(len(parts.passive) - len(parts.calibration)) <= 1
    classes = Parts.deal((y > 0.5).astype(float), 0)  # equal values are dealt at random
    assert 0 < (y > 0.5)[classes.calibration].mean() < 1 and not np.array_equal(np.diff(classes.active), np.diff(classes.active)[::-1])


def test_rare_and_unknown_attributes_weigh_nothing():
    _, _, y = planted()
    model = correlation_weights(SMILES, y, Search(thresholds=(4,), epochs=2))
    assert "[Se]" not in model.attributes.names and model.dcw(["[Se]"]) == model.dcw(["[Te]"])
    active = [SMILES[i] for i in Parts.deal(y, 0).active]
    assert all(sum(a in attributes(s) for s in active) >= 4 for a in model.attributes.names)


def test_statistics_of_constants():
    y = np.array([1.0, 2.0, 4.0])
    assert correlation(np.ones(3), y) == 0 and ideality(y, y) == 0 == ideality(np.full(3, 9.0), y)  # no error at all has no balance
    assert ideality(np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(-0.577350269189626)  # of the original program, in the tests of yardstick
    assert ideality(y + np.array([0.1, -0.1, 0.0]), y) == pytest.approx(correlation(y + np.array([0.1, -0.1, 0.0]), y) * 0.05 / 0.1)


def test_baseline_is_deterministic_and_takes_few_rows():
    rows, _ = molecules(SMILES[::4], {"a": list(planted()[2][::4])}, {"a": ""})
    options = dict(deals=2, epochs=3, thresholds=(2,))
    first, second = (Coral(**options).fit(rows, "a").predict(rows, return_std=True) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) and (first[1] > 0).all()
    assert not np.array_equal(Coral(seed=5, **options).fit(rows, "a").predict(rows), first[0])
    four = Coral().fit(rows.take(np.arange(4)), "a")
    assert np.allclose(four.predict(rows), rows.take(np.arange(4)).y("a").mean())
    with pytest.raises(BadInput): Search(thresholds=())
    with pytest.raises(BadInput): Search(step=0)
    with pytest.raises(BadInput, match="≥ 1"): Attributes.of(["C"], 0)
