"""What the turns of `benchmarks.read_shards` amount to: medians, ratios, and the limits they are held against."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.samples import REFERENCE_RAW_BYTES
from benchmarks.turns import BARE, MOSAIC, OURS, PACKED, REFERENCE, WEBDATASET, Turn

Turns = dict[tuple[str, str], dict[str, list[Turn]]]
"""By cache and order, then by reader; one turn of each in every round."""

Spread = tuple[float, ...]
"""Median, lowest and highest over the rounds."""

FASTER_THAN = {REFERENCE: 40.0, MOSAIC: 3.0, WEBDATASET: 3.0, BARE: 0.7}
"""How many times as fast as each our reader has to be."""

RAW_SHARE = 0.36
"""How large a sample in bf16 may be, as a share of the reference's in fp32."""

_WALL, _CPU = "wall", "CPU"
_CLOCKS = {_WALL: "wall_s", _CPU: "cpu_s"}


@dataclass(frozen=True)
class Speed:
    """How many times as fast as a peer our reader is, by two clocks.

    Attributes:
        ratios: Of samples per second, by clock.
        ceiling: The median of the same for the bare loop: what no reader of these bytes gets much beyond by one thread.
        limit: At least this.
    """

    what: str
    ratios: dict[str, Spread]
    ceiling: dict[str, float]
    limit: float

    @property
    def verdict(self) -> str:
        """Whether the limit is kept by the clock on the wall; "DISK" where the bare loop does not keep it either."""
        if self.ratios[_WALL][0] >= self.limit:
            return "PASS"
        return "DISK" if self.ceiling.get(_WALL, self.limit) < self.limit else "MISSED"

    @property
    def missed(self) -> bool:
        """Whether the limit is not kept where the bare loop would keep it."""
        return self.verdict == "MISSED"


@dataclass(frozen=True)
class Size:
    """A ratio of bytes per sample. `limit`: at most this."""

    what: str
    ratio: float
    limit: float

    @property
    def missed(self) -> bool:
        """Whether the ratio is above its limit."""
        return self.ratio > self.limit


def speeds(taken: Turns) -> list[Speed]:
    """Return the ratios of our reader to the others."""
    found = []
    for peer, limit in FASTER_THAN.items():
        for (cache, order), own in taken.items():
            if peer not in own:
                continue
            what = f"ours : {peer}, {cache}, {order}"
            ratios = {clock: _spread(own[OURS], own[peer], clock) for clock in _CLOCKS}
            bare = own.get(BARE) if peer != BARE else None
            ceiling = {clock: _spread(bare, own[peer], clock)[0] for clock in _CLOCKS} if bare else {}
            found.append(Speed(what, ratios, ceiling, limit))
    return found


def _spread(ours: Sequence[Turn], others: Sequence[Turn], clock: str) -> Spread:
    values = [_rate(one, clock) / _rate(other, clock) for one, other in zip(ours, others, strict=True)]
    return statistics.median(values), min(values), max(values)


def _rate(turn: Turn, clock: str) -> float:
    return float(turn.samples / getattr(turn, _CLOCKS[clock]))


def sizes(bytes_per_sample: Mapping[str, int]) -> list[Size]:
    """Return the ratios of sizes on the disk: of plain bf16, and of the lossless codec to its peers, all lossless."""
    found = [Size("ours : reference, raw", bytes_per_sample[OURS] / REFERENCE_RAW_BYTES, RAW_SHARE)]
    for peer, size in bytes_per_sample.items():
        if peer.startswith((WEBDATASET, MOSAIC, REFERENCE)):
            found.append(Size(f"{PACKED} : {peer}", bytes_per_sample[PACKED] / size, 1.0))
    return found


def rows(taken: Turns) -> list[dict[str, Any]]:
    """Return the turns one by one, for JSON."""
    return [
        {"cache": cache, "order": order, "reader": name, **asdict(turn)}
        for (cache, order), own in taken.items()
        for name, all_turns in own.items()
        for turn in all_turns
    ]


def rate_table(taken: Turns) -> str:
    """Return the medians of all readers as text."""
    columns = [f"{cache} {order}" for cache, order in taken]
    lines = ["samples per second (per CPU-second), medians"]
    lines.append("".join([f"{'':<14}", *(f"{column:>19}" for column in columns)]))
    for name in next(iter(taken.values())):
        cells = []
        for own in taken.values():
            wall, cpu = (statistics.median(_rate(turn, clock) for turn in own[name]) for clock in _CLOCKS)
            cells.append(f"{f'{wall:,.0f} ({cpu:,.0f})':>19}")
        lines.append("".join([f"{name:<14}", *cells]))
    return "\n".join(lines)


def speed_table(found: Sequence[Speed]) -> str:
    """Return the ratios of speed and their limits as text."""
    heading = "".join(f"{f'by {clock}':>32}" for clock in _CLOCKS)
    lines = [f"{'samples per second':<38}{'at least':>9}{heading}   pread in place of ours"]
    for one in found:
        cells = (_cell(one.ratios[_WALL]) + f" {one.verdict:<6}", _cell(one.ratios[_CPU]))
        ceiling = ", ".join(f"{value:.2f}" for value in one.ceiling.values())
        lines.append("".join([f"{one.what:<38}{one.limit:>9g}", *(f"{cell:>32}" for cell in cells), f"   {ceiling}"]))
    return "\n".join(line.rstrip() for line in lines)


def size_table(found: Sequence[Size], bytes_per_sample: Mapping[str, int]) -> str:
    """Return the sizes, their ratios and limits as text."""
    lines = ["bytes per sample on the disk, everything counted"]
    lines += [f"{name:<38}{size:>9,}" for name, size in bytes_per_sample.items()]
    lines += [f"{'reference, raw':<38}{REFERENCE_RAW_BYTES:>9,}", "", f"{'bytes per sample':<38}{'at most':>9}"]
    lines += [f"{one.what:<38}{one.limit:>9g}{f'{one.ratio:.3f} {_verdict(one.missed)}':>32}" for one in found]
    return "\n".join(line.rstrip() for line in lines)


def _cell(values: Spread) -> str:
    median, lowest, highest = values
    return f"{median:.2f} ({lowest:.2f}..{highest:.2f})"


def _verdict(missed: bool) -> str:
    return "MISSED" if missed else "PASS  "
