"""The errors that the toolkit raises on purpose.

PixArtError
├── ConfigError  exit 2: a job file, a flag or a model id is wrong; nothing was done
├── DataError    exit 3: the input or a dataset on disk is not what it says it is
└── JobError     exit 4: the machine or the cluster failed: storage, workers, a lease held by another run
    └── TransientError      of a kind that may pass: a unit that meets it is tried again, after a pause

Every message reads `where: what was expected, what was found; what to do`. Anything else that escapes is a bug
(exit 1, with its traceback). Each class takes one string, so that errors survive pickling between processes.
"""


class PixArtError(Exception):
    """The root: an error that its message explains completely."""

    exit_code = 1


class ConfigError(PixArtError):
    """A setting is unknown, of the wrong type or out of range, or a model cannot be found."""

    exit_code = 2


class DataError(PixArtError):
    """An input or a dataset on disk is unreadable, damaged, or does not fit the job."""

    exit_code = 3


class JobError(PixArtError):
    """The job could not go on: storage failed, a worker kept dying, or another run holds the output."""

    exit_code = 4


class TransientError(JobError):
    """Storage or a server failed for a while, after it was waited for; another attempt later may succeed."""
