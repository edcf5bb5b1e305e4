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
from pixart_data.storage import exists, local_copy, location

_PIPELINES: dict[str, tuple[type[Section], ModuleType]] = {
    "fetch": (Fetch, fetch_pipeline),
    "caption": (Caption, caption_pipeline),
    "extract": (Extract, extract_pipeline),
    "import": (Import, import_pipeline),
}
_OF_SETS = (extract_pipeline, import_pipeline)


def retry(job: Retry, dry_run: bool) -> None:
    """Do the rows again that were rejected, or print how many these are.

    Raises:
        ConfigError: If there is no run of a stage that rejects rows, or a reason is unknown.
        DataError: If the run is not finished, or its source or settings have changed.
    """
    require_known(job.reasons)
    for root in _roots(location(job.path)):
        rejected = Counter[str]()
        for record in read_records(root).values():
            rejected.update(record.rejected)
        reasons = job.reasons or sorted(rejected)
        counts = ", ".join(f"{reason} {rejected[reason]}" for reason in reasons if rejected[reason])
        if dry_run or not counts:
            print(f"retry: {counts or 'no rejected rows to try again'} -> {root}")
            continue
        stage_job, pipeline = _read(root)
        only = {"only": root} if pipeline in _OF_SETS else {}
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
