import json
from dataclasses import replace

import pyarrow as pa
import pytest

from pixart_data.commits import COMMITS, MANIFEST, publish_table
from pixart_data.errors import ConfigError, DataError
from pixart_data.records import KEPT
from pixart_data.sections import Source
from pixart_data.selection import Part, Selection, read_selection, seal_selection
from pixart_data.sources import count_rows, find_units, read_samples


@pytest.fixture
def folder(tmp_path):
    """Six files in three units; the content does not matter here."""
    made = tmp_path / "pictures"
    made.mkdir()
    for i in range(6):
        (made / f"{i}.jpg").write_bytes(b"image %d" % i)
        (made / f"{i}.txt").write_text(f"caption {i}")
    return made


@pytest.fixture
def root(tmp_path):
    return tmp_path / "filtered"


def source_of(folder, root=None):
    return Source(paths=[str(folder)], rows_per_unit=2, kept=str(root) if root else None)


def seal(root, units, *kept):
    """Write what a filter that kept these keys of each unit would."""
    parts = []
    for unit, keys in zip(units, kept, strict=True):
        file = publish_table(pa.table({"key": keys}, schema=KEPT), root, root / "kept", unit.id)
        parts.append(Part(unit.id, unit.fingerprint, 2, len(keys), "".join(keys), file))
    rows_out = sum(map(len, kept))
    rows_in = 2 * len(parts)
    rejected = {"blurred": rows_in - rows_out}
    seal_selection(root, Selection({}, rows_in, rows_out, rejected, parts, parts[0].file))


def test_only_what_was_kept_is_read(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/1"], ["pictures/2", "pictures/3"], [])
    source = source_of(folder, root)
    units = find_units(source)
    assert [count_rows(unit) for unit in units] == [1, 2, 0]
    for with_images in (True, False):
        samples = [sample for unit in units for sample in read_samples(unit, source, with_images=with_images)]
        assert [sample.key for sample in samples] == ["pictures/1", "pictures/2", "pictures/3"]
        assert [sample.caption for sample in samples] == ["caption 1", "caption 2", "caption 3"]
    assert [sample.data for sample in read_samples(units[1], source)] == [b"image 2", b"image 3"]


def test_of_the_samples_asked_for_by_key_those_that_were_kept_are_read(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/1"], ["pictures/2", "pictures/3"], [])
    source = source_of(folder, root)
    wanted = {"pictures/0", "pictures/1", "pictures/3", "pictures/4"}
    samples = [sample for unit in find_units(source) for sample in read_samples(unit, source, keys=wanted)]
    assert [sample.key for sample in samples] == ["pictures/1", "pictures/3"]


def test_a_fingerprint_changes_with_the_kept_keys_of_its_unit_alone(folder, root):
    all_units = find_units(source_of(folder))
    seal(root, all_units, ["pictures/0"], ["pictures/2"], ["pictures/4"])
    before = [unit.fingerprint for unit in find_units(source_of(folder, root))]
    seal(root, all_units, ["pictures/0"], ["pictures/3"], ["pictures/4"])
    after = [unit.fingerprint for unit in find_units(source_of(folder, root))]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    assert not set(after) & {unit.fingerprint for unit in all_units}


def test_what_a_filter_has_not_seen_is_refused(folder, root):
    units = find_units(source_of(folder))
    seal(root, units[:1], ["pictures/0"])
    expected = r"source\.kept: the filter in .* has not seen 2 of 3 shards: pictures-00001, pictures-00002; run `pixart"
    with pytest.raises(ConfigError, match=expected):
        find_units(source_of(folder, root))


def test_a_unit_that_changed_since_is_refused(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/0"], [], [])
    (folder / "3.jpg").write_bytes(b"another size")
    with pytest.raises(ConfigError, match=r"saw another content of 1 of 3 shards: pictures-00001; run `pixart filter`"):
        find_units(source_of(folder, root))


def test_an_image_that_vanished_is_noticed(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/0", "pictures/9"], [], [])
    source = source_of(folder, root)
    unit = find_units(source)[0]
    with pytest.raises(DataError, match="expected 2 samples that a filter kept, found 1; the source changed"):
        list(read_samples(unit, source))


def test_a_filter_that_ran_again_meanwhile_is_noticed(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/0"], [], [])
    source = source_of(folder, root)
    unit = find_units(source)[0]
    for path in (root / "kept").glob("pictures-00000*"):
        path.unlink()
    with pytest.raises(DataError, match="missing; the filter ran again meanwhile"):
        list(read_samples(unit, source))


def test_a_damaged_list_of_keys_is_named(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/0"], [], [])
    source = source_of(folder, root)
    unit = find_units(source)[0]
    for path in (root / "kept").glob("pictures-00000*"):
        path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pictures-00000-\w+\.parquet: cannot be read as Parquet"):
        list(read_samples(unit, source))


def test_no_filter_there(folder, root):
    with pytest.raises(ConfigError, match="expected the output of a finished filter, found none; run `pixart filter`"):
        find_units(source_of(folder, root))
    (root / COMMITS).mkdir(parents=True)
    with pytest.raises(ConfigError, match="found one that is not finished; run `pixart filter`"):
        find_units(source_of(folder, root))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", DataError, "not valid JSON"),
        ("[]", ConfigError, "expected pixart-filter version 1, found None version None"),
        (
            '{"format": "pixart-captions", "version": 1}',
            ConfigError,
            "found pixart-captions version 1; name the output",
        ),
        ('{"format": "pixart-filter", "version": 1}', DataError, "damaged"),
        ('{"format": "pixart-filter", "version": 1, "parts": [{"file": {}}]}', DataError, "damaged"),
    ],
)
def test_other_manifests_are_refused(folder, root, text, error, message):
    root.mkdir()
    (root / MANIFEST).write_text(text)
    with pytest.raises(error, match=message):
        find_units(source_of(folder, root))


def test_a_manifest_is_read_as_it_was_written(folder, root):
    seal(root, find_units(source_of(folder)), ["pictures/0"], [], ["pictures/4"])
    selection = read_selection(root)
    assert (selection.rows_in, selection.rows_out, selection.rejected) == (6, 2, {"blurred": 4})
    assert [part.rows_out for part in selection.parts] == [1, 0, 1]
    assert json.loads((root / MANIFEST).read_text())["version"] == 1


@pytest.mark.parametrize(
    "change", [{"rows_out": 3}, {"rejected": {"blurred": 3}}, {"rows_in": 7, "rejected": {"x": 5}}]
)
def test_an_account_that_does_not_balance_is_never_written(folder, root, change):
    seal(root, find_units(source_of(folder)), ["pictures/0"], [], ["pictures/4"])
    selection = read_selection(root)
    (root / MANIFEST).unlink()
    with pytest.raises(DataError, match="rows unaccounted for; please report this"):
        seal_selection(root, replace(selection, **change))
    assert not (root / MANIFEST).exists()
