"""The page about a run, `summary.html`: what came in and went out, how fast, what failed, and what to do next."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pixart_data.commits import Record
from pixart_data.pages import bar, escaped, page
from pixart_data.runs import Status, advice, duration, event_lines, size
from pixart_data.verdicts import GATE, Verdicts

_WIDTH, _HEIGHT, _TOP = 720, 150, 12
_STATES = {"running": "is running", "done": "is done", "failed": "failed", "stopped": "was stopped"}
_NUM_FAILED = 50


def summary_page(status: Status, place: str, sample: Record | None = None) -> str:
    """Render one page that needs nothing else.

    Args:
        place: The output directory, as a person would type it.
        sample: Any record of the run, for the settings that decided its results and what its workers said of the model.
    """
    return page(f"{status.stage}: {status.state}", _body(status, place, sample), _STYLE)


def _body(status: Status, place: str, sample: Record | None) -> Iterator[str]:
    yield f"<h1>{escaped(status.stage)} {_STATES[status.state]}</h1>"
    yield f"<p class=lead>{escaped(place)}<br>{escaped(_when(status))}</p>"
    if status.error:
        yield f"<p class=error>{escaped(status.error)}</p>"
    yield _cards(_figures(status))
    steps = advice(status, place, alive=False)
    if steps:
        yield "<h2>What to do next</h2>" + _list(steps)
    yield "<h2>Account</h2>"
    yield from _account(status)
    yield "<h2>Rows per second</h2>"
    yield from _timeline(status)
    if status.failed:
        yield "<h2>Shards that failed</h2>" + _failed(status)
    if status.slowest:
        yield "<h2>Slowest shards</h2>" + _slowest(status)
    events = event_lines(status)
    if events:
        yield "<h2>What happened on the way</h2>" + _list(events)
    yield "<h2>Memory</h2>" + _table(("", "at most"), _memory(status))
    if sample is not None:
        yield "<h2>Settings that decided the result</h2>"
        decided = {name: value for name, value in sample.settings.items() if name != "shard"}
        if GATE in sample.facts:
            judged = sample.facts[GATE]
            decided[GATE] = {**judged["settings"], "tagger": judged.get("tagger")}
        yield _table(("setting", "value"), _flat(decided), "words")
        found = {name: fact for name, fact in sample.facts.items() if name != GATE}
        if found:
            yield "<h2>What the workers found</h2>" + _table(("", ""), _flat(found), "words")
        yield "<p class=note>The whole job, every default filled in, is in job.toml beside this page.</p>"


def _when(status: Status) -> str:
    runs = f"{status.num_runs} runs" if status.num_runs > 1 else "1 run"
    return f"{runs}, {_time(status.first_started_unix_s)} to {_time(status.updated_unix_s)}, driven by {status.driver}"


def _figures(status: Status) -> Iterator[tuple[str, str]]:
    total = status.total
    yield "shards done", f"{status.num_done:,} of {status.num_units:,}"
    yield "rows out", f"{status.rows_out:,}"
    yield "rows rejected", f"{status.num_rejected:,}"
    if total.elapsed_s:
        yield "time at work", duration(total.elapsed_s)
        yield "rows per second", f"{total.rows_per_s:,.1f}"
    if total.busy_share is not None:
        yield "model idle", f"{1 - total.busy_share:.0%}"
    if total.worker_s:
        yield "worker-hours", f"{total.worker_s / 3600:,.2f}"
    cost = status.cost()
    if cost is not None:
        yield "cost", f"${cost:,.2f}"


def _account(status: Status) -> Iterator[str]:
    yield f"<p>{status.rows_in:,} rows in = {status.rows_out:,} out + {status.num_rejected:,} rejected</p>"
    most = max(status.rejected.values(), default=0)
    bars = (
        bar("own", escaped(reason), f"{count:,} ({count / status.rows_in:.2%})", count / most)
        for reason, count in sorted(status.rejected.items(), key=lambda item: -item[1])
    )
    if status.rejected:
        yield f"<div class='bars reasons'>{''.join(bars)}</div>"
    if status.gate:
        yield f"<p>{escaped(Verdicts.from_facts(status.gate).line())}</p>"
    if status.num_left or status.num_set_aside:
        yield (
            f"<p class=note>Not in this account: the rows of shards not done yet ({status.num_left:,}) and of those "
            f"set aside ({status.num_set_aside:,}).</p>"
        )


def _timeline(status: Status) -> Iterator[str]:
    points = status.timeline
    rates = [
        (start, end, max(rows - before, 0) / (end - start))
        for (start, before, _), (end, rows, _) in zip(points, points[1:], strict=False)
        if end > start
    ]
    if not rates:
        yield "<p class=note>Too short a run for a curve.</p>"
        return
    yield _steps(rates, "rows per second", ",.1f" if max(rate for _, _, rate in rates) < 100 else ",.0f")
    workers = [  # a run begins and ends without any
        (start, end, float(max(before, count)))
        for (start, _, before), (end, _, count) in zip(points, points[1:], strict=False)
        if end > start
    ]
    yield "<h2>Workers up</h2>" + _steps(workers, "workers", ".0f")
    if status.num_runs > 1:
        yield f"<p class=note>Time at work in {status.num_runs} runs; the pauses between them are left out.</p>"


def _steps(steps: Sequence[tuple[float, float, float]], what: str, form: str) -> str:
    """A step curve over (start_s, end_s, value)."""
    end_s = steps[-1][1]
    most = max(value for _, _, value in steps) or 1.0
    floor = _TOP + _HEIGHT

    def x(seconds: float) -> str:
        return f"{seconds / end_s * _WIDTH:.1f}"

    def y(value: float) -> str:
        return f"{floor - value / most * _HEIGHT:.1f}"

    outline = " ".join(f"{x(start)},{y(value)} {x(end)},{y(value)}" for start, end, value in steps)
    label = f"{what}, up to {most:{form}}"
    return (
        f'<svg class=curve viewBox="0 0 {_WIDTH} {floor + 20}" role=img aria-label="{escaped(label)}">'
        f'<polygon points="{x(steps[0][0])},{floor} {outline} {x(end_s)},{floor}"/>'
        f"<line x1=0 y1={_TOP} x2={_WIDTH} y2={_TOP} /><line x1=0 y1={floor} x2={_WIDTH} y2={floor} />"
        f"<text x=2 y={_TOP - 2}>{escaped(label)}</text><text x=2 y={floor + 15}>0 s</text>"
        f"<text x={_WIDTH - 2} y={floor + 15} text-anchor=end>{duration(end_s)}</text></svg>"
    )


def _failed(status: Status) -> str:
    units = sorted(status.failed.values(), key=lambda unit: (not unit.set_aside, unit.unit))
    rows = [
        (unit.unit, f"{unit.attempts}{', set aside' if unit.set_aside else ''}", unit.reason)
        for unit in units[:_NUM_FAILED]
    ]
    more = f"<p class=note>and {len(units) - _NUM_FAILED:,} more</p>" if len(units) > _NUM_FAILED else ""
    return _table(("shard", "attempts", "last error"), rows, "words") + more


def _slowest(status: Status) -> str:
    rows = [
        (slow.unit, duration(slow.seconds), f"{slow.rows:,}", _pace(slow.rows, slow.seconds), slow.worker)
        for slow in status.slowest
    ]
    return _table(("shard", "time", "rows", "rows/s", "worker"), rows)


def _pace(rows: int, seconds: float) -> str:
    return f"{rows / seconds:,.1f}" if seconds > 0 else "-"


def _memory(status: Status) -> Iterator[tuple[str, str]]:
    yield "a worker", size(status.peaks.worker_bytes)
    yield "the driver", size(status.peaks.driver_bytes)
    yield "Ray's object stores", size(status.peaks.object_store_bytes)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _cards(figures: Iterable[tuple[str, str]]) -> str:
    cards = (f"<div><dt>{escaped(name)}</dt><dd>{escaped(figure)}</dd></div>" for name, figure in figures)
    return f"<dl class=cards>{''.join(cards)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    names = "".join(f"<th scope=col>{escaped(name)}</th>" for name in head)
    heading = f"<thead><tr>{names}</tr></thead>" if any(head) else ""
    body = "".join(
        f"<tr><th scope=row>{escaped(first)}</th>{''.join(f'<td>{escaped(cell)}</td>' for cell in others)}</tr>\n"
        for first, *others in rows
    )
    return f"<div class=wide><table class='{kind}'>{heading}<tbody>\n{body}</tbody></table></div>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>"


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_STYLE = """
.lead, li, .error { overflow-wrap: anywhere; }
.error { background: var(--warn-page); color: var(--warn); border-radius: .5rem; padding: .75rem 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.cards dt { color: var(--soft); font-size: .8rem; }
.cards dd { margin: 0; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.reasons .bar { grid-template-columns: minmax(6rem, 13rem) 1fr 9rem; }
.curve { width: 100%; height: auto; display: block; }
.curve polygon { fill: var(--own); opacity: .75; } .curve line { stroke: var(--line); }
.curve text { fill: var(--soft); font-size: 12px; }
tbody th { font-weight: 400; }
.words td { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.words th { text-align: left; vertical-align: top; }
"""
