"""The job files of the commands that look at what is there: `inspect`, `verify`, `status` and `retry`."""

from pydantic import Field

from pixart_data.config import LocalPath, Section


class Inspect(Section):
    """`pixart inspect`: what a dataset, a table of captions, a checkpoint or a shard holds."""

    path: LocalPath
    """What to show."""
    num_samples: int = Field(default=3, ge=0)
    """How many samples to show of each part."""


class Verify(Section):
    """`pixart verify`: re-read every byte of a dataset or a table of captions."""

    path: LocalPath
    """A dataset, a feature set, or the output directory of a stage."""


class Status(Section):
    """`pixart status`: where the runs of an output directory stand."""

    path: LocalPath
    """The output directory of a stage or of a dataset, local or on an object store, or the job file that names it."""
    as_json: bool = False
    """Print one JSON object, for programs."""


class Retry(Section):
    """`pixart retry`: do the rejected rows of a finished run again; what is good stays as it is."""

    path: LocalPath
    """The output directory of `fetch`, `caption` or `extract`, or one feature set of a dataset."""
    reasons: list[str] = []
    """Only the rows that were rejected for these; empty: all rejected rows."""
