"""NLTK's data files: where they are, whether they are the ones that are known here, how to get them.

The files state no licence, so nothing of them is part of this toolkit: what compiled code needs is derived from the
user's own, at start. Where they are found is for `nltk.data.find` to say, with its checks of who may write there.
"""

import hashlib
import io
import json
import socket
import urllib.request
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pixart_data.errors import ConfigError, DataError

TAGGER = "taggers/averaged_perceptron_tagger_eng/"
PUNKT = "tokenizers/punkt_tab/english/"
WEIGHTS = f"{TAGGER}averaged_perceptron_tagger_eng.weights.json"
TAGDICT = f"{TAGGER}averaged_perceptron_tagger_eng.tagdict.json"
CLASSES = f"{TAGGER}averaged_perceptron_tagger_eng.classes.json"
COLLOCATIONS = f"{PUNKT}collocations.tab"
SENT_STARTERS = f"{PUNKT}sent_starters.txt"
ABBREV_TYPES = f"{PUNKT}abbrev_types.txt"
ORTHO_CONTEXT = f"{PUNKT}ortho_context.tab"

DIGESTS = {
    WEIGHTS: "789e8e35f6fac656d9b7eccea29ba4e8a137cbb5b525dd31f39e4291a9e80832",
    TAGDICT: "4c713731cb06727736962bc8cd94ad919217a040e76691059af99bc0c2c9c246",
    CLASSES: "7812cb7945022cb348bc6670b3eb7c76cdd50920715e86681337adfbf9c85253",
    COLLOCATIONS: "73d7f183e9cf31ee6edf41df100a6f57c72404db66f599fe86b3fb2e6148f35f",
    SENT_STARTERS: "8a66e19f1bf6a03061dbcda945e46839d09612f8235dbcb1b994f59184ecc989",
    ABBREV_TYPES: "0ab7d6b126eed733d9bc5733d3a51ea575e90ece1b908e77c9d5b74e2a54213a",
    ORTHO_CONTEXT: "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
}
"""SHA-256 of the files as NLTK publishes them; of their sorted lines where they hold a set, see `digest`."""

_SETS = frozenset({CLASSES, COLLOCATIONS, SENT_STARTERS, ABBREV_TYPES})
_PACKAGES = {"averaged_perceptron_tagger_eng": TAGGER, "punkt_tab": PUNKT}
_CONNECT_TIMEOUT_S = 5.0
_REMEDY = "run `pixart stats --download-nltk`, or set NLTK_DATA to a folder that holds them"
_OTHERWISE = "or pass --approximate for figures of TextBlob's lexicon"


@dataclass(frozen=True)
class Resources:
    """The data files, read.

    Attributes:
        contents: By the names of `DIGESTS`.
        places: Where on the disk each was found: the file itself, or the zip archive that holds it.
    """

    contents: Mapping[str, bytes]
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def altered(self) -> list[str]:
        """Names of the files that are not those known here; NLTK may well read them."""
        return [name for name, known in DIGESTS.items() if digest(name, self.contents[name]) != known]

    def paths(self, names: Iterable[str]) -> list[str]:
        """Return where files are on the disk, each place once; by name where that is not known."""
        return list(dict.fromkeys(self.places.get(name, name) for name in names))

    def parse(self, name: str) -> Any:
        """Return what a JSON file holds.

        Raises:
            DataError: If it is no JSON.
        """
        try:
            return json.loads(self.contents[name])
        except ValueError as error:
            raise damaged(f"{name}: {error}", self.paths([name])) from error


def digest(name: str, content: bytes) -> str:
    """Return the SHA-256 by which a file is known, in hex.

    Four files hold sets, which NLTK's packages have had in several orders: of those it is the sum of what they hold,
    sorted, a line each.
    """
    if name in _SETS:
        try:
            lines = json.loads(content) if name == CLASSES else content.decode().split("\n")
            content = "\n".join(sorted(set(lines))).encode()
        except (ValueError, TypeError):
            pass  # not what it should be: its own sum will not be known either
    return hashlib.sha256(content).hexdigest()


def find_resources(download: bool = False, otherwise: str = _OTHERWISE) -> Resources:
    """Read the data files from where NLTK finds them.

    Args:
        download: Let NLTK download missing ones first, as `nltk.download` does, to its usual folder.
        otherwise: How the command that needs them does without, for the complaint.

    Raises:
        ConfigError: If files are missing on this machine.
    """
    contents, places, remarks = _read()
    if download and len(contents) < len(DIGESTS):
        failure = _download()
        contents, places, remarks = _read()
        remarks += [f"download failed: {failure}"] if failure else []
    missing = [name for name in DIGESTS if name not in contents]
    if missing:
        raise ConfigError(_complaint(missing, remarks, otherwise))
    return Resources(contents, places)


def damaged(why: object, paths: Sequence[str] = ()) -> DataError:
    """Return the error for files that are there but make no sense.

    Args:
        why: What was noticed; it names the file where `paths` does not.
        paths: Those to delete, of `Resources.paths`.
    """
    short = " ".join(str(why).replace("*", "").split())[:200]
    return DataError(
        f"noun tagger: expected NLTK's data files, found them damaged ({short}); "
        f"delete just {', '.join(paths) or 'the file named there'} and {_REMEDY}"
    )


def _complaint(missing: list[str], remarks: list[str], otherwise: str) -> str:
    import nltk.data

    why = "".join(f"; {remark}" for remark in dict.fromkeys(remarks))
    head = (
        f"noun tagger: expected NLTK's data files, found {len(missing)} of {len(DIGESTS)} missing on "
        f"{socket.gethostname()} (looked in {', '.join(map(str, nltk.data.path)) or 'no folder'}{why}); {_REMEDY}, "
        f"{otherwise}; missing are"
    )
    return "\n  ".join([head, *(f"{name}, sha256{_of_what(name)} {DIGESTS[name]}" for name in missing)])


def _of_what(name: str) -> str:
    return " of its sorted lines" if name in _SETS - {CLASSES} else " of its sorted items" if name == CLASSES else ""


def _read() -> tuple[dict[str, bytes], dict[str, str], list[str]]:
    """Read what NLTK would find now, with the places, and its remarks: it refuses folders that others may write."""
    import nltk.data

    contents, places, remarks = {}, {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for folder in _PACKAGES.values():
            try:
                pointer = nltk.data.find(folder)
            except LookupError:
                continue
            except OSError as error:
                remarks.append(str(error))
                continue
            for name in DIGESTS:
                if name.startswith(folder):
                    try:
                        with nltk.data.open_datafile(pointer, PurePosixPath(name).name, encoding=None) as file:
                            contents[name] = file.read()
                        places[name] = _place(pointer, name)
                    except (OSError, KeyError) as error:
                        remarks.append(str(error))
    return contents, places, remarks + [str(warning.message) for warning in caught]


def _place(pointer: Any, name: str) -> str:
    """Return the file of a folder that NLTK found, or the archive that the folder is in."""
    from nltk.data import ZipFilePathPointer

    if isinstance(pointer, ZipFilePathPointer):
        return str(pointer.zipfile.filename)
    return str(Path(str(pointer), PurePosixPath(name).name))


def _download() -> str:
    """Have NLTK install its files; return why that failed, "" where it did not.

    NLTK waits 120 s for each address of a server that does not answer, so one quick connection is tried first,
    except through a proxy, which answers for the server.
    """
    import nltk
    from nltk.downloader import Downloader

    chatter = io.StringIO()
    index = urlsplit(Downloader.DEFAULT_URL)
    try:
        if "https" not in urllib.request.getproxies():
            socket.create_connection((index.hostname, index.port or 443), timeout=_CONNECT_TIMEOUT_S).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _PACKAGES:
                if not nltk.download(name, quiet=True, prefix="", print_error_to=chatter):
                    return " ".join(chatter.getvalue().split()) or f"nltk.download({name!r}) returned False"
    except (OSError, ValueError, HTTPException, SyntaxError) as error:  # SyntaxError: the XML index does not parse
        return f"{index.hostname}: {error}"
    return ""
