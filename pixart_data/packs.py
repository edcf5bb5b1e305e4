"""Packs: which samples of a feature set go into which large shard, in which order, decided before anything is copied.

Samples are in the order of (bucket, hash of the key), which puts them beside others that they have nothing to do with;
text sets follow the buckets of an image set, so that neighbours in one are neighbours in the other. What is planned
stays: a plan is a file, `generations/<number>.json` with an Arrow file of members beside it, one batch for each pack.
Samples that a source gains later make another generation.

Records are those of `entries.bin`, N of them. A group is what shares a member: one record of an image set; of a text
set, all records with the same caption, tokens and checksum.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.commits import PublishedFile, file_sha256
from pixart_data.editions import Lookup, Numbers, Original, find, identity, unlike
from pixart_data.entries import Entries, key_hashes
from pixart_data.errors import DataError
from pixart_data.retries import retrying, storage
from pixart_data.storage import (
    delete,
    is_remote,
    list_files,
    local_copy,
    read_bytes,
    replace_file,
    staging,
    write_new,
)

GENERATIONS = "generations"
TEXT_FOLDER = "shards"

_ADVICE = "packs are never rewritten: compact into a new folder"
_HEADERS_BYTES = 704  # of a member: the tar's, and about what safetensors takes
_BLOCK = 512
_TRAITS = ("num_tokens", "size", "crc")
_MEMBERS = pa.schema(
    [
        ("key", pa.string()),  # the member's name
        ("hash", pa.uint64()),  # of the key
        ("size_bytes", pa.uint32()),
        ("crc32", pa.uint32()),
        ("num_tokens", pa.uint32()),  # 0 of images
        ("flipped", pa.bool_()),  # the mirrored image follows
        ("flipped_crc32", pa.uint32()),
    ]
)


@dataclass(frozen=True)
class Pack:
    """A shard to be: a unit of work.

    Attributes:
        folder: Of the shard in the set.
        plan: The Arrow file, relative to the set.
        number: Of the batch in it.
        digest: Of what goes into the shard, whatever shard it comes from.
    """

    id: str
    folder: str
    plan: str
    number: int
    num_members: int
    digest: str


@dataclass(frozen=True)
class Generation:
    """Packs that were planned together, and of what features they are."""

    number: int
    shard_bytes: int
    features: dict[str, Any]
    plan: PublishedFile
    packs: list[Pack]


@dataclass(frozen=True)
class Groups:
    """Which records share a member.

    Attributes:
        of: The group of each record; (N,).
        leader: The record that names each group's member; (number of groups,).
        packed: Groups whose member is in a pack of an earlier generation.
    """

    of: Numbers
    leader: Numbers
    packed: npt.NDArray[np.bool_]


def make_groups(original: Original, named: npt.NDArray[np.uint64]) -> Groups:
    """Find the records that share a member; `named` are hashes of keys that name members of earlier generations.

    Of a text set, the captions of records with equal checksums are read.
    """
    records = original.entries
    is_named = np.isin(records["key"], named)
    if original.manifest.kind == "image" or not len(records):
        return Groups(np.arange(len(records)), np.arange(len(records)), is_named)
    of = _equal_members(original)
    order = np.lexsort((records["row"], ~is_named, of))  # a member keeps its name; a new one has that of its first row
    firsts = np.flatnonzero(np.diff(of[order], prepend=-1))
    leader = np.zeros(int(of.max()) + 1, np.int64)
    packed = np.zeros(len(leader), np.bool_)
    leader[of[order[firsts]]] = order[firsts]
    packed[of[order[firsts]]] = is_named[order[firsts]]
    return Groups(of, leader, packed)


def _equal_members(original: Original) -> Numbers:
    """Number the members of a text set, equal ones alike; (N,)."""
    records = original.entries
    begins = np.ones(len(records), np.bool_)
    begins[1:] = records["shard"][1:] != records["shard"][:-1]
    begins[1:] |= records["offset"][1:] != records["offset"][:-1]
    member = np.cumsum(begins) - 1
    firsts = np.flatnonzero(begins)
    traits = [records[name][firsts] for name in _TRAITS]
    order = np.lexsort(traits)
    alike = _runs([trait[order] for trait in traits])
    perhaps = np.sort(order[np.bincount(alike)[alike] > 1])  # members that have a double, going by their traits
    if not len(perhaps):
        return member
    words, known = _caption_words(original, records["row"][firsts[perhaps]])
    words[~known] = perhaps[~known].astype(np.uint64)  # no caption, no double: checksums alone prove little
    columns = [words, known, *(trait[perhaps] for trait in traits)]
    order = np.lexsort(columns)
    runs = _runs([column[order] for column in columns])
    first_of_run = np.flatnonzero(np.diff(runs, prepend=-1))
    group = np.arange(len(firsts))
    group[perhaps[order]] = perhaps[order[first_of_run]][runs]
    numbers: Numbers = group[member]
    return numbers


def _runs(columns: Sequence[npt.NDArray[Any]]) -> Numbers:
    """Number the runs of equal rows."""
    differs = np.zeros(len(columns[0]), np.bool_)
    for column in columns:
        differs[1:] |= column[1:] != column[:-1]
    return np.cumsum(differs)


def _caption_words(original: Original, rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Return hashes of the captions of rows, and which rows have one."""
    words, known = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.bool_)
    order = np.argsort(rows)
    for first, table in original.tables(["caption"]):
        start, stop = np.searchsorted(rows[order], [first, first + table.num_rows])
        own = order[start:stop]
        captions = table["caption"].take(pa.array(rows[own].astype(np.int64) - first)).to_pylist()
        known[own] = [bool(caption) for caption in captions]
        words[own] = key_hashes(caption or "" for caption in captions)
    return words, known


def bucket_ranks(original: Original, images: Original | None) -> Numbers:
    """Return the bucket of each record, (N,): its own, or that of its image; without one, a number above all."""
    records = original.entries
    if original.manifest.kind == "image":
        return records["bucket"].astype(np.int64)
    if images is None or not len(images):
        return np.zeros(len(records), np.int64)
    at, found = find(images.entries["key"], records["key"])
    return np.where(found, images.entries["bucket"][at].astype(np.int64), len(images.manifest.buckets))


def arrange(original: Original, groups: Groups, ranks: Numbers) -> tuple[Numbers, Numbers]:
    """Return the groups that are in no pack yet, in their new order, and the rank of the first record of each."""
    order = np.lexsort((original.entries["key"], ranks))
    order = order[~groups.packed[groups.of[order]]]
    firsts = np.sort(np.unique(groups.of[order], return_index=True)[1])
    return groups.of[order[firsts]], ranks[order[firsts]]


def cut(sizes: Numbers, ranks: Numbers | None, shard_bytes: int) -> list[tuple[int, int]]:
    """Cut members into packs of about equal size, none much larger than `shard_bytes`; returns (start, stop) of each.

    Args:
        sizes: In a shard, in bytes and in order.
        ranks: Ascending; no pack holds two. None: packs may hold any.
    """
    starts = [0] if ranks is None else [0, *(np.flatnonzero(np.diff(ranks)) + 1).tolist()]
    bounds: list[tuple[int, int]] = []
    for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True):
        ends = np.cumsum(sizes[start:stop])
        if not len(ends):
            continue
        count = -(-int(ends[-1]) // shard_bytes)
        limits = int(ends[-1]) * np.arange(1, count + 1) // count
        cuts = np.unique(np.searchsorted(ends, limits, side="left") + 1) + start
        bounds += zip([start, *cuts[:-1].tolist()], cuts.tolist(), strict=True)
    return bounds


def plan_generation(
    root: Path, number: int, original: Original, groups: Groups, ranks: Numbers, shard_bytes: int, write: bool
) -> Generation | None:
    """Plan packs for what is in none yet; None if there is nothing.

    Args:
        root: Of the compacted set.
        write: Put the plan there, so that it stays; only while holding the set's lease.
    """
    chosen, chosen_ranks = arrange(original, groups, ranks)
    if not len(chosen):
        return None
    leaders = groups.leader[chosen]
    columns = _columns(original.entries[leaders])
    stored = (columns["size_bytes"].astype(np.int64) + _HEADERS_BYTES + _BLOCK - 1) // _BLOCK * _BLOCK
    stored *= np.where(columns["flipped"], 2, 1)
    is_image = original.manifest.kind == "image"
    bounds = cut(stored, chosen_ranks if is_image else None, shard_bytes)
    file = PublishedFile("", 0, "")
    if write:
        file = _write_members(root, number, original, leaders, columns, bounds)
    packs = []
    for i, (start, stop) in enumerate(bounds):
        folder = original.manifest.buckets[int(chosen_ranks[start])]["ratio"] if is_image else TEXT_FOLDER
        content = hashlib.sha256(b"".join(column[start:stop].tobytes() for column in columns.values())).hexdigest()
        packs.append(Pack(f"pack-{number:03d}-{i:06d}", folder, file.path, i, stop - start, content))
    generation = Generation(number, shard_bytes, identity(original.manifest), file, packs)
    if write:
        write_new(root / GENERATIONS / f"{number:03d}.json", json.dumps(asdict(generation), indent=1).encode())
    return generation


def _columns(records: Entries) -> dict[str, npt.NDArray[Any]]:
    zeros = np.zeros(len(records), np.uint32)
    is_image = "bucket" in (records.dtype.names or ())
    return {
        "hash": records["key"],
        "size_bytes": records["size"],
        "crc32": records["crc"],
        "num_tokens": zeros if is_image else records["num_tokens"],
        "flipped": records["flipped_offset"] > 0 if is_image else zeros.astype(np.bool_),
        "flipped_crc32": records["flipped_crc"] if is_image else zeros,
    }


def _write_members(
    root: Path,
    number: int,
    original: Original,
    leaders: Numbers,
    columns: dict[str, npt.NDArray[Any]],
    bounds: Sequence[tuple[int, int]],
) -> PublishedFile:
    # Offsets of 64 bits: all keys together may be more than 2 GiB.
    pieces = [table["key"].cast(pa.large_string()) for _, table in original.tables(["key"])]
    keys = pa.chunked_array([chunk for piece in pieces for chunk in piece.chunks], pa.large_string()).combine_chunks()
    rows = original.entries["row"][leaders].astype(np.int64)
    folder = root / GENERATIONS
    with staging(folder, f"{number:03d}.arrow") as staged:
        with storage(staged), pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, _MEMBERS) as writer:
            for start, stop in bounds:
                names = keys.take(pa.array(rows[start:stop])).cast(pa.string())
                arrays = [names, *(pa.array(column[start:stop]) for column in columns.values())]
                writer.write_batch(pa.record_batch(arrays, schema=_MEMBERS))
        sha256, size_bytes = file_sha256(staged), staged.stat().st_size
        path = folder / f"{number:03d}-{sha256[:8]}.arrow"
        replace_file(staged, path)
    return PublishedFile(path.relative_to(root).as_posix(), size_bytes, sha256)


def read_generations(root: Path) -> list[Generation]:
    """Return what was planned for a compacted set so far.

    Raises:
        DataError: If a plan cannot be read.
    """
    found = []
    for path in list_files(root / GENERATIONS):
        if path.suffix == ".json" and not path.name.startswith("."):
            try:
                fields = json.loads(read_bytes(path))
                packs = [Pack(**pack) for pack in fields.pop("packs")]
                found.append(Generation(**fields | {"plan": PublishedFile(**fields["plan"]), "packs": packs}))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}: not a plan of packs ({error}); compact into a new folder") from error
    return found


def sweep_plans(root: Path, generations: Sequence[Generation]) -> None:
    """Delete what a kill left of plans; only while holding the set's lease."""
    named = {root / generation.plan.path for generation in generations}
    files = list_files(root / GENERATIONS)
    delete(path for path in files if path.suffix != ".json" and path not in named)


def read_members(root: Path, pack: Pack) -> pa.RecordBatch:
    """Return the members of a pack, in order: key, hash, sizes and checksums."""
    path = root / pack.plan

    def read() -> pa.RecordBatch:
        if not is_remote(path):
            with pa.memory_map(str(path)) as source:
                return pa.ipc.open_file(source).get_batch(pack.number)
        with cast(Any, path).open("rb") as file:
            return pa.ipc.open_file(file).get_batch(pack.number)

    try:
        return retrying(read, path, "read")
    except (FileNotFoundError, pa.ArrowException) as error:
        raise DataError(f"{path}: missing or damaged ({error}); compact into a new folder") from error


def require_same(original: Original, root: Path, generations: Sequence[Generation]) -> npt.NDArray[np.uint64]:
    """Check that a source still has what was planned of it, unchanged; return the hashes of the members' keys.

    Raises:
        DataError: Naming a sample that is gone or different, or the fact of the features that is.
    """
    for generation in generations:
        for name, before, now in unlike(generation.features, _as_json(identity(original.manifest))):
            raise DataError(f"{original.root}: {name} was {before!r} when it was compacted, and is {now!r}; {_ADVICE}")
    lookup = Lookup(original.entries["key"])
    hashes: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    for generation in generations:
        with local_copy(root / generation.plan.path) as copy, pa.memory_map(str(copy)) as source:
            table = pa.ipc.open_file(source).read_all()
            planned = {name: table[name].to_numpy() for name in _MEMBERS.names if name != "key"}
            same, found = _still_there(original, lookup, planned)
            wrong = np.flatnonzero(~same)
            if len(wrong):
                raise _lost(original, len(wrong), table["key"][int(wrong[0])].as_py(), bool(found[wrong[0]]))
            hashes.append(np.array(planned["hash"]))
    return np.concatenate(hashes)


def require_rows(original: Original, compacted: Original) -> None:
    """Check that a source still has every row of what was made of it, those that share a member with others included.

    Raises:
        DataError: Naming a sample that is gone or different.
    """
    same, found = _still_there(original, Lookup(original.entries["key"]), _columns(compacted.entries))
    wrong = np.flatnonzero(~same)
    if len(wrong):
        [key] = compacted.keys([int(compacted.entries["row"][wrong[0]])])
        raise _lost(original, len(wrong), key, bool(found[wrong[0]]))


def _still_there(
    original: Original, lookup: Lookup, before: dict[str, npt.NDArray[Any]]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Tell of samples whether they are the same now as `before`, and whether they are there."""
    at, found = lookup(before["hash"])
    if not len(original):
        return found, found
    now = _columns(original.entries[at])
    same = found.copy()
    for name, column in before.items():
        same &= column == now[name]
    return same, found


def _lost(original: Original, count: int, key: str, is_there: bool) -> DataError:
    return DataError(
        f"{original.root}: {count} sample(s) changed or vanished after they were compacted, the first is {key}, which "
        f"{'changed' if is_there else 'vanished'}; {_ADVICE}"
    )


def _as_json(facts: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(facts)))
