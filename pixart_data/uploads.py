"""Uploads to object stores that were begun and never ended: what a killed process leaves where no listing shows it."""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from pixart_data.errors import JobError
from pixart_data.retries import retrying

_log = logging.getLogger(__name__)


def abort_uploads(root: Path, directories: Iterable[Path]) -> int:
    """Abort uploads to files directly in `directories` that a killed process left half done, and return how many.

    No listing shows them, and their store is paid for. Where one may not see or abort them, a line says so: they cost,
    but do no other harm.

    Args:
        root: What all the directories are or lie in. Another run may be uploading to other folders below it.
    """
    store: Any = getattr(root, "fs", None)
    if not hasattr(store, "list_multipart_uploads"):
        return 0
    bucket = cast(Any, root).path.strip("/").partition("/")[0]
    folders = {cast(Any, directory).path.strip("/") for directory in directories}
    count = 0
    try:
        for upload in _uploads(store, root):
            if f"{bucket}/{upload['Key']}".rpartition("/")[0] in folders:
                fields = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(FileNotFoundError):
                    retrying(lambda fields=fields: store.call_s3("abort_multipart_upload", **fields), root)  # type: ignore[misc]
                count += 1
    except (JobError, FileNotFoundError, NotImplementedError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        _log.warning("%s: uploads that were cut off are not looked for or not aborted: %s", root, why)
    return count


def _uploads(store: Any, root: Path) -> list[dict[str, Any]]:
    """Return the unfinished uploads below `root`, from all pages of the listing."""
    bucket, _, prefix = cast(Any, root).path.strip("/").partition("/")
    fields = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    found: list[dict[str, Any]] = []
    while True:
        page = retrying(lambda: store.call_s3("list_multipart_uploads", **fields), root, "read")
        found += page.get("Uploads") or []
        if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
            return found
        fields["KeyMarker"] = page["NextKeyMarker"]
        fields["UploadIdMarker"] = page.get("NextUploadIdMarker") or ""
