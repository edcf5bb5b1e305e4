"""A finished report: the files that make it up, written together, and the manifest that names them, written last.

A report is written whole or not at all: from the moment the first of its files is replaced until the manifest is there
again, the output is one that was not finished, and the command writes it anew.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_data.commits import MANIFEST, PublishedFile
from pixart_data.confinement import is_plain
from pixart_data.errors import DataError
from pixart_data.owners import read_fields
from pixart_data.storage import delete, exists, write_atomic

FORMAT = "pixart-report"
VERSION = 1


def write_bundle(root: Path, files: Mapping[str, bytes], made_from: str) -> None:
    """Write the files of a report in place of those of an earlier one, and seal them.

    Args:
        files: By path relative to `root`.
        made_from: Digest of everything that decided them.
    """
    earlier = {file.path for file in _named(read_fields(root / MANIFEST) or {})}
    delete([root / MANIFEST])
    for name, data in files.items():
        write_atomic(root / name, data)
    delete(root / name for name in sorted(earlier - files.keys()))
    sealed = [
        {"path": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    ]
    manifest = {"format": FORMAT, "version": VERSION, "made_from": made_from, "files": sealed}
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1).encode())


def is_bundled(root: Path, made_from: str) -> bool:
    """Tell whether a report of that digest is finished, with all of its files there."""
    fields = read_fields(root / MANIFEST) or {}
    if (fields.get("format"), fields.get("version"), fields.get("made_from")) != (FORMAT, VERSION, made_from):
        return False
    files = _named(fields)
    return bool(files) and all(exists(root / file.path) for file in files)


def read_bundle(root: Path) -> list[PublishedFile]:
    """Return the files of a finished report.

    Raises:
        DataError: If its manifest is damaged, or of a version that this toolkit does not know.
    """
    fields = read_fields(root / MANIFEST) or {}
    found = (fields.get("format"), fields.get("version"))
    files = _named(fields)
    if found != (FORMAT, VERSION) or not files:
        raise DataError(
            f"{root / MANIFEST}: expected {FORMAT} version {VERSION} and its files, found {found[0]} version "
            f"{found[1]}; run `pixart stats` again: it is rewritten"
        )
    return files


def _named(fields: Mapping[str, Any]) -> list[PublishedFile]:
    """Return the files that a manifest names; none if it is damaged, or one lies elsewhere."""
    try:
        files = [PublishedFile(**entry) for entry in fields["files"]] if fields.get("format") == FORMAT else []
    except (KeyError, TypeError):
        return []
    return files if all(is_plain(file.path) for file in files) else []
