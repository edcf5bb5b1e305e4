"""What the gate found, counted: captions that failed at first, that passed when asked for again, that fail still."""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pixart_data.commits import Record

GATE = "gate"
_APPROXIMATE = "approximate, by TextBlob's lexicon"


@dataclass(frozen=True)
class Verdicts:
    """Captions at the gate, counted by failure; one caption can have several failures.

    Attributes:
        num_judged: Captions that were judged, each once.
        num_failed: Those whose first answer failed.
        num_mended: Of these, those that were asked for again and have an answer that passes.
        num_asked: Answers that were asked for after the first ones.
        first: The failures of the first answers.
        left: The failures of the answers that were kept.
        unanswered: Requests for another answer that brought none, by reason.
        approximate: Whether captions were judged by TextBlob's lexicon.
    """

    num_judged: int = 0
    num_failed: int = 0
    num_mended: int = 0
    num_asked: int = 0
    first: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    unanswered: dict[str, int] = field(default_factory=dict)
    approximate: bool = False

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Verdicts":
        """Count rows of a table of captions; those that were not judged do not count."""
        judged = [row for row in rows if row.get(GATE) is not None]
        failed = [row for row in judged if row["gate_first"]]
        return cls(
            num_judged=len(judged),
            num_failed=len(failed),
            num_mended=sum(not row[GATE] and row["kept_attempt"] > 1 for row in failed),
            num_asked=sum(row["num_attempts"] - 1 for row in judged),
            first=_tally(row["gate_first"] for row in judged),
            left=_tally(row[GATE] for row in judged),
        )

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Verdicts":
        """Return what a record's `facts["gate"]` says; nothing was judged where it says nothing."""
        return cls(**{name: facts[name] for name in cls.__dataclass_fields__ if name in facts})

    @classmethod
    def in_records(cls, records: Iterable[Record]) -> "Verdicts":
        """Return the counts of a whole table, from the records of its units."""
        return functools.reduce(cls.plus, (cls.from_facts(record.facts.get(GATE, {})) for record in records), cls())

    def to_facts(self) -> dict[str, Any]:
        """Return the counts for a record."""
        return asdict(self)

    def plus(self, other: "Verdicts") -> "Verdicts":
        """Return the counts of both."""
        return Verdicts(
            self.num_judged + other.num_judged,
            self.num_failed + other.num_failed,
            self.num_mended + other.num_mended,
            self.num_asked + other.num_asked,
            _sum(self.first, other.first),
            _sum(self.left, other.left),
            _sum(self.unanswered, other.unanswered),
            self.approximate or other.approximate,
        )

    @property
    def num_failing(self) -> int:
        """Captions that are marked as failing."""
        return self.num_failed - self.num_mended

    def line(self) -> str:
        """Say what became of the captions; empty if none was judged."""
        if not self.num_judged:
            return ""
        how = f"; {_APPROXIMATE}" if self.approximate else ""
        if not self.num_failed:
            return f"gate: all of {self.num_judged:,} passed{how}"
        again = f"{self.num_mended:,} passed when asked again, " if self.num_asked else ""
        return (
            f"gate: {self.num_failed:,} of {self.num_judged:,} failed ({_shown(self.first)}), {again}"
            f"{self.num_failing:,} still failing"
            + (f" ({_shown(self.left)})" if self.left else "")
            + (f"; asked without an answer ({_shown(self.unanswered)})" if self.unanswered else "")
            + how
        )


def _tally(failures: Iterable[Iterable[str]]) -> dict[str, int]:
    return dict(sorted(Counter(name for names in failures for name in names).items()))


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(one) + Counter(other)).items()))


def _shown(tally: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(tally.items(), key=lambda item: -item[1]))
