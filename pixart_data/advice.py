"""Which command to run again where an output is damaged: the one that wrote it."""

import re
from pathlib import Path

from pixart_data.errors import PixArtError
from pixart_data.storage import read_bytes

JOB = "job.toml"


def writer(root: Path) -> str | None:
    """Return the command that wrote an output, None where none is known.

    The job file that every command leaves in its output names the command in its first line.

    Raises:
        JobError: If the storage fails.
    """
    try:
        first = read_bytes(root / JOB).partition(b"\n")[0].decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    found = re.fullmatch("# pixart ([a-z]+)", first.strip())
    return found[1] if found else None


def command(root: Path) -> str:
    """Return the command that wrote an output, for messages: as it is typed, or words where none is known."""
    try:
        name = writer(root)
    except (OSError, PixArtError):
        name = None
    return f"`pixart {name}`" if name else "the command that wrote it"
