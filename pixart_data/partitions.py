"""A dataset in parts, which are datasets over the same shards: random shares, or what queries select.

A sample is in a part of every set or of none. Random shares go by a hash of the key, so that a sample stays in its part
however the dataset grows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pixart_data.commits import MANIFEST
from pixart_data.config import digest
from pixart_data.editions import Original, find, manifest_sha256
from pixart_data.entries import key_hashes
from pixart_data.errors import ConfigError, DataError
from pixart_data.links import linked_shards, require_shards, write_linked
from pixart_data.owners import MARKER, maker, place, read_fields, require_apart, require_links
from pixart_data.queries import parse
from pixart_data.shards import Manifest, feature_sets

COMMAND = "split"
SPLIT_FROM = "split_from"
_SPLIT = (
    "split"  # in the provenance: digest of the source, and of the shares or queries, all parts of one split have it
)

_REST = -1
_SALT = np.uint64(0xA0761D6478BD642F)  # so that parts do not go by the order of compacted shards, which is the hash's
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64

Parts = npt.NDArray[np.int8]
"""The number of the part of each sample, -1 for those in none."""


@dataclass(frozen=True)
class Partition:
    """Which samples of a dataset are in which part.

    Attributes:
        names: Of the parts.
        parts: Of each set, by row of its index.
        bounds: Where shares end, in [0, 1]; None where queries decide.
        split: Digest of what the parts follow from: the dataset's place, and shares or queries.
    """

    names: list[str]
    sets: dict[str, Original]
    parts: dict[str, Parts]
    bounds: npt.NDArray[np.float64] | None
    split: str = ""

    def num_rows(self, name: str, part: int) -> int:
        """Return how many rows of a set are in a part; -1 stands for those in none."""
        return int((self.parts[name] == part).sum())

    def rejected(self, table: pa.Table) -> Parts:
        """Return the parts of rejected rows; queries are about samples, and know nothing of these."""
        if self.bounds is None:
            return np.full(table.num_rows, _REST, np.int8)
        return _by_share(key_hashes(table["key"].to_pylist()), self.bounds)


def by_share(root: Path, shares: Mapping[str, float]) -> Partition:
    """Divide a dataset at random.

    Args:
        shares: Of each part; they add up to at most 1, and what is left is in no part.
    """
    sets = _open(root)
    bounds = np.cumsum(list(shares.values()))
    if bounds[-1] > 1 - 1e-9:
        bounds[-1] = 1.0
    parts = {name: _by_share(original.column("key"), bounds) for name, original in sets.items()}
    split = digest({"source": place(root), "share": list(shares.items())})
    return Partition(list(shares), sets, parts, bounds, split)


def by_query(root: Path, queries: Mapping[str, str], queried: str | None) -> Partition:
    """Divide a dataset by queries on the index of one set; the other sets follow its keys.

    Args:
        queried: Name of that set; None takes the only image set, or the only set.

    Raises:
        ConfigError: If a query is wrong, or matches nothing, or two match one sample.
    """
    sets = _open(root)
    queried = queried or _only(sets)
    if queried not in sets:
        raise ConfigError(f"queried_set: expected one of {', '.join(sets)}, found {queried!r}")
    others = {name: original for name, original in sets.items() if name != queried}
    chosen = _select(sets[queried], queries, others)
    parts = {queried: chosen}
    keys = sets[queried].column("key")
    for name in sets.keys() - {queried}:
        at, found = find(keys, sets[name].column("key"))
        parts[name] = np.where(found, chosen[at], np.int8(_REST)) if len(keys) else np.full(len(at), _REST, np.int8)
    split = digest({"source": place(root), "where": list(queries.items()), "queried_set": queried})
    return Partition(list(queries), sets, parts, None, split)


def check(partition: Partition, output: Path) -> None:
    """Make sure, before anything is written, that the parts can be.

    Raises:
        ConfigError: If one would be written over a set of the dataset, or over what another command made, or if there
            are parts of another split beside them.
        DataError: If a shard of any set is missing or cut off.
    """
    roots = [output / part / name for part in partition.names for name in partition.sets]
    require_apart(roots, [original.root for original in partition.sets.values()])
    for root in roots:
        require_links(root, COMMAND)
    _require_same_split(partition, output)
    for name, original in partition.sets.items():
        require_shards(linked_shards([original], [partition.parts[name] != _REST]))


def _require_same_split(partition: Partition, output: Path) -> None:
    """Parts of two splits have samples in common, and those of the first would be taken for parts of the second."""
    found = [(path, (read_fields(path) or {}).get("provenance")) for path in sorted(output.glob(f"*/*/{MANIFEST}"))]
    found += [(path, read_fields(path)) for path in sorted(output.glob(f"*/*/{MARKER}"))]
    for path, provenance in found:
        if isinstance(provenance, dict) and maker(provenance) == COMMAND and provenance.get(_SPLIT) != partition.split:
            raise ConfigError(
                f"output: {output}: expected a new folder, or parts of this split, found {path.parent} of another: of "
                "other shares or queries, or of another dataset; choose another output, or delete those parts"
            )


def write(partition: Partition, output: Path) -> Iterator[tuple[str, str, Manifest]]:
    """Write the parts; yield part, set and manifest of each set that is done.

    Raises:
        ConfigError: As `check`.
        DataError: As `check`.
    """
    check(partition, output)
    for number, part in enumerate(partition.names):
        for name, original in partition.sets.items():
            kept = partition.parts[name] == number
            linked = linked_shards([original], [kept])
            [excerpt] = linked.excerpts
            manifest = replace(
                original.manifest,
                shards=linked.shards,
                counts=_counts(partition, original, int(kept.sum()), number),
                records={},
                provenance={
                    **original.manifest.provenance,
                    SPLIT_FROM: manifest_sha256(original),
                    _SPLIT: partition.split,
                },
            )
            excerpt = replace(excerpt, keeps_rejected=_Rejected(partition, number))
            linked = replace(linked, excerpts=[excerpt])
            yield part, name, write_linked(output / part / name, manifest, linked, COMMAND)


@dataclass(frozen=True)
class _Rejected:
    """Tells which rejected rows are in a part."""

    partition: Partition
    number: int

    def __call__(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = self.partition.rejected(table) == self.number
        return mask


def _counts(partition: Partition, original: Original, rows_out: int, number: int) -> dict[str, Any]:
    rejected: Counter[str] = Counter()
    for table in original.rejected():
        rejected.update(table["error"].filter(pa.array(partition.rejected(table) == number)).to_pylist())
    return {"rows_in": rows_out + rejected.total(), "rows_out": rows_out, "rejected": dict(sorted(rejected.items()))}


def _open(root: Path) -> dict[str, Original]:
    sets = {name: Original(path) for name, path in feature_sets(root).items()}
    if not sets:
        raise DataError(f"{root}: expected a dataset, found no finished feature set; run `pixart extract` first")
    return sets


def _only(sets: Mapping[str, Original]) -> str:
    images = [name for name, original in sets.items() if original.manifest.kind == "image"] or list(sets)
    if len(images) > 1:
        raise ConfigError(
            f"queried_set: required where there are several ({', '.join(images)}); pass --set queried_set={images[0]}"
        )
    return images[0]


def _by_share(hashes: npt.NDArray[np.uint64], bounds: npt.NDArray[np.float64]) -> Parts:
    mixed = hashes ^ _SALT
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
    mixed ^= mixed >> np.uint64(31)
    position = (mixed >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    parts = np.searchsorted(bounds, position, side="right")
    return np.where(parts < len(bounds), parts, _REST).astype(np.int8)


def _select(original: Original, queries: Mapping[str, str], others: Mapping[str, Original]) -> Parts:
    def elsewhere(column: str) -> str:
        holders = [name for name, other in others.items() if column in other.schema.names]
        return f"{column} is a column of {holders[0]}: --set queried_set={holders[0]}" if holders else ""

    parsed = [parse(text) for text in queries.values()]
    parts = np.full(len(original), _REST, np.int8)
    names = list(queries)
    columns = sorted(set().union(*(query.columns for query in parsed)))
    for query in parsed:
        query.require(original.schema.names, elsewhere)
    for first, table in original.tables(columns):
        own = parts[first : first + table.num_rows]
        for number, query in enumerate(parsed):
            mask = query.mask(table)
            twice = np.flatnonzero(mask & (own != _REST))
            if len(twice):
                [key] = original.keys([first + int(twice[0])])
                raise ConfigError(
                    f"where: expected parts without a common sample, found {key} in '{names[own[twice[0]]]}' and in "
                    f"'{names[number]}'; let one query exclude the other, e.g. with `and not (...)`"
                )
            own[mask] = number
    for number, name in enumerate(names):
        if not (parts == number).any():
            raise ConfigError(f"where: expected samples in '{name}', found none that match `{parsed[number].text}`")
    return parts
