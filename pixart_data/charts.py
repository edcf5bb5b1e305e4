"""Small charts as inline SVG, in the colours of `pages`; they need no script, and say in words what they show."""

from collections.abc import Sequence

from pixart_data.pages import escaped

_WIDTH, _TOP = 1040, 18
_BARS = 60
_COLOURS = 6

STYLE = """
.chart { width: 100%; height: auto; display: block; margin: .5rem 0; }
.plot { min-width: 44rem; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart line { stroke: var(--line); } .chart .bars rect { fill: var(--own); }
.chart .path { fill: none; stroke: var(--own); stroke-width: 2; }
.chart .reach { stroke: var(--own); stroke-width: 2; } .chart .spread { fill: var(--own); opacity: .55; }
.chart .centre { stroke: var(--ink); stroke-width: 2; } .chart .band { fill: var(--card); }
.chart .limit { stroke: var(--soft); stroke-dasharray: 3 3; }
.part-0 { fill: var(--own); } .part-1 { fill: var(--paper); } .part-2 { fill: #e09f3e; } .part-3 { fill: #5aa469; }
.part-4 { fill: #b56576; } .part-5 { fill: #8d99ae; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .875rem; margin: .25rem 0 .75rem; }
.legend svg { width: .8rem; height: .8rem; margin-right: .4rem; }
"""


def histogram(heights: Sequence[float], label: str, start: str, end: str, height_px: int = 140) -> str:
    """Draw bars side by side; many are gathered.

    Args:
        heights: Of the bars, one after another; more than 60 are added up in groups.
        label: What it shows, in words; written above it.
        start: Written under the first bar.
        end: Written under the last one.
    """
    group = -(-len(heights) // _BARS) or 1
    bars = [sum(heights[i : i + group]) for i in range(0, len(heights), group)]
    most = max(bars, default=0) or 1
    step = _WIDTH / max(len(bars), 1)
    floor = _TOP + height_px
    drawn = "".join(
        f'<rect x="{i * step + 0.5:.1f}" y="{floor - value / most * height_px:.1f}" width="{max(step - 1, 1):.1f}" '
        f'height="{value / most * height_px:.1f}"/>'
        for i, value in enumerate(bars)
        if value
    )
    return (
        f"{_open(label, floor + 18)}<g class=bars>{drawn}</g><line x1=0 y1={floor} x2={_WIDTH} y2={floor} />"
        f"<text x=0 y={floor + 14}>{escaped(start)}</text>"
        f"<text x={_WIDTH} y={floor + 14} text-anchor=end>{escaped(end)}</text></svg></div>"
    )


def curve(values: Sequence[float], label: str, start: str, end: str, height_px: int = 100) -> str:
    """Draw a line through values at equal distances, from zero up; the words are those of `histogram`."""
    most = max(values, default=0) or 1
    floor = _TOP + height_px
    step = _WIDTH / max(len(values) - 1, 1)
    points = " ".join(f"{i * step:.1f},{floor - value / most * height_px:.1f}" for i, value in enumerate(values))
    return (
        f'{_open(label, floor + 18)}<polyline class=path points="{points}"/>'
        f"<line x1=0 y1={floor} x2={_WIDTH} y2={floor} /><text x=0 y={floor + 14}>{escaped(start)}</text>"
        f"<text x={_WIDTH} y={floor + 14} text-anchor=end>{escaped(end)}</text></svg></div>"
    )


def ranges(rows: Sequence[tuple[str, float, float, float, float]], label: str, expected: tuple[float, float]) -> str:
    """Draw for each row a line from its least to its largest value, a box of one std around the mean, and the mean.

    Args:
        rows: Name, least, mean, std and largest value.
        label: What it shows, in words; written above it.
        expected: Where the boxes should end, drawn as a band.
    """
    low = min([expected[0], *(min(row[1], row[2] - row[3]) for row in rows)])
    high = max([expected[1], *(max(row[4], row[2] + row[3]) for row in rows)])
    left, line = 90, 24
    scale = (_WIDTH - left - 10) / ((high - low) or 1.0)

    def x(value: float) -> str:
        return f"{left + (value - low) * scale:.1f}"

    floor = _TOP + line * len(rows) + 6
    wide = (expected[1] - expected[0]) * scale
    drawn = [f'<rect class=band x="{x(expected[0])}" y={_TOP} width="{wide:.1f}" height={floor - _TOP} />']
    for value in expected:
        drawn.append(f'<line class=limit x1="{x(value)}" y1={_TOP} x2="{x(value)}" y2={floor} />')
        drawn.append(f'<text x="{x(value)}" y={floor + 14} text-anchor=middle>{value:g}</text>')
    for i, (name, least, mean, std, most) in enumerate(rows):
        y = _TOP + line * i + line // 2 + 3
        drawn.append(
            f"<text x={left - 12} y={y + 4} text-anchor=end>{escaped(name)}</text>"
            f'<line class=reach x1="{x(least)}" y1={y} x2="{x(most)}" y2={y} />'
            f'<rect class=spread x="{x(mean - std)}" y={y - 7} width="{max(2 * std * scale, 1):.1f}" height=14 rx=2 />'
            f'<line class=centre x1="{x(mean)}" y1={y - 9} x2="{x(mean)}" y2={y + 9} />'
        )
    return f"{_open(label, floor + 20)}{''.join(drawn)}</svg></div>"


def shares(parts: Sequence[tuple[str, float, str]], label: str) -> str:
    """Draw one bar of parts and a legend; the smallest parts beyond six are gathered.

    Args:
        parts: Name, size and the size in words.
        label: What it shows, in words.
    """
    parts = [part for part in parts if part[1] > 0]
    shown = sorted(parts, key=lambda part: -part[1])
    if len(shown) > _COLOURS:
        others = sum(part[1] for part in shown[_COLOURS - 1 :])
        shown = [*shown[: _COLOURS - 1], (f"{len(shown) - _COLOURS + 1} others", others, "")]
    total = sum(part[1] for part in shown) or 1.0
    start, drawn, legend = 0.0, [], []
    for i, (name, size, figure) in enumerate(shown):
        wide = size / total * _WIDTH
        drawn.append(f'<rect class=part-{i} x="{start:.1f}" y=0 width="{max(wide, 0.5):.1f}" height=22 />')
        start += wide
        square = f'<svg viewBox="0 0 1 1" aria-hidden=true><rect class=part-{i} width=1 height=1 /></svg>'
        words = " ".join(word for word in (escaped(name), escaped(figure), f"{size / total:.1%}") if word)
        legend.append(f"<span>{square}{words}</span>")
    bar = f'<svg class=chart viewBox="0 0 {_WIDTH} 22" role=img aria-label="{escaped(label)}">{"".join(drawn)}</svg>'
    return f"{bar}<div class=legend>{''.join(legend)}</div>"


def _open(label: str, height_px: int) -> str:
    return (  # in a box of its own: a narrow window scrolls it, and its words stay legible
        f'<div class=wide><svg class="chart plot" viewBox="0 0 {_WIDTH} {height_px}" role=img '
        f'aria-label="{escaped(label)}">'
        f"<text x=0 y=11>{escaped(label)}</text>"
    )
