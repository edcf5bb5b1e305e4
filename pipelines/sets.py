"""The sets of captions of a `stats` job: their units of work, and which set is compared with which."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.config import CaptionSet, Stats
from pixart_data.captions import CaptionFile
from pixart_data.columns import TEXT
from pixart_data.errors import ConfigError, DataError
from pixart_data.inputs import Kinds, find_captions, holds_none, look_at, num_rows, require_text
from pixart_data.units import encode_name

RAW = "-raw"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CountUnit:
    """A unit: one file of one set, or a slice of it.

    Attributes:
        beside: The column that the captions are compared with on the same images; empty: none.
        is_raw: Whether the set is the raw captions of another one, whose images it does not count again.
    """

    id: str
    set_name: str
    file: CaptionFile
    column: str
    beside: str = ""
    is_raw: bool = False

    @property
    def fingerprint(self) -> str:
        """Changes when the file does."""
        return self.file.fingerprint

    @property
    def texts(self) -> dict[str, str]:
        """What is read besides the captions, by what it is: a model's captions come with how they were asked for."""
        texts = {"beside": self.beside} if self.beside else {}
        if self.column.startswith("caption"):
            suffix = self.column.removeprefix("caption")
            texts |= {"error": f"error{suffix}", "finish_reason": f"finish_reason{suffix}"}
            texts |= {} if suffix else {"prompt": "prompt"}
        return texts


@dataclass
class Sets:
    """All sets of a job.

    Attributes:
        units: In the order of the report, raw captions right before the set that they came with.
        compared: Names of sets by the name of the set that is compared with them.
        derived: Names of the sets that the job does not name itself.
    """

    units: list[CountUnit] = field(default_factory=list)
    compared: dict[str, str] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """The names, in the order of the report."""
        return list(dict.fromkeys(unit.set_name for unit in self.units))

    @property
    def have_pairs(self) -> bool:
        """Whether any has captions and raw ones of the same images."""
        return any(unit.beside and not unit.is_raw for unit in self.units)


def find_sets(job: Stats) -> Sets:
    """Find the files of every set.

    Raises:
        ConfigError: If a path or a column is not there, or `compare` names no set, or one and itself.
        DataError: If a file cannot be read, or a set has no rows at all.
    """
    sets = Sets()
    for caption_set in job.sets:
        _add(sets, job, caption_set)
    for name, other in job.compare.items():
        for given in (name, other):
            if given not in sets.names:
                close = difflib.get_close_matches(given, sets.names, n=1, cutoff=0.5)
                hint = f"did you mean '{close[0]}'?" if close else "name one of these"
                found = ", ".join(f"'{known}'" for known in sets.names)
                raise ConfigError(f"compare: expected names of sets, which are {found}, found '{given}'; {hint}")
        if name == other:
            raise ConfigError(f"compare: expected two sets, found '{name}' and itself; name another one, or remove it")
        sets.compared[name] = other
    return sets


def no_captions(units: Sequence[CountUnit], found: str) -> str:
    """Say that a set has no captions, for whoever is to mend that.

    Args:
        units: Of the set.
        found: What there was in their place.
    """
    first = units[0]
    files = f"{len(units)} parts of {first.file.path} ..." if len(units) > 1 else first.file.path
    where = files if first.file.path.endswith(TEXT) else f"column '{first.column}' of {files}"
    return f"{first.set_name}: expected captions in {where}, found {found}; name what has some, or leave the set out"


def _add(sets: Sets, job: Stats, caption_set: CaptionSet) -> None:
    name, column = caption_set.name, caption_set.column
    files = find_captions(caption_set.path, f"the set '{name}'")
    tables = look_at(files)
    require_text(tables, name, column)
    if not any(num_rows(file) for file in files):
        raise DataError(no_captions(list(_units(name, files, column)), "no rows"))
    dense = next((other for other in job.sets if _is_raw_of(caption_set, other)), None)
    if dense is not None and _has_column(dense.column, files, tables):
        sets.units += _units(name, files, column, dense.column, is_raw=True)
        return
    raw = caption_set.raw_column
    if not raw or raw == column or not _has_column(raw, files, tables):
        sets.units += _units(name, files, column)
        return
    if holds_none(files, raw):  # as in SA-1B, whose images came without: no set of nothing but rejected rows
        log.info("%s: column '%s' is empty, so that its captions are compared with none", name, raw)
        sets.units += _units(name, files, column)
        return
    named = [other.name for other in job.sets if _is_raw_of(other, caption_set)]
    named += [
        other.name + RAW for other in job.sets if other.name + RAW in sets.derived and _same_raw(other, caption_set)
    ]
    sets.compared[name] = next(iter(named), f"{name}{RAW}")
    if not named:
        if any(other.name == sets.compared[name] for other in job.sets):
            raise ConfigError(
                f"sets: '{sets.compared[name]}' is what the raw captions of '{name}' are called; give the other set "
                "of this name another one"
            )
        sets.derived.add(sets.compared[name])
        sets.units += _units(sets.compared[name], files, raw, column, is_raw=True)
    sets.units += _units(name, files, column, raw)


def _is_raw_of(raw: CaptionSet, dense: CaptionSet) -> bool:
    return _same_place(raw, dense) and raw.column == dense.raw_column and raw.column != dense.column


def _same_raw(one: CaptionSet, other: CaptionSet) -> bool:
    return _same_place(one, other) and one.raw_column == other.raw_column


def _same_place(one: CaptionSet, other: CaptionSet) -> bool:
    return one.path.rstrip("/") == other.path.rstrip("/")


def _has_column(column: str, files: Sequence[CaptionFile], tables: Mapping[str, Kinds]) -> bool:
    """Tell whether every file has a column of text; text files have none."""
    every = all(kinds.get(column) == "text" for kinds in tables.values())
    return bool(tables) and every and not any(file.path.endswith(TEXT) for file in files)


def _units(
    name: str, files: Sequence[CaptionFile], column: str, beside: str = "", is_raw: bool = False
) -> Iterator[CountUnit]:
    encoded = encode_name(name, max_length=60)
    for file in files:
        yield CountUnit(f"{encoded}--{file.id}", name, file, column, beside, is_raw)
