"""The commands that run on Ray: `fetch`, `filter`, `caption`, `stats` and `extract`."""

from types import ModuleType

from pipelines import caption as caption_pipeline
from pipelines import extract as extract_pipeline
from pipelines import fetch as fetch_pipeline
from pipelines import filter as filter_pipeline
from pipelines import stats as stats_pipeline
from pipelines.config import Caption, Extract, Fetch, Filter, Stats
from pixart_data.config import Section
from pixart_data.reports import terminal_table
from pixart_data.storage import location
from pixart_data.tagging.resources import TAGGER, find_resources


def fetch(job: Fetch, dry_run: bool) -> None:
    """Download the images of a job's lists, or print what that would do."""
    _run(fetch_pipeline, job, dry_run)


def caption(job: Caption, dry_run: bool) -> None:
    """Caption the images of a job, or print what that would do."""
    _run(caption_pipeline, job, dry_run)


def stats(job: Stats, dry_run: bool) -> None:
    """Count the nouns of a job's captions and print the table, or print what would be counted."""
    if not job.sets:
        _download_nltk(dry_run)
        return
    _run(stats_pipeline, job, dry_run)
    if not dry_run:
        print(f"\n{terminal_table(stats_pipeline.read_stats(job))}")
        print(f"\nreport: {job.output}/{stats_pipeline.HTML_FILE}, {stats_pipeline.JSON_FILE} and figures beside it")


def _download_nltk(dry_run: bool) -> None:
    """Fetch NLTK's data where it is missing, and print the folder that holds it."""
    if dry_run:
        print("stats: would fetch NLTK's data, if it is missing, as NLTK does")
        return
    import nltk.data

    find_resources(download=True)
    print(f"stats: NLTK's data is in {str(nltk.data.find(TAGGER)).removesuffix(TAGGER.rstrip('/')).rstrip('/')}")


def filter(job: Filter, dry_run: bool) -> None:
    """Measure the images of a job and list those that its filters keep, or print what that would do."""
    _run(filter_pipeline, job, dry_run)


def extract(job: Extract, dry_run: bool) -> None:
    """Make the feature sets of a job, or print what that would do."""
    _run(extract_pipeline, job, dry_run)
    if job.image is not None and job.text is not None and not dry_run:
        for text_set in job.text_columns:
            line = extract_pipeline.match_line(location(job.output), job.image.set_name, text_set)
            kind = f"{text_set}: " if len(job.text_columns) > 1 else ""
            print(f"extract: {kind}{line} -> {job.output}")


def _run(pipeline: ModuleType, job: Section, dry_run: bool) -> None:
    if dry_run:
        for run, plan in pipeline.plan(job):
            print(*plan.lines(run), sep="\n")
        return
    for run, account in pipeline.run(job):
        print(f"{run.stage}: {account.line()} -> {run.root}")
