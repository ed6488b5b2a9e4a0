"""Public services, replayed: paging, resuming, back-off, refusals, rows that cannot be used, keys, files."""
import gzip
import hashlib
import io
import json
import subprocess
import sys
import threading
import zipfile
from email.utils import format_datetime
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urljoin, urlsplit

import httpx
import numpy as np
import pytest

from matfm.core import BadInput, ChecksumMismatch, DataUnavailable, check_unit
from matfm.data import remote
from matfm.data.records import Records, check_target_unit
from matfm.data.remote import (
    JARVIS, JARVIS_PROPERTIES, MP_PROPERTIES, PROVIDERS, PUBCHEM_PROPERTIES, SERVICES, Http, Pace, Refused, RemoteFile, Row, activity_values, chembl, crawl, download_file, figshare_files,
    gathered, huggingface_files, jarvis, materials_project, mp_crystal, optimade, optimade_crystal, optimade_properties, pubchem, pubchem_search, replay, request_key, service_message, zenodo_files,
)

RECORDED = Path(__file__).parent / "recorded"
X = "https://example.org/x"


def exchanges(name: str) -> list[dict]:
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))["exchanges"]


class Clock:
    "A clock that only sleeping moves."
    def __init__(self):
        self.now, self.slept = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def line(tmp_path, clock):
    "A function that makes an `Http` on one cache folder from exchanges or a handler."
    def make(source, **kwargs) -> Http:
        transport = httpx.MockTransport(source) if callable(source) else replay(source)
        return Http(tmp_path / "remote", transport, Pace(clock, clock.sleep), progress=False, **kwargs)
    return make


def asked(http: Http) -> list[str]:
    return http.transport.asked


def nothing(request):
    raise httpx.ConnectError("no network", request=request)


# one request ---------------------------------------------------------------------------------------------------------
def test_answers_are_kept_and_young_enough(line):
    again = [{"url": X, "body": {"n": 1}}, {"url": X, "body": {"n": 2}}]
    assert line(again).json(X).data == {"n": 1}
    assert line(nothing).json(X).data == {"n": 1}, "no second request"
    assert line(again[1:], max_age=0.0).json(X).data == {"n": 2}, "too old for this one"


def test_order_of_parameters_does_not_matter_but_forms_do(line):
    assert request_key(X + "?b=2&a=1&c=") == request_key(X + "?c=&a=1&b=2") != request_key(X + "?a=1&b=2")
    assert request_key(X, {"cid": "1"}) != request_key(X, {"cid": "2"}) != request_key(X)
    http = line([{"url": X, "form": {"cid": "1"}, "body": 1}, {"url": X, "form": {"cid": "2"}, "body": 2}, {"url": X, "body": 3}])
    assert [http.json(X, {"cid": "1"}).data, http.json(X, {"cid": "2"}).data, http.json(X).data] == [1, 2, 3]


def test_a_damaged_kept_answer_is_fetched_again(line):
    line([{"url": X, "body": {"n": 1}}]).json(X)
    http = line([{"url": X, "body": {"n": 2}}])
    [kept] = http.cache.rglob("*.gz")
    for rubbish in (b"", b"\x1f\x8brubbish", gzip.compress(b"{"), gzip.compress(b"[]"), gzip.compress(b'{"data": 1, "url": "", "retrieved": "yesterday"}')):
        kept.write_bytes(rubbish)
        assert http.json(X).data == {"n": 2}


def test_429_waits_as_long_as_it_is_told(line, clock):
    http = line([{"url": X, "status": 429, "headers": {"Retry-After": "11"}, "body": ""}, {"url": X, "body": 1}])
    assert http.json(X).data == 1 and 11.0 in clock.slept


def test_retry_after_may_be_a_date(line, clock):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    assert line([{"url": X, "status": 503, "headers": {"Retry-After": when}, "body": ""}, {"url": X, "body": 1}]).json(X).data == 1
    assert any(35 < s <= 40 for s in clock.slept)


def test_a_long_wait_is_told_not_sat_out(line, clock):
    http = line([{"url": X, "status": 429, "headers": {"Retry-After": "86400"}, "body": {"message": "Quota exceeded"}}])
    with pytest.raises(Refused, match="Quota exceeded; it asks to wait 86400 s. Call again later") as e:
        http.json(X)
    assert e.value.status == 429 and len(asked(http)) == 1 and sum(clock.slept) < 5


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_5xx_is_tried_five_times_with_doubling_pauses(line, clock, status):
    http = line([{"url": X, "status": status, "body": "<html><title>x</title><body>Down for <b>maintenance</b></body></html>"}])
    with pytest.raises(Refused, match=f"answered {status}.*maintenance"):
        http.json(X)
    assert len(asked(http)) == 5 and clock.slept == [0.5, 1.0, 2.0, 4.0]


def test_a_passing_5xx_costs_nothing_but_time(line):
    assert line([{"url": X, "status": 502, "body": ""}] * 4 + [{"url": X, "body": "7"}]).json(X).data == 7


@pytest.mark.parametrize("status,body,said", [
    (404, {"Fault": {"Code": "PUGREST.NotFound", "Message": "No CID found", "Details": ["No CID found that matches the given name"]}}, "No CID found; No CID found that matches the given name"),
    (400, {"error_message": "Invalid resource lookup data provided"}, "Invalid resource lookup"),
    (422, {"detail": [{"loc": ["query", "_limit"], "msg": "value is not a valid integer"}]}, "not a valid integer"),
    (400, {"errors": [{"title": "Bad Request", "detail": "unknown property"}]}, "unknown property"),
    (404, {"status": 404, "message": "The persistent identifier does not exist."}, "identifier does not exist"),
    (401, {"error": "Repository not found"}, "Repository not found"), (403, "", "no explanation"), (404, {"Fault": "odd", "errors": ["odd"], "detail": 3}, "odd")])
def test_our_mistakes_are_raised_at_once_in_the_services_words(line, status, body, said):
    http = line([{"url": X, "status": status, "body": body}])
    with pytest.raises(Refused, match=said) as e:
        http.json(X)
    assert e.value.status == status and len(asked(http)) == 1 and X in str(e.value)
    with pytest.raises(Refused):
        http.json(X)
    assert len(asked(http)) == 2, "an error is not kept"


def test_malformed_json_says_what_came(line):
    http = line([{"url": X, "body": "<html>Welcome to the hotel's network</html>"}, {"url": X, "body": "[1]"}])
    with pytest.raises(DataUnavailable, match="not JSON.*hotel's network"):
        http.json(X)
    assert http.json(X).data == [1], "it was not kept"


def test_offline_says_what_to_do(line, clock):
    with pytest.raises(DataUnavailable, match="example.org cannot be reached.*Connect to the internet and call again.*MATFM_DATA_CACHE"):
        line(nothing).json(X)
    assert clock.slept, "it tried more than once"


def test_only_the_web_is_asked(line):
    for url in ("file:///etc/passwd", "ftp://example.org/x", "example.org", ""):
        with pytest.raises(BadInput, match="not a web address"):
            line(nothing).json(url)


def test_an_unwritable_cache_is_named(tmp_path, clock):
    (tmp_path / "file").write_text("in the way")
    http = Http(tmp_path / "file", replay([{"url": X, "body": 1}]), Pace(clock, clock.sleep))
    with pytest.raises(DataUnavailable, match="cannot write to .*MATFM_DATA_CACHE"):
        http.json(X)


def test_the_cache_lies_below_the_workspaces(monkeypatch, tmp_path):
    monkeypatch.setenv("MATFM_DATA_CACHE", str(tmp_path / "here"))
    assert Http().cache == tmp_path / "here" / "remote"


def test_pace_holds_over_threads_and_hosts():
    slept: list[float] = []
    pace = Pace(lambda: 0.0, slept.append)
    threads = [threading.Thread(target=pace.wait, args=("zenodo.org",)) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(slept) == [1.0, 2.0, 3.0, 4.0]
    pace.wait("example.org")
    assert len(slept) == 4, "another host need not wait"


# pages ---------------------------------------------------------------------------------------------------------------
def pages_of(n: int, per: int = 2) -> list[dict]:
    return [{"url": X, "params": {"page": str(k)}, "body": {"rows": list(range(per * k, per * k + per)), "next": f"/x?page={k + 1}" if k + 1 < n else None}} for k in range(n)]


def following(reply) -> str:
    return urljoin(reply.url, reply.data["next"]) if reply.data["next"] else ""


def crawled(http: Http, **kwargs) -> list:
    return [r for r, _ in crawl(http, X + "?page=0", "rows", following, **kwargs)]


def test_paging_goes_through_all(line):
    http = line(pages_of(5))
    assert crawled(http) == list(range(10)) and len(asked(http)) == 5


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 99])
def test_limit_fetches_no_page_too_many(line, limit):
    http = line(pages_of(5))
    assert crawled(http, limit=limit) == list(range(min(limit, 10))) and len(asked(http)) == min(-(-limit // 2), 5)


def test_limit_must_be_positive(line):
    with pytest.raises(BadInput, match="limit"):
        crawled(line(pages_of(1)), limit=0)


@pytest.mark.parametrize("broken", range(5))
def test_a_cut_off_crawl_fetches_nothing_twice(line, broken):
    bad = pages_of(5)
    bad[broken] = {**bad[broken], "status": 500, "body": ""}
    first = line(bad)
    with pytest.raises(Refused):
        crawled(first)
    second = line(pages_of(5))
    assert crawled(second) == list(range(10))
    good = {u for u in asked(first) if not u.endswith(f"page={broken}")}
    assert not good & set(asked(second)) and len(good) + len(asked(second)) == 5


def test_circles_and_missing_lists(line):
    with pytest.raises(DataUnavailable, match="again and again"):
        crawled(line([{"url": X, "params": {"page": "0"}, "body": {"rows": [], "next": "/x?page=0"}}]))
    for body in ({"other": []}, [1, 2], {"rows": {"a": 1}}, 3):
        with pytest.raises(DataUnavailable, match="no list 'rows'"):
            crawled(line([{"url": X, "params": {"page": "0"}, "body": body}], max_age=0.0))


# rows ----------------------------------------------------------------------------------------------------------------
def test_gathered_loses_nothing_and_keeps_the_rows_apart():
    rows = [Row(str(i), s, {"y": y}, {"n": i}, why) for i, (s, y, why) in enumerate([("CCO", 1, ""), (None, 1, ""), ("C1C", 1, ""), ({"raw": 1}, 1, "no structure"), ("CC", None, ""), ("CC", float("nan"), ""),
                                                                                     ("CC", "na", ""), ("C", "2.5", ""), ("N", float("inf"), "")])]
    records, rejected = gathered(rows, "molecule", {"y": "eV"}, SERVICES["chembl"])
    assert records.frame["n"].to_list() == [0, 7] and records.y().ravel().tolist() == [1, 2.5]
    assert rejected.frame["row"].to_list() == [1, 2, 3, 4, 5, 6, 8] and rejected.frame["id"].to_list() == ["1", "2", "3", "4", "5", "6", "8"]
    assert (records.licence, records.name) == ("CC BY-SA 3.0", "chembl")


def test_gathered_without_rows_or_targets():
    for domain in ("molecule", "crystal"):
        records, rejected = gathered([], domain, {"y": "eV"}, SERVICES["chembl"])
        assert len(records) == len(rejected) == 0 and records.targets == {"y": "eV"}
    assert len(gathered([Row("a", "C")], "molecule", {}, SERVICES["chembl"])[0]) == 1


def test_every_stated_unit_is_one():
    for table in (PUBCHEM_PROPERTIES, MP_PROPERTIES, JARVIS_PROPERTIES):
        for unit in table.values(): check_unit(unit)
    assert check_target_unit("-log10(mol/L)")


# PubChem -------------------------------------------------------------------------------------------------------------
def test_pubchem_cids(line):
    records, rejected = pubchem([2244, 2519, 999999999], http=line(exchanges("pubchem")))
    assert isinstance(records, Records) and records.ids == ["2244", "2519"] and records.y("MolecularWeight").ravel().tolist() == [180.16, 194.19]
    assert records.frame["source_url"][0] == "https://pubchem.ncbi.nlm.nih.gov/compound/2244" and len(records.frame["retrieved"][0]) == 10
    assert rejected.frame.select("id", "reason").rows() == [("999999999", "no structure")]


def test_pubchem_one_wrong_cid_does_not_spoil_the_batch(line):
    records, rejected = pubchem(["02244", 99999999999999, "x", "", 2244], http=line(exchanges("pubchem")))
    assert records.ids == ["2244"] and sorted(r.split(":")[0] for r in rejected.frame["reason"]) == ["asked twice", "not a cid", "not a cid", "unknown to PubChem"]


def test_pubchem_silence_about_a_cid_is_noticed(line):
    url = f"{SERVICES['pubchem'].url}/compound/cid/property/SMILES,InChIKey,Title,XLogP/JSON"
    http = line([{"url": url, "form": {"cid": "1,2"}, "body": {"PropertyTable": {"Properties": [{"CID": 2, "SMILES": "CCO", "XLogP": 0.1}]}}}])
    records, rejected = pubchem([1, 2], properties=["XLogP"], http=http)
    assert records.ids == ["2"] and rejected.frame.select("id", "reason").rows() == [("1", "nothing sent by PubChem")]


def test_pubchem_names_and_smiles(line):
    http = line(exchanges("pubchem"))
    records, rejected = pubchem(["aspirin", "unobtainium", "caffeine"], "name", http=http)
    assert records.frame["asked"].to_list() == ["aspirin", "caffeine"] and "No CID found" in rejected.frame["reason"][0]
    records, rejected = pubchem(["CC(=O)Oc1ccccc1C(=O)O", "C[Xe]C"], "smiles", http=http)
    assert records.frame["inchikey"].to_list() == ["BSYNRYMUTXBXSQ-UHFFFAOYSA-N"] and rejected.frame["reason"].to_list() == ["unknown to PubChem: not in the database"]


def test_pubchem_busy_is_not_taken_for_unknown(line):
    http = line(lambda request: httpx.Response(503, json={"Fault": {"Code": "PUGREST.ServerBusy", "Message": "Too many requests or server too busy"}}))
    with pytest.raises(Refused, match="too busy"):
        pubchem([2244], http=http)


def test_pubchem_search_polls_and_remembers(line, clock):
    ask = lambda http: pubchem_search("CC(=O)OC1=CC=CC=C1C(=O)O", limit=10, http=http)
    http = line(exchanges("pubchem"))
    assert ask(http) == [2244, 2519, 3672] and [s for s in clock.slept if s > 1] == [2.0, 3.0]
    assert ask(line(nothing)) == [2244, 2519, 3672]


def test_pubchem_search_patience_and_no_hit(line):
    running = [e for e in exchanges("pubchem") if "Waiting" in e["body"]]
    with pytest.raises(DataUnavailable, match="still searching after 30 s"):
        pubchem_search("CC(=O)OC1=CC=CC=C1C(=O)O", limit=10, patience=30, http=line(running))
    none = [running[0], {**running[1], "status": 404, "body": {"Fault": {"Code": "PUGREST.NotFound", "Message": "No hits"}}}]
    assert pubchem_search("CC(=O)OC1=CC=CC=C1C(=O)O", limit=10, http=line(none)) == []
    with pytest.raises(BadInput, match="similarity"):
        pubchem_search("C", "similar", http=line(nothing))


# ChEMBL --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change,nM,p", [
    ({}, 1.0, 9.0), ({"standard_value": "2.5", "standard_units": "uM"}, 2500.0, 5.60206), ({"standard_value": 1e-3, "standard_units": "M"}, 1e6, 3.0),
    ({"standard_relation": ">"}, 1.0, None), ({"standard_relation": "<="}, 1.0, None), ({"standard_relation": "~"}, 1.0, None), ({"standard_relation": None}, 1.0, None),
    ({"data_validity_comment": "Potential transcription error"}, 1.0, None), ({"data_validity_comment": "Manually validated"}, 1.0, 9.0)])
def test_pchembl_only_for_exact_values(change, nM, p):
    found = activity_values({"standard_value": "1", "standard_units": "nM", "standard_relation": "=", **change})
    assert found[0] == pytest.approx(nM) and (found[1] is None if p is None else found[1] == pytest.approx(p, abs=1e-5))


@pytest.mark.parametrize("change,why", [({"standard_value": None, "activity_comment": "Not Active"}, "no value: Not Active"), ({"standard_value": ""}, "no value: no comment"), ({"standard_value": "0"}, "not a concentration"),
                                        ({"standard_value": "-3"}, "not a concentration"), ({"standard_value": "NaN"}, "not a concentration"), ({"standard_units": "%"}, "not a molar unit: '%'"),
                                        ({"standard_units": "ug.mL-1"}, "not a molar unit"), ({"standard_units": None}, "not a molar unit: ''")])
def test_what_is_no_concentration(change, why):
    with pytest.raises(BadInput, match=why):
        activity_values({"standard_value": "1", "standard_units": "nM", "standard_relation": "=", **change})


def test_chembl_pages_bounds_and_rejects(line):
    http = line(exchanges("chembl"))
    records, rejected = chembl("CHEMBL3921", page=2, http=http)
    assert len(asked(http)) == 4 and len(records) + len(rejected) == 8
    by_relation = {r: records.frame.filter(records.frame["relation"] == r)["pchembl"].to_list() for r in (">", "~")}
    assert by_relation == {">": [None], "~": [None]} and np.isnan(records.y("pchembl")).sum() == 3 and np.isfinite(records.y("concentration")).all()
    assert records.targets["pchembl"] == "-log10(mol/L)" and rejected.reasons() == {"no structure": 1, "not a molar unit": 1, "no value": 1}
    assert records.frame["source_url"][0].endswith("/activity/31864") and "10.1093" in records.citation


def test_chembl_resumes(line):
    part = exchanges("chembl")
    with pytest.raises(DataUnavailable):
        chembl("CHEMBL3921", page=2, http=line(part[:2]))
    rest = line(part[2:])
    assert len(chembl("CHEMBL3921", page=2, http=rest)[0]) == 5 and len(asked(rest)) == 2


def test_chembl_arguments(line):
    for target in ("EGFR", "CHEMBL", "CHEMBL203&x=1"):
        with pytest.raises(BadInput, match="not a ChEMBL target"):
            chembl(target, http=line(nothing))
    with pytest.raises(BadInput, match="page"):
        chembl("CHEMBL203", page=5000, http=line(nothing))


def test_odd_rows_are_set_aside(line):
    body = {"activities": [3, None, [], {"activity_id": 1}, {"activity_id": 2, "canonical_smiles": "C", "standard_value": "abc", "standard_units": "nM"},
                           {"activity_id": 4, "canonical_smiles": "C1CC", "standard_value": "1", "standard_units": "nM", "standard_relation": "="}], "page_meta": {"next": None}}
    records, rejected = chembl("CHEMBL1", http=line(lambda request: httpx.Response(200, json=body)))
    assert len(records) == 0 and len(rejected) == 6 and sum("malformed row" in r for r in rejected.frame["reason"]) == 4


# Materials Project ---------------------------------------------------------------------------------------------------
def test_missing_key_is_named_before_anything_is_sent(line, monkeypatch):
    monkeypatch.delenv("MP_API_KEY", raising=False)
    http = line([])
    with pytest.raises(DataUnavailable, match=r"https://next-gen.materialsproject.org/api .*MP_API_KEY"):
        materials_project({"chemsys": "Na-Cl"}, http=http)
    assert asked(http) == []


def test_the_key_goes_in_a_header_and_is_kept_nowhere(line, monkeypatch):
    monkeypatch.setenv("MP_API_KEY", " sesame ")
    seen = []
    def serve(request):
        seen.append(request)
        return httpx.Response(200, json={"data": [], "meta": {"total_doc": 0}})
    http = line(serve)
    materials_project({"elements": ["Na", "Cl"], "is_stable": True}, http=http)
    asked_for = dict(parse_qsl(urlsplit(str(seen[0].url)).query))
    assert seen[0].headers["x-api-key"] == "sesame" and "sesame" not in str(seen[0].url) and asked_for["elements"] == "Na,Cl" and asked_for["is_stable"] == "true" and asked_for["deprecated"] == "false"
    assert all(b"sesame" not in gzip.decompress(p.read_bytes()) for p in http.cache.rglob("*.gz"))


def test_the_key_does_not_follow_a_redirect(line):
    hosts = []
    def serve(request):
        hosts.append(request.url.host)
        return httpx.Response(302, headers={"Location": "https://evil.example/x"})
    with pytest.raises(Refused, match="302"):
        materials_project({}, key="sesame", http=line(serve))
    assert hosts == ["api.materialsproject.org"]


def test_a_wrong_key_is_explained(line):
    with pytest.raises(DataUnavailable, match="does not accept the key: Invalid authentication credentials; compare MP_API_KEY"):
        materials_project({}, key="wrong", http=line(lambda request: httpx.Response(401, json={"message": "Invalid authentication credentials"})))


def test_materials_project_rows(line):
    http = line(exchanges("materials_project"))
    records, rejected = materials_project({"nelements_max": 2}, key="k", http=http, page=2)
    assert records.ids == ["mp-149", "mp-22862"] and len(asked(http)) == 3 and records.frame["pretty_formula"].to_list() == ["Si", "NaCl"]
    assert rejected.frame.select("id", "row").rows() == [("mp-000001", 2), ("mp-000002", 3), ("mp-000003", 4)]
    moduli, _ = materials_project({"material_ids": "mp-149"}, ["bulk_modulus.vrh"], key="k", http=http)
    assert moduli.y().tolist() == [[88.9]] and moduli.frame["licence"].to_list() == ["CC BY 4.0"]


def test_materials_project_licence_of_gnome_entries(line):
    docs = [d | {"band_gap": 1.0} for e in exchanges("materials_project") for d in e["body"]["data"] if d["material_id"] == "mp-000003"]
    records, _ = materials_project({}, ["band_gap"], key="k", http=line(lambda request: httpx.Response(200, json={"data": docs, "meta": {"total_doc": 1}})))
    assert records.frame["licence"].to_list() == ["CC BY-NC 4.0"]


def test_materials_project_arguments(line):
    with pytest.raises(BadInput, match="did you mean"):
        materials_project({}, ["bandgap"], key="k", http=line(nothing))
    with pytest.raises(BadInput, match="_limit"):
        materials_project({"_limit": 3}, key="k", http=line(nothing))


def test_a_structure_builds_no_classes(tmp_path, monkeypatch):
    "pymatgen's reader imports whatever a site's properties name; ours reads numbers."
    (tmp_path / "named_by_a_stranger.py").write_text("class Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    site = {"species": [{"element": "Cu", "occu": 1}], "abc": [0, 0, 0], "properties": {"x": {"@module": "named_by_a_stranger", "@class": "Thing"}}}
    assert mp_crystal({"lattice": {"matrix": (np.eye(3) * 3).tolist()}, "sites": [site]}).formula == "Cu"
    assert "named_by_a_stranger" not in sys.modules


# OPTIMADE ------------------------------------------------------------------------------------------------------------
TARGETS = {"_oqmd_delta_e": "eV/atom", "_oqmd_band_gap": "eV"}


def test_optimade_pages_stay_on_https(line):
    http = line(exchanges("optimade"))
    records, rejected = optimade("oqmd", 'elements HAS "Cl"', TARGETS, http=http, page=2)
    assert all(a.startswith("GET https://") for a in asked(http)) and len(asked(http)) == 3
    assert records.ids == ["4061139", "4061144"] and records.y("_oqmd_delta_e").ravel().tolist() == [-2.077, -2.2]
    assert rejected.reasons() == {"disordered crystal": 1, "no target value": 1, "no structure": 1, "incomplete structure": 1}
    assert np.allclose(records.structures()[1].frac, [[0, 0, 0], [0.5, 0.5, 0.5]]) and records.licence == "CC BY 4.0"


def test_optimade_without_targets_keeps_unlabelled_crystals(line):
    page = exchanges("optimade")[1]["body"] | {"links": {}, "meta": {}}
    records, _ = optimade("https://optimade.example.org/v1/", "nsites=2", http=line(lambda request: httpx.Response(200, json=page)))
    assert records.ids == ["4061141"] and records.frame["source_url"][0] == "https://optimade.example.org/v1/structures/4061141" and records.licence == "ask the provider"


def test_optimade_resumes(line):
    part = exchanges("optimade")
    with pytest.raises(DataUnavailable):
        optimade("oqmd", 'elements HAS "Cl"', TARGETS, http=line(part[:1]), page=2)
    rest = line(part[1:])
    assert len(optimade("oqmd", 'elements HAS "Cl"', TARGETS, http=rest, page=2)[0]) == 2 and len(asked(rest)) == 2


def test_optimade_errors(line):
    with pytest.raises(BadInput, match="did you mean 'alexandria-pbe'"):
        optimade("alexandria_pbe", "", http=line(nothing))
    with pytest.raises(Refused, match="Unable to parse filter"):
        optimade("oqmd", "elements HAS", TARGETS, http=line(exchanges("optimade")), page=2)
    assert optimade_properties("oqmd", line(exchanges("optimade")))["unit"].to_list() == ["eV", "eV/atom", None]


@pytest.mark.parametrize("change,why", [
    ({"lattice_vectors": [[1, 0, 0], [0, 1, 0], [None, None, None]]}, "not periodic"), ({"structure_features": ["site_attachments"]}, "incomplete"), ({"species_at_sites": []}, "no structure"),
    ({"species": [{"name": "Na", "chemical_symbols": ["vacancy"], "concentration": [1]}, {"name": "Cl", "chemical_symbols": ["Cl"], "concentration": [1]}]}, "no element: 'vacancy'"),
    ({"cartesian_site_positions": [[0, 0, 0]]}, "2 atomic numbers but 1"), ({"cartesian_site_positions": [[0, 0, 0], ["a", 0, 0]]}, "positions cannot be used"), ({"lattice_vectors": [[float("nan")] * 3] * 3}, "NaN")])
def test_crystals_that_are_none(change, why):
    salt = exchanges("optimade")[0]["body"]["data"][0]["attributes"]
    with pytest.raises(BadInput, match=why):
        optimade_crystal({**salt, **change})


def test_providers_are_known_by_https_addresses():
    for s in (*PROVIDERS.values(), *SERVICES.values()):
        assert s.url.startswith("https://") and not s.url.endswith("/") and s.licence and s.citation


# files ---------------------------------------------------------------------------------------------------------------
DATA = np.random.default_rng(0).bytes(50_000)


class Server:
    "Sends DATA in pieces, breaking off after `piece` bytes, with or without support for ranges."
    def __init__(self, piece: int, ranges: bool = True):
        self.piece, self.ranges, self.starts = piece, ranges, []

    def __call__(self, request):
        start = int(request.headers.get("range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.starts.append(start)
        if start >= len(DATA):
            return httpx.Response(416)
        piece, rest = self.piece, DATA[start:]
        class Stream(httpx.SyncByteStream):
            def __iter__(self):
                yield rest[:piece]
                if len(rest) > piece:
                    raise httpx.ReadError("connection reset")
        return httpx.Response(206 if start else 200, headers={"Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if start else {}, stream=Stream())


FILE = RemoteFile("sub/data.bin", "https://example.org/data.bin", len(DATA), "sha256:" + hashlib.sha256(DATA).hexdigest())


def test_download_goes_on_where_it_broke(line, tmp_path):
    server = Server(7_000)
    path = download_file(FILE, tmp_path / "out", line(server))
    assert path.read_bytes() == DATA and server.starts == list(range(0, 50_000, 7_000)) and [p.name for p in path.parent.iterdir()] == ["data.bin"]
    assert download_file(FILE, tmp_path / "out", line(nothing)) == path


def test_download_goes_on_in_a_later_call(line, tmp_path):
    part = tmp_path / "out" / "sub" / ".data.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:30_000])
    with pytest.raises(DataUnavailable, match="cannot be reached"):
        download_file(FILE, tmp_path / "out", line(nothing))
    server = Server(10**6)
    assert download_file(FILE, tmp_path / "out", line(server)).read_bytes() == DATA and server.starts == [30_000]


def test_download_complete_part_needs_no_byte_more(line, tmp_path):
    part = tmp_path / "out" / "sub" / ".data.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA)
    assert download_file(FILE, tmp_path / "out", line(Server(10**6))).read_bytes() == DATA


def test_download_from_a_server_without_ranges(line, tmp_path):
    server = Server(10**6, ranges=False)
    part = tmp_path / "out" / "sub" / ".data.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:100])
    assert download_file(FILE, tmp_path / "out", line(server)).read_bytes() == DATA
    with pytest.raises(DataUnavailable, match="cannot be reached"):
        download_file(FILE, tmp_path / "other", line(Server(7_000, ranges=False)))


@pytest.mark.parametrize("change,why", [({"checksum": "md5:" + "0" * 32}, "has the checksum md5:.*0{32} is promised"), ({"checksum": "git:" + "0" * 40}, "git:"), ({"bytes": 3}, "has 50,000 bytes, 3 are promised")])
def test_a_wrong_file_is_not_left_behind(line, tmp_path, change, why):
    with pytest.raises(ChecksumMismatch, match=why):
        download_file(FILE.replace(**change), tmp_path / "out", line(Server(10**6)))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_damaged_file_is_fetched_again(line, tmp_path):
    path = download_file(FILE, tmp_path / "out", line(Server(10**6)))
    path.write_bytes(b"damaged")
    assert download_file(FILE, tmp_path / "out", line(Server(10**6))).read_bytes() == DATA


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "C:\\x", "\\\\host\\x", "a\\..\\x", "", ".", ".."])
def test_names_stay_below_the_folder(name):
    with pytest.raises(BadInput, match="not a file name"):
        RemoteFile(name, "https://example.org/x")


def test_checksums_of_an_unknown_kind():
    with pytest.raises(BadInput, match="kind of checksum"):
        RemoteFile("x", X, checksum="crc32:00")


def test_listings(line):
    http = line(exchanges("files"))
    for record in ("1234567", 1234567, "10.5281/zenodo.1234567", "https://zenodo.org/records/1234567", "https://doi.org/10.5281/zenodo.1234567"):
        [z] = zenodo_files(record, http)
        assert z.licence == "cc-by-4.0" and z.citation == "Doe, Jane et al. 2024, A small table, 10.5281/zenodo.1234567"
    for article in (6815699, "10.6084/m9.figshare.6815699.v5", "https://figshare.com/articles/dataset/jdft_3d-7-7-2018/6815699", "https://figshare.com/articles/dataset/jdft_3d-7-7-2018/6815699/5"):
        [f] = figshare_files(article, http)
        assert f.licence == "CC BY 4.0" and f.checksum.startswith("md5:"), "a link to elsewhere is no file"
    small, large = huggingface_files("jane/table", http=http)
    assert small.checksum.startswith("git:") and large.checksum.startswith("sha256:") and "/resolve/0123456789abcdef" in small.url and small.licence == "mit"
    for file in (z, small, large):
        assert download_file(file, http=http).read_bytes().startswith(b"smiles,y")


def test_figshare_lists_more_than_a_page(line):
    file = lambda i: {"name": f"{i}.csv", "size": 1, "is_link_only": False, "download_url": f"https://ndownloader.figshare.com/files/{i}", "computed_md5": "", "supplied_md5": ""}
    url = "https://api.figshare.com/v2/articles/1000000"
    http = line([{"url": url, "body": {"id": 1000000}}, {"url": url + "/files", "params": {"page": "1", "page_size": "100"}, "body": [file(i) for i in range(100)]},
                 {"url": url + "/files", "params": {"page": "2", "page_size": "100"}, "body": [file(100)]}])
    assert [f.name for f in figshare_files(1000000, http)] == [f"{i}.csv" for i in range(101)]


def test_listing_errors(line):
    http = line(exchanges("files"))
    for wrong, why in [(lambda: zenodo_files("x", http), "not a Zenodo record"), (lambda: figshare_files("x", http), "not a Figshare article"), (lambda: huggingface_files("a/b/c", http=http), "not a repository"),
                       (lambda: huggingface_files("../x", http=http), "not a repository"), (lambda: huggingface_files("a/b", "space", http=http), "kind of repository")]:
        with pytest.raises(BadInput, match=why):
            wrong()
    with pytest.raises(Refused, match="persistent identifier does not exist"):
        zenodo_files(9, http)
    with pytest.raises(DataUnavailable, match=r"accepted its terms.*matfm\[hub\]"):
        huggingface_files("jane/gated", "model", http=http)


# JARVIS --------------------------------------------------------------------------------------------------------------
def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr(name, content)
    return buffer.getvalue()


def test_jarvis(line):
    body = zipped("jdft_3d-12-12-2022.json", (RECORDED / "jarvis.json").read_bytes())
    http = line([{"url": JARVIS["dft_3d"].url, "body": body}])
    records, rejected = jarvis(targets=["formation_energy_peratom", "mbj_bandgap"], http=http)
    assert records.ids == ["JVASP-1002", "JVASP-23862"] and np.isnan(records.y("mbj_bandgap")[1, 0]) and records.targets["mbj_bandgap"] == "eV"
    assert rejected.reasons() == {"no element": 1, "no target value": 1, "no structure": 1}
    direct, cartesian = records.structures()
    assert np.allclose(direct.frac[1], 0.25) and np.allclose(cartesian.frac[1], [0.5, 0.5, 0])
    assert len(jarvis(limit=1, http=http)[0]) == 1 and len(asked(http)) == 1


def test_jarvis_damaged_archive_is_deleted(line):
    good = zipped("jdft_3d-12-12-2022.json", b"[1, 2, 3]   " * 50)
    flipped = good.replace(b"[1, 2, 3]", b"[1, 2, 4]", 1)
    for body in (b"<html>busy</html>", flipped, zipped("other.json", b"[]"), zipped("jdft_3d-12-12-2022.json", b"{")):
        http = line([{"url": JARVIS["dft_3d"].url, "body": body}])
        with pytest.raises(ChecksumMismatch, match="deleted; call again"):
            jarvis(http=http)
        assert not [p for p in (http.cache / "files").rglob("*") if p.is_file()]


def test_jarvis_names(line):
    for wrong in (lambda: jarvis("dft3d", http=line(nothing)), lambda: jarvis(targets=["bandgap"], http=line(nothing))):
        with pytest.raises(BadInput, match="did you mean"):
            wrong()


# the module ----------------------------------------------------------------------------------------------------------
def test_recordings_name_the_interface_they_follow():
    for path in RECORDED.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < 20_000 and (path.stem == "jarvis" or content["note"])


def test_service_message_never_fails():
    for body in ("", "null", "[]", "3", '{"Fault": null}', '{"errors": null, "detail": {}}', '{"errors": [{"detail": {"a": 1}}]}', "<<>>", "\x00"):
        assert isinstance(service_message(body), str) and service_message(body)


def test_import_is_light():
    code = "import sys, matfm.data.remote; print([m for m in ('torch', 'rdkit', 'pymatgen', 'httpx', 'sklearn', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_everything_exported_is_documented():
    public = [getattr(remote, n) for n in remote.__all__ if callable(getattr(remote, n))]
    assert public and not [f for f in public if not f.__doc__]
