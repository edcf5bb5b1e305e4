"""Self-contained HTML pages: one look for reports and summaries; no scripts, no fonts, no network."""

import html
from collections.abc import Iterable

DOCTYPE = "<!DOCTYPE html>"
"""How every page begins."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5c6679; --line: #d9dee7; --page: #ffffff; --card: #f5f7fa;
  --own: #2f6fde; --paper: #a9b4c6; --warn: #8a5200; --warn-page: #fff1d6; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --soft: #9aa5b8; --line: #333b4a;
  --page: #141821; --card: #1c222d; --own: #6ea0ff; --paper: #56627a; --warn: #ffcf87; --warn-page: #3d2c0c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; overflow-wrap: anywhere; }
.lead { color: var(--soft); margin: 0 0 1.5rem; }
.note { color: var(--soft); font-size: .875rem; margin: .4rem 0; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-size: .8rem; font-weight: 600; }
.own th { font-weight: 650; } tr.own { background: var(--card); }
tr.paper, .bar.paper .label { color: var(--soft); } .paper th { font-weight: 400; }
.approx { display: inline-block; background: var(--warn-page); color: var(--warn); border-radius: 1rem;
  padding: 0 .55rem; font-size: .75rem; font-weight: 500; }
.bar { display: grid; grid-template-columns: minmax(6rem, 15rem) 1fr 5rem; gap: .75rem; align-items: center;
  padding: .15rem 0; break-inside: avoid; }
.label { overflow-wrap: anywhere; } .figure { text-align: right; font-variant-numeric: tabular-nums; }
.track { display: block; background: var(--card); border-radius: .25rem; }
.track span { display: block; height: .85rem; border-radius: .25rem; background: var(--own); }
.paper .track span { background: var(--paper); }
.top { columns: 18rem; column-gap: 2.5rem; font-size: .875rem; }
.top .bar { grid-template-columns: 7.5rem 1fr 4rem; }
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """Return a whole page.

    Args:
        title: Plain text.
        body: Blocks of HTML, one after another; what comes from elsewhere in them must have gone through `escaped`.
        style: CSS that only this kind of page needs.
    """
    return "\n".join(
        [
            DOCTYPE,
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="color-scheme" content="light dark"><title>{escaped(title)}</title>',
            f"<style>{_STYLE}{style}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def printable(text: str) -> str:
    """Keep control characters, escape sequences and lone surrogates away from terminals and files."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def escaped(text: str) -> str:
    """Make text safe in HTML, in elements and in quoted attributes."""
    return html.escape(printable(text))


def bar(kind: str, label: str, figure: str, share: float) -> str:
    """Return one bar of a bar chart.

    Args:
        kind: `own` or `paper`: its colour.
        label: HTML already.
        share: Its length, 0 to 1.
    """
    track = f"<span class=track><span style='width:{share:.1%}'></span></span>"
    return f"<div class='bar {kind}'><span class=label>{label}</span>{track}<span class=figure>{figure}</span></div>\n"
