"""The noun report: Table 1 of the PixArt-alpha paper with the user's caption sets on top.

The same rows as a terminal table, as JSON (`stats.json`) and as one self-contained HTML page (`report.html`).
Figures of an approximate tagger carry a `~` and a line that says why, in all three.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pixart_data.errors import DataError
from pixart_data.nouns import APPROXIMATE_DEFINITION, DEFINITION, NounStats
from pixart_data.pages import bar, escaped, page, printable

FORMAT = "pixart-stats"
VERSION = 1
PAPER = "PixArt-alpha, Table 1"

_PAPER_CAPTIONS = 11_200_000
_COMPARABLE_RATIO = 1.5
_LABEL_CHARS = 40
_COLUMNS = ("Dataset", "Captions", "VN", "DN", "VN/DN", "Total nouns", "Nouns/image")


def _paper_row(valid: int, distinct: int, vn_dn: float, total: int, per_image: float) -> NounStats:
    return NounStats(
        num_captions=_PAPER_CAPTIONS,
        num_empty=0,
        distinct_nouns=distinct,
        valid_nouns=valid,
        vn_dn=vn_dn,
        total_nouns=total,
        nouns_per_image=per_image,
        approximate=False,
        tagger="nltk, version not published",
    )


PAPER_ROWS: Mapping[str, NounStats] = {
    "LAION": _paper_row(210_000, 2_461_000, 0.085, 72_000_000, 6.4),
    "LAION-LLaVA": _paper_row(85_000, 646_000, 0.133, 233_900_000, 20.9),
    "SAM-LLaVA": _paper_row(23_000, 124_000, 0.186, 327_900_000, 29.3),
    "Internal": _paper_row(152_000, 582_000, 0.261, 136_600_000, 12.2),
}
"""The paper's rows as printed, rounding included; the number of captions is derived: total over average."""


def terminal_table(sets: Mapping[str, NounStats]) -> str:
    """Render the sets, then the paper's rows, as aligned columns with footnotes; ends without a line break."""
    rows = [_COLUMNS, *_cells(sets)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *figures]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_notes(sets)])


def to_json(sets: Mapping[str, NounStats]) -> dict[str, Any]:
    """Return the report as JSON-able data; every row says its tagger, its definition and whether it is approximate."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "definition": DEFINITION,
        "sets": [_json_row(name, stats) for name, stats in sets.items()],
        "paper": [{**_json_row(name, stats), "source": PAPER} for name, stats in PAPER_ROWS.items()],
        "notes": _notes(sets),
        "made_with": _versions(),
    }


def from_json(report: Mapping[str, Any]) -> dict[str, NounStats]:
    """Read the user's sets back from what `to_json` made.

    Raises:
        DataError: If it is something else, or of a version that this toolkit does not know.
    """
    found = (report.get("format"), report.get("version"))
    if found != (FORMAT, VERSION):
        raise DataError(f"stats.json: expected {FORMAT} version {VERSION}, found {found[0]} version {found[1]}")
    names = {field.name for field in fields(NounStats)}
    sets = {}
    try:
        for row in report["sets"]:
            known = {name: value for name, value in row.items() if name in names}
            top = tuple((noun, count) for noun, count in row["top_nouns"])
            sets[row["name"]] = NounStats(**{**known, "top_nouns": top})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"stats.json: a row is damaged ({error!r}); run `pixart stats` again") from error
    return sets


def html_page(sets: Mapping[str, NounStats]) -> str:
    """Render one page that needs nothing else: no scripts, no fonts, no network."""
    made_with = ", ".join(f"{name} {number}" for name, number in _versions().items())
    taggers = "".join(
        f"<li>{escaped(name)}: {escaped(stats.tagger)}{_badge(stats)}</li>" for name, stats in sets.items()
    )
    definitions = dict.fromkeys([DEFINITION, *(_definition(stats) for stats in sets.values())])
    return page(
        "Noun statistics",
        [
            "<h1>Noun statistics of captions</h1>",
            f"<p class=lead>How dense the captions are in nouns, beside the rows of {PAPER}.</p>",
            _html_table(sets),
            *(f"<p class=note>{escaped(note)}</p>" for note in _notes(sets)),
            "<h2>Nouns per image</h2>",
            _html_averages(sets),
            *(_html_top_nouns(name, stats) for name, stats in sets.items()),
            "<h2>Definition</h2>",
            *(f"<p>{escaped(text)}</p>" for text in definitions),
            "<h2>How this was made</h2>",
            f"<ul>{taggers}<li>Page: {escaped(made_with)}</li></ul>",
        ],
    )


def _cells(sets: Mapping[str, NounStats]) -> list[tuple[str, ...]]:
    rows = []
    for name, stats in sets.items():
        mark = _mark(stats)
        figures = (
            f"{stats.valid_nouns:,}",
            f"{stats.distinct_nouns:,}",
            f"{stats.vn_dn:.1%}",
            f"{stats.total_nouns:,}",
            f"{stats.nouns_per_image:.1f}",
        )
        rows.append((printable(name), f"{stats.num_captions:,}", *(mark + figure for figure in figures)))
    for name, stats in PAPER_ROWS.items():
        rows.append(
            (
                f"{name} (paper)",
                f"{stats.num_captions / 1e6:.1f}M",
                f"{stats.valid_nouns / 1e3:.0f}K",
                f"{stats.distinct_nouns / 1e3:.0f}K",
                f"{stats.vn_dn:.1%}",
                f"{stats.total_nouns / 1e6:.1f}M",
                f"{stats.nouns_per_image:.1f}",
            )
        )
    return rows


def _notes(sets: Mapping[str, NounStats]) -> list[str]:
    """What a reader must know before comparing rows, one line each."""
    notes = [
        "VN: distinct nouns that appear more than 10 times. DN: distinct nouns.",
        f"(paper): {PAPER}, as printed; its number of captions is derived (total / nouns per image).",
    ]
    approximate = dict.fromkeys(stats.tagger for stats in sets.values() if stats.approximate)
    if approximate:
        notes.append(
            f"~ approximate: counted with {', '.join(approximate)}; against NLTK, averages differ by up to "
            "about 3% and DN by about 13%. Do not compare with rows counted by NLTK."
        )
    sizes = [_PAPER_CAPTIONS, *(stats.num_captions for stats in sets.values())]
    if max(sizes) > _COMPARABLE_RATIO * min(sizes):
        notes.append(
            "VN/DN grows with sample size: rows with different numbers of captions do not compare "
            f"(here {min(sizes):,} to {max(sizes):,})."
        )
    for name, stats in sets.items():
        if stats.num_empty:
            notes.append(f"{printable(name)}: {stats.num_empty:,} null or blank captions are not counted.")
    return notes


def _json_row(name: str, stats: NounStats) -> dict[str, Any]:
    row = asdict(stats)
    row["top_nouns"] = [list(pair) for pair in stats.top_nouns]
    return {"name": printable(name), "definition": _definition(stats), **row}


def _versions() -> dict[str, str]:
    try:
        toolkit = version("pixart-toolkit")
    except PackageNotFoundError:
        toolkit = "not installed"
    return {"pixart-toolkit": toolkit, "Python": platform.python_version()}


def _definition(stats: NounStats) -> str:
    return APPROXIMATE_DEFINITION if stats.approximate else DEFINITION


def _mark(stats: NounStats) -> str:
    return "~" if stats.approximate else ""


def _shortened(noun: str) -> str:
    return noun if len(noun) <= _LABEL_CHARS else f"{noun[:_LABEL_CHARS]}…"


def _badge(stats: NounStats) -> str:
    return " <span class=approx>approximate</span>" if stats.approximate else ""


def _html_table(sets: Mapping[str, NounStats]) -> str:
    head = "".join(f"<th scope=col>{column}</th>" for column in _COLUMNS)
    body = []
    every = [*sets.values(), *PAPER_ROWS.values()]
    for index, (cells, stats) in enumerate(zip(_cells(sets), every, strict=True)):
        kind = "own" if index < len(sets) else "paper"
        figures = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        body.append(f"<tr class={kind}><th scope=row>{escaped(cells[0])}{_badge(stats)}</th>{figures}</tr>")
    rows = "\n".join(body)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"


def _html_averages(sets: Mapping[str, NounStats]) -> str:
    every = [*sets.values(), *PAPER_ROWS.values()]
    largest = max(stats.nouns_per_image for stats in every)
    bars = []
    for index, (cells, stats) in enumerate(zip(_cells(sets), every, strict=True)):
        kind = "own" if index < len(sets) else "paper"
        bars.append(bar(kind, escaped(cells[0]) + _badge(stats), cells[-1], stats.nouns_per_image / largest))
    return f"<div class=bars>{''.join(bars)}</div>"


def _html_top_nouns(name: str, stats: NounStats) -> str:
    largest = max((count for _, count in stats.top_nouns), default=1)
    mark = _mark(stats)
    bars = [
        bar("own", escaped(_shortened(noun)), f"{mark}{count:,}", count / largest) for noun, count in stats.top_nouns
    ]
    inside = f"<div class='bars top'>{''.join(bars)}</div>" if bars else "<p class=note>No nouns were found.</p>"
    return f"<h2>Most frequent nouns: {escaped(name)}{_badge(stats)}</h2>{inside}"
