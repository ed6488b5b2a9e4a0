"""The catalogue, and every way in which getting a file can go wrong."""
import csv
import errno
import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from matfm.core import BadInput, ChecksumMismatch, DataUnavailable, TooManyRejected, sha256_file
from matfm.data import sources
from matfm.data.records import Atoms, Crystal, Mixture, Records, check_target_unit, molecules
from matfm.data.sources import Source, card, catalogue, download, fetch, listing, load, load_frame, load_with_rejected, source
from matfm.data.splits import leakage, random_split
from matfm.settings import Settings

CONTENT = b"SMILES,y\nCCO,1.5\nCCN,2.5\nC1CC,3\nCCC,4\n"
PACKED = gzip.compress(CONTENT, mtime=0)
TINY = Source("tiny", "molecule", "molecules/tiny.csv.gz", 4, len(PACKED), hashlib.sha256(PACKED).hexdigest(), hashlib.sha256(CONTENT).hexdigest(),
              structure="SMILES", targets={"y": "eV"}, licence="CC0-1.0", citation="nobody 2024")


class Web:
    "A web server with scripted answers: path → list of answers, the last one repeated."
    def __init__(self): self.script, self.asked, self.address = {}, [], ""

    def answer(self, handler):
        self.asked.append(handler.path)
        answers = self.script.get(handler.path, [(404, b"")])
        status, body, *promised = answers.pop(0) if len(answers) > 1 else answers[0]
        handler.send_response(status)
        handler.send_header("Content-Length", str(promised[0] if promised else len(body)))
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def web():
    site = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self): site.answer(self)
        def log_message(self, *args): pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        yield site
        server.shutdown()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch): monkeypatch.setattr(sources, "PAUSES", (0.01, 0.01))


@pytest.fixture
def folder(tmp_path):
    "A mirror folder with the tiny set, and settings that use it."
    file = tmp_path / "mirror" / TINY.file
    file.parent.mkdir(parents=True)
    file.write_bytes(PACKED)
    return Settings(root=str(tmp_path), data_mirror=str(tmp_path / "mirror"), data_cache=str(tmp_path / "cache"))


def leftovers(path):
    return [p for p in Path(path).rglob("*") if p.is_file()] if Path(path).exists() else []


# -- the catalogue --

def test_entries():
    entries = catalogue()
    assert len(entries) > 150 and len({s.file for s in entries.values()}) == len(entries)
    for s in entries.values():
        assert s.embedded or (len(s.sha256) == 64 and s.rows > 0 and s.bytes > 0), s.name
        assert bool(s.structure or s.build) == (s.domain not in ("table", "text")) or s.embedded or s.name == "mat2vec_analogies", s.name
        assert s.task and (s.citation or not s.structure) and (s.licence or not s.structure), s.name
        assert s.embedded or s.url or s.source, s.name
        assert not Path(s.file).is_absolute() and "/work" not in s.to_json(), s.name
    for unit in {u for s in entries.values() for u in [*s.targets.values(), *s.conditions.values()]}: check_target_unit(unit)
    assert not [s.name for s in entries.values() if s.file.endswith(".csv.gz") and not s.content_sha256]


def test_catalogue_is_the_mirrors(mirror):
    for kind in ("molecules", "crystals", "text"):
        with open(mirror / kind / "MANIFEST.csv", newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                s = source(row["name"])
                assert (s.file, s.sha256, s.rows, s.bytes, s.licence) == (f"{kind}/{row['file']}", row["sha256"], int(row["rows"]), int(row["bytes"]), row["licence"])


def test_names_and_cards():
    with pytest.raises(BadInput, match="did you mean 'lipophilicity'"): source("lipophilicty")
    with pytest.raises(BadInput, match="did you mean"): load("ESOLL")
    text = card("esol")
    assert all(w in text for w in ("Delaney", "Apache", "1,128", "log10(mol/L)", source("esol").sha256))
    html = source("esol")._repr_html_()
    assert "<a href=" in html and "licence" in html
    assert "&lt;b&gt;" in TINY.replace(note="<b>")._repr_html_()
    assert set(listing("crystal")["domain"]) == {"crystal"} and len(listing()) == len(catalogue())
    assert {"mlearn_Si", "rmd17_ethanol"} <= set(listing(task="Energies and Forces")["name"]) and set(listing("mixture", "regression")["domain"]) == {"mixture"}
    with pytest.raises(BadInput, match="did you mean 'mixture'"): listing("mixtures")
    assert all(w in card("chemixhub_viscosity") for w in ("T [K]", "by mole", "log10(cP)"))


@pytest.mark.parametrize("changes, message", [({"file": "/etc/passwd"}, "below the mirror's root"), ({"file": "a/../../b"}, "below the mirror's root"), ({"domain": "molecul"}, "did you mean 'molecule'"),
                                              ({"domain": "mixture", "build": {"prats": []}}, "did you mean 'parts'"), ({"build": {"parts": []}}, "build of a molecule"), ({"basis": "mol"}, "did you mean 'mole'")])
def test_entries_are_checked(changes, message):
    with pytest.raises(BadInput, match=message): TINY.replace(**changes)


# -- downloading --

def test_download_after_two_failures(web, tmp_path):
    web.script["/x"] = [(503, b"busy"), (200, PACKED[:30], len(PACKED)), (200, PACKED)]
    assert sha256_file(download(f"{web.address}/x", TINY, tmp_path / "c" / "t.csv.gz")) == TINY.sha256
    assert web.asked == ["/x"] * 3 and len(leftovers(tmp_path)) == 1


@pytest.mark.parametrize("answers, error, tries", [
    ([(404, b"")], DataUnavailable, 1), ([(403, b"no")], DataUnavailable, 1), ([(500, b"")], DataUnavailable, 3), ([(200, PACKED[:30], len(PACKED))], DataUnavailable, 3),
    ([(200, PACKED[:-1] + b"?")], ChecksumMismatch, 1), ([(200, b"<html>log in first</html>")], ChecksumMismatch, 1), ([(200, b"")], ChecksumMismatch, 1)])
def test_failed_downloads_leave_nothing(answers, error, tries, web, tmp_path):
    web.script["/x"] = answers
    with pytest.raises(DataUnavailable) as e: download(f"{web.address}/x", TINY, tmp_path / "t.csv.gz")
    assert type(e.value) is error and len(web.asked) == tries and not leftovers(tmp_path)


def test_mismatch_names_both_sums(web, tmp_path):
    web.script["/x"] = [(200, b"\x1f\x8bother")]
    with pytest.raises(ChecksumMismatch) as e: download(f"{web.address}/x", TINY, tmp_path / "t.csv.gz")
    assert TINY.sha256 in str(e.value) and hashlib.sha256(b"\x1f\x8bother").hexdigest() in str(e.value)


@pytest.mark.parametrize("body", [CONTENT, gzip.compress(CONTENT, 1, mtime=7)], ids=["unpacked", "packed otherwise"])
def test_same_content_in_another_packing(body, web, tmp_path):
    web.script["/x.csv"] = [(200, body)]
    assert gzip.decompress(download(f"{web.address}/x.csv", TINY, tmp_path / "t.csv.gz").read_bytes()) == CONTENT


def test_interrupted_download_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "t.csv.gz").write_bytes(PACKED)
    def cut(url, into):
        into.write_bytes(PACKED[:10])
        raise KeyboardInterrupt
    monkeypatch.setattr(sources, "_stream", cut)
    with pytest.raises(KeyboardInterrupt): download("http://127.0.0.1:9/x", TINY, tmp_path / "t.csv.gz")
    assert [p.name for p in leftovers(tmp_path)] == ["t.csv.gz"] and (tmp_path / "t.csv.gz").read_bytes() == PACKED


def test_full_disk(tmp_path, monkeypatch):
    def full(url, into):
        into.write_bytes(PACKED[:10])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(sources, "_stream", full)
    with pytest.raises(DataUnavailable, match="no space left in the cache folder.*set MATFM_DATA_CACHE"): download("http://127.0.0.1:9/x", TINY, tmp_path / "t.csv.gz")
    assert not leftovers(tmp_path)


def test_cache_that_is_no_folder(web, tmp_path):
    (tmp_path / "cache").write_text("a file")
    web.script["/" + TINY.file] = [(200, PACKED)]
    with pytest.raises(DataUnavailable, match="cannot write to the cache folder"): fetch(TINY, Settings(data_mirror=web.address, data_cache=str(tmp_path / "cache")))


# -- cache, mirror, internet --

def test_every_kind_of_mirror(folder, web):
    web.script["/m/" + TINY.file] = [(200, PACKED)]
    assert fetch(TINY, folder) == Path(folder.data_mirror) / TINY.file and not leftovers(folder.data_cache)
    assert fetch(TINY, folder.replace(data_mirror=Path(folder.data_mirror).as_uri())).read_bytes() == PACKED
    assert fetch(TINY, folder.replace(data_mirror="mirror")).read_bytes() == PACKED
    cached = fetch(TINY, folder.replace(data_mirror=f"{web.address}/m/"))
    assert cached == Path(folder.data_cache) / "files" / TINY.file
    assert fetch(TINY, folder.replace(data_mirror="")) == cached and len(web.asked) == 1


def test_damaged_mirror_is_an_error_damaged_cache_is_not(folder):
    cached = Path(folder.data_cache) / "files" / TINY.file
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half")
    with pytest.warns(UserWarning, match="fetched again"): assert fetch(TINY, folder).read_bytes() == PACKED
    (Path(folder.data_mirror) / TINY.file).write_bytes(b"half")
    with pytest.raises(ChecksumMismatch, match=TINY.sha256): fetch(TINY, folder)


def test_internet_comes_last(folder, web):
    web.script["/tiny.csv"] = [(200, CONTENT)]
    here = TINY.replace(url=f"{web.address}/tiny.csv")
    fetch(here, folder)
    assert not web.asked
    assert fetch(here, folder.replace(data_mirror="elsewhere")).read_bytes() == PACKED and web.asked == ["/tiny.csv"]


@pytest.mark.parametrize("mirror, url, said", [
    ("", "http://127.0.0.1:9/t.csv", "no mirror is set.*ConnectError"), ("gone", "", "does not exist.*knows no address"), ("http://127.0.0.1:9", "https://doi.org/10.1/x", "ConnectError.*another form"),
    ("", "https://x.org/chembl_%s.csv", "another form")])
def test_message_when_nobody_has_it(mirror, url, said, tmp_path):
    with pytest.raises(DataUnavailable, match=said) as e: fetch(TINY.replace(url=url), Settings(root=str(tmp_path), data_mirror=mirror, data_cache=str(tmp_path / "c")))
    text = str(e.value)
    assert type(e.value) is DataUnavailable and all(w in text for w in ("MATFM_DATA_MIRROR", "[data] mirror", "settings.ini", TINY.file, url)) and ("connect to the internet" in text) == ("ConnectError" in text) and not leftovers(tmp_path / "c")


def test_settings_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("MATFM_DATA_MIRROR", folder.data_mirror)
    assert len(load_with_rejected(TINY)[0]) == 3


# -- loading --

def test_load_and_its_cache(folder, monkeypatch):
    with pytest.warns(UserWarning, match="1 of 4 rows were set aside"): r = load(TINY, settings=folder)
    assert (r.name, r.licence, r.citation, r.targets, r.canonical) == ("tiny", "CC0-1.0", "nobody 2024", {"y": "eV"}, True)
    monkeypatch.setattr(sources, "from_frame", lambda *a, **k: pytest.fail("parsed again"))
    again, bad = load_with_rejected(TINY, settings=folder)
    assert again.frame.equals(r.frame) and bad.frame["value"].to_list() == ["C1CC"] and again.citation == r.citation


def test_damaged_parse_cache(folder):
    r, bad = load_with_rejected(TINY, settings=folder)
    for f in leftovers(Path(folder.data_cache) / "records"): f.write_bytes(b"PAR1 no")
    again, bad2 = load_with_rejected(TINY, settings=folder)
    assert again.digest == r.digest and bad2.frame.equals(bad.frame)


def test_limit_and_targets(folder):
    assert load(TINY, limit=2, settings=folder).structures() == ["CCO", "CCN"]
    with pytest.warns(UserWarning, match="1 of 4"): assert len(load(TINY, limit=99, settings=folder, targets="y")) == 3
    assert load(TINY, targets=(), limit=2, settings=folder).targets == {}
    with pytest.raises(BadInput, match="unknown target 'x'"): load(TINY, targets=["x"], settings=folder)
    with pytest.raises(BadInput, match="limit must be"): load(TINY, limit=0, settings=folder)
    one, two = (load(TINY.replace(ordered=True, trusted=True, targets={}), limit=3, settings=folder) for _ in range(2))
    assert one.digest == two.digest and len(one) == 3 and one.structures() != ["CCO", "CCN", "C1CC"]


def test_refuses_when_most_is_bad(folder):
    body = gzip.compress(b"SMILES,y\nC1,1\nQ,2\nC,3\n", mtime=0)
    (Path(folder.data_mirror) / TINY.file).write_bytes(body)
    s = TINY.replace(sha256=hashlib.sha256(body).hexdigest())
    with pytest.raises(TooManyRejected, match="2 of 3"): load(s, settings=folder)


def test_frames(folder):
    f = load_frame(TINY, settings=folder)
    assert f["y"].to_list() == [1.5, 2.5, 3.0, 4.0] and f["SMILES"][0] == "CCO"


def test_embedded_sets(tmp_path):
    s = source("matfm_molecules").replace(file="data/nowhere/labelled.parquet")
    here = Settings(root=str(tmp_path))
    with pytest.raises(DataUnavailable, match="comes with matfm's repository"): fetch(s, here)
    made = molecules(["CCO", "CCN"], {"gap": [1.0, 2.0]}, {"gap": "eV"}, name="made here")[0].save(tmp_path / s.file)
    assert len(load(s, settings=here)) == 2 and len(load(s, limit=1, settings=here)) == 1
    (made.parent / "checksums.json").write_text(json.dumps({"labelled.parquet": sha256_file(made)}))
    assert load(s, settings=here).targets == {"gap": "eV"}
    (made.parent / "checksums.json").write_text(json.dumps({"labelled.parquet": "0" * 64}))
    with pytest.raises(ChecksumMismatch): load(s, settings=here)


@pytest.mark.parametrize("name", ["matfm_molecules", "matfm_molecules_unlabelled", "matfm_crystals"])
def test_the_checkouts_own_sets(name, root):
    if not (root / source(name).file).is_file(): pytest.skip(f"{source(name).file} is not in this checkout")
    entry, r = source(name), load(name)
    assert (len(r), r.domain, r.targets, r.licence, r.citation) == (entry.rows, entry.domain, entry.targets, entry.licence, entry.citation)
    assert set(r.frame[entry.split]) == {"train", "valid", "test"}
    assert len(load(name, limit=50).structures()) == 50


# -- the real thing --

@pytest.mark.parametrize("name, rows", [("esol", 1128), ("freesolv", 642), ("bbbp", 2039), ("matbench_expt_gap", 4604), ("matbench_phonons", 1265), ("dielectric_constant", 1056)])
def test_whole_sets(name, rows, mirror):
    r, bad = load_with_rejected(name)
    assert len(r) == rows and len(r) + len(bad) == source(name).rows
    assert list(r.targets) == list(source(name).targets) and np.isfinite(r.y()).any(axis=1).all()
    assert source(name).split in ("", *r.frame.columns)


KINDS = {"molecule": str, "composition": str, "reaction": str, "crystal": Crystal, "mixture": Mixture, "atoms": Atoms}
PUBLIC = sorted(n for n, s in catalogue().items() if not s.embedded)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_set_loads(name, mirror, tmp_path):
    s = source(name)
    limit = None if s.rows <= 1200 or (s.domain in ("table", "text") and s.bytes < 2e6) else 60
    r, bad = load_with_rejected(name, limit=limit, jobs=1)
    assert len(r) + len(bad) == min(limit or s.rows, s.rows) and len(r) > len(bad)
    assert (r.name, r.domain, r.targets, r.conditions, r.basis, r.licence, r.citation) == (name, s.domain, s.targets, s.conditions, s.basis, s.licence, s.citation)
    assert r.y().shape == (len(r), len(s.targets)) and s.split in ("", *r.frame.columns) and len(listing(s.domain, s.task))
    again = Records.load(r.save(tmp_path / "r.parquet"))
    assert again.frame.equals(r.frame) and (again.digest, again.conditions, again.basis) == (r.digest, r.conditions, r.basis)
    few = r.take(range(min(60, len(r))))
    if s.domain in KINDS: assert all(isinstance(x, KINDS[s.domain]) for x in few.structures())
    split = random_split(few)
    assert len(split) == len(few) and leakage(split, few)["identical_test"] == 0 and "<table" in few._repr_html_()


@pytest.mark.parametrize("name", ["flash_point_mixtures", "electrolyte_conductivity", "mlearn_Li", "glass_non_glass_abstracts", "ner_synthesis_olivetti", "cameo_fegapd", "az_eln_buchwald_hartwig"])
def test_whole_sets_of_every_domain(name, mirror):
    r, again = load(name), load(name)  # the second from the cache of parsed records
    assert len(r) == source(name).rows and again.digest == r.digest
    assert list(again.targets) == list(r.targets) == list(source(name).targets) and list(again.conditions) == list(source(name).conditions)


def test_mixtures_are_put_together(mirror):
    r = load("electrolyte_molsets_conductivity", limit=50)
    assert "*" in r.structures()[0].components[0] and "[Cu]" not in str(r.structures()) and r.structures()[0].roles[-1] == "salt" and np.isnan(r.structures()[0].fractions[-1])
    lce = load("electrolyte_lce_formulation")
    assert all(abs(sum(m.fractions) - 1) < 0.02 for m in lce.structures()) and max(map(len, lce.structures())) > 3
    pair = load("chemixhub_olfactory_similarity", limit=20).structures()
    assert all(set(m.roles) == {"1", "2"} and all(map(np.isnan, m.fractions)) for m in pair)
    r, bad = load_with_rejected("chemixhub_viscosity", limit=3000)
    assert not len(bad) and {len(m) for m in r.structures()} == {1, 2} and r.frame["T"].dtype.is_float()
    r, bad = load_with_rejected("chemixhub_polymer_electrolyte", jobs=1)
    assert all("components but 2 fractions" in w for w in bad.frame["reason"]) and 0 < len(bad) < 300


def test_configurations_have_forces(mirror):
    r = load("mlearn_Mo", limit=20)
    assert r.frame["forces"].list.len().to_list() == [3 * len(a) for a in r.structures()] and all(a.lattice is not None for a in r.structures())
    assert load("rmd17_aspirin", limit=5).structures()[0].lattice is None and r.y("energy").max() < 0


def test_arrays_become_rows(mirror):
    r = load("multimat_sample")
    row = r[next(i for i, v in enumerate(r.frame["charge_density_32"]) if v is not None)]
    assert np.array(row["charge_density_32"]).shape == (32, 32, 32) and np.array(row["dos"]).shape == (2, 601) and r.frame["charge_density_16"].null_count() == 408 - 371
    x = load("xrd_autoxrd_thinfilm")
    assert len({len(v) for c in ("two_theta", "intensity") for v in x.frame[c]}) == 1 and x[0]["two_theta"] == x[72]["two_theta"]


def test_texts(mirror):
    r = load("mat2vec_analogies")
    assert len(r) == 35104 and r[0]["section"] == "chemical element names" and [r[0][c] for c in "abcd"] == ["Ac", "actinium", "Ag", "silver"]
    assert json.loads(load("matsci_nlp_sc_comics")[0]["t_type_dict"])["T9"] == "SC"
    assert load("ner_matscholar", limit=3).frame["tokens"].dtype == pl.List(pl.String)


@pytest.mark.parametrize("name", PUBLIC)
def test_stranger_is_told_what_to_do(name, tmp_path, monkeypatch):
    def nobody(url, into): raise httpx.ConnectError("no route to host")
    monkeypatch.setattr(sources, "_stream", nobody)
    s = source(name)
    with pytest.raises(DataUnavailable) as e: load(name, settings=Settings(data_cache=str(tmp_path)))
    said = str(e.value)
    assert "Set MATFM_DATA_MIRROR" in said and s.file in said and (s.url or s.source) in said
    assert ("connect to the internet" in said) == ("no route to host" in said) and not leftovers(tmp_path)


def test_missing_table_of_compounds(tmp_path):
    body = gzip.compress(b"ids,y\n\"[0.0, 1.0]\",1\n", mtime=0)
    (tmp_path / "t.csv.gz").write_bytes(body)
    s = Source("t", "mixture", "t.csv.gz", 1, len(body), hashlib.sha256(body).hexdigest(), targets={"y": ""},
               build={"parts": [{"smiles": ["ids"]}], "compounds": {"source": "chemixhub_viscosity_compounds", "number": "compound_id", "smiles": ["smiles"]}})
    with pytest.raises(DataUnavailable, match="chemixhub_viscosity_compounds is not in the cache"): load(s, settings=Settings(data_mirror=str(tmp_path), data_cache=str(tmp_path / "cache")))


@pytest.mark.parametrize("domain, build, csv_text, reasons", [
    ("mixture", {"parts": [{"smiles": ["a", "b"], "fractions": ["x"]}]}, 'a,b,x,y\nCCO,O,"[0.4, 0.6]",1\nCCO,O,"[1.0, 2.0, 3.0]",1\nQ,,"[1.0]",1\n,,,1\n', ["2 components but 3 fractions", "a component cannot be used", "a mixture without components"]),
    ("reaction", {"reactants": ["a"], "product": ["b"]}, "a,b,y\nCO.CC(=O)O,COC(C)=O,1\nC,,1\n,C,1\nQ,C,1\n", ["a reaction without product", "a reaction without reactants", "a side of the reaction cannot be used"]),
    ("atoms", {"symbols": "s", "positions": "p", "lattice": "c"}, 's,p,c,y\n"[""O""]","[[0, 0, 0]]","[[9,0,0],[0,9,0],[0,0,9]]",1\n"[""Xx""]","[[0, 0, 0]]",,1\n"[""O""]","[[0, 0",,1\n"[""O""]","[[0, 0, 0]]","[[1,2]]",1\n',
     ["atomic numbers must lie", "positions cannot be read", "lattice cannot be read"])])
def test_bad_rows_of_every_build(domain, build, csv_text, reasons, tmp_path):
    body = gzip.compress(csv_text.encode(), mtime=0)
    (tmp_path / "t.csv.gz").write_bytes(body)
    s = Source("t", domain, "t.csv.gz", 4, len(body), hashlib.sha256(body).hexdigest(), targets={"y": ""}, build=build)
    r, bad = load_with_rejected(s, settings=Settings(data_mirror=str(tmp_path), data_cache=str(tmp_path / "cache")))
    assert len(r) == 1 and len(bad) == len(reasons)
    for said, wanted in zip(bad.frame["reason"], reasons, strict=True): assert wanted in said


def test_plain_frames(mirror):
    for name in ("uspto50k", "electrolyte_conductivity", "discomat_tables", "ner_matscholar", "rmd17_ethanol", "xrd_alfelio_synthetic", "mat2vec_analogies"):
        assert len(load_frame(name, limit=20)) == 20
