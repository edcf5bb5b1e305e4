"""The commands that run on Ray: `caption`, `stats` and `extract`."""

from pathlib import Path
from types import ModuleType

from pipelines import caption as caption_pipeline
from pipelines import extract as extract_pipeline
from pipelines import stats as stats_pipeline
from pipelines.config import Caption, Extract, Stats
from pixart_data.config import Section
from pixart_data.reports import terminal_table


def caption(job: Caption, dry_run: bool) -> None:
    """Caption the images of a job, or print what that would do."""
    _run(caption_pipeline, job, dry_run)


def stats(job: Stats, dry_run: bool) -> None:
    """Count the nouns of a job's captions and print the table, or print what would be counted."""
    _run(stats_pipeline, job, dry_run)
    if not dry_run:
        print(f"\n{terminal_table(stats_pipeline.read_stats(job))}")
        print(f"\nreport: {job.output}/{stats_pipeline.HTML_FILE} and {stats_pipeline.JSON_FILE}")


def extract(job: Extract, dry_run: bool) -> None:
    """Make the feature sets of a job, or print what that would do."""
    _run(extract_pipeline, job, dry_run)
    if job.image is not None and job.text is not None and not dry_run:
        line = extract_pipeline.match_line(Path(job.output), job.image.set_name, job.text.set)
        print(f"extract: {line} -> {job.output}")


def _run(pipeline: ModuleType, job: Section, dry_run: bool) -> None:
    if dry_run:
        for run, plan in pipeline.plan(job):
            print(plan.line(run))
            print(plan.count_line(run))
        return
    for run, account in pipeline.run(job):
        print(f"{run.stage}: {account.line()} -> {run.root}")
