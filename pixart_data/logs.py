"""Log lines on stderr: text for people, or one JSON object a line for machines (`--log-json`)."""

import json
import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from types import TracebackType

log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """Renders a record as one line: time (UTC), level, command, logger, message, and the `fields` it was logged with.

    A record carries fields if it was logged with `extra={"fields": {...}}`; they become keys of the object.

    Args:
        rank: Of this process among several that run the same command; those after the first say it in each line.
    """

    def __init__(self, command: str, rank: int = 0) -> None:
        super().__init__()
        self._command = command
        self._rank = {"rank": rank} if rank else {}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line break."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "command": self._command,
            **self._rank,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def talk(packages: Iterable[str], command: str, verbose: bool, as_json: bool, rank: int = 0) -> None:
    """Send the log to stderr, and as JSON also what Python itself would print there: warnings and tracebacks.

    Args:
        packages: Loggers of the toolkit; others are heard from warnings on.
        verbose: Debug messages of the toolkit, too.
        rank: Of this process among several that run the same command: those after the first are heard from warnings
            on, or with `verbose`, and each of their lines is marked.
    """
    mark = f"[rank {rank}] " if rank else ""
    line = f"%(asctime)s {mark}%(message)s"
    logging.basicConfig(stream=sys.stderr, format=line, datefmt="%Y-%m-%d %H:%M:%S", force=as_json)
    if as_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter(command, rank))
        logging.captureWarnings(True)
        sys.excepthook = _log_exception
    level = logging.DEBUG if verbose else logging.WARNING if rank else logging.INFO
    for package in packages:
        logging.getLogger(package).setLevel(level)


def is_json() -> bool:
    """Tell whether the log is for machines: then nothing else may be written to stderr."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _log_exception(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    log.critical("%s: %s; this is a bug: please report it", kind.__name__, error, exc_info=(kind, error, where))
