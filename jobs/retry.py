"""`pixart retry`: the rejected rows of a finished run once more, and nothing else."""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs.config import Retry
from pipelines import caption as caption_pipeline
from pipelines import extract as extract_pipeline
from pipelines import fetch as fetch_pipeline
from pipelines import imports as import_pipeline
from pipelines.config import Caption, Extract, Fetch, Import
from pipelines.driver import JOB, require_known
from pixart_data.commits import read_records
from pixart_data.config import Section, load
from pixart_data.errors import ConfigError
from pixart_data.storage import exists, is_remote, local_copy, location

_PIPELINES: dict[str, tuple[type[Section], ModuleType]] = {
    "fetch": (Fetch, fetch_pipeline),
    "caption": (Caption, caption_pipeline),
    "extract": (Extract, extract_pipeline),
    "import": (Import, import_pipeline),
}


def retry(job: Retry, dry_run: bool) -> None:
    """Do the rows again that were rejected, or print how many these are.

    Raises:
        ConfigError: If there is no run of a stage that rejects rows, its job is of another place, or a reason is
            unknown.
        DataError: If the run is not finished, or its source or settings have changed.
    """
    require_known(job.reasons)
    for root in _roots(location(job.path)):
        rejected = Counter[str]()
        for record in read_records(root).values():
            rejected.update(record.rejected)
        reasons = job.reasons or sorted(rejected)
        counts = ", ".join(f"{reason} {rejected[reason]}" for reason in reasons if rejected[reason])
        if not counts:
            print(f"retry: no rejected rows to try again -> {root}")
            continue
        stage_job, pipeline = _read(root)
        place = _named(root, stage_job)
        if dry_run:
            print(f"retry: {counts} -> {root}")
            continue
        only = {"only": place} if _sets(stage_job) else {}
        for run, account in pipeline.run(stage_job, reasons=reasons, **only):
            print(f"{run.stage}: {account.line()} -> {run.root}")


def _roots(path: Path) -> list[Path]:
    """Return the output directory at `path`, or those of the feature sets below it."""
    if exists(path / JOB):
        return [path]
    roots = sorted(found.parent for found in path.glob(f"*/{JOB}"))
    if not roots:
        raise ConfigError(f"{path}: expected the output directory of a run, found no {JOB} in it; check the path")
    return roots


def _read(root: Path) -> tuple[Any, ModuleType]:
    """Return the job that made an output directory, and the pipeline that did it."""
    with local_copy(root / JOB) as copy:
        command = copy.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# pixart ")
        if command not in _PIPELINES:
            known = ", ".join(f"`{name}`" for name in _PIPELINES)
            raise ConfigError(f"{root / JOB}: expected the job of {known}, found {command!r}; run that command again")
        config, pipeline = _PIPELINES[command]
        return load(config, copy), pipeline


def _sets(job: Any) -> list[str]:
    """Name the feature sets that a job makes; none where its output is one table or one folder of tars."""
    if isinstance(job, Extract):
        return [*([job.image.set_name] if job.image else []), *job.text_columns]
    return [job.image.set_name, job.text.set] if isinstance(job, Import) else []


def _named(root: Path, job: Any) -> Path:
    """Return `root` as its own job names it: through links and mounts a folder has several names.

    Raises:
        ConfigError: If the job is of another place, as after a move or in a copy.
    """
    output, sets = location(job.output), _sets(job)
    for place in [output / name for name in sets] or [output]:
        if _is_same(place, root):
            return place
    names = f" and the sets {', '.join(sets)}" if sets else ""
    again = f" and name the folder {' or '.join(sets)} again" if sets and root.name not in sets else ""
    raise ConfigError(
        f"{root / JOB}: expected the job of this folder, found output = {str(output)!r}{names}; set output to where "
        f"the {'set' if sets else 'run'} lies now, {str(root.parent if sets else root)!r}{again}"
    )


def _is_same(place: Path, root: Path) -> bool:
    if str(place) == str(root):
        return True
    try:
        return not is_remote(place) and not is_remote(root) and place.samefile(root)
    except OSError:  # it is not there
        return False
