"""`pixart verify`: re-read what was written, say what is damaged, by sample; compute some of it again and compare."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.config import Verify
from pipelines.config import Compact, Extract
from pixart_data.config import load
from pixart_data.errors import ConfigError, DataError
from pixart_data.models import quiet_loading
from pixart_data.recomputation import (
    Chosen,
    Comparison,
    Origin,
    captions_of,
    choose,
    recompute_images,
    recompute_texts,
)
from pixart_data.shards import FeatureSet, feature_sets
from pixart_data.storage import exists, local_copy, location
from pixart_data.verification import Finding, planned
from pixart_data.verification import verify as verify_files

log = logging.getLogger(__name__)

_JOB = "job.toml"


def verify(job: Verify, dry_run: bool) -> None:
    """Verify what is at a path; with `dry_run`, print how many files and bytes that would read.

    Raises:
        ConfigError: If samples are to be computed again and their source or model is not there.
        DataError: If anything is damaged, missing or not what it was made from, after all of it was read.
    """
    root = location(job.path)
    if dry_run:
        sizes = [size_bytes for _, size_bytes in planned(root)]
        how = "would look at the sizes of" if job.fast else "would read"
        print(f"verify: {how} {len(sizes)} files, {sum(sizes):,} bytes, under {root}")
        if job.recompute:
            print(f"verify: would compute {job.recompute} samples of each set again: {', '.join(_sets(root))}")
        return
    num_files, num_bytes = _require_whole(verify_files(root, job.fast))
    if job.fast:
        print(
            f"verify: {num_files} files, {num_bytes:,} bytes: the fast check found nothing wrong; it looked at sizes, "
            "manifests, indexes and records, and read no shard: run without --fast to read every byte"
        )
    else:
        print(f"verify: {num_files} files, {num_bytes:,} bytes, all whole")
    if job.recompute:
        _recompute(root, job)


def _require_whole(findings: Iterator[Finding]) -> tuple[int, int]:
    """Print what is damaged as it is found; return how many files, and bytes, are whole."""
    damaged: list[Finding] = []
    num_files = num_bytes = 0
    for finding in findings:
        if finding.problem:
            damaged.append(finding)
            print(_line(finding))
        else:
            num_files, num_bytes = num_files + 1, num_bytes + finding.size_bytes
    if damaged:
        others = f"; and {len(damaged) - 1} more problem(s)" if len(damaged) > 1 else ""
        raise DataError(f"{_line(damaged[0])}{others}; {num_files} files are whole")
    return num_files, num_bytes


def _line(finding: Finding) -> str:
    sample = f"sample {finding.sample}: " if finding.sample else ""
    return f"{finding.path}: {sample}{finding.problem}"


def _recompute(root: Path, job: Verify) -> None:
    """Compute samples of every feature set again."""
    findings: list[Finding] = []
    sets = _sets(root)
    quiet_loading()
    made_by = {path: _made_by(path, path.name) for path in sets.values()}  # a mistake is found before hours of work
    for name, path in sets.items():
        features = FeatureSet(path)
        chosen = choose(features, job.recompute, job.seed)
        log.info("%s: %d samples are computed again", path, len(chosen))
        with _naming(made_by[path][1]):
            comparison = _compare(features, chosen, *made_by[path])
        features.close()
        findings += comparison.findings
        for finding in comparison.findings:
            print(_line(finding))
        print(
            f"{name}: {comparison.num_samples} of {len(features):,} samples computed again, {comparison.num_equal} "
            f"equal bit for bit; largest difference {comparison.largest_difference:.3g}, relative error "
            f"{comparison.relative_error:.3g} (up to {comparison.limit:.3g} is taken for the same)"
        )
    if findings:
        raise DataError(f"{_line(findings[0])}; {len(findings)} sample(s) in all are not what they were made from")


def _sets(root: Path) -> dict[str, Path]:
    """Return the feature sets to compute samples of."""
    sets = feature_sets(root)
    if not sets:
        what = "expected a dataset or a feature set to compute again, found none"
        raise ConfigError(f"{root}: {what}; name one, or leave --recompute out")
    return sets


def _made_by(root: Path, name: str) -> tuple[Extract, Path]:
    """Return the job that a set was extracted by, and the folder of that set: another one if it was compacted.

    Raises:
        ConfigError: If it was not extracted here.
    """
    if not exists(root / _JOB):
        raise ConfigError(f"{root}: expected the {_JOB} of `pixart extract`, found none; --recompute needs to know how")
    with local_copy(root / _JOB) as copy:
        command = copy.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# pixart ")
        if command == "compact":
            source = location(load(Compact, copy).path)
            return _made_by(source if exists(source / _JOB) else source / name, name)
        if command != "extract":
            raise ConfigError(
                f"{root / _JOB}: expected the job of `extract`, found {command!r}: --recompute can only do again what "
                "extract did"
            )
        return load(Extract, copy), root


def _compare(features: FeatureSet, chosen: list[Chosen], job: Extract, origin: Path) -> Comparison:
    from pixart_data.captions import caption_files
    from pixart_data.sources import find_units

    units: dict[str, Any]
    if features.manifest.kind == "image":
        if job.image is None or job.source is None:
            raise ConfigError("image: required, and missing; extract the set again")
        units = {unit.id: unit for unit in find_units(job.source)}
        return recompute_images(features, Origin(origin), chosen, units, job.source, job.image)
    column = job.text_columns.get(origin.name)
    if job.text is None or column is None:
        raise ConfigError(f"text: no set {origin.name} in it; a set's folder keeps its name")
    if job.captions is not None:
        units = {unit.id: unit for unit in caption_files(location(job.captions.path), "captions.path")}
    else:
        units = {unit.id: unit for unit in find_units(job.source)} if job.source is not None else {}
    captions = captions_of(job.source, column)
    return recompute_texts(features, Origin(origin), chosen, units, captions, job.text)


@contextlib.contextmanager
def _naming(origin: Path) -> Iterator[None]:
    """Put the job file that settings are from before complaints about them."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{origin / _JOB}: {error}") from error
