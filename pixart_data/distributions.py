"""Figures of what surrounds the nouns: lengths for T5, and sizes, canvases and cropping of the pictures."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pixart_data.corpora import Corpus
from pixart_data.renderings import INK, Legend, Plot, compact, counted, look, percent, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 48
_TAIL = 0.001
_NAME_CHARS = 18
_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
_LOST = 0.1
_WIDEST_LOSS = 0.05

Shown = Sequence[tuple[int, Corpus, Mapping[str, Any]]]
"""Places in the report, corpora and the data that is drawn of them."""


def length_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Which share of the captions has how many tokens, and the limit at which T5's input is cut."""
    shown = [(i, c, c.lengths) for i, c in enumerate(corpora) if c.lengths and sum(c.lengths["counts"])]
    if not shown:
        return None
    limits = sorted({int(lengths["max_tokens"]) for _, _, lengths in shown})
    longest = max(_quantile(lengths["counts"], 1 - _TAIL) for _, _, lengths in shown)
    width = -(-max(longest + 1, limits[-1] + 1) // _BINS)

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for index, corpus, lengths in shown:
            shares = _binned(lengths["counts"], width)[: max(longest, limits[-1]) // width + 1]
            middles = [(i + 0.5) * width - 0.5 for i in range(len(shares))]
            [line] = axes.plot(middles, shares, markevery=_every(index, shares), **look(index))
            entries.append((line, f"{shortened(corpus.name, _NAME_CHARS)}: {lengths['share_truncated']:.1%} cut"))
        for limit in limits:
            line = axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (2, 2)))
            entries.append((line, f"{limit} tokens: the limit"))
        each = "" if width == 1 else f" (in steps of {width})"
        axes.set(xlabel=f"tokens of T5 in a caption{each}", ylabel="share of the captions")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        percent(axes.yaxis)
        return entries

    finding = " ".join(
        f"{shortened(corpus.name)}: {lengths['share_truncated']:.1%} of the captions are longer than "
        f"{lengths['max_tokens']} tokens and are cut; half have at most {_quantile(lengths['counts'], 0.5)}."
        for _, corpus, lengths in shown
    )
    return Plot("lengths", "Caption lengths against the limit of T5", finding, draw)


def bucket_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Which share of the pictures goes to the canvas of each ratio."""
    shown = _framed(corpora)
    if not shown:
        return None

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        axes.set_xscale("log")  # before it is drawn on: a half is as far from square as a double
        for index, corpus, frames in shown:
            ratios = [bucket["height_px"] / bucket["width_px"] for bucket in frames["buckets"]]
            shares = [bucket["count"] / frames["num_images"] for bucket in frames["buckets"]]
            [line] = axes.plot(ratios, shares, **look(index))
            entries.append((line, corpus.name))
        axes.set(xlabel="height over width of the canvas", ylabel="share of the pictures")
        axes.set_ylim(bottom=0)
        counted(axes.xaxis)
        axes.set_xticks(_RATIOS, [f"{ratio:g}" for ratio in _RATIOS])
        percent(axes.yaxis)
        return entries

    words = []
    for _, corpus, frames in shown:
        used = [bucket for bucket in frames["buckets"] if bucket["count"]]
        fullest = max(used, key=lambda bucket: bucket["count"])
        words.append(
            f"{shortened(corpus.name)}: {len(used)} of {len(frames['buckets'])} canvases are used; the fullest, "
            f"{fullest['height_px']} x {fullest['width_px']} px (height x width), takes "
            f"{fullest['count'] / frames['num_images']:.1%}."
        )
    return Plot("buckets", "Aspect-ratio buckets", " ".join(words), draw)


def resolution_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Which share of the pictures has how many pixels, and how many the training resolution asks for."""
    shown = _framed(corpora)
    if not shown:
        return None
    resolutions = sorted({int(frames["resolution_px"]) for _, _, frames in shown})

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        axes.set_xscale("log")
        for index, corpus, frames in shown:
            edges, counts = _trimmed(frames["megapixels"])
            middles = [(low * high) ** 0.5 for low, high in zip(edges, edges[1:], strict=False)]
            [line] = axes.plot(middles, [count / frames["num_images"] for count in counts], **look(index))
            share = frames["share_upscaled"]
            entries.append((line, f"{shortened(corpus.name, _NAME_CHARS)}: {share:.1%} enlarged"))
        for resolution_px in resolutions:
            line = axes.axvline(resolution_px**2 / 1e6, color=INK, linewidth=1, linestyle=(0, (2, 2)))
            entries.append((line, f"{resolution_px} x {resolution_px} px"))
        axes.set(xlabel="megapixels of the original", ylabel="share of the pictures")
        axes.set_ylim(bottom=0)
        counted(axes.xaxis)
        percent(axes.yaxis)
        return entries

    finding = " ".join(
        f"{shortened(corpus.name)}: half of {frames['num_images']:,} pictures have at least "
        f"{compact(_median_edge(frames['megapixels']))} megapixels; {frames['share_upscaled']:.1%} are smaller than "
        f"their canvas at {frames['resolution_px']} px and are enlarged."
        for _, corpus, frames in shown
    )
    return Plot("resolutions", "Resolution of the pictures", finding, draw)


def crop_plot(corpora: Sequence[Corpus]) -> Plot | None:
    """Which share of the pictures loses more than so much of its area to the crop."""
    shown = _framed(corpora)
    if not shown:
        return None
    end = max(_WIDEST_LOSS, *(_last_edge(frames["crop_loss"]) for _, _, frames in shown))

    def draw(axes: "Axes") -> Legend:
        entries: list[tuple[object, str]] = []
        for index, corpus, frames in shown:
            losses = frames["crop_loss"]
            kept = [edge for edge in losses["edges"] if edge <= end]
            more = _exceeding(losses["counts"])[: len(kept)]
            [line] = axes.plot(kept, more, markevery=_every(index, kept), **look(index))
            entries.append((line, f"{shortened(corpus.name, _NAME_CHARS)}: {losses['mean']:.1%} on average"))
        axes.set(xlabel="more than so much of the picture is cut off", ylabel="share of the pictures")
        axes.set_ylim(bottom=0)
        percent(axes.xaxis)
        percent(axes.yaxis)
        return entries

    finding = " ".join(
        f"{shortened(corpus.name)}: cropping to the canvas cuts off {frames['crop_loss']['mean']:.1%} of a picture on "
        f"average, {_lost_more(frames['crop_loss']):.1%} of the pictures lose a tenth or more."
        for _, corpus, frames in shown
    )
    return Plot("crops", "What cropping cuts off", finding, draw)


def _framed(corpora: Sequence[Corpus]) -> list[tuple[int, Corpus, Mapping[str, Any]]]:
    return [(i, c, c.frames) for i, c in enumerate(corpora) if c.frames and c.frames["num_images"]]


def _binned(counts: Sequence[int], width: int) -> list[float]:
    total = sum(counts)
    return [sum(counts[i : i + width]) / total for i in range(0, len(counts), width)]


def _every(index: int, values: Sequence[object]) -> tuple[int, int]:
    """Where markers go: not at the same places for two sets, so that one does not hide the other's."""
    step = max(len(values) // 8, 1)
    return (index * max(step // 2, 1) % step, step)


def _exceeding(counts: Sequence[int]) -> list[float]:
    """The share at or beyond each edge of a histogram."""
    total = sum(counts)
    return [1.0, *(1 - below / total for below in accumulate(counts))]


def _lost_more(losses: Mapping[str, Any]) -> float:
    beyond = _exceeding(losses["counts"])
    return next(share for edge, share in zip(losses["edges"], beyond, strict=True) if edge >= _LOST)


def _last_edge(losses: Mapping[str, Any]) -> float:
    """The edge that hardly a picture exceeds."""
    beyond = zip(losses["edges"], _exceeding(losses["counts"]), strict=True)
    return float(next((edge for edge, share in beyond if share <= _TAIL), losses["edges"][-1]))


def _trimmed(histogram: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[int]]:
    """Leave out the empty bins on both sides but for one each."""
    counts = histogram["counts"]
    used = [index for index, count in enumerate(counts) if count]
    first, last = max(used[0] - 1, 0), min(used[-1] + 2, len(counts))
    return histogram["edges"][first : last + 1], counts[first:last]


def _median_edge(histogram: Mapping[str, Any]) -> float:
    """The lower edge of the bin that the middle picture is in."""
    return float(histogram["edges"][_quantile(histogram["counts"], 0.5)])


def _quantile(counts: Sequence[int], share: float) -> int:
    total = sum(counts)
    return next((index for index, below in enumerate(accumulate(counts)) if below >= share * total), 0)
