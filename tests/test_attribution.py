"""Attribution: known truth for every method, nothing lost between parts and atoms, bad input refused, light at the door."""
import itertools
import math

import numpy as np
import pytest
import torch

from matfm.core import BadInput, MissingExtra, UnknownName
from matfm.explain import attribution as at
from matfm.explain.attribution import DescriptorModel, Game, Parts, cascade, explain, explain_all, hits, keep_atoms, molecule_parts, shapley
from matfm.represent.molecule import read_molecule

try: import shap  # noqa: F401
except ImportError: shap = None
needs_shap = pytest.mark.skipif(shap is None, reason="needs the extra 'explain'")


def toy(k, f): return Game(Parts("columns", tuple(map(str, range(k))), tuple((i,) for i in range(k))), f)


def by_orders(game, k):
    out = np.zeros(k)
    for order in itertools.permutations(range(k)):
        seen = np.zeros(k, bool)
        for i in order:
            before = game(seen[None])[0]
            seen[i] = True
            out[i] += game(seen[None])[0] - before
    return out / math.factorial(k)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 4))
    return X, np.array([2.0, -1.0, 0.0, 3.0])


@pytest.fixture(scope="module")
def forest(data):
    from sklearn.ensemble import RandomForestRegressor
    X, _ = data
    return DescriptorModel(RandomForestRegressor(10, max_depth=4, random_state=0).fit(X, X[:, 0] * X[:, 1] + X[:, 3]), X[:20])


@pytest.fixture(scope="module")
def linear(data):
    from sklearn.linear_model import LinearRegression
    X, w = data
    return DescriptorModel(LinearRegression().fit(X, X @ w + 1), X[:20])


def small(name, representation="molecule_graph", records=None, target="count", **config):
    "A model with random weights and a head that answers."
    from matfm.adapt.finetune import FinetuneSpec, Model
    from matfm.models.heads import Output, Task, make_predictor
    from matfm.models.zoo import from_scratch
    start = from_scratch(representation, name, seed=1, **config)
    predictor = make_predictor(start.encoder, Task((Output(target),)), np.array([[0.0], [1.0], [2.0]])).eval()
    with torch.no_grad(): predictor.heads.layers[-1].weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return Model(predictor, start.representation, FinetuneSpec(), [], [], {})


@pytest.fixture(scope="module")
def gnn(): return small("molecule_gnn", width=16, depth=2)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_shapley_is_the_mean_over_orders(k, seed):
    table = np.random.default_rng(seed).normal(size=2 ** k)
    game = toy(k, lambda m: table[m @ (1 << np.arange(k))])
    values, whole, none, _ = shapley(game)
    assert np.allclose(values, by_orders(game, k)) and np.isclose(values.sum(), whole - none)


def test_shapley_axioms():
    game = toy(4, lambda m: (m[:, 0] & m[:, 1]).astype(float) + 3.0 * m[:, 3])
    assert np.allclose(shapley(game)[0], [0.5, 0.5, 0, 3])  # symmetry, dummy, additivity


def test_linear_models_are_taken_apart_exactly(linear, data):
    X, w = data
    truth = w * (X[40] - X[:20].mean(0))
    for method in ("occlusion", "shapley"): assert np.allclose(explain(linear, X[40], method).values, truth), method
    assert np.allclose(explain(linear, X[40], "lime").values, truth, atol=0.05)
    assert abs(explain(linear, X[40], "shapley").gap) < 1e-9


@needs_shap
def test_shap_agrees_with_all_sets(linear, forest, data):
    X, w = data
    for row in (40, 41, 42):
        exact = explain(forest, X[row], "shapley")
        assert np.allclose(explain(forest, X[row], "tree_shap").values, exact.values, atol=1e-6)
        assert np.isclose(explain(forest, X[row], "tree_shap").baseline, exact.baseline)
        assert np.allclose(explain(forest, X[row], "kernel_shap").values, exact.values, atol=1e-6)
    assert np.allclose(explain(linear, X[40], "kernel_shap").values, w * (X[40] - X[:20].mean(0)), atol=1e-6)


@needs_shap
def test_tree_explainer_of_classes(data):
    from sklearn.ensemble import RandomForestClassifier
    X, _ = data
    model = DescriptorModel(RandomForestClassifier(8, max_depth=3, random_state=0).fit(X, X[:, 0] > 0), X[:15])
    assert np.allclose(explain(model, X[40], "tree_shap").values, explain(model, X[40], "shapley").values, atol=1e-6)


def test_a_missing_package_is_named(forest, data, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "shap", None)
    for method in ("tree_shap", "kernel_shap"):
        with pytest.raises(MissingExtra, match=r"pip install 'matfm\[explain\]'"): explain(forest, data[0][0], method)


@pytest.mark.parametrize("name,config", [("molecule_gnn", {"width": 16, "depth": 2}), ("graph_transformer", {"width": 16, "depth": 2, "heads": 2})])
def test_order_of_atoms_does_not_matter(name, config):
    from rdkit import Chem
    model, smiles = small(name, **config), "OCC(N)c1ccc(Cl)cc1"
    mol = Chem.MolFromSmiles(smiles)
    order = np.random.default_rng(3).permutation(mol.GetNumAtoms()).tolist()
    other = Chem.MolToSmiles(Chem.RenumberAtoms(mol, order), canonical=False)
    place = Chem.MolFromSmiles(other).GetSubstructMatches(mol, uniquify=False)
    for method in ("integrated_gradients", "gradient_input", "occlusion") + (("rollout",) if name == "graph_transformer" else ()):
        a, b = explain(model, smiles, method).atoms, explain(model, other, method).atoms
        assert min(np.abs(a - b[list(p)]).max() for p in place) < 1e-4 + 0.03 * np.abs(a).max(), method


@pytest.mark.parametrize("smiles", ["CCO", "c1ccccc1C(=O)O", "O", "C[N+](C)(C)CC(=O)[O-].O"])
def test_integrated_gradients_add_up(gnn, smiles):
    for base in (None, at.mean_embedding(gnn, ["CCO", "c1ccccc1"])):
        a = explain(gnn, smiles, base=base, tolerance=0.005)
        assert abs(a.gap) <= 0.005 * max(np.abs(a.values).sum(), 1e-3) + 1e-5, a
        by_group = explain(gnn, smiles, by="groups", base=base, tolerance=0.005)
        assert np.isclose(by_group.total, a.total, atol=1e-6)


def test_the_model_is_left_alone(gnn):
    before = {k: v.clone() for k, v in gnn.predictor.state_dict().items()}
    for method in ("integrated_gradients", "occlusion", "lime"): explain(gnn, "CCO", method)
    list(cascade(gnn))
    assert all(v.equal(gnn.predictor.state_dict()[k]) for k, v in before.items())
    assert not at.input_embedding(gnn.predictor.encoder)._forward_hooks and all(p.grad is None for p in gnn.predictor.parameters())


def test_hooks_go_even_when_the_method_fails(gnn):
    table = at.input_embedding(gnn.predictor.encoder)
    with pytest.raises(RuntimeError), at.replaced(table, lambda e: e[:, :3]): gnn.predictor(gnn.representation.collate([gnn.representation("CCO")]))
    assert not table._forward_hooks


def test_cascade_goes_from_the_head_to_the_input(gnn):
    stages = list(cascade(gnn, seed=5))
    same = [all(p.equal(q) for p, q in zip(m.predictor.encoder.parameters(), gnn.predictor.encoder.parameters(), strict=True)) for _, m in stages]
    assert stages[0][0] == "heads" and same[0] and not same[-1] and sorted(same, reverse=True) == same  # a fresh norm is like another
    first = at.input_embedding(gnn.predictor.encoder).table.weight
    changed = [not at.input_embedding(m.predictor.encoder).table.weight.equal(first) for _, m in stages]
    assert changed == [False] * (len(stages) - 1) + [True]


@pytest.mark.parametrize("smiles", ["CC(=O)Oc1ccccc1C(=O)O", "c1ccc2ccccc2c1", "C", "[Na+].[Cl-]", "O=C1CCCN1c1ccc(F)cc1"])
def test_every_atom_is_in_one_group(smiles):
    n = read_molecule(smiles).GetNumAtoms()
    for by in ("atoms", "groups"):
        parts = molecule_parts(smiles, by)
        assert sorted(a for m in parts.members for a in m) == list(range(n)) and len(parts.names) == len(parts.rows)


@pytest.mark.parametrize("smiles", ["CC(=O)Oc1ccccc1C(=O)O", "C[C@H](N)C(=O)O", "C[N+](=O)[O-]", "c1cc[nH]c1", "FS(F)(F)(F)(F)F", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"])
def test_any_atom_can_be_taken_out(smiles):
    mol = read_molecule(smiles)
    n = mol.GetNumAtoms()
    for i in range(n):
        left = read_molecule(keep_atoms(mol, np.arange(n) != i))
        assert left.GetNumAtoms() == n - 1 and not any(a.GetNumRadicalElectrons() for a in left.GetAtoms())


@pytest.mark.parametrize("smiles", ["CC(=O)Oc1ccccc1Br", "C[C@@H](Cl)[N+](C)(C)C", "c1ccc2[nH]ccc2c1"])
def test_tokens_lie_on_atoms(smiles):
    model = small("transformer", "smiles", width=16, depth=2, heads=2)
    n = read_molecule(smiles).GetNumAtoms()
    a = explain(model, smiles, "rollout")
    assert np.isclose(a.total, 1, atol=1e-5) and {i for m in a.members for i in m} == set(range(n))
    g = explain(model, smiles, by="groups")
    assert abs(g.gap) < 0.02 * np.abs(g.values).sum() + 1e-5 and sorted(i for m in g.members for i in m) == list(range(n))
    read = {i: read_molecule(smiles).GetAtomWithIdx(i).GetSymbol() for i in range(n)}
    for t, m in zip(a.names, a.members, strict=True):
        if t in ("Br", "Cl"): assert [read[i] for i in m] == [t]


def salt():
    from matfm.data.records import Crystal
    return Crystal(np.eye(3) * 5.64, [11] * 4 + [17] * 4, [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("name,representation,sites", [("crystal_gnn", "crystal_graph", 8), ("sitenet", "crystal_pairs", 2), ("composition_transformer", "composition", 2)])
def test_crystals(name, representation, sites):
    model = small(name, representation, width=16, depth=2, **({"heads": 2} if name != "crystal_gnn" else {}))
    a = explain(model, salt())
    assert len(a.values) == sites and abs(a.gap) < 0.02 * np.abs(a.values).sum() + 1e-5 and "data:image/png" in a._repr_html_() or name == "composition_transformer"
    equal = {n: [v for m, v in zip(a.names, a.values, strict=True) if m.rstrip("0123456789") == n] for n in ("Na", "Cl")}
    assert all(np.ptp(v) < 1e-3 * max(np.abs(a.values).max(), 1e-3) + 1e-5 for v in equal.values())  # equivalent sites alike
    if name != "crystal_gnn": assert np.isclose(explain(model, salt(), "rollout").total, 1, atol=1e-5)
    assert explain(model, salt(), "shapley", by="elements").names == ("Na", "Cl")


def test_formulas_from_outside():
    from matfm.data.records import parse_formula
    iron = lambda formulas: np.array([parse_formula(f).get("Fe", 0.0) for f in formulas], float)
    game = at.removal_game(iron, "Fe2O3", domain="composition")
    assert game(np.array([[True, True], [True, False]])).tolist() == [2.0, 2.0]
    assert at.occlusion(game)[0].tolist() == [2, 0] and math.isnan(at.occlusion(game)[2])
    with pytest.raises(BadInput, match="without elements"): shapley(game)


def test_columns_of_fingerprints_and_groups():
    from matfm.represent.descriptors import Ecfp
    from matfm.represent.groups import FunctionalGroups
    for rep in (Ecfp(radius=1, bits=256, counts=True), FunctionalGroups()):
        rows = rep.rows([rep.read(s) for s in ("CCO", "CCN", "c1ccccc1", "CC(=O)O")])

        class Sum:
            def predict(self, X): return X.sum(1)
        a = explain(DescriptorModel(Sum(), rows, rep), "CC(C)O", "occlusion")
        assert a.size == 4 and abs(a.gap) < 1e-6 and "<svg" in a._repr_html_()
        on_atoms = sum(v for v, m in zip(a.values, a.members, strict=True) if m)
        assert np.isclose(a.atoms.sum(), on_atoms)


def test_bad_rows_are_set_aside(gnn):
    from matfm.data.records import molecules
    records, _ = molecules(["CCO", "CCN", "C"], canonical=False)
    found, bad = explain_all(gnn, records, "shapley", most=2)
    assert [a is None for a in found] == [True, True, False] and len(bad) == 2 and "kernel_shap" in bad.frame["reason"][0]


def test_bad_input(gnn, linear):
    with pytest.raises(UnknownName, match="did you mean"): explain(gnn, "CCO", "occlusions")
    with pytest.raises(UnknownName): explain(gnn, "CCO", by="sites")
    with pytest.raises(UnknownName): explain(gnn, "CCO", output="mass")
    with pytest.raises(BadInput, match="does not work for"): explain(linear, np.zeros(4), "rollout")
    with pytest.raises(BadInput): explain(gnn, "not a molecule")
    with pytest.raises(BadInput, match="background has shape"): explain(linear, np.zeros(3))
    with pytest.raises(BadInput, match="no attention"): explain(gnn, "CCO", "rollout")
    with pytest.raises(BadInput, match="DescriptorModel"): explain(small("group_mlp", "functional_groups", width=8, hidden=8), "CCO")
    with pytest.raises(BadInput): at.mean_attribution([])


def test_ensembles_are_averaged(gnn):
    from matfm.adapt.finetune import Ensemble
    other = list(cascade(gnn, 1))[0][1]
    both = explain(Ensemble([gnn, other]), "CCO", "occlusion")
    assert np.allclose(both.values, (explain(gnn, "CCO", "occlusion").values + explain(other, "CCO", "occlusion").values) / 2)


@pytest.mark.parametrize("values,truth,want", [([3, 2, 1], [1, 0, 0], (1, 1)), ([1, 2, 3], [1, 0, 0], (0, 0)), ([0, 0, 0, 0], [1, 1, 0, 0], (0.5, 0.5)), ([2, 2, 1, 0], [1, 0, 1, 0], (0.625, 0.5))])
def test_hits(values, truth, want):
    from sklearn.metrics import roc_auc_score
    got = hits(np.array(values, float), np.array(truth, bool))
    assert np.allclose(got, want) and np.isclose(got[0], roc_auc_score(truth, values))


def test_import_is_light():
    import subprocess
    import sys
    out = subprocess.run([sys.executable, "-c", "import sys, matfm.explain.attribution; print([m for m in ('rdkit', 'shap', 'sklearn', 'matplotlib', 'lightning', 'pymatgen') if m in sys.modules])"], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_a_network_from_outside(gnn):
    "Deleting atoms is what asking the network about the smaller molecule says; what cannot be deleted is refused."
    from matfm.data.records import molecules
    def ask(*smiles): return gnn.predict(molecules(list(smiles), canonical=False)[0])[0]["count"].to_numpy()
    smiles = "OCCc1ccccc1"
    a = explain(gnn, smiles, "occlusion", by="groups", outside=True)
    ring = next(i for i, m in enumerate(a.members) if len(m) == 6)
    whole, left = ask(smiles, "OCC")
    assert np.isclose(a.values[ring], whole - left, atol=1e-5) and np.isclose(a.value, whole, atol=1e-5) and a.unit == explain(gnn, smiles).unit
    assert abs(explain(gnn, "CCO", "shapley", outside=True).gap) < 1e-5
    with pytest.raises(BadInput, match="from outside"): explain(gnn, smiles, "rollout", outside=True)
    with pytest.raises(BadInput, match="has no vector"): explain(gnn, smiles, "occlusion", outside=True, base=at.mean_embedding(gnn, ["CCO"]))
    crystal = small("crystal_gnn", "crystal_graph", width=16, depth=2)
    with pytest.raises(BadInput, match="taken out of"): explain(crystal, salt(), "occlusion", outside=True)
    formula = small("composition_transformer", "composition", width=16, depth=2, heads=2)
    b = explain(formula, "Fe2O3", "occlusion", outside=True)
    assert b.names == ("Fe", "O") and b.kind == "elements" and np.isnan(b.baseline) and np.isfinite(b.values).all() and "without them" not in b._repr_html_()
    with pytest.raises(BadInput, match="without elements"): explain(formula, "Fe2O3", "shapley", outside=True)
