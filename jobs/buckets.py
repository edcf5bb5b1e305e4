"""`pixart buckets`: a table of buckets for the sizes of a pile of images, and what each choice loses."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.config import Buckets
from pixart_data.buckets import Bucket, bucket_table, custom_table, size_name
from pixart_data.errors import ConfigError
from pixart_data.proposals import Losses, candidates, losses, propose
from pixart_data.sizes import Origin, Sizes, find_origins, read_sizes

WORTH = 0.001
"""More canvases are recommended only where they save more than this share of pixels and time."""

_HEAD = ("table", "used", "cropped", "worst 1%", "enlarged", "waiting", "loss", "rare", "carried", "smallest")
_LEGEND = """\
  used      canvases with images, of all: the shapes that a compiled model is compiled for
  cropped   pixels cut off, the mean over the images; worst 1%: one image in a hundred loses more
  enlarged  images that are smaller than their canvas
  waiting   GPU time in which ranks wait for the one with the largest canvas
  loss      cropped + waiting, by which tables are compared
  rare      images in canvases with less than {global_batch:,} of them, a batch for each GPU
  carried   images that the first epoch leaves over for the second, less than a batch of each canvas
  smallest  images of the rarest canvas in use"""


@dataclass(frozen=True)
class _Choice:
    name: str
    table: tuple[Bucket, ...]
    losses: Losses


def buckets(job: Buckets, dry_run: bool) -> None:
    """Print what tables lose on the images of a job, and the one that is recommended; nothing is written.

    With `dry_run`, print where sizes would be read from.

    Raises:
        ConfigError: If there is nothing with a size, or no table can be made as asked.
        DataError: If a file cannot be read, or no image has a size.
    """
    given = _given(job)
    choices = candidates(job.resolution_px, job.multiple_px, job.min_area, job.max_aspect)
    if not choices:
        raise ConfigError("max_aspect: expected a range with a canvas in it, found none; raise it or lower min_area")
    origins = find_origins(job.paths)
    if dry_run:
        for origin in origins:
            print(f"buckets: would read {_amount(origin, job.every)}: {origin.path}")
        return
    sizes = read_sizes(origins, job.every)
    tables = propose(sizes, choices, max(job.num_buckets), job.num_gpus, _min_images(job, sizes))
    shown = [_choice(job, sizes, name, table) for name, table in given.items()]
    proposed = [_choice(job, sizes, f"{n} canvas{'es' * (n > 1)}", tables[n]) for n in _numbers(job, tables)]
    for line in (*_title(job, origins, sizes), "", *_comparison(shown + proposed), "", *_legend(job), ""):
        print(line)
    for line in (*_notes(job, sizes, tables, choices), *_recommendation(job, shown, proposed)):
        print(line)


def _given(job: Buckets) -> dict[str, tuple[Bucket, ...]]:
    """Return the tables that are there already."""
    tables = {"reference": bucket_table(job.resolution_px)}
    if job.table is not None:
        try:
            tables["yours"] = custom_table(job.table, job.resolution_px)
        except ConfigError as error:
            raise ConfigError(f"table: {str(error).replace('image.resolution_px', 'resolution_px')}") from None
    return tables


def _amount(origin: Origin, every: int) -> str:
    if origin.units:
        return f"the headers of {len(origin.units[::every]):,} of {len(origin.units):,} units"
    return f"the sizes in {len(origin.tables):,} table(s), {origin.kind}"


def _global_batch(job: Buckets) -> int:
    return job.batch_size * job.num_gpus


def _min_images(job: Buckets, sizes: Sizes) -> int:
    """Ask for a batch for each GPU of every canvas, so that few samples are left over; of too few images, nothing."""
    return _global_batch(job) if sizes.num_images >= _global_batch(job) else 0


def _numbers(job: Buckets, tables: dict[int, tuple[Bucket, ...]]) -> list[int]:
    """Return the numbers of canvases to show: those asked for, or else the most that there can be."""
    return [number for number in job.num_buckets if number in tables] or [max(tables)]


def _choice(job: Buckets, sizes: Sizes, name: str, table: tuple[Bucket, ...]) -> _Choice:
    return _Choice(name, table, losses(sizes, table, job.batch_size, job.num_gpus))


# Lines


def _title(job: Buckets, origins: Sequence[Origin], sizes: Sizes) -> Iterator[str]:
    for kind in dict.fromkeys(origin.kind for origin in origins):
        first, *others = (origin.path for origin in origins if origin.kind == kind)
        yield f"{kind}: {first}" + (f" and {len(others):,} more" if others else "")
    about = "about " if job.every > 1 and any(origin.units for origin in origins) else ""
    without = f", {sizes.num_left_out:,} more without a size" if sizes.num_left_out else ""
    yield (
        f"{about}{sizes.num_images:,} images{without}; {job.resolution_px} px, batches of {job.batch_size} on "
        f"{job.num_gpus} GPU(s)"
    )


def _comparison(choices: Sequence[_Choice]) -> Iterator[str]:
    rows = [_HEAD, *(_row(choice) for choice in choices)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    for first, *others in rows:
        cells = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        yield f"{first:{widths[0]}}  {'  '.join(cells)}"


def _row(choice: _Choice) -> tuple[str, ...]:
    lost = choice.losses
    smallest = min(count for count in lost.counts if count)
    shares = (lost.cropped, lost.worst, lost.enlarged, lost.waiting, lost.total, lost.rare, lost.carried)
    used = f"{lost.num_used}/{len(choice.table)}"
    return (choice.name, used, *(f"{100 * share:.2f}%" for share in shares), f"{smallest:,}")


def _legend(job: Buckets) -> list[str]:
    return _LEGEND.format(global_batch=_global_batch(job)).splitlines()


def _notes(
    job: Buckets, sizes: Sizes, tables: dict[int, tuple[Bucket, ...]], choices: Sequence[Bucket]
) -> Iterator[str]:
    missing = [str(number) for number in job.num_buckets if number not in tables]
    if missing:
        why = (
            f"there are {len(choices)} to choose from"
            if int(missing[0]) > len(choices)
            else f"not each could have {_min_images(job, sizes):,} images, or a ratio of its own"
        )
        yield f"no table of {', '.join(missing)} canvases: {why}"
    if sizes.num_images < _global_batch(job):
        yield f"{sizes.num_images:,} image(s) are less than one batch for each GPU: canvases may be as rare as that"
    aspect = sizes.height_px / sizes.width_px
    beyond = int(sizes.count[(aspect > job.max_aspect) | (aspect < 1 / job.max_aspect)].sum())
    if beyond:
        yield (
            f"{beyond:,} image(s) have sides of more than {job.max_aspect:g} : 1 and lose their ends; `pixart filter` "
            f"with filters.max_aspect = {job.max_aspect} leaves them out"
        )


def _recommendation(job: Buckets, shown: Sequence[_Choice], proposed: Sequence[_Choice]) -> Iterator[str]:
    best, proposal = _best([*shown, *proposed]), _best(proposed)
    hint = ": leave image.buckets out" if best is shown[0] else ""
    yield f"recommended: {best.name}, {_lost(best)}{hint}"
    if best is not proposal:
        yield f"best proposal: {proposal.name}, {_lost(proposal)}"
    yield f"  {'canvas':>11}  {'ratio':>5}  {'images':>11}  epochs to a batch"
    for bucket, count in zip(proposal.table, proposal.losses.counts, strict=True):
        epochs = f"{-(-job.batch_size // count):,}" if count else "-"
        yield f"  {size_name(bucket):>11}  {bucket.ratio:>5}  {count:>11,}  {epochs:>17}"
    names = json.dumps([size_name(bucket) for bucket in proposal.table])
    yield from ("", "# for the job file of extract", "[image]", f"resolution_px = {job.resolution_px}")
    yield from (
        f"buckets = {names}",
        f'# set = "{job.resolution_px}px-{len(proposal.table)}" keeps what is in another set',
    )
    yield from (
        "",
        "# or by hand",
        f"--set image.resolution_px={job.resolution_px} \\",
        f"--set 'image.buckets={names}'",
    )


def _best(choices: Sequence[_Choice]) -> _Choice:
    """Return, of those that lose about the least, the one with the fewest shapes; the first of equals."""
    least = min(choice.losses.total for choice in choices)
    return min((c for c in choices if c.losses.total <= least + WORTH), key=lambda c: c.losses.num_used)


def _lost(choice: _Choice) -> str:
    return f"{100 * choice.losses.total:.2f}% lost"
