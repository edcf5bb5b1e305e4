"""`pixart fetch`: lists of URLs to tars of images, one for each slice of a list, with a status for every row."""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.config import Fetch
from pipelines.driver import Account, Plan, Run, execute, make_plan
from pipelines.worker import Report
from pixart_data.archives import IMAGES, ROWS, Row, is_rows, publish_rows, publish_shard, read_status, seal_images
from pixart_data.commits import Record, read_records
from pixart_data.errors import TransientError
from pixart_data.records import SCHEMA_VERSION, Reason
from pixart_data.retries import storage
from pixart_data.storage import location
from pixart_data.urls import UrlUnit, count_urls, find_urls, read_urls, require_order

if TYPE_CHECKING:
    from pixart_data.downloads import Download

log = logging.getLogger(__name__)

STAGE = "fetch"
_DECIDES = {
    "max_bytes",
    "robots",
    "opt_out_directives",
    "check",
    "min_side_px",
    "max_aspect",
    "max_image_pixels",
}
_NO_ANSWER = (Reason.HOST_NOT_FOUND, Reason.CONNECTION_FAILED, Reason.TIMED_OUT)
_JUDGED_FROM_HOSTS = 50


class FetchStage:
    """Fetches one unit after another."""

    def __init__(self, job: Fetch) -> None:
        from pixart_data.downloads import Downloader

        self.job = job
        self.root = location(job.output)
        self.downloader = Downloader(job.downloads)

    def __call__(self, unit: UrlUnit, report: Report) -> Record:
        """Write the unit's tar and its table of rows and return its record."""
        rows = [
            _row(found.key, found.url, found.caption, found.error, found.detail)
            for found in read_urls(unit, self.job.urls)
        ]
        with _spool() as spool:
            fetched = self._fetch(unit.id, rows, spool, report)
            _require_network(unit.id, fetched)
            done, files = publish_shard(self.root, unit.id, fetched, spool.read)
        facts = {"list": Path(unit.file.path).name, "first_row": unit.file.start}
        files.append(publish_rows(self.root, unit.id, done))
        rejected = _rejected(done)
        return Record(unit.id, "", {}, len(done), len(done) - sum(rejected.values()), rejected, files, facts)

    def retry(self, unit: UrlUnit, reasons: Sequence[str], record: Record, report: Report) -> Record:
        """Ask again for the rows that were rejected for one of `reasons`; what is won goes into one more tar.

        Returns:
            The record that replaces the unit's: the tars that were there, the new one, and a new table of rows.
        """
        before = read_status(self.root, record)
        wanted = set(reasons) - {Reason.BAD_ROW}  # there is nothing to ask for
        again = [row for row in before if row["error"] in wanted and row["url"] is not None]
        fresh = [_row(row["key"], row["url"], row["caption"]) for row in again]
        with _spool() as spool:
            fetched = self._fetch(unit.id, fresh, spool, report)
            _require_network(unit.id, fetched, again)
            won, files = publish_shard(self.root, unit.id, [r for r in fetched if r["error"] is None], spool.read)
        news = {row["key"]: row for row in [*fetched, *won]}
        after = [news.get(row["key"], row) for row in before]
        rejected = _rejected(after)
        kept = [file for file in record.files if not is_rows(file)]
        files = [*kept, *files, publish_rows(self.root, unit.id, after)]
        return replace(record, rows_out=len(after) - sum(rejected.values()), rejected=rejected, files=files)

    def _fetch(self, unit: str, rows: Sequence[Row], spool: "_Spool", report: Report) -> list[Row]:
        """Ask for every URL once, however many rows have it, and return the rows with what became of them."""
        wanted = Counter(row["url"] for row in rows if row["error"] is None)
        counted = Counter(rejected=len(rows) - wanted.total(), rows=len(rows) - wanted.total())
        found: dict[str, Download] = {}
        started_s = time.monotonic()

        def done(download: "Download") -> None:
            if download.error is None:
                spool.add(download.url, download.data)
            found[download.url] = replace(download, data=b"")
            counted["rows"] += wanted[download.url]
            counted["rejected"] += wanted[download.url] if download.error else 0
            report(counted["rows"], counted["rejected"])

        self.downloader.fetch(list(wanted), done)
        seconds = max(time.monotonic() - started_s, 1e-6)
        images = len(rows) - counted["rejected"]
        log.info(
            "%s: %d URLs, %d images in %.1f s: %.1f images/s, %.2f MB/s",
            *(unit, len(rows), images, seconds, images / seconds, spool.size_bytes / 1e6 / seconds),
        )
        return [row if row["error"] else _outcome(row, found[row["url"]]) for row in rows]


@dataclass
class _Spool:
    """Images in the order they came, on local disk until the tar is written in the order of the list."""

    file: IO[bytes]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    size_bytes: int = 0

    def add(self, url: str, data: bytes) -> None:
        with storage(tempfile.gettempdir()):
            self.file.write(data)
        self.places[url] = (self.size_bytes, len(data))
        self.size_bytes += len(data)

    def read(self, row: Row) -> bytes:
        offset, size_bytes = self.places[row["url"]]
        self.file.seek(offset)
        return self.file.read(size_bytes)


@contextmanager
def _spool() -> Iterator[_Spool]:
    with tempfile.TemporaryFile() as file:  # has no name: a kill leaves nothing behind
        yield _Spool(file)


def _row(key: str, url: str | None, caption: str | None, error: Reason | None = None, detail: str = "") -> Row:
    return {
        "key": key,
        "url": url,
        "caption": caption,
        "status": "rejected" if error else "ok",
        "error": None if error is None else str(error),
        "detail": detail or None,
        "num_attempts": 0,
        **dict.fromkeys(("http_status", "shard", "format", "size_bytes", "width_px", "height_px", "sha256")),
    }


def _outcome(row: Row, download: "Download") -> Row:
    made = _row(row["key"], row["url"], row["caption"], download.error, download.detail)
    made |= {"http_status": download.http_status, "num_attempts": download.num_attempts}
    if download.facts is not None:
        facts = download.facts
        made |= {"format": facts.extension, "size_bytes": facts.size_bytes, "sha256": facts.sha256}
        made |= {"width_px": facts.width_px, "height_px": facts.height_px}
    return made


def _rejected(rows: Sequence[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row["error"] for row in rows if row["error"] is not None).items()))


def _require_network(unit: str, rows: Sequence[Row], before: Sequence[Row] = ()) -> None:
    """A machine that has lost its network must not turn ten thousand good URLs into rejected rows.

    Rows that end as they did `before` prove nothing, and lose nothing: a host may be gone for good.
    """
    errors = {row["key"]: row["error"] for row in before}
    asked = [row for row in rows if row["error"] not in (Reason.BAD_ROW, Reason.BAD_URL, Reason.PRIVATE_ADDRESS)]
    hosts = {urlsplit(row["url"]).netloc for row in asked if row["error"] != errors.get(row["key"])}
    if len(hosts) >= _JUDGED_FROM_HOSTS and all(row["error"] in _NO_ANSWER for row in asked):
        raise TransientError(
            f"{unit}: expected answers from some of {len(hosts)} hosts, found none ({asked[0]['detail']}); check this "
            "machine's network and name servers, then run the same command again"
        )


def prepare(job: Fetch) -> Run:
    """Find the units of a job and what decides their results; how long and how often is asked does not.

    Raises:
        ConfigError: If the lists cannot be used, or are numbered otherwise than in what is committed.
    """
    root = location(job.output)
    units = find_urls(job.urls)
    require_order(units, read_records(root))
    decided: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "downloads": job.downloads.model_dump(include=_DECIDES),
        "urls": job.urls.model_dump(include={"url_column", "caption_column"}),
    }
    return Run(
        stage=STAGE,
        root=root,
        units=units,
        settings=lambda unit: {**decided, "shard": unit.fingerprint},
        build=partial(FetchStage, job),
        cluster=job.cluster,
        swept=[root / IMAGES, root / ROWS],
        count=count_urls,
        per_cpu=True,
        needs_gpu=False,
    )


def plan(job: Fetch) -> list[tuple[Run, Plan]]:
    """Return what the job would do; no server is asked."""
    run = prepare(job)
    return [(run, make_plan(run))]


def run(job: Fetch, reasons: Sequence[str] = ()) -> list[tuple[Run, Account]]:
    """Do the job; with `reasons`, do the rows of a finished one again that were rejected for these."""
    prepared = prepare(job)
    return [(prepared, execute(prepared, job, partial(seal_images, prepared.root), reasons))]
