"""NLTK's data files: found, told from others, fetched, and missed with words that help."""

import json
import random
import shutil
import socket

import pytest

from pixart_data.errors import ConfigError, DataError
from pixart_data.tagging import resources
from pixart_data.tagging.resources import ABBREV_TYPES, CLASSES, COLLOCATIONS, SENT_STARTERS, WEIGHTS, find_resources

PUBLISHED = dict(resources.DIGESTS)


@pytest.fixture
def without_data(monkeypatch, tmp_path):
    """NLTK finds nothing on disk, and no network call is made unless a test allows one."""
    folder = tmp_path / "nothing"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr("nltk.data.path", [str(folder)])

    def unreachable(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: pytest.fail("downloaded without asking"))
    return folder


@pytest.fixture
def copied(grammar, monkeypatch, tmp_path):
    """A copy of the miniature that a test may damage."""
    folder = tmp_path / "copied"
    shutil.copytree(grammar, folder)
    monkeypatch.setattr("nltk.data.path", [str(folder)])
    return folder


def test_known_files_are_read_as_they_are(nltk_data):
    found = find_resources()
    assert {name: (nltk_data / name).read_bytes() for name in PUBLISHED} == found.contents
    assert found.altered == []
    assert found.places == {name: str(nltk_data / name) for name in PUBLISHED}
    assert len(found.contents) == 7


def test_other_files_are_told(synthetic_nltk_data, monkeypatch):
    monkeypatch.setattr(resources, "DIGESTS", PUBLISHED)
    assert find_resources().altered == [name for name in PUBLISHED if name != CLASSES]  # the classes are the same


@pytest.mark.parametrize("name", [CLASSES, COLLOCATIONS, SENT_STARTERS, ABBREV_TYPES])
def test_sets_are_known_in_any_order(grammar, name):
    content = (grammar / name).read_text()
    items = json.loads(content) if name == CLASSES else content.split("\n")
    assert len(items) > 3
    random.Random(0).shuffle(items)
    join = json.dumps if name == CLASSES else "\n".join
    known = resources.digest(name, content.encode())
    assert resources.digest(name, join(items).encode()) == known
    assert resources.digest(name, join([*items, "more"]).encode()) != known
    assert resources.digest(name, join(items[1:]).encode()) != known


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_change_is_told(grammar, synthetic_nltk_data, name):
    contents = dict(find_resources().contents)
    for changed in (contents[name] + b"x", contents[name][1:], b"", b"\xff", b"null", b"[1, [2]]"):
        assert resources.Resources({**contents, name: changed}).altered == [name]


def test_missing_files_are_named_with_their_sums_and_what_to_do(without_data):
    with pytest.raises(ConfigError) as caught:
        find_resources()
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("noun tagger: expected NLTK's data files, found 7 of 7 missing on ")
    assert f"looked in {without_data}" in first
    for way_out in ("pixart stats --download-nltk", "NLTK_DATA", "--approximate"):
        assert way_out in first
    assert len(rest) == 7
    for line, (name, digest) in zip(rest, PUBLISHED.items(), strict=True):
        assert line.strip().startswith(f"{name}, sha256")
        assert line.endswith(digest)


def test_one_missing_file_is_named_alone(copied):
    (copied / SENT_STARTERS).unlink()
    with pytest.raises(ConfigError) as caught:
        find_resources()
    first, *rest = str(caught.value).splitlines()
    assert "found 1 of 7 missing" in first
    assert [line.split(",")[0].strip() for line in rest] == [SENT_STARTERS]


def test_a_folder_that_others_may_write_is_refused_with_nltks_reason(copied):
    (copied / WEIGHTS).parent.chmod(0o777)
    with pytest.raises(ConfigError, match="3 of 7 missing .*writable by, or owned by, another account"):
        find_resources()


def test_packages_may_be_zipped(copied):
    for package in ("taggers/averaged_perceptron_tagger_eng", "tokenizers/punkt_tab"):
        parent, name = (copied / package).parent, (copied / package).name
        shutil.make_archive(str(parent / name), "zip", parent, name)
        shutil.rmtree(parent / name)
        (parent / f"{name}.zip").chmod(0o644)
    found = find_resources()
    assert set(found.contents) == set(PUBLISHED)
    archives = [
        str(copied / f"{name}.zip") for name in ("taggers/averaged_perceptron_tagger_eng", "tokenizers/punkt_tab")
    ]
    assert found.paths([WEIGHTS, CLASSES, COLLOCATIONS]) == archives


def test_only_damaged_files_are_to_be_deleted():
    contents = {CLASSES: b"{", WEIGHTS: b"{}"}
    with pytest.raises(DataError, match=r"classes\.json: Expecting.*; delete just /data/classes and run"):
        resources.Resources(contents, {CLASSES: "/data/classes", WEIGHTS: "/data/weights"}).parse(CLASSES)


def test_no_download_unless_asked(without_data):
    with pytest.raises(ConfigError) as caught:
        find_resources(download=False)
    assert "download failed" not in str(caught.value)


def test_no_network_is_found_out_at_once(without_data):
    with pytest.raises(ConfigError, match=r"download failed: raw\.githubusercontent\.com: unreachable"):
        find_resources(download=True)


def test_a_download_that_fails_says_why(without_data, monkeypatch, capfd):
    def failing(name, *, quiet, prefix, print_error_to):
        assert quiet
        print_error_to.write(f"{prefix}Error loading {name}:\n    no route")
        return False

    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    monkeypatch.setattr("nltk.download", failing)
    with pytest.raises(ConfigError, match="Error loading averaged_perceptron_tagger_eng: no route"):
        find_resources(download=True)
    assert capfd.readouterr() == ("", "")


def test_a_download_makes_the_files_usable(without_data, grammar, monkeypatch):
    asked = []

    def downloading(name, **kwargs):
        asked.append(name)
        folder = next(path for path in grammar.glob("*/*") if path.name == name)
        shutil.copytree(folder, without_data / folder.relative_to(grammar))
        return True

    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: socket.socket())
    monkeypatch.setattr("nltk.download", downloading)
    assert set(find_resources(download=True).contents) == set(PUBLISHED)
    assert asked == ["averaged_perceptron_tagger_eng", "punkt_tab"]


def test_what_is_there_is_not_downloaded(copied, monkeypatch):
    monkeypatch.setattr("nltk.download", lambda *args, **kwargs: pytest.fail("downloaded without need"))
    assert len(find_resources(download=True).contents) == 7
