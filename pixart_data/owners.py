"""Whose a folder is: no command is to sweep away, or write over, what another one made.

The job file that every command leaves says so in its first line; so do the provenance of a set over the shards of
others, and the marker that lies beside it until it is done.
"""

import json
import posixpath
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from pixart_data import advice
from pixart_data.commits import COMMITS, MANIFEST
from pixart_data.errors import ConfigError
from pixart_data.storage import is_remote, list_files, read_bytes

MARKER = "unfinished.json"
MADE_BY = "made_by"
"""In the provenance: the command, of sets that are made of others; what else is there may be inherited from these."""

_SOURCES = {"compacted_from": "compact", "merged_from": "merge", "split_from": "split"}  # of sets without `made_by`


def maker(provenance: Mapping[str, Any]) -> str | None:
    """Return the command that made a set of others; None if it was made of something else."""
    made_by = provenance.get(MADE_BY) or next((word for key, word in _SOURCES.items() if key in provenance), None)
    return None if made_by is None else str(made_by)


def read_fields(path: Path) -> dict[str, Any] | None:
    """Return a JSON object as it lies there: empty if it is damaged, None if there is none."""
    try:
        fields = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def require_run(root: Path, command: str) -> None:
    """Make sure that a run with commit records may write to a folder, and sweep what no record names.

    Raises:
        ConfigError: If what another command made is there, or a set without commit records.
    """
    other, manifest, writer = _other(root, command)
    # A set that names records of its own lost them to somebody who wants these units redone.
    is_foreign = writer is None and manifest and manifest.get("shards") and not manifest.get("records")
    if not other and is_foreign and not list_files(root / COMMITS):
        other = "a feature set without commit records"
    _refuse(root, command, other)


def require_links(root: Path, command: str) -> None:
    """Make sure that a set over the shards of others may be written to a folder.

    Raises:
        ConfigError: If what another command made is there, or shards of nobody knows whom.
    """
    other, manifest, writer = _other(root, command)
    begun = writer is not None or read_fields(root / MARKER) is not None
    if not other and list_files(root / COMMITS):
        other = "commit records of another command"
    elif not other and manifest is not None and maker(_provenance(manifest)) is None and (manifest or not begun):
        other = "a feature set that another command made"
    elif not other and manifest is None and not begun and next(iter(root.glob("*/*.tar")), None) is not None:
        other = f"shards without {MANIFEST}"
    _refuse(root, command, other)


def require_apart(targets: Iterable[Path], sources: Iterable[Path]) -> None:
    """Make sure that no folder to be written is one that is read, by whatever name.

    Raises:
        ConfigError: If one is.
    """
    names = {place(source): source for source in sources}
    for target in targets:
        source = names.get(place(target))
        source = source or next((source for source in names.values() if _is_same_file(target, source)), None)
        if source is not None:
            what = f"expected a folder of its own, found the dataset {source}, which is read"
            raise ConfigError(f"output: {target}: {what}; choose another output")


def place(path: Path) -> str:
    """Return one name for a folder however it is written: absolute, without links, `..` and slashes too many."""
    local = _local(path)
    if local is not None:
        return str(local.resolve())
    [protocol, *_] = _protocols(path)
    return f"{protocol}://{posixpath.normpath(cast(Any, path).path.strip('/'))}"


def _is_same_file(one: Path, other: Path) -> bool:
    here, there = _local(one), _local(other)
    try:
        return here is not None and there is not None and here.samefile(there)
    except OSError:  # it is not there
        return False


def _local(path: Path) -> Path | None:
    if not is_remote(path):
        return path
    return Path(cast(Any, path).path) if "file" in _protocols(path) else None


def _protocols(path: Path) -> list[str]:
    protocols = cast(Any, path).fs.protocol
    return [protocols] if isinstance(protocols, str) else list(protocols)


def _other(root: Path, command: str) -> tuple[str, dict[str, Any] | None, str | None]:
    """Say what another command left, and return manifest and writer; the latter is `command` or None then."""
    writer, manifest = advice.writer(root), read_fields(root / MANIFEST)
    if writer not in (None, command):
        return f"the results of `pixart {writer}`", manifest, writer
    begun = maker(read_fields(root / MARKER) or {})
    if begun not in (None, command):
        return f"what `pixart {begun}` left unfinished", manifest, writer
    made_by = maker(_provenance(manifest or {}))
    if made_by not in (None, command):
        return f"a feature set that `pixart {made_by}` made", manifest, writer
    return "", manifest, writer


def _provenance(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    provenance = manifest.get("provenance")
    return provenance if isinstance(provenance, dict) else {}


def _refuse(root: Path, command: str, other: str) -> None:
    if other:
        what = f"expected a new folder, or what `pixart {command}` left there, found {other}"
        raise ConfigError(f"output: {root}: {what}; choose another output")
