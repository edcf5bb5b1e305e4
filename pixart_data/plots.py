"""What the figures of the noun report show: each from one function of the corpora, as PNG and in the page alike.

Approximate corpora are drawn without the paper's points: those were counted by another tagger.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from pixart_data.corpora import PAPER_ROWS, Corpus
from pixart_data.distributions import bucket_plot, crop_plot, length_plot, resolution_plot
from pixart_data.nouns import NounStats
from pixart_data.renderings import INK, PAGE, SOFT, Legend, Plot, compact, counted, look, percent, shortened
from pixart_data.scorecards import quality_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TAIL = 0.005
_PAPER_MARKERS = ("o", "s", "^", "D")


def figures(corpora: Sequence[Corpus]) -> dict[str, Plot]:
    """Return the figures that these corpora have data for, by name, in the order of the report.

    They hold the corpora, and draw only when asked for their bytes.
    """
    makers: Sequence[Callable[[Sequence[Corpus]], Plot | None]] = (
        rank_plot,
        noun_plot,
        growth_plot,
        density_plot,
        quality_plot,
        length_plot,
        bucket_plot,
        resolution_plot,
        crop_plot,
    )
    drawn = [plot for maker in makers if (plot := maker(corpora)) is not None]
    if any(corpus.stats.approximate for corpus in corpora):
        drawn = [replace(plot, title=f"{plot.title} (approximate)") for plot in drawn]
    return {plot.name: plot for plot in drawn}


def rank_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """How often the noun of each rank occurs, both on log scales, and the line above which a noun is valid."""
    shown = [(index, corpus) for index, corpus in enumerate(corpora) if corpus.ranks]
    if not shown:
        return None
    threshold = shown[0][1].stats.threshold

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for index, corpus in shown:
            ranks, counts = zip(*corpus.ranks, strict=True)
            [line] = axes.loglog(ranks, counts, markevery=max(len(ranks) // 8, 1), **look(index))
            entries.append((line, corpus.name))
        limit = axes.axhline(threshold + 0.5, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axes.set(xlabel="rank of the noun", ylabel="occurrences")
        counted(axes.xaxis)
        counted(axes.yaxis)
        return [*entries, (limit, f"valid: more than {threshold} times")]

    finding = " ".join(
        f"{shortened(corpus.name)}: {corpus.stats.valid_nouns:,} of {corpus.stats.distinct_nouns:,} nouns occur more "
        f"than {threshold} times ({corpus.stats.vn_dn:.1%}){_most_frequent(corpus)}."
        for _, corpus in shown
    )
    return Plot("ranks", "How often each noun occurs", finding, draw)


def noun_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Which share of the captions holds how many nouns, and the mean of each set."""
    shown = [(index, corpus) for index, corpus in enumerate(corpora) if sum(corpus.per_caption)]
    if not shown:
        return None
    end = max(_end(corpus.per_caption) for _, corpus in shown)

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for index, corpus in shown:
            total = sum(corpus.per_caption)
            shares = [count / total for count in corpus.per_caption[:end]]
            style = look(index)
            every = max(len(shares) // 8, 1)
            [line] = axes.plot(range(len(shares)), shares, markevery=(index * every // 2 % every, every), **style)
            axes.axvline(corpus.stats.nouns_per_image, color=style["color"], linewidth=1, linestyle=(0, (1, 2)))
            entries.append((line, f"{shortened(corpus.name, 18)}: {corpus.stats.nouns_per_image:.1f}"))
        axes.set(xlabel="nouns in a caption (dotted: the mean)", ylabel="share of the captions")
        axes.set_ylim(bottom=0)
        percent(axes.yaxis)
        return entries

    finding = " ".join(
        f"{shortened(corpus.name)}: {corpus.stats.nouns_per_image:.1f} nouns in a caption on average, half have "
        f"at most {_quantile(corpus.per_caption, 0.5)} and 95% at most {_quantile(corpus.per_caption, 0.95)}."
        for _, corpus in shown
    )
    return Plot("nouns", "Nouns in a caption", finding, draw)


def growth_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Distinct and valid nouns of random subsets, both on log scales, with the paper's four points."""
    shown = _grown(corpora)
    if not shown:
        return None

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for index, corpus in shown:
            sizes = [point.num_captions for point in corpus.growth]
            style = {**look(index), "linestyle": "-"}
            [line] = axes.loglog(sizes, [point.distinct_nouns for point in corpus.growth], **style)
            valid = [(size, point.valid_nouns) for size, point in zip(sizes, corpus.growth, strict=True)]
            some = [pair for pair in valid if pair[1] >= 1]
            style = {**style, "linestyle": (0, (2, 1.5)), "markerfacecolor": style["color"]}
            axes.loglog([size for size, _ in some], [nouns for _, nouns in some], **style)
            entries.append((line, corpus.name))
        papers = _paper(axes, shown, lambda stats: (stats.distinct_nouns, stats.valid_nouns))
        axes.set(xlabel="captions", ylabel="nouns: distinct (solid), valid (dashed)")
        counted(axes.xaxis)
        counted(axes.yaxis)
        return [*entries, *papers]

    finding = " ".join(
        f"{shortened(corpus.name)}: {corpus.growth[-1].distinct_nouns:,.0f} distinct and "
        f"{corpus.growth[-1].valid_nouns:,.0f} valid nouns in {corpus.growth[-1].num_captions:,} captions"
        f"{_from_half(corpus)}."
        for _, corpus in shown
    )
    return Plot("growth", "Vocabulary as captions are added", finding, draw, 3.1)


def density_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """VN/DN of random subsets of each size, with the paper's four points: what compares at equal size only."""
    shown = _grown(corpora)
    if not shown:
        return None

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for index, corpus in shown:
            sizes = [point.num_captions for point in corpus.growth]
            [line] = axes.semilogx(sizes, [point.vn_dn for point in corpus.growth], **look(index))
            entries.append((line, corpus.name))
        papers = _paper(axes, shown, lambda stats: (stats.vn_dn,))
        smallest = min(corpus.stats.num_captions for _, corpus in shown)
        axes.axvline(smallest, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        axes.set(xlabel="captions in a random subset", ylabel="VN/DN")
        axes.set_ylim(bottom=0)
        counted(axes.xaxis)
        percent(axes.yaxis)
        return [*entries, *papers]

    return Plot("density", "VN/DN at equal numbers of captions", _equal_sizes(shown), draw)


def _grown(corpora: Sequence[Corpus]) -> list[tuple[int, Corpus]]:
    """Sets with nouns: a log scale has no zero."""
    return [(i, corpus) for i, corpus in enumerate(corpora) if corpus.growth and corpus.growth[-1].distinct_nouns > 0]


def _paper(
    axes: "Axes", shown: Sequence[tuple[int, Corpus]], figures: Callable[[NounStats], Sequence[float]]
) -> list[tuple[object, str]]:
    """Draw the paper's rows as grey points; the first figure hollow, a second one filled."""
    if any(corpus.stats.approximate for _, corpus in shown):
        return []
    entries: list[tuple[object, str]] = []
    for marker, (name, stats) in zip(_PAPER_MARKERS, PAPER_ROWS.items(), strict=True):
        point = partial(
            axes.plot, color=SOFT, marker=marker, linestyle="none", markeredgewidth=1.2, markersize=6, clip_on=False
        )
        handles = [
            point([stats.num_captions], [figure], markerfacecolor=PAGE if first else SOFT)[0]
            for first, figure in zip((True, False), figures(stats), strict=False)
        ]
        entries.append((handles[0], f"paper: {name}"))
    return entries


def _equal_sizes(shown: Sequence[tuple[int, Corpus]]) -> str:
    """Say who leads at the largest size that all sets have; a single set is compared with nobody."""
    smallest = min(corpus.stats.num_captions for _, corpus in shown)
    at_size = {
        shortened(corpus.name): point.vn_dn
        for _, corpus in shown
        for point in [*corpus.rarefied, *corpus.growth]
        if point.num_captions == smallest
    }
    ordered = sorted(at_size.items(), key=lambda item: -item[1])
    words = ", ".join(f"{name} {vn_dn:.1%}" for name, vn_dn in ordered)
    kind = "Random subsets of" if len(shown) > 1 else "All"
    return f"{kind} {smallest:,} captions: {words}. VN/DN moves with sample size; compare at one size only."


def _most_frequent(corpus: Corpus) -> str:
    if not corpus.top:
        return ""
    noun, count = corpus.top[0]
    return f"; the most frequent, “{shortened(noun)}”, occurs {compact(count)} times"


def _from_half(corpus: Corpus) -> str:
    """By how much the second half of the captions still enlarges the vocabulary, where the points tell."""
    last = corpus.growth[-1]
    halves = [point for point in corpus.growth if point.num_captions * 2 <= last.num_captions]
    if not halves or not halves[-1].distinct_nouns:
        return ""
    half = halves[-1]
    return f", {last.distinct_nouns / half.distinct_nouns:.1f} times the distinct nouns of {half.num_captions:,}"


def _end(counts: Sequence[int]) -> int:
    """One past the last bar worth drawing: what lies beyond is hardly a caption in two hundred."""
    total = sum(counts)
    for index, below in enumerate(accumulate(counts)):
        if below >= (1 - _TAIL) * total:
            return index + 1
    return len(counts)


def _quantile(counts: Sequence[int], share: float) -> int:
    total = sum(counts)
    return next((index for index, below in enumerate(accumulate(counts)) if below >= share * total), 0)
