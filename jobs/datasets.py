"""What `pixart inspect` says of a dataset, and the page it makes of one."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.config import Inspect
from pixart_data.commits import read_records
from pixart_data.errors import ConfigError
from pixart_data.figures import LatentFigures, TextFigures
from pixart_data.overviews import Overview, overview_page
from pixart_data.remotes import open_set
from pixart_data.shards import INDEX, FeatureSet, Manifest, tensor_shape
from pixart_data.storage import location, write_atomic
from pixart_data.surveys import Match, Survey, match, space, survey
from pixart_data.tables import parquet

if TYPE_CHECKING:
    from pixart_data.thumbnails import Decoder, Thumbnail

log = logging.getLogger(__name__)

_TEXT_WIDTH = 100
_BAR_WIDTH = 20
_MOST_OUTLIERS = 5
_SMALL_SHARE = 0.005  # portions of storage below are gathered


def describe(path: Path, sets: dict[str, Path], unfinished: Sequence[Path], job: Inspect) -> Iterator[str]:
    """Yield what there is to say of a dataset, set by set, and write the page if the job asks for one.

    Raises:
        DataError: If a set's files are damaged or do not belong together.
        JobError: If the storage fails.
    """
    for root in unfinished:
        yield f"\n{root.name}: not finished, {len(read_records(root))} shards are done; run `pixart extract` to its end"
    with ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pixart-inspect-")))
        opened = [open_set(root, cache, 0) for root in sets.values()]
        for features in opened:
            stack.callback(features.close)
        surveys = []
        for features in opened:
            surveys.append(survey(features, max(job.num_samples, 1)))
            yield from _set(features, surveys[-1], job.num_samples)
        matches = _matches(opened)
        if matches:
            yield ""
        for one in matches:
            yield (
                f"{one.images} with {one.texts}: {one.num_both:,} samples train; {one.num_images - one.num_both:,} "
                f"images have no text, {one.num_texts - one.num_both:,} texts no image"
            )
        if job.html is not None:
            page = Overview(str(path), surveys, matches, [root.name for root in unfinished], *_pictures(opened, job))
            write_atomic(location(job.html), overview_page(page).encode())
            yield f"\npage -> {job.html}"


def _of_kind(sets: Sequence[FeatureSet], kind: str) -> list[FeatureSet]:
    return [features for features in sets if features.manifest.kind == kind]


def _matches(sets: Sequence[FeatureSet]) -> list[Match]:
    return [match(images, texts) for images in _of_kind(sets, "image") for texts in _of_kind(sets, "text")]


# In lines


def _set(features: FeatureSet, found: Survey, num_samples: int) -> Iterator[str]:
    manifest, counts = found.manifest, found.manifest.counts
    yield f"\n{found.root.name}: {manifest.kind} features, {counts['rows_out']:,} of {counts['rows_in']:,} samples"
    yield from _rejected(found, num_samples)
    model = manifest.model
    revision = f" @ {model['revision']}" if model.get("revision") else ""
    yield f"  model    {model.get('id', 'unknown')}{revision}, computed in {model.get('dtype', 'unknown precision')}"
    yield f"  policy   {', '.join(f'{key}: {value}' for key, value in manifest.policy.items())}"
    yield from _storage(found)
    if manifest.kind == "image":
        yield from _buckets(found)
        if isinstance(found.figures, LatentFigures):
            yield from _latents(found.figures)
    else:
        yield from _lengths(found)
        if isinstance(found.figures, TextFigures):
            yield from _texts(found.figures)
    for alarm in found.alarms():
        yield f"  ALARM    {alarm}"
    for row in _first_rows(found.root / INDEX, num_samples):
        yield _image(row) if manifest.kind == "image" else _text(row, manifest)


def _rejected(found: Survey, num_samples: int) -> Iterator[str]:
    counts = found.manifest.counts["rejected"]
    if counts:
        yield f"  rejected {', '.join(f'{reason} {count:,}' for reason, count in counts.items())}"
    for rows in found.rejected.values():
        for row in rows[:num_samples]:
            yield f"    {row['key']}: {row['error']}: {row['detail']}"


def _storage(found: Survey) -> Iterator[str]:
    shards = found.manifest.shards
    mean = f", {space(sum(s['size_bytes'] for s in shards) / len(shards))} on average" if shards else ""
    yield f"  shards   {len(shards):,}, {sum(shard['size_bytes'] for shard in shards):,} bytes{mean}"
    if found.small_shards:
        yield (
            f"           {found.small_shards:,} are small; to gather them: `pixart compact {found.root.parent} --out "
            "FOLDER`"
        )
    each = f", {found.size_bytes / found.num_rows:,.0f} bytes a sample" if found.num_rows else ""
    yield f"  storage  {space(found.size_bytes)}{each}"
    rest = 0
    for portion in (*found.shards, *found.tables):
        share = portion.size_bytes / max(found.size_bytes, 1)
        if share < _SMALL_SHARE:
            rest += portion.size_bytes
        else:
            yield f"    {portion.what:32} {portion.size_bytes:>18,} {share:7.1%}  {_bar(share)}".rstrip()
    if rest:
        yield f"    {'others':32} {rest:>18,} {rest / found.size_bytes:7.1%}"


def _buckets(found: Survey) -> Iterator[str]:
    manifest = found.manifest
    held = [bucket for bucket in manifest.buckets if bucket["rows"]]
    most = max((bucket["rows"] for bucket in held), default=1)
    yield f"  scaling  {manifest.model.get('scaling_factor', 'unknown')}, not applied to what is stored"
    if found.totals.num_flipped:
        yield f"  mirrored {found.totals.num_flipped:,} images are stored mirrored, too"
    yield f"  {'bucket':8} {'height x width':>15} {'samples':>11} {'shards':>7}   {manifest.tensor} {manifest.dtype}"
    for bucket in held:
        sides = f"{bucket['height_px']} x {bucket['width_px']} px"
        shape = str(tensor_shape(bucket, manifest))
        rows = f"{bucket['rows']:>11,} {bucket['shards']:>7,}   {shape:18}"
        yield f"  {bucket['ratio']:8} {sides:>15} {rows} {_bar(bucket['rows'] / most)}".rstrip()


def _latents(figures: LatentFigures) -> Iterator[str]:
    yield (
        f"  latents  of {figures.num_samples:,} images, times the scaling factor; training expects a mean near 0 and a "
        "std near 1"
    )
    if not figures.num_used:
        return
    yield f"    {'channel':>7} {'mean':>8} {'std':>8} {'min':>8} {'max':>8} {'posterior std':>14}"
    posterior = figures.posterior_std * figures.scaling_factor
    columns = [figures.scaled(figures.mean), figures.scaled_std, figures.scaled(figures.least)]
    columns += [figures.scaled(figures.most), posterior]
    for number, (mean, std, least, most, noise) in enumerate(zip(*columns, strict=True)):
        yield f"    {number:>7} {mean:>8.3f} {std:>8.3f} {least:>8.2f} {most:>8.2f} {noise:>14.4f}"


def _lengths(found: Survey) -> Iterator[str]:
    totals, manifest = found.totals, found.manifest
    if found.num_rows:
        lengths = totals.lengths
        spread = ", ".join(f"{totals.percentile(share)} at {share:.0%}" for share in (0.05, 0.5, 0.95))
        least, most = int(lengths.nonzero()[0][0]), len(lengths) - 1
        yield f"  tokens   {least} to {most}, {spread}; {found.num_truncated:,} captions truncated"
        yield from _histogram(lengths.tolist(), least)
    if found.num_rows > totals.num_members:
        yield f"  shared   {found.num_rows - totals.num_members:,} rows share the features of an equal caption"
    codec, measured = manifest.codec, manifest.codec.get("measured")
    lost = ""
    if measured:
        lost = (
            f": channel error {measured['channel_error']:.2%}, of the worst channel "
            f"{measured['worst_channel_error']:.2%}, cosine {measured['cosine_mean']:.5f}, at worst "
            f"{measured['cosine_lowest']:.5f}; measured on {measured['num_tokens']:,} tokens"
        )
    yield f"  codec    {codec.get('name', 'bf16')}{lost}"
    null = manifest.model.get("null")
    if null:
        yield f"  null     the empty caption, {null['num_tokens']} token(s), in {null['path']}"


def _histogram(lengths: Sequence[int], least: int) -> Iterator[str]:
    """Ten lines at most."""
    step = max(1, -(-(len(lengths) - least) // 10))
    groups = [(start, sum(lengths[start : start + step])) for start in range(least, len(lengths), step)]
    most = max(count for _, count in groups)
    for start, count in groups:
        label = f"{start}-{min(start + step, len(lengths)) - 1}" if step > 1 else f"{start}"
        yield f"    {label:>9} {count:>11,}  {_bar(count / most)}".rstrip()


def _texts(figures: TextFigures) -> Iterator[str]:
    rms = figures.token_rms
    if not len(rms):
        return
    low, median, high = (float(rms[int(share * (len(rms) - 1))]) for share in (0.05, 0.5, 0.95))
    yield (
        f"  values   of {figures.num_samples:,} captions: rms of a token {median:.3g} ({low:.3g} at 5%, {high:.3g} at "
        f"95%), {figures.zero_share:.2%} zero vectors"
    )
    outliers = figures.outliers()
    if outliers:
        named = ", ".join(f"{channel} ({ratio:.0f} times)" for channel, ratio in outliers[:_MOST_OUTLIERS])
        more = f" and {len(outliers) - _MOST_OUTLIERS} more" if len(outliers) > _MOST_OUTLIERS else ""
        yield f"           channels far larger than the median one: {named}{more}"


def _first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    if not count:
        return []
    with parquet(path) as file:
        return next((batch.to_pylist() for batch in file.iter_batches(count)), [])


def _image(row: dict[str, Any]) -> str:
    known = row["original_width_px"] is not None  # other tools may not have told
    original = f"{row['original_width_px']} x {row['original_height_px']} px" if known else "original size unknown"
    ops = f", {row['image_ops']}" if row["image_ops"] else ""
    return f"  {row['key']}: {original}{ops} -> {row['bucket']}, {row['shard']} at {row['offset_bytes']}"


def _text(row: dict[str, Any], manifest: Manifest) -> str:
    return f"  {row['key']}: {manifest.tensor} {manifest.dtype} {tensor_shape(row, manifest)}, {short(row['caption'])}"


def short(text: Any) -> str:
    """Return a text on one line that is not too long; a dash for none."""
    if text is None:
        return "-"
    line = " ".join(str(text).split())
    return line if len(line) <= _TEXT_WIDTH else line[: _TEXT_WIDTH - 3] + "..."


def _bar(share: float) -> str:
    return "#" * round(share * _BAR_WIDTH)


# Pictures


def _pictures(sets: Sequence[FeatureSet], job: Inspect) -> "tuple[dict[str, list[Thumbnail]], str]":
    """Return samples by image set, and why they are without pictures if they are."""
    from pixart_data.thumbnails import thumbnails

    images, texts = _of_kind(sets, "image"), _of_kind(sets, "text")
    if not images or not job.num_pictures:
        return {}, ""
    count = max(1, job.num_pictures // len(images))
    found: dict[str, list[Thumbnail]] = {}
    why = ""
    for features in images:
        decoder: Decoder | None = None
        try:
            decoder = _decoder(features.manifest.model, job)
            log.info("inspect: decoding %d pictures of %s", min(count, len(features)), features.root)
        except ConfigError as error:
            why = (
                f"{error}. To see pictures, name a copy of the VAE: pixart inspect {job.path} --html {job.html} "
                "--set vae=FOLDER"
            )
            log.warning("inspect: no pictures of %s: %s", features.root, error)
        found[features.root.name] = thumbnails(features, texts, decoder, count)
    return found, why


def _decoder(model: dict[str, Any], job: Inspect) -> "Decoder":
    from pixart_data.thumbnails import Decoder

    if not job.vae and "id" not in model:
        raise ConfigError("vae: expected the manifest to name the model that made the latents, found none")
    return Decoder(model, job.vae, job.vae_subfolder, job.device)
