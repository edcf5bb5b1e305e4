"""Files of a model on the hub, or in its cache on this machine."""

import re
from collections.abc import Callable
from pathlib import Path

from pixart_data.errors import ConfigError

_PLACES = ("transformer/", "")
_TIMEOUT_S = 10.0


def opened(name: str) -> Callable[[str], Path | None]:
    """Return what fetches a file of the transformer in a repository of the hub, from its root or its folder.

    The hub is asked once whether it knows the repository: `hf_hub_download` alone would try for half a minute for each
    file. Where it does not answer, files come from the cache.

    Raises:
        ConfigError: If the hub does not know `name`, or `huggingface_hub` is not installed; and what is returned, if
            the hub does not answer and the cache lacks the file.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise ConfigError(
            f"{name}: no such folder, and the hub needs huggingface_hub; pip install 'pixart-toolkit[sample]'"
        ) from error

    silence: Exception | None = None
    try:
        HfApi().model_info(name, timeout=_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _unreachable(name, error) from error
    except Exception as error:  # noqa: BLE001  what the hub's client raises has no common root
        silence = error

    def fetch(file: str) -> Path | None:
        missing: Exception | None = None
        for place in _PLACES:
            try:
                return Path(hf_hub_download(name, place + file, local_files_only=silence is not None))
            except LocalEntryNotFoundError as error:
                missing = silence or error
            except EntryNotFoundError:
                continue
            except (OSError, HFValidationError) as error:
                raise _unreachable(name, error) from error
        if missing is not None:
            raise _unreachable(name, missing) from missing
        return None

    return fetch


def _unreachable(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{name}: expected a path, or an id within reach on the hub, found neither ({sentence(error)}); check the "
        "name, or give the path of a run, a file or a folder of weights"
    )


def sentence(error: Exception | str) -> str:
    """Return the first sentence of a library's message, 150 characters at most."""
    return re.split(r"\.\s|\n", str(error), maxsplit=1)[0][:150].rstrip(".")
