"""The noun report: Table 1 of the PixArt-alpha paper with the user's caption sets on top, and what stands behind it.

One self-contained page: no scripts, no fonts, no network; and the first table again for terminals. Approximate sets are
marked in both, and stand apart from the paper's rows, which another tagger counted.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pixart_data.corpora import PAPER, PAPER_CAPTIONS, PAPER_ROWS, Corpus, made_with, notes
from pixart_data.errors import DataError
from pixart_data.listings import (
    COLUMNS,
    LEAST_CAPTIONS,
    Group,
    badges,
    equal_size_table,
    label,
    length_table,
    mark,
    named,
    pair_table,
    paper_figures,
    sizes_compared,
    table,
    table_1,
    table_1_figures,
    threshold_table,
    too_small,
    view_table,
)
from pixart_data.nouns import DEFINITION, definition
from pixart_data.pages import bar, escaped, page, printable
from pixart_data.plots import figures
from pixart_data.renderings import STYLE, Plot, compact, num_cells, shortened
from pixart_data.scorecards import quality_sections

if TYPE_CHECKING:
    from pixart_data.galleries import Exhibit

_TERMINAL_CHARS = 120
_NAME_CHARS = 28
_GAP = "  "
_TOP, _TOP_OF_MANY, _MANY = 50, 20, 3
_GAINED = 40
_APPROXIMATE = (
    "Approximate: against NLTK, averages differ by up to about 3% and DN by about 13%. Do not compare with figures "
    "counted by NLTK, the paper's among them."
)


def require_one_kind(corpora: Sequence[Corpus]) -> None:
    """Make sure that sets may stand in one table.

    Raises:
        DataError: If some were counted exactly and others approximately.
    """
    rough = [corpus.name for corpus in corpora if corpus.stats.approximate]
    exact = [corpus.name for corpus in corpora if not corpus.stats.approximate]
    if rough and exact:
        raise DataError(
            f"report: expected sets that compare, found {printable(exact[0])} counted by NLTK and "
            f"{printable(rough[0])} counted approximately; run `pixart stats` on both, with --approximate or without"
        )


def terminal_table(corpora: Sequence[Corpus]) -> str:
    """Render the sets, then the paper's rows, as aligned columns with footnotes; ends without a line break.

    No line is longer than 120 characters. Where sets differ in size, two columns more give their figures
    in random subsets as large as the smallest.

    Raises:
        DataError: If exact and approximate sets are mixed.
    """
    require_one_kind(corpora)
    approximate = any(corpus.stats.approximate for corpus in corpora)
    size, at_size = _common_size(corpora)
    extra = (f"DN @{compact(size)}", f"VN/DN @{compact(size)}") if size else ()
    rows = [("Captions of", *COLUMNS, *extra)]
    for corpus in corpora:
        more = at_size.get(corpus.name, ("-",) * len(extra))
        rows.append((printable(corpus.name), *table_1_figures(corpus.stats), *more))
    split = len(rows)
    rows += [(f"{name} (paper)", *paper_figures(stats), *("-" for _ in extra)) for name, stats in PAPER_ROWS.items()]
    widths = [max(num_cells(row[i]) for row in rows) for i in range(len(rows[0]))]
    room = _TERMINAL_CHARS - sum(width + len(_GAP) for width in widths[1:])
    widths[0] = min(widths[0], room, _NAME_CHARS)
    lines = [_aligned((shortened(row[0], widths[0]), *row[1:]), widths) for row in rows]
    if approximate:
        lines.insert(split, "not comparable with these, which NLTK counted:")
    lines.insert(1, _GAP.join("-" * width for width in widths))
    told = [f"@{compact(size)}: in random subsets of {size:,} captions, which compare with each other."] if size else []
    footnotes = (*notes(corpora), *told, *too_small(corpora), *_foreign(corpora))
    return "\n".join([*lines, "", *(line for words in footnotes for line in _wrapped(words))])


def html_page(corpora: Sequence[Corpus], gallery: Sequence["Exhibit"] = ()) -> str:
    """Render one page that needs nothing else.

    Args:
        corpora: In the order of the report; two of one name cannot be told apart.
        gallery: Pictures with their captions.

    Raises:
        DataError: If exact and approximate sets are mixed.
    """
    require_one_kind(corpora)
    plots = figures(corpora)
    blocks = [
        *_opening(corpora),
        *_nouns(corpora, plots),
        *_pairs(corpora),
        *_most_frequent(corpora),
        *quality_sections(corpora, plots["quality"].html() if "quality" in plots else ""),
        *_lengths(corpora, plots),
        *_frames(corpora, plots),
        *_rejections(corpora),
        *_gallery(gallery),
        *_definition(corpora),
    ]
    return page("Noun statistics", blocks, STYLE + _STYLE)


def _opening(corpora: Sequence[Corpus]) -> Iterator[str]:
    total = sum(corpus.stats.num_captions for corpus in corpora)
    sets = f"{len(corpora)} set{'s' * (len(corpora) != 1)}"
    yield "<h1>Noun statistics of captions</h1>"
    yield f"<p class=lead>{total:,} captions in {sets}: how dense they are in nouns, beside the rows of {PAPER}.</p>"
    if any(corpus.stats.approximate for corpus in corpora):
        taggers = ", ".join(dict.fromkeys(corpus.stats.tagger for corpus in corpora))
        yield f"<p class=alarm>Counted with {escaped(taggers)}. {_APPROXIMATE}</p>"
    yield from (f"<p class=alarm>{escaped(words)}</p>" for words in _foreign(corpora))


def _nouns(corpora: Sequence[Corpus], plots: dict[str, Plot]) -> Iterator[str]:
    yield "<h2>Noun density</h2>"
    yield table_1(corpora)
    yield from (f"<p class=note>{escaped(note)}</p>" for note in notes(corpora))
    yield "<h2>Sample size</h2>"
    yield f"<p class='note strong'>{escaped(_comparable(corpora))}</p>"
    yield equal_size_table(corpora)
    yield from (f"<p class=note>{escaped(words)}</p>" for words in too_small(corpora))
    yield from _plots(plots, "density", "growth", "ranks", "nouns")
    other = view_table(corpora) + threshold_table(corpora)
    if other:
        yield f"<h2>Other ways of counting</h2>{other}"


def _comparable(corpora: Sequence[Corpus]) -> str:
    words = "VN/DN, VN and DN move with the number of captions, so rows of different size above do not compare. "
    if sizes_compared(corpora):
        words += "Rows of one size below do: they are what random subsets of that many captions have on average. "
    words += "Nouns per image compares at any size. "
    if any(corpus.stats.approximate for corpus in corpora):
        return f"{words}Nothing here compares with the paper's rows."
    words += f"The paper's rows are of about {PAPER_CAPTIONS / 1e6:.1f}M captions each"
    if PAPER_CAPTIONS in sizes_compared(corpora):
        return f"{words}: compare them at that size."
    return f"{words}: of sets much smaller or larger, only nouns per image compares with them."


def _pairs(corpora: Sequence[Corpus]) -> Iterator[str]:
    by_name = {corpus.name: corpus for corpus in corpora}
    pairs = [(c, by_name[c.gained_over]) for c in corpora if c.gained_over is not None and c.gained_over in by_name]
    if not pairs:
        return
    yield "<h2>Raw against re-captioned</h2>"
    for dense, raw in pairs:
        yield f"<h3>{label(dense.name)} against {label(raw.name)}</h3>{pair_table(dense, raw)}"
        if raw.name == f"{dense.name}-raw":  # how a set is called whose captions are in a column beside the others
            yield f"<p class=note>{label(raw.name)}: the captions that the same images came with.</p>"
        yield _gained(dense, raw, _GAINED if len(pairs) == 1 else _TOP_OF_MANY)


def _gained(dense: Corpus, raw: Corpus, num_nouns: int) -> str:
    here, there = label(dense.name), label(raw.name)
    if not dense.gained:
        return f"<p class=note>No noun is valid in {here} that is not in {there}.</p>"
    words = (
        f"<h4>Gained nouns</h4><p class=note>{dense.num_gained:,} nouns are valid in {here} and not in {there}; "
        f"{dense.num_lost:,} are the other way round. The most frequent of those gained, how often they occur, and in "
        "parentheses how often they did:</p>"
    )
    sign, most = mark(dense.stats), dense.gained[0][1]
    bars = "".join(
        bar("own", label(noun), f"{sign}{now:,} ({sign}{before:,})", now / most)
        for noun, now, before in dense.gained[:num_nouns]
    )
    return f"{words}<div class='bars top gained'>{bars}</div>"


def _most_frequent(corpora: Sequence[Corpus]) -> Iterator[str]:
    yield "<h2>Most frequent nouns</h2>"
    for corpus in corpora:
        yield f"<h3>{named(corpus)}</h3>"
        nouns = corpus.top[: _TOP if len(corpora) <= _MANY else _TOP_OF_MANY]
        if not nouns:
            yield "<p class=note>No nouns were found.</p>"
            continue
        sign = mark(corpus.stats)
        bars = "".join(bar("own", label(noun), f"{sign}{count:,}", count / nouns[0][1]) for noun, count in nouns)
        yield f"<div class='bars top'>{bars}</div>"


def _lengths(corpora: Sequence[Corpus], plots: dict[str, Plot]) -> Iterator[str]:
    yield "<h2>Lengths for T5</h2>"
    measured = length_table(corpora)
    if not measured:
        yield (
            "<p class=note>Not measured: run <code>pixart stats</code> again with <code>--tokenizer "
            "DeepFloyd/t5-v1_1-xxl</code>, or with <code>tokenizer = &quot;...&quot;</code> in the job file.</p>"
        )
        return
    yield measured
    yield from _plots(plots, "lengths")


def _frames(corpora: Sequence[Corpus], plots: dict[str, Plot]) -> Iterator[str]:
    yield "<h2>Pictures</h2>"
    rows = [
        (
            named(corpus),
            (
                f"{frames['num_images']:,}",
                f"{frames['resolution_px']} px",
                f"{sum(bucket['count'] > 0 for bucket in frames['buckets'])} of {len(frames['buckets'])}",
                f"{frames['share_upscaled']:.1%}",
                f"{frames['crop_loss']['mean']:.1%}",
                f"{frames['num_without_size']:,}",
            ),
        )
        for corpus in corpora
        if (frames := corpus.frames)
    ]
    if not rows:
        yield (
            "<p class=note>No sizes: the tables have no columns <code>width_px</code> and <code>height_px</code>. "
            "Those that <code>pixart caption</code> writes do.</p>"
        )
        return
    head = ("Pictures of", "number", "trained at", "buckets used", "enlarged", "cropped away", "without a size")
    yield table("What training at this resolution does to the pictures", head, [Group("", rows)])
    yield from _plots(plots, "buckets", "resolutions", "crops")


def _rejections(corpora: Sequence[Corpus]) -> Iterator[str]:
    groups = [
        Group(named(corpus), [(label(reason), (f"{count:,}",)) for reason, count in _by_count(corpus.rejections)])
        for corpus in corpora
        if corpus.rejections
    ]
    if groups:
        yield "<h2>Rejected rows</h2>"
        yield f"<div class=short>{table('Rows without a caption, by reason', ('Reason', 'Rows'), groups)}</div>"


def _gallery(gallery: Sequence["Exhibit"]) -> Iterator[str]:
    if not gallery:
        return
    yield "<h2>Pictures with raw and dense captions</h2><div class=gallery>"
    for exhibit in gallery:
        picture = base64.b64encode(exhibit.jpeg).decode()
        yield (
            f'<figure><img width={exhibit.width} height={exhibit.height} alt="the picture {escaped(exhibit.key)}" '
            f'src="data:image/jpeg;base64,{picture}"><figcaption><dl><dt>raw</dt><dd dir=auto>{escaped(exhibit.raw)}'
            f"</dd><dt>dense</dt><dd dir=auto>{escaped(exhibit.dense)}</dd></dl>"
            f"<p class=note>{escaped(shortened(exhibit.key, 80))}</p></figcaption></figure>\n"
        )
    yield "</div>"


def _definition(corpora: Sequence[Corpus]) -> Iterator[str]:
    texts = dict.fromkeys([*(definition(corpus.stats) for corpus in corpora), DEFINITION])
    versions = ", ".join(f"{name} {number}" for name, number in made_with().items())
    yield "<h2>Definition</h2>"
    yield from (f"<p>{escaped(text)}</p>" for text in texts)
    items = "".join(
        f"<li>{label(corpus.name)}: {escaped(corpus.stats.tagger)}{badges(corpus)}</li>" for corpus in corpora
    )
    yield f"<h2>How this was made</h2><ul>{items}<li>Page: {escaped(versions)}</li></ul>"


def _plots(plots: dict[str, Plot], *names: str) -> Iterator[str]:
    """Those of the figures that there are, side by side where there is room."""
    drawn = "".join(plots[name].html() for name in names if name in plots)
    if drawn:
        yield f"<div class=plots>{drawn}</div>"


def _foreign(corpora: Sequence[Corpus]) -> list[str]:
    return [
        f"{shortened(corpus.name)}: {corpus.language.get('share_other', 1.0):.0%} of a sample of its captions are not "
        "in English; the tagger knows English only: these figures mean little."
        for corpus in corpora
        if corpus.language.get("flagged")
    ]


def _common_size(corpora: Sequence[Corpus]) -> tuple[int, dict[str, tuple[str, ...]]]:
    """The size of the smallest set that compares, and by set what the two columns for it hold; 0 where none does."""
    large = [corpus.stats.num_captions for corpus in corpora if corpus.stats.num_captions >= LEAST_CAPTIONS]
    smallest = min(large, default=0)
    sets = sizes_compared(corpora).get(smallest, [])
    if len(sets) < 2:
        return 0, {}
    return smallest, {
        corpus.name: (
            f"{mark(corpus.stats)}{point.distinct_nouns:,.0f}",
            f"{mark(corpus.stats)}{point.vn_dn:.1%}",
        )
        for corpus, point in sets
    }


def _wrapped(words: str) -> Iterator[str]:
    """Break a line where the terminal ends, which wide signs reach in half as many."""
    line = ""
    for word in words.split(" "):
        if line and num_cells(line) + 1 + num_cells(word) > _TERMINAL_CHARS:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    padding = [" " * (width - num_cells(cell)) for cell, width in zip(row, widths, strict=True)]
    figures = [space + cell for space, cell in zip(padding[1:], row[1:], strict=True)]
    return _GAP.join([row[0] + padding[0], *figures])


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


_STYLE = """
main { max-width: 68rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1.5rem; break-after: avoid; }
h3, h4 { font-size: 1rem; margin: 1.25rem 0 .5rem; break-after: avoid; } h4 { font-size: .9rem; }
caption { text-align: left; white-space: normal; color: var(--soft); font-size: .875rem; padding-bottom: .35rem; }
td, th { padding: .4rem .6rem; } tbody th { font-weight: 400; text-align: left; white-space: normal;
  overflow-wrap: break-word; min-width: 6rem; }
main { --tint: color-mix(in srgb, var(--ink) 4%, transparent); }
.wide { background: linear-gradient(to left, var(--page) 45%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, color-mix(in srgb, var(--ink) 25%, transparent), transparent) right / 1.1rem 100%
  no-repeat; }
.wide th:first-child { position: sticky; left: 0; background: var(--page); }
tr.own { background: var(--tint); }
.wide .own th:first-child { background: linear-gradient(var(--tint), var(--tint)) var(--page); }
.wide .group th:first-child { background: none; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2.5rem); }
tbody .own th { font-weight: 650; }
.group th { color: var(--soft); font-size: .8rem; font-weight: 650; padding-top: .9rem; }
.gained .bar { grid-template-columns: 7rem 1fr 6rem; }
.short table { width: auto; min-width: min(100%, 26rem); }
.alarm { background: var(--warn-page); color: var(--warn); border-radius: .5rem; padding: .75rem 1rem;
  margin: .5rem 0; }
.strong { color: var(--ink); font-size: 1rem; } code { overflow-wrap: anywhere; }
.alarm, .note, li, .label { overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.25rem; }
.gallery figure { margin: 0; background: var(--card); border-radius: .5rem; overflow: hidden; break-inside: avoid; }
.gallery img { display: block; width: 100%; height: 15rem; object-fit: contain; background: var(--line); }
.gallery figcaption { padding: .6rem .8rem; font-size: .875rem; overflow-wrap: anywhere; }
.gallery dl { display: grid; grid-template-columns: 3.2rem 1fr; gap: .35rem .5rem; margin: 0; }
.gallery dt { color: var(--soft); } .gallery dd { margin: 0; }
@media (max-width: 30rem) {
  main { padding: 1.25rem 1rem 2rem; } h1 { font-size: 1.5rem; } table { font-size: .875rem; }
  td, th { padding: .35rem .45rem; } tbody th { min-width: 7rem; max-width: 9rem; }
  .bars .bar { grid-template-columns: minmax(5rem, 9rem) 1fr 4rem; }
  .top { columns: 2 8rem; column-gap: 1.5rem; } .top .bar { grid-template-columns: 1fr auto; }
  .top .track { display: none; }
}
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } .wide { overflow: visible; background: none;
    break-inside: avoid; }
  table { font-size: 8pt; } thead th, .group th { font-size: inherit; } td, th { padding: .2rem .35rem; }
  tr, .bar { break-inside: avoid; } thead { display: table-header-group; }
  .plots { grid-template-columns: 1fr 1fr; } .plots > div { grid-column: 1 / -1; }
  .top { font-size: 8pt; columns: 2; } .plots figcaption, .note { font-size: 8pt; }
}
"""
