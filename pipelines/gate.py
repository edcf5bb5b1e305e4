"""The caption gate: what fails is asked for again with other decoding, within a limit; what still fails is marked."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines.config import Caption, Gating
from pipelines.driver import JOB, changed
from pixart_data.commits import Record, read_records
from pixart_data.config import load
from pixart_data.errors import ConfigError
from pixart_data.questions import MAIN as CAPTION
from pixart_data.questions import Caption as Answer
from pixart_data.questions import Decoding, NoCaption, columns
from pixart_data.records import Reason
from pixart_data.sections import Captioner, Gate
from pixart_data.storage import exists, local_copy, location
from pixart_data.verdicts import GATE, Verdicts

if TYPE_CHECKING:
    from pathlib import Path

    from pixart_data.tagging.engines import Kind

Row = dict[str, Any]

_TRUNCATED, _LOOP = "truncated", "loop"
_PROBE = "A house."

log = logging.getLogger(__name__)


class Gatekeeper:
    """Judges the captions of a table's rows, says how those that fail are asked for again, and keeps the better answer.

    A row tells all that was done about it: `gate` has the failures of the caption that it holds, `gate_first` those of
    the first one, `num_attempts` how often it was asked for, and `kept_attempt` which of the answers it holds. So a
    table can be taken up where it was left, by another run and with other limits, and nothing is asked beyond the
    limit. Threads may share one.

    Args:
        tagger: The engine to judge with; None: the one that this machine has.

    Raises:
        ConfigError: If the data that captions are judged with is missing, or the engine is another one.
    """

    def __init__(self, config: Gating, captioner: Captioner, tagger: str | None = None) -> None:
        from pixart_data.gates import CaptionGate

        self.config, self.captioner = config, captioner
        self._gate = CaptionGate(config, _kind(config))
        self._gate.judge([_PROBE], [None], [None])  # opens what it judges with, which is to fail before any work
        self.tagger: str = self._gate.tagger
        if tagger not in (None, self.tagger):
            raise ConfigError(
                f"gate: expected {tagger}, as where the job was planned, found {self.tagger} on this machine; install "
                "one version everywhere"
            )

    def judge(self, rows: Sequence[Row]) -> None:
        """Mark the rows that have a caption with what it fails, if anything."""
        good = [row for row in rows if row.get("caption") is not None]
        failures = self._failures(good, [(row["caption"], row["finish_reason"]) for row in good])
        for row, found in zip(good, failures, strict=True):
            row[GATE] = found
            for name in ("num_attempts", "kept_attempt"):
                row[name] = row.get(name) or 1
            if row["kept_attempt"] == 1:
                row["gate_first"] = found

    def is_due(self, row: Row) -> bool:
        """Tell whether a judged row is to be asked for again."""
        return bool(row.get(GATE)) and row["num_attempts"] <= self.config.attempts

    def decoding(self, row: Row) -> Decoding:
        """Return how the next answer for a row that failed is to be drawn.

        Sampling gets out of a loop that greedy decoding fell into. A penalty on words that were said helps where it
        did not, and hurts elsewhere: it drives long captions into rambling. What was cut off gets room.
        """
        temperatures = self.config.temperatures
        length = self.captioner.max_new_tokens
        return Decoding(
            temperature=temperatures[min(row["num_attempts"], len(temperatures)) - 1],
            top_p=self.config.top_p,
            max_new_tokens=round(length * self.config.more_tokens) if _TRUNCATED in row[GATE] else length,
            frequency_penalty=self.config.frequency_penalty if _LOOP in row[GATE] else 0.0,
        )

    def weigh(self, rows: Sequence[Row], answers: Sequence[Answer | NoCaption]) -> Counter[str]:
        """Put into each row its new answer, if that has fewer failures than the one that it holds.

        No answer, or an empty one, is an attempt like any other, unless `is_no_attempt`.

        Returns:
            How many rows got no answer, by reason.
        """
        unanswered = Counter[str]()
        told: list[tuple[Row, Answer]] = []
        for row, answer in zip(rows, answers, strict=True):
            row["num_attempts"] += not is_no_attempt(answer)
            if isinstance(answer, Answer) and answer.text:
                told.append((row, answer))
            else:
                unanswered[str(answer.reason if isinstance(answer, NoCaption) else Reason.EMPTY_CAPTION)] += 1
        failures = self._failures([row for row, _ in told], [(answer.text, answer.finish_reason) for _, answer in told])
        for (row, answer), found in zip(told, failures, strict=True):
            if len(found) < len(row[GATE]):
                row |= {**columns(CAPTION, answer), GATE: found, "kept_attempt": row["num_attempts"]}
        return unanswered

    def facts(self, rows: Sequence[Row], unanswered: Mapping[str, int], before: Mapping[str, Any]) -> dict[str, Any]:
        """Return for a unit's record what became of its captions, by which settings and by whose tags.

        Args:
            unanswered: What `weigh` returned, added up.
            before: What the record that is replaced says of the gate. Attempts that brought no answer count for ever,
                as they do in the rows; a server's errors are no attempts, and those of the last run count.
        """
        burnt = {reason: n for reason, n in before.get("unanswered", {}).items() if reason != Reason.SERVER_ERROR}
        verdicts = replace(
            Verdicts.of(rows),
            unanswered=dict(sorted((Counter(burnt) + Counter(unanswered)).items())),
            approximate=self.config.approximate,
        )
        return {GATE: {"settings": self.config.model_dump(), "tagger": self.tagger, **verdicts.to_facts()}}

    def _failures(self, rows: Sequence[Row], answers: Sequence[tuple[str, str | None]]) -> list[list[str]]:
        if not rows:
            return []
        captions, ends = [text for text, _ in answers], [finish_reason for _, finish_reason in answers]
        return self._gate.judge(captions, [row["prompt"] for row in rows], ends)


def is_no_attempt(answer: Answer | NoCaption) -> bool:
    """Tell whether a server failed, however often it was asked: that says nothing of the caption."""
    return isinstance(answer, NoCaption) and answer.reason == Reason.SERVER_ERROR


def find_judge(config: Gating) -> str:
    """Return the name of the engine that captions are judged with.

    Raises:
        ConfigError: If its data is missing on this machine.
    """
    from pixart_data.gates import find_tagger

    return find_tagger(_kind(config))


def _kind(config: Gating) -> "Kind":
    return "textblob" if config.approximate else "nltk"


def lacks(config: Gating | None, tagger: str | None, to_the_end: bool, record: Record) -> str:
    """Say why a unit is to be judged anew or asked about again, in a few words for the plan; empty if it is not.

    The gate is no part of the unit's digest: the captions that pass it would be asked for again, too. How to ask
    decides only where captions still fail.

    Args:
        to_the_end: Captions are asked for that a server failed on the last time.
    """
    if config is None:
        return ""
    facts = record.facts.get(GATE)
    if facts is None:
        return "captions not judged"
    before, now = {**facts["settings"], "tagger": facts.get("tagger")}, {**config.model_dump(), "tagger": tagger}
    if not facts["left"]:
        before, now = ({name: one.get(name) for name in (*Gate.model_fields, "tagger")} for one in (before, now))
    names = changed(before, now, "gate.")
    if names:
        return f"{names} changed"
    return "captions that a server failed on" if to_the_end and _num_failed_on(facts) else ""


def _num_failed_on(facts: Mapping[str, Any]) -> int:
    return int(facts.get("unanswered", {}).get(Reason.SERVER_ERROR, 0))


def with_gate(job: Caption) -> Caption:
    """Return a job with the gate that its table went through before, where the job itself has none.

    Without it new captions would stay unjudged beside judged ones, and the record of what was judged would be lost.

    Raises:
        ConfigError: If the table went through the gate of another version.
    """
    root = location(job.output)
    if job.gate is not None:
        return job
    settings = [facts["settings"] for record in read_records(root).values() if (facts := record.facts.get(GATE))]
    if not settings:
        return job
    log.info("caption: the captions in %s are judged: goes on with the settings of their gate", root)
    try:
        return job.model_copy(update={"gate": _gate_of(root) or Gating.model_validate(settings[0])})
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise ConfigError(
            f"{root}: expected captions that this version judged, found other settings of their gate ({keys}); pass "
            "--retry-failed-gate to have them judged anew"
        ) from error


def _gate_of(root: "Path") -> Gating | None:
    """Return the gate of the job that was done last, which may have been stopped before any unit went through it."""
    if not exists(root / JOB):
        return None
    with local_copy(root / JOB) as copy:
        try:
            return load(Caption, copy).gate
        except ConfigError:  # of another version; the records say it, too
            return None
