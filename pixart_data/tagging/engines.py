"""Which engine tags the captions: the compiled one where it is sure to give NLTK's answer, else NLTK itself.

Sure means: the NLTK that is installed is one that the compiled code was compared with, its data files are the published
ones, and on the captions of `proof` the two agree here and now.
"""

import logging
import time
from importlib.metadata import version
from typing import Literal

from numba import config

from pixart_data.errors import DataError
from pixart_data.tagging import compilation
from pixart_data.tagging.blocks import Engine
from pixart_data.tagging.compiled import CompiledEngine
from pixart_data.tagging.proof import CAPTIONS, prove
from pixart_data.tagging.references import NltkEngine, TextBlobEngine
from pixart_data.tagging.resources import Resources, damaged, find_resources

Kind = Literal["nltk", "textblob"]

NLTK_VERSIONS = frozenset({"3.10.4"})
"""Those whose tokenizer and tagger the compiled code was compared with, on all real captions and by the fuzzer."""

_INSTEAD = "NLTK itself tags the captions, with the same result but a hundred times slower"
_log = logging.getLogger(__name__)


def open_engine(kind: Kind, download: bool = False) -> Engine:
    """Return an engine of a kind, loaded and tried out.

    Args:
        kind: "nltk" for exactly NLTK's answer, "textblob" for an approximation that needs no data files.
        download: Let NLTK download missing files first, as `nltk.download` does, to its usual folder.

    Raises:
        ConfigError: If NLTK's data files are missing on this machine.
        DataError: If they are there but damaged.
    """
    if kind == "textblob":
        return TextBlobEngine()
    resources = find_resources(download)
    try:
        reference = NltkEngine()
    except (LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        raise damaged(error, resources.paths(resources.altered)) from error
    doubt = _doubt(resources)
    if not doubt:
        _announce()
        try:
            return _proved(CompiledEngine(resources), reference)
        except DataError as error:
            doubt = str(error)
    _log.warning("%s. Meanwhile %s", doubt, _INSTEAD)
    return NltkEngine()


def _announce() -> None:
    if compilation.folder():
        _log.info("noun tagger: loading; on a machine's first run it is compiled, which takes a minute")
    else:
        _log.warning(
            "noun tagger: expected a folder for compiled code, found none that can be written, so that each process "
            "compiles for a minute; set NUMBA_CACHE_DIR to such a folder"
        )


def _proved(engine: Engine, reference: Engine) -> Engine:
    started_s = time.perf_counter()
    differences = prove(engine, reference)
    if differences:
        raise DataError(
            f"noun tagger: expected the compiled tagger to agree with NLTK on {len(CAPTIONS)} captions, found "
            f"{len(differences)} that differ, as {differences[0]}; please report this line"
        )
    took_s = time.perf_counter() - started_s
    _log.info("noun tagger: %s, compiled; agreed on %d captions, %.1f s", engine.name, len(CAPTIONS), took_s)
    return engine


def _doubt(resources: Resources) -> str:
    """Return why the compiled engine might not agree with NLTK here, "" if nothing speaks for that."""
    if config.DISABLE_JIT:
        return "noun tagger: expected compiled code, found NUMBA_DISABLE_JIT set; unset it for speed"
    installed = version("nltk")
    if installed not in NLTK_VERSIONS:
        known = ", ".join(sorted(NLTK_VERSIONS))
        return (
            f"noun tagger: expected nltk {known}, found {installed}, with which the compiled tagger was not compared; "
            f"run `pip install nltk=={max(NLTK_VERSIONS)}` for speed"
        )
    if resources.altered:
        return (
            f"noun tagger: expected the data files that NLTK publishes, found others by their SHA-256: "
            f"{', '.join(resources.paths(resources.altered))}; "
            f"delete just these and run `pixart stats --download-nltk` for speed"
        )
    return ""
