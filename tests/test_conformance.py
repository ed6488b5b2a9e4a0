"""Everything registered goes through the conformance suite of `matfm.testing`; a registered name without a case is a failure."""
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matfm import testing
from matfm.core import MissingExtra
from matfm.data.records import Crystal, Mixture, Records, compositions, crystals, from_values, molecules, parse_formula
from matfm.registry import registries

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- small records ---------------------------------------------------------------------------------------------------

SMILES = ["CCO", "c1ccccc1O", "CC(=O)N", "C[N+](C)(C)C", "C", "OC(=O)C1CC1", "C/C=C/Cl", "N[C@@H](C)C(=O)O"]
RINGS = ["c1ccccc1O", "c1ccncc1", "C1CCCCC1N", "c1ccoc1C", "c1ccsc1", "C1CCOC1", "c1ccc2ccccc2c1", "C1CC1C"]  # eight scaffolds
ANIONS, CATIONS = [8, 9, 16, 17], [3, 11, 12, 20, 22, 26, 30, 13]


def crystal(k: int) -> Crystal:
    "A low-symmetry cell of three to five sites, two or three elements."
    rng = np.random.default_rng(k)
    n = 3 + k % 3
    lattice = np.diag([4.0, 4.4, 4.9]) * (n / 3) ** (1 / 3) + rng.uniform(-0.3, 0.3, (3, 3))
    grid = np.array([[0, 0, 0], [0.5, 0.5, 0.1], [0.1, 0.5, 0.55], [0.55, 0.05, 0.5], [0.8, 0.8, 0.75]])[:n]
    numbers = [CATIONS[k % 8], ANIONS[k % 4], ANIONS[k % 4], CATIONS[(k + 3) % 8], ANIONS[(k + 1) % 4]][:n]
    return Crystal(lattice, numbers, (grid + rng.uniform(-0.03, 0.03, grid.shape)) % 1)


@cache
def records(domain: str) -> Records:
    "Eight records with a number `a`, a number `b` that is missing once, and a class `c`."
    y = [0.5, 1.0, -0.3, 2.0, 0.1, 1.4, -1.0, 0.7]
    targets, units = {"a": y, "b": [*y[1:], float("nan")], "c": [1, 0, 1, 1, 0, 1, 0, 1]}, {"a": "eV", "b": "", "c": ""}
    cells = [crystal(k) for k in range(8)]
    pairs = [Mixture((SMILES[k], SMILES[(k + 1) % 8], "O"), (0.3, 0.7, None), ("1", "1", "2")) for k in range(8)]
    kept, rejected = {"molecule": lambda: molecules(SMILES, targets, units, canonical=False),
                      "rings": lambda: molecules(RINGS, targets, units, canonical=False),
                      "crystal": lambda: crystals(cells, targets, units),
                      "composition": lambda: compositions([c.formula for c in cells], targets, units),
                      "mixture": lambda: from_values(pairs, "mixture", targets, units)}[domain]()
    assert len(kept) == 8 and len(rejected) == 0, rejected
    return kept


def renumbered(smiles: str) -> str:
    "The same molecule, its atoms in reverse order."
    from rdkit import Chem
    mol = Chem.MolFromSmiles(smiles)
    mol = Chem.RenumberAtoms(mol, list(range(mol.GetNumAtoms()))[::-1])
    return Chem.MolToSmiles(mol, canonical=False)


def rewritten(formula: str) -> str:
    "The same composition: elements in reverse order, amounts doubled."
    return "".join(f"{s}{2 * n:g}" for s, n in reversed(parse_formula(formula).items()))


# ---- the table: one case for every registered name -------------------------------------------------------------------

REPRESENTATIONS: dict[str, Callable[[Any], Any]] = {
    "smiles": lambda cls: cls.default(),
    "smirk": lambda cls: cls.default(),
    "gpe": lambda cls: cls.fit(SMILES, size=180),
    "selfies": lambda cls: cls.default(),
    "molecule_graph": lambda cls: cls(),
    "crystal_graph": lambda cls: cls(cutoff=4.5),
    "crystal_pairs": lambda cls: cls(sites=16),
    "crystal_potentials": lambda cls: cls(cutoff=4.5),
    "material_string": lambda cls: cls.default(),
    "ecfp": lambda cls: cls(bits=64),
    "rdkit_descriptors": lambda cls: cls(),
    "composition_stats": lambda cls: cls(),
    "xrd": lambda cls: cls(bins=64),
    "bond_orientation": lambda cls: cls(),
    "crystal_text": lambda cls: cls(length=64),
    "crystal_views": lambda cls: cls(bins=64, length=64),
    "composition": lambda cls: cls(),
    "fingerprint": lambda cls: cls(bits=64),
    "concat": lambda cls: cls(),
    "topological_indices": lambda cls: cls(),
    "mixture": lambda cls: cls(),
    "mixture_pair": lambda cls: cls(),
    "molecule_3d": lambda cls: cls(count=1),
    "molecule_conformer": lambda cls: cls(count=1, targets=True),
    "molecule_views": lambda cls: cls(length=64),
    "descriptors_3d": lambda cls: cls(),
    "phonon_descriptors": lambda cls: cls(registries()["potential"].build("lennard_jones"), reach=4.0, mesh=15.0),
    "chgnet_features": lambda cls: cls(),
    "crystal_stats": lambda cls: cls(),
    "functional_groups": lambda cls: cls.fit(SMILES, support=2, descriptors=("MolLogP",)),
}
ENCODERS: dict[str, tuple[dict[str, Any], Callable[[Any], Any] | None]] = {  # configuration; the same record in another order
    "transformer": (dict(width=24, depth=2, heads=2), None),
    "transformer_decoder": (dict(width=24, depth=2, heads=2), None),
    "seq2seq": (dict(width=24, depth=1, heads=2), None),
    "molecule_gnn": (dict(width=24, depth=2), renumbered),
    "group_mlp": (dict(width=24, hidden=48), renumbered),
    "graph_transformer": (dict(width=24, depth=2, heads=2), renumbered),
    "conformer_transformer": (dict(width=24, depth=2, heads=2), None),  # a renumbered SMILES gets another conformer
    "crystal_gnn": (dict(width=24, depth=2, basis=16), testing.reordered),
    "composition_transformer": (dict(width=24, depth=2, heads=2), rewritten),
    "sitenet": (dict(width=24, depth=2, heads=2, pair=12, basis=24), testing.reordered),
    "potnet": (dict(width=24, depth=2, basis=16, sums=12), testing.reordered),
    "fusion": (dict(parts={n: dict(name="molecule_gnn", width=24, depth=2) for n in ("a", "b")}), renumbered),
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("transformer", dict(feed_forward="swiglu", norm="rms", pool="cls")),
    ("transformer", dict(attention="linear")),
    ("molecule_gnn", dict(width=24, depth=2, readout=16)),
    ("transformer_decoder", dict(feed_forward="swiglu", norm="rms")),
    ("molecule_gnn", dict(pool="sum")),
    ("composition_transformer", dict(pooling="weighted")),
    ("conformer_transformer", dict(scales=())),
    ("fusion", dict(how="gate", width=16)),
]
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {  # encoder; options
    "masked_tokens": ("transformer", {}),
    "masked_atoms": ("molecule_gnn", {}),
    "group_reconstruction": ("group_mlp", {}),
    "next_token": ("transformer_decoder", dict(hide=0.15, ahead=2)),
    "denoise_spans": ("seq2seq", dict(ahead=2)),
    "descriptor_targets": ("transformer", dict(mean=[0.2, 1.0], std=[1.0, 0.5], hide=0.15)),
    "element_shuffling": ("crystal_gnn", {}),
    "denoise": ("crystal_gnn", {}),
    "infomax": ("crystal_gnn", {}),
    "symmetry_heads": ("crystal_gnn", {}),
    "plausible": ("crystal_gnn", {}),
    "relational": ("molecule_gnn", {}),
    "nt_xent": ("molecule_gnn", {}),
    "multimodal": ("crystal_gnn", dict(space=32, inner=32)),
    "scage": ("conformer_transformer", {}),
    "mixed": ("crystal_gnn", dict(parts=("element_shuffling", "denoise"), weights=(1.0, 0.5))),
}
BASELINES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # records; options
    "dummy": (("molecule", "crystal", "composition", "mixture"), {}),
    "ecfp_forest": (("molecule",), dict(n_estimators=20)),
    "ecfp_svm": (("molecule",), {}),
    "composition_forest": (("crystal", "composition"), dict(n_estimators=20)),
    **{f"qspr_{m}": (("molecule", "crystal", "composition"), dict(o)) for m, o in (("mlr", {}), ("pls", {}), ("rf", {"n_estimators": 5}), ("svm", {}), ("ann", {"max_iter": 20}))},
    "avalon_forest": (("molecule",), dict(n_estimators=20, bits=256)),
    "coral": (("molecule",), dict(epochs=5)),
    "mixture_forest": (("mixture",), dict(n_estimators=20)),
    "mixture_ridge": (("mixture",), {}),
    "linear_mixing": (("mixture",), {}),
    "nearest_mixture": (("mixture",), {}),
}
SPLITTERS: dict[str, tuple[str, ...]] = {  # records
    "random": ("molecule", "crystal", "composition"),
    "scaffold": ("rings",),
    "composition": ("crystal", "composition"),
    "stratified": ("molecule", "crystal", "composition"),
    "time": ("molecule", "crystal", "composition"),
    "butina": ("rings",),
    "component_sets": ("mixture",),
    "new_components": ("mixture",),
}
POTENTIALS: dict[str, dict[str, Any]] = {  # how exact: CHGNet computes in single precision
    "chgnet": dict(step=1e-2, tolerance=3e-2),
    "lennard_jones": dict(step=1e-4, tolerance=1e-4),
}
TABLES: dict[str, dict] = {"representation": REPRESENTATIONS, "encoder": ENCODERS, "objective": OBJECTIVES, "baseline": BASELINES,
                           "splitter": SPLITTERS, "potential": POTENTIALS, "generator": {}, "oracle": {}}


def registered(kind: str):
    "One test for each name of a registry, and for each case of the table."
    return pytest.mark.parametrize("name", sorted({*registries()[kind].names(), *TABLES[kind]}))


def case(kind: str, name: str) -> tuple[Any, Any]:
    "The registered class and its case."
    if name not in TABLES[kind]:
        pytest.fail(f"the {kind} {name!r} is registered and has no case in tests/test_conformance.py")
    return registries()[kind].get(name), TABLES[kind][name]


class WithAux:
    "A representation whose batches also hold `aux`, two numbers for each record."
    def __init__(self, representation: Any): self.representation = representation
    def __getattr__(self, name: str) -> Any: return getattr(self.representation, name)
    def __call__(self, record: Any) -> Any: return self.representation(record)

    def collate(self, items: Any) -> Any:
        import torch
        sizes = torch.tensor([float(self.representation.size(i)) for i in items])
        return {**self.representation.collate(items), "aux": torch.stack([sizes / 10, sizes.sqrt()], 1)}


def made(encoder: str, **more: Any) -> tuple[Any, Any, Records]:
    "A small encoder, its representation and eight records."
    from matfm.models.zoo import from_scratch
    cls, (config, _) = case("encoder", encoder)
    rep_cls, make = case("representation", cls.representation)
    p = from_scratch(make(rep_cls), encoder, seed=0, **{**config, **more})
    return p.encoder, p.representation, records(rep_cls.domain)


# ---- the tests -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", sorted(TABLES))
def test_every_name_has_a_case(kind):
    assert set(registries()) == set(TABLES), "a registry without a table of cases"
    missing = [n for n in registries()[kind].names() if n not in TABLES[kind] and not n.startswith("test_")]  # other tests register examples
    assert not missing, f"no case for the {kind} {', '.join(missing)}"
    offered = {e.name for e in entry_points(group=f"matfm.{kind}")}
    decorator = re.compile(rf'^@{kind}s\.register\("(\w+)"\)', re.M)
    decorated = {n for p in sorted(ROOT.glob("matfm/**/*.py")) for n in decorator.findall(p.read_text())}
    absent = sorted({*TABLES[kind], *decorated} - offered)
    assert not absent, f"no entry point offers the {kind} {', '.join(absent)}: it is not found by name"


@registered("representation")
def test_representation(name):
    cls, make = case("representation", name)
    testing.check_representation(make(cls), records(cls.domain))


@registered("encoder")
def test_encoder(name):
    _, (_, permute) = case("encoder", name)
    encoder, representation, rows = made(name)
    testing.check_encoder(encoder, representation, rows, permute)


@pytest.mark.parametrize("name,options", VARIANTS)
def test_encoder_variant(name, options):
    _, (_, permute) = case("encoder", name)
    encoder, representation, rows = made(name, **options)
    testing.check_encoder(encoder, representation, rows, permute)


@registered("encoder")
def test_encoder_overfits(name):
    encoder, representation, rows = made(name)
    testing.assert_overfits(encoder, representation, rows, rows.y("a")[:, 0])


@registered("encoder")
def test_encoder_same_seed(name):
    (a, *_), (b, *_), (c, *_) = made(name), made(name), made(name)
    assert all(bool((p == q).all()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    import torch
    with torch.no_grad():
        next(c.parameters()).add_(1)
    assert bool((next(a.parameters()) == next(b.parameters())).all()), "two encoders share weights"


@pytest.mark.parametrize("max_neighbors", [12, None])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_crystal_encoders_are_invariant(max_neighbors, k):
    from matfm.models.zoo import from_scratch
    from matfm.represent.crystal import CrystalGraph
    names = [n for n in ENCODERS if registries()["encoder"].get(n).representation == "crystal_graph"]
    assert names
    for name in names:
        p = from_scratch(CrystalGraph(cutoff=4.5, max_neighbors=max_neighbors), name, **ENCODERS[name][0])
        testing.assert_invariant(p.encoder, p.representation, crystal(k))


@registered("objective")
def test_objective(name):
    cls, (encoder_name, options) = case("objective", name)
    encoder, representation, rows = made(encoder_name)
    if "aux" in cls.reads: representation = WithAux(representation)
    if cls.suits == ("molecule_views",): representation = registries()["representation"].get("molecule_views")(length=64)
    if cls.suits == ("crystal_views",): representation = registries()["representation"].get("crystal_views")(bins=64, length=64)
    testing.check_objective(cls, encoder, representation, rows, **options)


@registered("baseline")
def test_baseline(name):
    cls, (domains, options) = case("baseline", name)
    for domain in domains:
        testing.check_baseline(cls, records(domain), "a" if domain == domains[0] else "b", **options)
    testing.check_baseline(cls, records(domains[0]), "c", kind="binary", **options)


@registered("baseline")
def test_baseline_of_several_targets(name):
    cls, (domains, options) = case("baseline", name)
    rows = records(domains[0])
    both = cls(**options).fit(rows, ["a", "b"]).predict(rows)
    assert both.shape == (8, 2)
    np.testing.assert_allclose(both[:, 0], cls(**options).fit(rows, "a").predict(rows))


@registered("splitter")
def test_splitter(name):
    splitter, domains = case("splitter", name)
    for domain in domains:
        testing.check_splitter(splitter, records(domain), fractions=(0.5, 0.25, 0.25), slack=0.26)


@registered("potential")
def test_potential(name):
    cls, options = case("potential", name)
    potential = cls()
    try:
        potential.energies([crystal(1)])
    except MissingExtra as e:
        pytest.skip(str(e))
    testing.check_potential(potential, crystal(1), **options)
