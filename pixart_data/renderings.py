"""Figures drawn once and shown twice: as a PNG file, and as SVG inside a page, in the page's colours.

The same data gives the same bytes: no dates, no random ids. In a page the colours are CSS variables, so that a figure
follows the reader's dark mode, and words stay words. Sets are told apart by marker and line style as well as by
colour: the colours differ for colour-blind readers, the rest for a black-and-white printer.

matplotlib is imported where a figure is drawn: importing this module is cheap.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from pixart_data.pages import escaped, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, SOFT, LINE, PAGE = "#1d2433", "#5c6679", "#d9dee7", "#ffffff"
"""Colours by their role in `pages`: words, what stands back, rules, the ground."""

DPI = 200

_SERIES = ("#2f6fde", "#b93c0b", "#0b7a6b", "#96308a", "#7a5c00", "#4b5563")
_SERIES_DARK = ("#7aa8ff", "#ff9e64", "#45cfb8", "#f29adb", "#e5c558", "#c0c9d8")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1)))
_COLOURS = {
    **{INK: "ink", SOFT: "soft", LINE: "line", PAGE: "page"},
    **{colour: f"set-{index}" for index, colour in enumerate(_SERIES)},
}
_WIDTH_INCHES, _LEGEND_ROW_INCHES = 4.7, 0.19
_PNG_SCALE = 1.4
_NAME_CHARS, _LABEL_CHARS, _HALF_CHARS = 28, 42, 21
_KEPT_DECIMALS = 2

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "text.parse_math": False,  # a set may be called $x$
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.labelspacing": 0.25,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 2.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "pixart",
}

STYLE = f"""
:root {{ {" ".join(f"--set-{index}: {colour};" for index, colour in enumerate(_SERIES))} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{
  {" ".join(f"--set-{index}: {colour};" for index, colour in enumerate(_SERIES_DARK))} }} }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem;
  margin-bottom: 1.5rem; }}
.plots > * {{ min-width: 0; }}
.plots figure {{ margin: 0; max-width: 36rem; break-inside: avoid; }}
.plots h3 {{ font-size: 1rem; margin: 0 0 .35rem; }}
.plots figcaption {{ color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }}
.plot {{ display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }}
.plot * {{ stroke-linejoin: round; stroke-linecap: butt; }}
"""
"""What a page needs that shows figures; `pages` has the other colours."""


@dataclass(frozen=True)
class Plot:
    """A figure that can be drawn.

    Attributes:
        name: One word: the name of its file, and what makes its ids its own in a page.
        finding: What it shows, in sentences: for those who cannot see it.
        draw: Draws into axes, and returns the entries of the legend below them: handles and their labels.
        height_inches: Of the axes, for a width of 4.7 inches; the legend comes on top of it.
    """

    name: str
    title: str
    finding: str
    draw: Callable[["Axes"], "Legend"]
    height_inches: float = 2.7

    def png(self, source: str) -> bytes:
        """Return the figure as a PNG of 200 dpi with its title and, below that, where its figures come from."""
        return _saved(self, "png", source)

    def svg(self) -> str:
        """Return the figure as an SVG element for a page, without its title."""
        return _inlined(_saved(self, "svg", "").decode(), self)

    def html(self) -> str:
        """Return the figure with title and finding as a block of a page."""
        return (
            f"<figure><h3>{escaped(self.title)}</h3>{self.svg()}"
            f"<figcaption>{escaped(self.finding)}</figcaption></figure>\n"
        )


Legend = Sequence[tuple[Any, str]]
"""Handles as matplotlib takes them, and their labels."""


def look(index: int) -> dict[str, Any]:
    """Return colour, marker and line style of the set at a place of the report: keywords of `Axes.plot`."""
    return {
        "color": _SERIES[index % len(_SERIES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "markerfacecolor": PAGE,
        "markeredgewidth": 1.2,
    }


def shortened(text: str, max_chars: int = _NAME_CHARS) -> str:
    """Cut what a stranger wrote to what a label has room for, and keep control characters out; wide signs count 2."""
    text = printable(text)
    if num_cells(text) <= max_chars:
        return text
    ends = accumulate(num_cells(sign) for sign in text)
    return text[: sum(end < max_chars for end in ends)] + "…"


def num_cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def compact(value: float) -> str:
    """Write a number as an axis has room for: 950, 12K, 1.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def counted(axis: "Axis") -> None:
    """Label an axis with compact numbers; a logarithmic one at powers of ten only."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if axis.get_scale() == "log":
        axis.set_minor_locator(NullLocator())


def percent(axis: "Axis") -> None:
    """Label an axis of shares in percent.

    Its ticks depend on the data alone: with those that matplotlib chooses by the room there is, labels get wider as the
    layout makes room for them, and the name of the axis slips off the edge.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%"))


def _saved(plot: Plot, kind: str, source: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    data = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # not those of whoever runs this
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # names in any script: boxes will do
        figure = Figure(layout="constrained", facecolor=PAGE if kind == "png" else "none")
        axes = figure.add_subplot()
        _finished(figure, plot, plot.draw(axes), source if kind == "png" else None)
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(data, format=kind, dpi=DPI, metadata=metadata)
    return data.getvalue()


def _finished(figure: "Figure", plot: Plot, entries: Legend, source: str | None) -> None:
    """Give the figure its size, its legend and, as a file of its own, its title and its source."""
    handles = [handle for handle, _ in entries]
    labels = [shortened(label, _LABEL_CHARS) for _, label in entries]
    columns = 2 if max(map(num_cells, labels), default=0) <= _HALF_CHARS else 1
    labels = [f"\u200a{label}" for label in labels]  # matplotlib leaves out what begins with "_"
    rows = -(-len(labels) // columns)
    scale = 1.0 if source is None else _PNG_SCALE
    height = plot.height_inches * scale + rows * _LEGEND_ROW_INCHES
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)
    if source is not None:
        height += 0.5
        figure.suptitle(plot.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.axes[0].set_title(printable(source), loc="left", fontsize=7, color=SOFT)
    figure.set_size_inches(_WIDTH_INCHES * scale, height)


def _inlined(source: str, plot: Plot) -> str:
    """Make an SVG file an element of a page: nothing that reaches beyond it, ids of its own, colours of the page."""
    root = ElementTree.fromstring(source)  # what matplotlib has just written
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', source))
    ids = {old: f"{plot.name}-{number}" for number, old in enumerate(sorted(used))}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag in ("text", "tspan") else None
        element.tail = None
        element.attrib = {
            name.rpartition("}")[2]: _value(name, value, ids)
            for name, value in element.attrib.items()
            if (name != "id" or value in ids) and not value.startswith("rotate(-0 ")
        }
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
        parent[:] = [kept for child in parent for kept in _flattened(child)]
    label = f"{plot.title}. {plot.finding}"
    root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _flattened(element: ElementTree.Element) -> list[ElementTree.Element]:
    """Put what is in a group that says nothing in its place."""
    if element.tag not in ("g", "defs") or element.attrib or (element.tag == "defs" and len(element)):
        return [element]
    return [kept for child in element for kept in _flattened(child)]


def _value(name: str, value: str, ids: dict[str, str]) -> str:
    if name == "id":
        return ids[value]
    if name.endswith("href"):
        return f"#{ids[value[1:]]}"
    if name == "clip-path":
        return f"url(#{ids[value[5:-1]]})"
    if name == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
        return re.sub(r"#[0-9a-f]{6}", lambda match: f"var(--{_COLOURS.get(match[0], 'ink')})", value)
    if name in ("d", "x", "y", "transform", "width", "height", "viewBox"):
        return " ".join(re.sub(r"-?\d+\.\d+", lambda match: _rounded(match[0]), value).split())
    return value


def _rounded(number: str) -> str:
    text = f"{float(number):.{_KEPT_DECIMALS}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
