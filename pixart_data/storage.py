"""Places that outputs are written to and sources are read from: local folders, network mounts, object stores."""

from pathlib import Path
from typing import Any, cast

from pixart_data.errors import ConfigError


def location(url: str) -> Path:
    """Return a path for a local folder or for a URL such as `s3://bucket/prefix`.

    What comes back for a URL has the methods of `pathlib.Path` that the toolkit uses, and is typed as one.

    Raises:
        ConfigError: If the package that opens the URL is not installed.
    """
    if "://" not in url:
        return Path(url)
    try:
        from upath import UPath
    except ModuleNotFoundError as error:
        raise ConfigError(f"{url}: {error.name} is not installed; pip install 'pixart-toolkit[s3]'") from error
    return cast(Path, UPath(url))


def is_remote(path: Any) -> bool:
    """Tell an object store's path from one that the operating system opens."""
    return not isinstance(path, Path)
