"""The tables of the noun report as HTML: each in a box of its own that scrolls, with a caption and headed rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixart_data.corpora import PAPER, PAPER_CAPTIONS, PAPER_ROWS, Corpus
from pixart_data.nouns import NounStats
from pixart_data.pages import escaped
from pixart_data.rarefaction import Growth
from pixart_data.renderings import shortened

COLUMNS = ("Captions", "VN", "DN", "VN/DN", "Total nouns", "Nouns/image")
"""Of Table 1, beside the name of the row."""

LEAST_CAPTIONS = 100
"""Random subsets of fewer captions say nothing of a set: they are not compared."""

_LABEL_CHARS = 40


@dataclass(frozen=True)
class Group:
    """Rows of a table that belong together.

    Attributes:
        title: Written in a row above them; empty for none.
        rows: Name, as HTML, and figures, as plain text.
        kind: `own` or `paper`: how they look.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[str]]]
    kind: str = ""


def table(caption: str, head: Sequence[str], groups: Iterable[Group]) -> str:
    """Render a table; the first column of `head` is that of the rows' names.

    Args:
        caption: What it shows, in words: written above it, and what a screen reader calls the box.
    """
    columns = "".join(f"<th scope=col>{escaped(name)}</th>" for name in head)
    bodies = []
    for group in groups:
        title = f"<tr class=group><th scope=rowgroup colspan={len(head)}>{group.title}</th></tr>" if group.title else ""
        rows = "".join(
            f"<tr class='{group.kind}'><th scope=row>{name}</th>{''.join(f'<td>{escaped(f)}</td>' for f in figures)}"
            "</tr>\n"
            for name, figures in group.rows
        )
        bodies.append(f"<tbody>{title}{rows}</tbody>")
    return (
        f'<div class=wide role=region tabindex=0 aria-label="{escaped(caption)}"><table>'
        f"<caption><span>{escaped(caption)}</span></caption><thead><tr>{columns}</tr></thead>{''.join(bodies)}</table></div>\n"
    )


def label(text: str) -> str:
    """Make what a stranger wrote a short label, as HTML; <bdi> keeps right-to-left names from turning the figures."""
    cut = text if len(text) <= _LABEL_CHARS else f"{text[:_LABEL_CHARS]}…"
    return f"<bdi>{escaped(cut)}</bdi>"


def mark(stats: NounStats) -> str:
    """What stands before each figure of an approximate tagger."""
    return "~" if stats.approximate else ""


def badges(corpus: Corpus) -> str:
    """What a reader must see beside a set's name, as HTML."""
    found = (("approximate", corpus.stats.approximate), ("not English?", bool(corpus.language.get("flagged"))))
    return "".join(f" <span class=approx>{word}</span>" for word, shown in found if shown)


def named(corpus: Corpus) -> str:
    """The name of a set with its badges, as HTML."""
    return label(corpus.name) + badges(corpus)


def table_1_figures(stats: NounStats) -> tuple[str, ...]:
    """A set's cells of Table 1."""
    figures = (
        f"{stats.valid_nouns:,}",
        f"{stats.distinct_nouns:,}",
        f"{stats.vn_dn:.1%}",
        f"{stats.total_nouns:,}",
        f"{stats.nouns_per_image:.1f}",
    )
    return (f"{stats.num_captions:,}", *(mark(stats) + figure for figure in figures))


def paper_figures(stats: NounStats) -> tuple[str, ...]:
    """A row's cells of Table 1 as the paper prints them."""
    return (
        f"{stats.num_captions / 1e6:.1f}M",
        f"{stats.valid_nouns / 1e3:.0f}K",
        f"{stats.distinct_nouns / 1e3:.0f}K",
        f"{stats.vn_dn:.1%}",
        f"{stats.total_nouns / 1e6:.1f}M",
        f"{stats.nouns_per_image:.1f}",
    )


def table_1(corpora: Sequence[Corpus]) -> str:
    """Table 1 of the paper with these sets on top; approximate ones and the paper's rows get a table each."""
    own = Group("", [(named(corpus), _density_second(table_1_figures(corpus.stats))) for corpus in corpora], "own")
    rows = [(label(name), _density_second(paper_figures(stats))) for name, stats in PAPER_ROWS.items()]
    paper, head = Group(PAPER, rows, "paper"), ("Captions of", *_density_second(COLUMNS))
    if not any(corpus.stats.approximate for corpus in corpora):
        return table("Table 1: noun density, beside the rows of the paper", head, [own, paper])
    return (
        table("Noun density, approximate", head, [own])
        + "<p class='note strong'>Not comparable with the paper's rows, which were counted with NLTK:</p>"
        + table("Noun density in the paper", head, [paper])
    )


def _density_second(cells: Sequence[str]) -> tuple[str, ...]:
    """Put nouns per image, the last cell of Table 1, after the captions: what comes late is off the edge of a phone."""
    return (cells[0], cells[-1], *cells[1:-1])


def sizes_compared(corpora: Sequence[Corpus]) -> dict[int, list[tuple[Corpus, Growth]]]:
    """Return the sizes at which sets compare, smallest first, each with the sets that are large enough.

    A size that a single set has compares with nothing, unless it is that of the paper's rows; nor does one below
    `LEAST_CAPTIONS`.
    """
    points = (point.num_captions for corpus in corpora for point in corpus.rarefied)
    sizes = sorted({size for size in points if size >= LEAST_CAPTIONS})
    found = {size: [(corpus, point) for corpus in corpora if (point := at(corpus, size))] for size in sizes}
    return {size: sets for size, sets in found.items() if len(sets) > 1 or size == PAPER_CAPTIONS}


def too_small(corpora: Sequence[Corpus]) -> list[str]:
    """Name the sets that are too small to be compared, a line each; a single set is compared with none."""
    return [
        f"{shortened(corpus.name)}: too small to compare ({corpus.stats.num_captions:,} captions, of at least "
        f"{LEAST_CAPTIONS})."
        for corpus in corpora
        if corpus.stats.num_captions < LEAST_CAPTIONS and len(corpora) > 1
    ]


def at(corpus: Corpus, size: int) -> Growth | None:
    """Return a set's figures in random subsets of a size, or all of it; None where they are not known."""
    stats = corpus.stats
    whole = Growth(stats.num_captions, stats.distinct_nouns, stats.valid_nouns, stats.vn_dn)
    points = [whole, *corpus.rarefied, *corpus.growth]
    return next((point for point in points if point.num_captions == size), None)


def equal_size_table(corpora: Sequence[Corpus]) -> str:
    """Distinct and valid nouns of every set at equal numbers of captions; empty where nothing compares."""
    groups = []
    for size, sets in sizes_compared(corpora).items():
        rows = [(named(corpus), growth_figures(corpus.stats, point)) for corpus, point in sets]
        groups.append(Group(f"{size:,} captions", rows))
        if size == PAPER_CAPTIONS and not any(corpus.stats.approximate for corpus in corpora):
            paper = [(label(f"{name} (paper)"), paper_figures(stats)[1:]) for name, stats in PAPER_ROWS.items()]
            groups.append(Group("", [(name, (*cells[:3], cells[4])) for name, cells in paper], "paper"))
    if not groups:
        return ""
    head = ("Random subsets of", "VN", "DN", "VN/DN", "Nouns/image")
    return table("The same at equal numbers of captions: these rows compare, size by size", head, groups)


def growth_figures(stats: NounStats, point: Growth) -> tuple[str, ...]:
    """A set's cells at one size; the expected nouns of an image are the same at every size."""
    figures = (
        f"{point.valid_nouns:,.0f}",
        f"{point.distinct_nouns:,.0f}",
        f"{point.vn_dn:.1%}",
        f"{stats.nouns_per_image:.1f}",
    )
    return tuple(mark(stats) + figure for figure in figures)


def view_table(corpora: Sequence[Corpus]) -> str:
    """Each set by other ways of counting."""
    groups = [
        Group(
            named(corpus),
            [
                (escaped(stats.rule or view), _density_second(table_1_figures(stats))[1:])
                for view, stats in corpus.views.items()
            ],
        )
        for corpus in corpora
        if corpus.views
    ]
    return (
        table("Table 1 by other ways of counting", ("What counts as a noun", *_density_second(COLUMNS)[1:]), groups)
        if groups
        else ""
    )


def threshold_table(corpora: Sequence[Corpus]) -> str:
    """Valid nouns by how often they must occur."""
    limits = sorted({limit for corpus in corpora for limit in corpus.thresholds})
    if not limits:
        return ""
    rows = [
        (named(corpus), [_figure(corpus, corpus.thresholds.get(limit)) for limit in limits])
        for corpus in corpora
        if corpus.thresholds
    ]
    head = ("Nouns that occur more than", *(f"{limit:,}" for limit in limits))
    return table("Valid nouns by threshold (times); the paper takes 10", head, [Group("", rows)])


def _figure(corpus: Corpus, count: int | None) -> str:
    return "" if count is None else f"{mark(corpus.stats)}{count:,}"


def pair_table(dense: Corpus, raw: Corpus) -> str:
    """A set beside the one that it was made from, and the ratio of the two."""
    shared = min(dense.stats.num_captions, raw.stats.num_captions)
    at_size = [at(corpus, shared) for corpus in (raw, dense)]
    rows: list[tuple[str, float, float, str]] = [
        ("Captions", raw.stats.num_captions, dense.stats.num_captions, ",.0f"),
        ("Nouns/image", raw.stats.nouns_per_image, dense.stats.nouns_per_image, ".1f"),
        ("Total nouns", raw.stats.total_nouns, dense.stats.total_nouns, ",.0f"),
    ]
    before, after = at_size if shared >= LEAST_CAPTIONS else (None, None)
    if before is not None and after is not None:
        rows += [
            (f"DN at {shared:,} captions", before.distinct_nouns, after.distinct_nouns, ",.0f"),
            (f"VN at {shared:,} captions", before.valid_nouns, after.valid_nouns, ",.0f"),
            (f"VN/DN at {shared:,} captions", before.vn_dn, after.vn_dn, ".1%"),
        ]
    rows += _same_images(dense.pairs, raw.pairs)
    sign = mark(dense.stats)
    cells = [
        (escaped(what), (_signed(sign, what, f"{a:{form}}"), _signed(sign, what, f"{b:{form}}"), _ratio(a, b)))
        for what, a, b, form in rows
    ]
    caption = "Both sets, and the ratio of the second to the first"
    return table(caption, ("Figure", raw.name[:_LABEL_CHARS], dense.name[:_LABEL_CHARS], "Ratio"), [Group("", cells)])


def length_table(corpora: Sequence[Corpus]) -> str:
    """Captions against the token limit, of the sets that were measured; empty where none was."""
    rows = [
        (
            named(corpus),
            (
                f"{lengths['num_captions']:,}",
                _share_measured(lengths),
                f"{lengths['mean_tokens']:.1f}",
                f"{lengths['max_tokens']}",
                f"{lengths['share_truncated']:.2%}",
                f"{lengths['share_of_tokens_lost']:.2%}",
                shortened(str(lengths["tokenizer"]), 60),
            ),
        )
        for corpus in corpora
        if (lengths := corpus.lengths)
    ]
    head = (
        "Captions of",
        "measured",
        "of rows",
        "mean tokens",
        "limit",
        "captions cut",
        "tokens lost",
        "tokenizer",
    )
    return table("Captions against the token limit", head, [Group("", rows)]) if rows else ""


def _share_measured(lengths: Mapping[str, Any]) -> str:
    share = lengths.get("share_of_rows", 1.0)
    return "all" if share >= 1.0 else f"1 in {1 / share:,.0f}"


def _same_images(dense: Mapping[str, int], raw: Mapping[str, int]) -> list[tuple[str, float, float, str]]:
    """Return the rows for the images that have both captions."""
    count = dense.get("num_captions", 0)
    if not count or raw.get("num_captions") != count:
        return []
    return [
        (f"{what} on the {count:,} images with both", raw[name] / count, dense[name] / count, ".1f")
        for what, name in (("Nouns", "num_nouns"), ("Distinct nouns", "num_distinct_nouns"))
    ]


def _signed(sign: str, what: str, figure: str) -> str:
    return figure if what == "Captions" else sign + figure


def _ratio(before: float, after: float) -> str:
    return f"{after / before:.3g}" if before else "–"
