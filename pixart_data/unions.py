"""Datasets with different samples, joined into one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_data.editions import Original, find, identity, manifest_sha256, unlike
from pixart_data.errors import DataError
from pixart_data.links import Linked, linked_shards, require_shards, write_linked
from pixart_data.owners import require_apart, require_links
from pixart_data.shards import Manifest, feature_sets

COMMAND = "merge"
MERGED_FROM = "merged_from"

_ADVICE = {
    "codec.calibration": "features of one calibration cannot be read with another's; extract the captions of one again "
    "in the job of the other, or both with text.codec = 'bf16'",
    "codec.name": "extract one of them again with the text.codec of the other",
    "model.null": "the empty captions differ, and so did the encoders; extract one of them again",
    "buckets": "extract one of them again with the image.buckets of the other",
}


def open_all(roots: Sequence[Path]) -> dict[str, list[Original]]:
    """Open the sets of datasets, by name, each in the order of the datasets.

    Raises:
        DataError: If they do not have the same sets, of the same encoders, or share keys.
    """
    found = [feature_sets(root) for root in roots]
    for root, sets in zip(roots, found, strict=True):
        if not sets:
            raise DataError(f"{root}: expected a dataset, found no finished feature set; run `pixart extract` first")
        if sets.keys() != found[0].keys():
            raise DataError(
                f"{root}: expected the sets {_names(found[0])} as in {roots[0]}, found {_names(sets)}; extract what is "
                "missing, or name the feature sets instead of the datasets"
            )
    opened = {name: [Original(sets[name]) for sets in found] for name in found[0]}
    for originals in opened.values():
        for original in originals[1:]:
            _require_alike(originals[0], original)
        _require_distinct(originals)
    return opened


def check(opened: Mapping[str, Sequence[Original]], output: Path) -> None:
    """Make sure, before anything is written, that the joint dataset can be.

    Raises:
        ConfigError: If it would be written over one of the datasets, or over what another command made.
        DataError: If a shard of any set is missing or cut off.
    """
    roots = [output / name for name in opened]
    require_apart(roots, [original.root for originals in opened.values() for original in originals])
    for root in roots:
        require_links(root, COMMAND)
    for originals in opened.values():
        require_shards(_linked(originals))


def merge(opened: Mapping[str, Sequence[Original]], output: Path) -> Iterator[tuple[str, Manifest]]:
    """Write the joint dataset, set after set, and yield the name and manifest of each that is done.

    Rows are in the order of the datasets; the first one's empty caption is taken.

    Raises:
        ConfigError: As `check`.
        DataError: As `check`.
    """
    check(opened, output)
    for name, originals in opened.items():
        linked = _linked(originals)
        first = originals[0].manifest
        manifest = replace(
            first,
            shards=linked.shards,
            counts=_sum_counts(originals),
            codec=_codec(originals),
            records={},
            provenance={**first.provenance, MERGED_FROM: [manifest_sha256(original) for original in originals]},
        )
        yield name, write_linked(output / name, manifest, linked, COMMAND)


def _linked(originals: Sequence[Original]) -> Linked:
    return linked_shards(originals, [np.ones(len(original), np.bool_) for original in originals])


def _names(sets: Mapping[str, Path]) -> str:
    return ", ".join(sorted(sets))


def _require_alike(first: Original, other: Original) -> None:
    for name, expected, found in unlike(identity(first.manifest), identity(other.manifest)):
        advice = next((text for prefix, text in _ADVICE.items() if name.startswith(prefix)), "")
        raise DataError(
            f"{other.root}: {name}: expected {_short(expected)} as in {first.root}, found {_short(found)}; "
            f"{advice or 'extract one of them again with the settings and the model of the other'}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _require_distinct(originals: Sequence[Original]) -> None:
    for number, other in enumerate(originals):
        for earlier in originals[:number]:
            _, found = find(earlier.entries["key"], other.column("key"))
            rows = np.flatnonzero(found)
            if len(rows):
                [key] = other.keys([int(rows[0])])
                raise DataError(
                    f"{other.root}: {len(rows)} of its {len(other)} keys are in {earlier.root} too, the first is "
                    f"{key}; leave one of them out, or name sources apart with source.root and extract again"
                )


def _sum_counts(originals: Sequence[Original]) -> dict[str, Any]:
    rejected: dict[str, int] = {}
    for original in originals:
        for reason, count in original.manifest.counts["rejected"].items():
            rejected[reason] = rejected.get(reason, 0) + count
    sums = {name: sum(original.manifest.counts[name] for original in originals) for name in ("rows_in", "rows_out")}
    return {**sums, "rejected": dict(sorted(rejected.items()))}


def _codec(originals: Sequence[Original]) -> dict[str, Any]:
    """Return the codec, with how exact it was over all sets; parts of one dataset tell the same of it."""
    codec = originals[0].manifest.codec
    measured = [o.manifest.codec["measured"] for o in originals if "measured" in o.manifest.codec]
    if len(measured) < len(originals) or all(facts == measured[0] for facts in measured):
        return codec
    from pixart_data.fidelity import merge as merge_measured

    return {**codec, "measured": merge_measured(measured)}
