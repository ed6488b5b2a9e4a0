"""Tokenisers against each other, against the published SMIRK package's answers and against RDKit: the same tokens one by one and in bulk, no unknown token, the same molecule."""
import csv
import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput
from matfm.data.loading import BatchPlan, Loader, featurise
from matfm.data.records import molecules
from matfm.registry import representations
from matfm.represent.sequence import (
    AROMATIC, ELEMENTS, GLYPHS, SMIRK, SPECIALS, GpeTokens, SelfiesTokens, SmilesTokens, SmirkTokens, Spellings, glyph_words, learn_merges, randomise, selfies_glyphs)

MOLECULES = ["CCO", "CN[C@H]1CC[C@@H](c2ccc(Cl)c(Cl)c2)c2ccccc21", "C/C=C/Cl", "[2H]C([2H])([2H])S(=O)C", "c1cc[se]c1", "[O-][Cl+3]([O-])([O-])[O-].[Na+]", "CC[N@@+](C)(Cl)Br",
             "O=[14C]=O", "B1([O-])OC(=O)C(=O)O1.[Li+]", "C[N+](C)(C)CCO", "Brc1ccc(Br)cc1", "OC(=O)[C@@H](N)Cc1c[nH]c2ccccc12", "N#Cc1ccccc1", "C1CC%10CCC1CC%10", "O"]
REFUSED = ["", None, 3, b"CC", ["C"], "C[NH3", "CN]", "[[C]]", "[]", "[C@@@]", "C C", "C\n", "C\x02", "\x03", "\x02\x03", "C\x00C", "Clé", "[é]", "CHCl3", "l", "r", "Xl", "[C\n]", "C[C\x03]C", "C+", "\ud800", "[CH2]" * 255]
FITTED = SmilesTokens.fit(MOLECULES)
GPE = GpeTokens.fit(MOLECULES * 2, size=200)
TOKENISERS = {"smiles": SmilesTokens(), "atom-wise": FITTED, "smirk": SmirkTokens(), "glyphs": GpeTokens(), "gpe": GPE, "selfies": SelfiesTokens()}


def alone(rep, text):
    try:
        return rep(text)["tokens"]
    except BadInput:
        return None


def assert_bulk_is_one_by_one(rep, texts):
    flat, offsets = rep.encode_batch(texts)
    items = rep.many(texts)
    assert len(items) == len(texts) == len(offsets) - 1 and flat.dtype == np.int32 and offsets[-1] == len(flat)
    for text, item, a, b in zip(texts, items, offsets[:-1], offsets[1:], strict=True):
        one = alone(rep, text)
        if one is None:
            assert item is None and a == b, text
        else:
            assert item["tokens"].dtype == one.dtype and np.array_equal(item["tokens"], one) and np.array_equal(flat[a:b], one), text


# ---- in bulk -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TOKENISERS)
def test_bulk_is_one_by_one(name):
    rep = TOKENISERS[name]
    assert [alone(rep, t) is None for t in REFUSED] == [True] * len(REFUSED)
    assert_bulk_is_one_by_one(rep, MOLECULES + REFUSED + MOLECULES[::-1])
    assert_bulk_is_one_by_one(rep, REFUSED)
    assert_bulk_is_one_by_one(rep, ["C"])
    assert_bulk_is_one_by_one(rep, [])


bracket = st.builds("[{}{}{}{}{}{}]".format, st.sampled_from(["", "0", "13"]), st.sampled_from([*ELEMENTS, *AROMATIC, "*", "#6", "Xx"]), st.sampled_from(["", "@", "@@", "@TB20"]),
                    st.sampled_from(["", "H", "H12"]), st.sampled_from(["", "+", "-10", "++"]), st.sampled_from(["", ":1", ":99"]))
piece = st.sampled_from([*"CNOSPFIBbcnosp*()=#$:/\\.-~123%<>[]+@Hlr é\n\x02\x03", "Cl", "Br"]) | bracket


@given(st.lists(st.lists(piece, max_size=12).map("".join) | st.sampled_from(REFUSED), max_size=12), st.sampled_from(["smiles", "atom-wise", "smirk", "gpe"]), st.integers(3, 30))
@settings(max_examples=300, deadline=None)
def test_bulk_is_one_by_one_on_any_text(texts, name, max_length):
    assert_bulk_is_one_by_one(TOKENISERS[name].replace(max_length=max_length), texts)


def test_featurise_takes_the_bulk_path_and_keeps_the_reasons():
    rows, _ = molecules(["CCO", "C" * 30, "CCN", "[Na+].[Cl-]"], canonical=False)
    items, kept, rejected = featurise(SmilesTokens(max_length=20), rows)
    assert kept.tolist() == [0, 2, 3] and [i["tokens"].tolist() for i in items] == [SmilesTokens()(s)["tokens"].tolist() for s in ("CCO", "CCN", "[Na+].[Cl-]")]
    assert rejected.frame["row"].to_list() == [1] and "32 tokens are more than max_length=20" in rejected.frame["reason"][0]


# ---- vocabularies ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in TOKENISERS if n not in ("atom-wise",)])
def test_specs_survive_json_and_decode_again(name):
    from rdkit import Chem
    rep = TOKENISERS[name]
    again = representations.build(json.loads(json.dumps(representations.describe(rep))))
    assert again == rep and again.digest == rep.digest and type(again).default(max_length=9).max_length == 9
    for s in MOLECULES:
        ids = rep(s)["tokens"]
        assert np.array_equal(ids, again(s)["tokens"]) and rep.unk_id not in ids
        if name == "selfies":
            assert Chem.CanonSmiles(rep.decode(ids)) == Chem.CanonSmiles(s)
        else:
            assert rep.decode(ids) == s == "".join(rep.tokens(s))


def test_the_shipped_checkpoint_keeps_its_tokens(root):
    config = json.loads((root / "data/checkpoints/matfm-smiles-small/config.json").read_text())["representation"]
    rep = representations.build(config)
    assert rep == SmilesTokens() and rep.digest == "25fd3d25de8a"
    assert rep("C[13C@@H2+]Cl")["tokens"].tolist() == [1, 45, 19, 24, 26, 45, 34, 40, 25, 21, 20, 56, 2]


def test_what_an_atomwise_vocabulary_lacks_is_one_token():
    assert FITTED.encode("[K+]C") == [FITTED.unk_id, FITTED.vocab.index("C")] and FITTED.tokens("[Na+]") == ["[Na+]"]
    assert FITTED.decode(FITTED.encode("[K+]C")) == "<unk>C"
    assert FITTED.encode_batch(["[K+]C", "P"])[0].tolist() == [1, 4, FITTED.vocab.index("C"), 2, 1, 4, 2]


# What the package smirk 0.3.0 cuts (its ids are these minus 4), and where it differs: it rewrites ++ as +2, calls part of a bracket unknown, reads > as [.
SAME = {"[13C@@H2+]": "[ 1 3 C @@ H 2 + ]", "[Co@OH12-]": "[ Co @OH 1 2 - ]", "[nH]": "[ n H ]", "[*:17]": "[ * : 1 7 ]", "[HH]": "[ H H ]", "[Fe+12]": "[ Fe + 1 2 ]", "C%12": "C % 1 2",
        "C%(123)": "C % ( 1 2 3 )", "[235U+3]": "[ 2 3 5 U + 3 ]", "[Pt@SP1]": "[ Pt @SP 1 ]", "[CH12]": "[ C H 1 2 ]", "[2H]": "[ 2 H ]", "C[C@H:23]C": "C [ C @ H : 2 3 ] C", "[C@TB10]": "[ C @TB 1 0 ]",
        "[NH4+]": "[ N H 4 + ]", "[C-10]": "[ C - 1 0 ]", "C~C": "C <unk> C", "CC>>CO": "C C <unk> <unk> C O"}


def test_smirk_cuts_as_the_package_does():
    smirk = SmirkTokens()
    package = sorted(SMIRK)
    assert {s: " ".join(smirk.tokens(s)) for s in SAME if ">" not in s} == {s: t for s, t in SAME.items() if ">" not in s}
    assert len(package) == 158 and [smirk.vocab.index(t) - 4 for t in package] == list(range(1, 159)) and set(GLYPHS) - set(SMIRK) == {"~", "<", ">", "te", "si"}
    assert smirk.tokens("[Fe++]") == ["[", "Fe", "+", "+", "]"] and smirk.tokens("[te]") == ["<unk>"] and smirk.tokens("CC>>CO").count("<unk>") == 2


# ---- glyph pair encoding -------------------------------------------------------------------------------------------------

def test_merges_are_those_of_the_definition():
    words, merges, text = glyph_words(MOLECULES), learn_merges(glyph_words(MOLECULES), 25), {w: list(w) for w in glyph_words(MOLECULES)}
    assert len(merges) > 5
    for pair in merges:
        counts: dict = {}
        for w, cut in text.items():
            for p in zip(cut, cut[1:], strict=False):
                counts[p] = counts.get(p, 0) + words[w]
        allowed = {p: n for p, n in counts.items() if "".join(p) not in GLYPHS}
        assert pair == min(allowed, key=lambda p: (-allowed[p], p))
        for cut in text.values():
            i = 0
            while i < len(cut) - 1:
                if (cut[i], cut[i + 1]) == pair:
                    cut[i:i + 2] = ["".join(pair)]
                i += 1
    rep = GpeTokens((*SPECIALS, *GLYPHS, *dict.fromkeys("".join(p) for p in merges)), merges=tuple(merges))
    assert all(rep.tokens("".join(w)) == cut for w, cut in text.items() if not re.search(r"H|[@+-]|\d", "".join(w)))


def test_merges_do_not_depend_on_the_order_of_the_corpus_and_never_cross_a_bracket():
    assert GpeTokens.fit((MOLECULES * 2)[::-1], size=200) == GPE and len(GPE.merges) > 10
    assert all(not re.search(r"[\[\]().%/\\]|Sc|Cn", t) or t in GLYPHS for t in GPE.vocab[5:])
    assert GpeTokens.fit(["CCO", "no SMILES", "C[N", ""], size=300).merges == ()
    with pytest.raises(BadInput, match="lacks"):
        GpeTokens(merges=(("C", "C"),))
    with pytest.raises(BadInput, match="at position 1"):
        GPE("C C")


# ---- SELFIES -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("smiles,message", [("[*:1]CC[*:2]", "no SELFIES"), ("O=Cl(=O)(=O)O", "constraints"), ("[CH3:7][OH:12]", "another molecule"), ("C1CC", "RDKit cannot read"), ("C[Pt@SP1](F)(Cl)Br", "no SELFIES")])
def test_selfies_refuses_what_would_come_back_otherwise(smiles, message):
    with pytest.raises(BadInput, match=message):
        SelfiesTokens()(smiles)


def test_rare_selfies_symbols_are_spelled():
    rep = SelfiesTokens()
    assert rep.tokens("[13CH3][Fe]") == [*"[13CH3]", "[", "Fe", "]"] and rep.tokens("C[Li]") == ["[C]", "[", "Li", "]"]
    for symbol in ["[13C@@H1]", "[=Branch2]", "[-/Ring2]", "[\\NH1+1]", "[OsH2-1]", "[=Co+2]"]:
        assert "".join(selfies_glyphs(symbol)) == symbol and set(selfies_glyphs(symbol)) <= set(rep.vocab)


# ---- spellings -------------------------------------------------------------------------------------------------------------

def test_spellings_are_the_same_molecule_and_a_pure_function_of_seed_epoch_and_row():
    from rdkit import Chem
    rep = SmilesTokens()
    items = Spellings(rep, MOLECULES, epochs=6, seed=3)
    n = len(MOLECULES)
    assert len(items) == len(items.sizes) == 6 * n and items.sizes[:n].tolist() == [rep.size(rep(s)) for s in MOLECULES]
    texts = [rep.decode(i["tokens"]) for i in items]
    assert [Chem.CanonSmiles(t) for t in texts] == [Chem.CanonSmiles(s) for s in MOLECULES] * 6
    assert [rep.decode(items[k]["tokens"]) for k in reversed(range(6 * n))] == texts[::-1]
    assert texts[2 * n + 1] == randomise(MOLECULES[1], [3, 2, 1]) and len(set(texts[1::n])) > 3
    assert [rep.decode(i["tokens"]) for i in Spellings(rep, MOLECULES, 6, seed=4)] != texts
    for bad in (-1, 6 * n):
        with pytest.raises(IndexError):
            items[bad]


def test_a_loader_resumed_sees_the_same_spellings():
    rep = SmilesTokens()
    items = Spellings(rep, MOLECULES, epochs=4, seed=0)
    plan = BatchPlan(items.sizes, batch_size=7, seed=1)
    whole = list(Loader(rep, items, plan, np.tile(np.arange(len(MOLECULES)), 4)))
    rest = list(Loader(rep, items, plan, np.tile(np.arange(len(MOLECULES)), 4), start=3))
    assert sorted(int(i) for b in whole for i in b["index"]) == list(range(4 * len(MOLECULES)))
    assert all((a["tokens"] == b["tokens"]).all() and (a["y"] == b["y"]).all() for a, b in zip(whole[3:], rest, strict=True))


def test_a_spelling_that_does_not_fit_gives_way():
    tight = SmilesTokens(max_length=SmilesTokens().size(SmilesTokens()(MOLECULES[1])))
    assert all(tight.size(i) <= tight.max_length for i in Spellings(tight, MOLECULES[1:2], 30))
    with pytest.raises(BadInput, match="got NoneType"):
        randomise(None, 0)


RDKIT_ERRS = ["Fc1ccc(N[C@H]2[C@@H]3C[C@H]4C[C@@H](C3)C[C@@H]2C4)cc1F",  # some of its random spellings are another molecule
              "C1C[N+]23CCC[N+]4(C1)CC[S-]1->[Fe+2]567[SH+]CC[N+]58CCC[N+]6(CCC8)CC[S-]7->[Fe+2]124[SH+]CC3"]


@given(st.sampled_from(MOLECULES + RDKIT_ERRS * 4), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_every_spelling_is_the_same_molecule(smiles, seed):
    from rdkit import Chem
    assert Chem.CanonSmiles(randomise(smiles, seed)) == Chem.CanonSmiles(smiles)


# ---- the mirror ------------------------------------------------------------------------------------------------------------

def test_every_set_of_the_mirror_round_trips_without_unknown_tokens(mirror):
    with open(mirror / "molecules" / "MANIFEST.csv", newline="") as f:
        sets = [(m["file"], m["structure_column"]) for m in csv.DictReader(f) if re.search(r"smile|rxn|product|>|_sm|Ligand", m["structure_column"], re.I)]
    assert len(sets) > 30
    closed, strings = (SmilesTokens(max_length=10**6), GPE.replace(max_length=10**6)), 0
    for file, columns in sets:
        with gzip.open(mirror / "molecules" / file, "rt") as f:
            rows = [r for r, _ in zip(csv.DictReader(f), range(500), strict=False)]
        texts = [r[c].strip() for c in columns.split(";") for r in rows if r[c] and r[c] not in ("FAIL", "nan")]
        for rep in closed:
            flat, offsets = rep.encode_batch(texts)
            assert rep.unk_id not in flat and (np.diff(offsets) > 2).all(), file
            assert rep.decode(flat.tolist()) == "".join(texts), file
        strings += len(texts)
    assert strings > 15_000
    assert_bulk_is_one_by_one(closed[0], texts)


def test_two_hundred_thousand_molecules_in_bulk_are_one_by_one(mirror):
    path = mirror / "molecules" / "unlabelled_union.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the mirror")
    with gzip.open(path, "rt") as f:
        rows = csv.reader(f)
        column = next(rows).index("smiles")
        smiles = [r[column] for _, r in zip(range(200_000), rows, strict=False)]
    rep = SmilesTokens(max_length=10**6)
    flat, offsets = rep.encode_batch(smiles)
    one = [rep(s)["tokens"] for s in smiles]
    assert np.array_equal(flat, np.concatenate(one)) and np.array_equal(np.diff(offsets), [len(t) for t in one])
