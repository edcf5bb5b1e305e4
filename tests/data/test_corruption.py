"""A short cut of the campaign of tests/corruption.py, and that the campaign itself would notice."""

from collections import Counter

import numpy as np
import pytest

from pixart_data.entries import IMAGE_ENTRY, checks
from pixart_data.errors import DataError
from pixart_data.verification import verify
from tests import corruption
from tests.corruption import Campaign, Corruption, build, read_all

COUNT = 120
COMMANDS_EVERY = 4
KINDS = {
    "flipped bit", "cut short", "swapped members", "swapped shards", "missing file", "stale index", "wrong manifest",
}  # fmt: skip


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("campaign"))


def test_no_corruption_goes_undetected_and_none_gives_a_wrong_tensor(campaign):
    assert not [finding for finding in verify(campaign.root) if finding.problem]
    kinds, failures = corruption.run(campaign, range(COUNT), COMMANDS_EVERY)
    assert failures == []
    assert kinds.total() == COUNT
    assert kinds.keys() == KINDS
    assert min(kinds.values()) >= 6
    assert {path: path.read_bytes() for path in campaign.contents} == campaign.contents  # all was taken back


def test_the_campaign_reads_every_sample_of_every_set(campaign):
    assert Counter(name for name, _ in campaign.samples) == dict.fromkeys(corruption.SETS, 13)  # and the empty caption
    batches = {at: values for at, values in campaign.samples.items() if at[1] >= 0}
    for name in corruption.SETS:
        sizes = {tuple(values[3].ravel()) for (of, _), values in batches.items() if of == name}
        assert len(sizes) == 6  # as many as a unit has samples, each with its own
    shapes = {values[0].shape[1:] for values in batches.values()}
    assert shapes == {(2, 4, 3, 6), (2, 4, 6, 3)}  # of one size in bytes: only the bucket tells them apart
    plain, mirrored = ([v[0].tobytes() for (of, _), v in batches.items() if of == name] for name in ("text", "packed"))
    assert len(set(plain) | set(mirrored)) == 22
    assert len(set(plain) & set(mirrored)) == 2  # which were not stored mirrored
    texts = [values[1].tobytes() for (of, _), values in batches.items() if of == "text"]
    assert len(set(texts)) == 8  # twelve samples, of which three and three have one caption
    assert campaign.corruption(7) == campaign.corruption(7)


def first_failure(campaign, most=600):
    """The first corruption that goes undetected."""
    for seed in range(most):
        if failures := corruption.run(campaign, [seed])[1]:
            return failures[0]
    return ""


@pytest.mark.parametrize(
    "part",
    ["check_shard", "_verify_records", "_verify_sealed_records", "_verify_agreement"],
)
def test_the_campaign_notices_a_verify_that_does_not_look(campaign, monkeypatch, part):
    monkeypatch.setattr(f"pixart_data.verification.{part}", lambda *_: iter(()))
    monkeypatch.setattr(campaign, "_read", lambda _: [])
    assert "verify found nothing" in first_failure(campaign)


def test_the_campaign_notices_a_reader_that_does_not_check(campaign, monkeypatch):
    from pixart_data import shards

    monkeypatch.setattr(shards, "crc32", lambda data, *_: Same())
    monkeypatch.setattr(campaign, "_verified", lambda: [])
    assert "reading gave other values" in first_failure(campaign)


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("editions.Original._require_whole", "halved: other samples than before"),
        ("editions.Original._require_same", "halved: other samples than before"),
        ("pairs.file_sha256", "exported: "),
        ("surveys.wrong_numbers", "looked_at: IndexError"),
    ],
)
def test_the_campaign_notices_commands_that_do_not_look(campaign, monkeypatch, broken, expected):
    monkeypatch.setattr(f"pixart_data.{broken}", Lax())
    made = {
        "editions.Original._require_whole": stale(campaign, "256px/entries.bin", "older"),
        "editions.Original._require_same": stale(campaign, "256px/index.parquet", "other sizes"),
        "pairs.file_sha256": stale(campaign, "256px/index.parquet", "other sizes"),
        "surveys.wrong_numbers": stale(campaign, "256px/entries.bin", "other table", every_bucket=9),
    }[broken]
    assert any(problem.startswith(expected) for problem in campaign.misused(made)), campaign.misused(made)
    monkeypatch.undo()
    assert campaign.misused(made) == []


def stale(campaign, name, other, every_bucket=None):
    path = campaign.root / name
    data = (campaign.others[other] / name).read_bytes()
    if every_bucket is not None:
        records = np.frombuffer(data, IMAGE_ENTRY).copy()
        records["bucket"] = every_bucket
        records["check"] = checks(records)
        data = records.tobytes()
    return Corruption("", "", {path: data})


class Lax:
    """Finds nothing wrong, and any checksum right."""

    def __call__(self, *_):
        return Same()

    def __get__(self, *_):
        return self


class Same:
    """Equal to every checksum."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __iter__(self):
        return iter(())

    def __bool__(self):
        return False

    __hash__ = None


def test_a_manifest_of_another_table_does_not_turn_images(tmp_path):
    """Its bucket numbers mean other canvases, of the same size in bytes: no checksum of a sample would tell."""
    root = build(tmp_path / "dataset")
    other = build(tmp_path / "other", table=("0.22", *corruption.TABLE))
    (root / "256px/manifest.json").write_bytes((other / "256px/manifest.json").read_bytes())
    with pytest.raises(DataError, match=r"entries.bin: damaged: its SHA-256 is not the one in the manifest"):
        read_all(root, tmp_path / "plans")
