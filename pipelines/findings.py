"""What `stats` found: the parts of all units merged, and made into stats.json, the figures and report.html."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipelines.config import MOST_PICTURES, Stats
from pipelines.facts import Facts
from pipelines.sets import CountUnit, Sets, no_captions
from pixart_data.bundles import is_bundled, write_bundle
from pixart_data.commits import Record, read_table
from pixart_data.config import digest
from pixart_data.corpora import VERSION, Corpus, Extras, build, from_json, to_json
from pixart_data.errors import DataError
from pixart_data.galleries import Exhibit, Row, choose, gallery
from pixart_data.lemmas import find_lemmatizer
from pixart_data.nouns import NounCounts
from pixart_data.records import Reason
from pixart_data.storage import location, read_bytes
from pixart_data.verification import REPORT

JSON_FILE = REPORT
HTML_FILE = "report.html"
FIGURES = "figures"
COUNTS, QUALITY, DRAWN = "counts", "measures", "drawn"
DRAWN_SEED = 0
"""By which rows are drawn while captions are counted; from these, the seed of the gallery chooses."""

log = logging.getLogger(__name__)


@dataclass
class _Found:
    """What the units of a set gave together."""

    name: str
    counts: NounCounts
    facts: Facts


def write_findings(job: Stats, sets: Sets, records: list[Record]) -> None:
    """Merge what the units of each set gave, and write the report; one that is there already stays as it is.

    Raises:
        DataError: If a set of the job has no captions at all.
    """
    root = location(job.output)
    made_from = _digest(job, sets, records)
    if is_bundled(root, made_from):
        return
    by_unit = {record.unit: record for record in records}
    found = [_merged(root, name, [u for u in sets.units if u.set_name == name], by_unit) for name in sets.names]
    empty = {one.name for one in found if not one.counts.num_captions}
    for one in found:
        if one.name in empty - sets.derived:
            _complain(one, sets)
    found = [one for one in found if one.name not in empty]
    corpora = build(
        {one.name: one.counts for one in found},
        {one.name: _extras(one.facts) for one in found},
        {name: other for name, other in sets.compared.items() if not {name, other} & empty},
        job.threshold,
    )
    write_bundle(root, _files(corpora, _exhibits(job, sets, root, records)), made_from)


def _extras(facts: Facts) -> Extras:
    return Extras(
        quality=facts.totals.to_json(),
        lengths=facts.lengths.to_json() if facts.lengths is not None else None,
        frames=facts.frames.to_json() if facts.frames is not None else None,
        rejections=dict(sorted(facts.rejections.items())),
        language=facts.language,
        gate=dict(sorted(facts.totals.failures.items())),
        pairs=dict(sorted(facts.pairs.items())),
    )


def read_findings(root: Path) -> list[Corpus]:
    """Return what is known of each set, in the order of the report.

    Raises:
        DataError: If stats.json is damaged, or of a version that this toolkit does not know.
    """
    try:
        return from_json(json.loads(read_bytes(root / JSON_FILE)))
    except ValueError as error:
        raise DataError(f"{root / JSON_FILE}: not valid JSON ({error}); run `pixart stats` again") from error


def _digest(job: Stats, sets: Sets, records: list[Record]) -> str:
    """Return what changes when the report must be written anew."""
    return digest(
        {
            "toolkit": [version("pixart-toolkit"), VERSION],
            "sets": sets.names,
            "compared": sets.compared,
            "threshold": job.threshold,
            "lemmas": find_lemmatizer().rule,
            "gallery": None if job.gallery is None else job.gallery.model_dump(),
            "units": {record.unit: [record.digest, *(file.sha256 for file in record.files)] for record in records},
        }
    )


def _merged(root: Path, name: str, units: list[CountUnit], records: Mapping[str, Record]) -> _Found:
    def parts() -> Iterator[NounCounts]:
        for unit in units:
            yield NounCounts.from_table(read_table(root / _file_of(records[unit.id], COUNTS)))

    counted = parts()
    first = next(counted)
    return _Found(name, first.merge(counted), Facts.merged(Facts.from_json(records[unit.id].facts) for unit in units))


def _file_of(record: Record, folder: str) -> str:
    return next(file.path for file in record.files if file.path.startswith(f"{folder}/"))


def _complain(found: _Found, sets: Sets) -> None:
    """Raise DataError for a set without captions, saying what there was in their place."""
    units = [unit for unit in sets.units if unit.set_name == found.name]
    reasons = dict(sorted(found.facts.rejections.items()))
    num_damaged = reasons.pop(Reason.BAD_ROW, 0)
    num_empty = found.counts.num_empty - num_damaged
    problem = f" ({found.facts.problem})" if found.facts.problem else ""
    why = f" ({', '.join(f'{reason} {count:,}' for reason, count in reasons.items())})" if reasons else ""
    what = [f"{num_damaged:,} damaged{problem}"] if num_damaged else []
    what += [f"{num_empty:,} null or blank{why}"] if num_empty else []
    raise DataError(no_captions(units, f"rows without one: {', '.join(what)}" if what else "no rows"))


def _exhibits(job: Stats, sets: Sets, root: Path, records: list[Record]) -> list[Exhibit]:
    """Return the pictures of the gallery; without rows to draw from, say why there are none."""
    if job.gallery is None or not sets.have_pairs:
        return []
    drawn = [file.path for record in records for file in record.files if file.path.startswith(f"{DRAWN}/")]
    if not drawn:
        log.warning(
            "gallery: expected rows with a caption and a raw caption, found none; set raw_column of a set to the "
            "column of the raw ones"
        )
        return []
    rows: list[Row] = []
    for path in drawn:
        rows = candidates([*rows, *(Row(**row) for row in read_table(root / path).to_pylist())])
    return gallery(job.gallery.source, rows, job.gallery.num_pictures, job.gallery.seed)


def candidates(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that any gallery over all of these could show, whatever its number of pictures and its seed."""
    return choose(rows, MOST_PICTURES, DRAWN_SEED)


def _files(corpora: list[Corpus], exhibits: list[Exhibit]) -> dict[str, bytes]:
    """Return the report's files by path."""
    from pixart_data.plots import figures
    from pixart_data.reports import html_page

    files = {
        JSON_FILE: json.dumps(to_json(corpora), indent=1, ensure_ascii=False).encode("utf-8", errors="replace"),
        HTML_FILE: html_page(corpora, exhibits).encode("utf-8", errors="replace"),
    }
    source = f"pixart-toolkit {version('pixart-toolkit')}, {corpora[0].stats.tagger}"
    for name, plot in figures(corpora).items():
        files[f"{FIGURES}/{name}.png"] = plot.png(source)
    return files
