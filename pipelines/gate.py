"""The caption gate: what fails is asked for again with other decoding, within a limit; what still fails is marked."""

from collections.abc import Sequence
from typing import Any

from pipelines.config import Gating
from pixart_data.errors import ConfigError
from pixart_data.questions import MAIN as CAPTION
from pixart_data.questions import Caption, Decoding, NoCaption, columns
from pixart_data.sections import Captioner
from pixart_data.verdicts import GATE, Verdicts

Row = dict[str, Any]

_TRUNCATED, _LOOP = "truncated", "loop"
_PROBE = "A house."
_REMEDY = "gate: captions are judged by their words' tags; without that data, pass `--set gate.approximate=true`"


class Gatekeeper:
    """Judges the captions of a table's rows, says how those that fail are asked for again, and keeps the better answer.

    A row tells all that was done about it: `gate` has the failures of the caption that it holds, `gate_first` those of
    the first one, `num_attempts` how often it was asked for. So a table can be taken up where it was left, by another
    run and with other limits, and nothing is asked beyond the limit. Threads may share one.

    Raises:
        ConfigError: If the data that captions are judged with is missing.
    """

    def __init__(self, config: Gating, captioner: Captioner) -> None:
        from pixart_data.gates import CaptionGate

        self.config, self.captioner = config, captioner
        self._gate = CaptionGate(config, "textblob" if config.approximate else "nltk")
        try:
            self._gate.judge([_PROBE], [None], [None])  # opens what it judges with, which is to fail before any work
        except ConfigError as error:
            raise ConfigError(f"{error}\n{_REMEDY}") from error

    def judge(self, rows: Sequence[Row]) -> None:
        """Mark the rows that have a caption with what it fails, if anything."""
        good = [row for row in rows if row.get("caption") is not None]
        failures = self._failures(good, [(row["caption"], row["finish_reason"]) for row in good])
        for row, found in zip(good, failures, strict=True):
            row[GATE], row["num_attempts"] = found, row.get("num_attempts") or 1
            if row["num_attempts"] == 1:
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

    def weigh(self, rows: Sequence[Row], answers: Sequence[Caption | NoCaption]) -> None:
        """Put into each row its new answer, if that has fewer failures than the one that it holds.

        No answer, or an empty one, is an attempt like any other.
        """
        told = [
            (row, answer)
            for row, answer in zip(rows, answers, strict=True)
            if isinstance(answer, Caption) and answer.text
        ]
        failures = self._failures([row for row, _ in told], [(answer.text, answer.finish_reason) for _, answer in told])
        for row in rows:
            row["num_attempts"] += 1
        for (row, answer), found in zip(told, failures, strict=True):
            if len(found) < len(row[GATE]):
                row |= {**columns(CAPTION, answer), GATE: found}

    def facts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return for a unit's record what became of its captions, and by which settings."""
        return {GATE: {"settings": self.config.model_dump(), **Verdicts.of(rows).to_facts()}}

    def _failures(self, rows: Sequence[Row], answers: Sequence[tuple[str, str | None]]) -> list[list[str]]:
        if not rows:
            return []
        captions, ends = [text for text, _ in answers], [finish_reason for _, finish_reason in answers]
        return self._gate.judge(captions, [row["prompt"] for row in rows], ends)
