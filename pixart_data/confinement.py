"""Paths that come out of files, which anyone may have written: they must stay below the folder that they belong to."""

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from pixart_data.errors import DataError

_RATIO = re.compile(r"[0-9]+\.[0-9][0-9]")


def stays_below(path: Any) -> TypeGuard[str]:
    """Tell whether a path, `..` in it resolved, is that of something below the folder it is relative to.

    Links are not looked at: whoever puts one into a folder of theirs may mean it.
    """
    if not isinstance(path, str) or "\0" in path or path.startswith("/"):
        return False
    return posixpath.normpath(path).split("/")[0] not in ("..", ".")


def is_plain(path: Any) -> TypeGuard[str]:
    """Tell whether a path stays below its folder and has but one spelling: no `.`, `..`, `//` or backslash."""
    return stays_below(path) and posixpath.normpath(path) == path and "\\" not in path


def require_confined(path: Path, fields: Mapping[str, Any]) -> None:
    """Check that what a manifest names lies in its feature set: files are written and folders swept by these names.

    Args:
        path: Of the manifest.
        fields: Its content.

    Raises:
        DataError: If a shard, the calibration, the null features or a bucket's folder is elsewhere.
    """
    try:
        named = list(_named(fields))
        ratios = [bucket["ratio"] for bucket in fields.get("buckets", ())]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a complete manifest ({error!r}); run `pixart extract` again") from error
    wrong = [f"the path {name!r:.80}" for name in named if not is_plain(name)]
    wrong += [f"the bucket {r!r:.80}" for r in ratios if not (isinstance(r, str) and _RATIO.fullmatch(r))]
    if wrong:
        raise DataError(
            f"{path}: expected paths inside the feature set and buckets such as '1.00', found {wrong[0]}; nothing of "
            "this set is read: `pixart` did not write this manifest, so ask whoever gave it to you for another copy"
        )


def _named(fields: Mapping[str, Any]) -> Iterator[Any]:
    for shard in fields.get("shards", ()):
        yield shard["path"]
    if calibration := fields.get("codec", {}).get("calibration"):
        yield calibration["path"]
    if null := fields["model"].get("null"):
        yield null["path"]
