"""`pixart inspect`: what is at a path, in words: a dataset, a feature set, captions, a report, a run, a shard."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.config import Inspect
from jobs.datasets import describe, short
from pixart_data import selection
from pixart_data.archives import read_seal
from pixart_data.bundles import read_bundle
from pixart_data.captions import caption_files
from pixart_data.commits import COMMITS, MANIFEST, read_records, read_table
from pixart_data.errors import ConfigError, DataError
from pixart_data.pages import DOCTYPE, printable
from pixart_data.shards import MEMBER, feature_sets
from pixart_data.storage import exists, local_copy, location, matching, read_bytes
from pixart_data.verdicts import GATE, Verdicts

_META = "meta.json"
_CONVERTED = ("model.safetensors", "model.pth", "model.pt")  # by `pixart convert`
_NULL = {"own_length": "that of the empty string", "caption_length": "the reference's table, cut at their length"}
_TEXT_WIDTH = 100
_MOST_HEADER_BYTES = 1 << 20
_ROWS_LOOKED_AT = 10_000  # for samples to show


def inspect(job: Inspect, dry_run: bool) -> None:
    """Print what a path holds; `dry_run` says only which kind of thing it is.

    Raises:
        ConfigError: If there is nothing at the path, a page is asked for of what is no dataset, or would take the place
            of something else.
        DataError: If it is nothing that the toolkit writes, or damaged.
    """
    path = location(job.path)
    sets = feature_sets(path)
    kind, lines = _look_at_sets(path, sets, job) if sets else _look(path, job.num_samples)
    if job.html is not None and not sets:
        raise ConfigError(f"html: expected a dataset to make a page of, found {kind} at {path}; leave --html out")
    if job.html is not None:
        _require_free(location(job.html), path)
    print(f"{path}: {kind}")
    if not dry_run:
        for line in lines:
            print("\n".join(map(printable, line.split("\n"))))  # captions, keys and the like are other people's words


def _require_free(page: Path, dataset: Path) -> None:
    """Refuse to write a page over anything but a page, or into the dataset.

    Raises:
        ConfigError: If it would be.
    """
    if f"{page.resolve()}/".startswith(f"{dataset.resolve()}/"):
        raise ConfigError(f"html: expected a file outside the dataset {dataset}, found {page}; choose another")
    if page.is_dir():
        raise ConfigError(f"html: expected a file, found the folder {page}; add a name, such as {page / 'page.html'}")
    if exists(page) and not read_bytes(page).startswith(DOCTYPE.encode()):
        raise ConfigError(
            f"html: expected a new file or a page to replace, found {page}, which is neither; choose another"
        )


def _look_at_sets(path: Path, sets: dict[str, Path], job: Inspect) -> tuple[str, Iterator[str]]:
    unfinished = [p.parent for p in matching(path, f"*/{COMMITS}") if p.parent not in sets.values()]
    return f"{len(sets)} feature set(s)", describe(path, sets, unfinished, job)


def _look(path: Path, num_samples: int) -> tuple[str, Iterator[str]]:
    """Return the kind of thing at a path and, lazily, its description."""
    if path.is_file():
        return _look_at_file(path, num_samples)
    if (path / _META).is_file() or any(path.glob(f"step_*/{_META}")):
        return "checkpoint", _checkpoint(path)
    if (path / "config.json").is_file() or (path / "transformer" / "config.json").is_file():
        return "weights", _weights(path)
    if any((path / name).is_file() for name in _CONVERTED):
        return "weights", _weights(path)
    if (path / "stats.json").is_file():
        return "noun statistics", _statistics(path / "stats.json")
    if (path / COMMITS).is_dir() or (path / "job.toml").is_file():
        return _look_at_commits(path, num_samples)
    raise DataError(f"{path}: nothing here that pixart wrote; expected a dataset, captions, a report or a run")


def _look_at_commits(path: Path, num_samples: int) -> tuple[str, Iterator[str]]:
    if not (path / MANIFEST).is_file():
        records = read_records(path)
        return f"unfinished, {len(records)} shards are done", iter(())
    fetched = read_seal(path)
    if fetched is not None:
        return "fetched images", _fetched([path / rows["path"] for rows in fetched["rows"]], num_samples)
    if selection.is_selection(path):
        return "kept images", _kept(path, num_samples)
    verdicts = Verdicts.in_records(read_records(path).values())
    return "captions", _captions([location(file.path) for file in caption_files(path, "path")], verdicts, num_samples)


def _kept(path: Path, num_samples: int) -> Iterator[str]:
    kept = selection.read_selection(path)
    yield f"  {kept.rows_in:,} measured, {kept.rows_out:,} kept, in {len(kept.parts)} part(s)"
    yield from _rejected(path / kept.rejected_file.path, num_samples)


def _look_at_file(path: Path, num_samples: int) -> tuple[str, Iterator[str]]:
    if path.suffix == ".parquet":
        return "Parquet table", _table(path, num_samples)
    if path.suffix == ".tar":
        return "tar", _tar(path, num_samples)
    if path.name == "stats.json":
        return "noun statistics", _statistics(path)
    if path.suffix in (".pth", ".pt", ".safetensors"):
        return "weights", _weights(path)
    raise DataError(
        f"{path}: expected a folder, a .parquet, .tar, .pth, .pt or .safetensors, or a stats.json; nothing else can be "
        "inspected"
    )


def _captions(paths: list[Path], verdicts: Verdicts, num_samples: int) -> Iterator[str]:
    columns = ["status", "error", "finish_reason", "model", "num_tokens"]
    table = pa.concat_tables([read_table(path, columns=columns) for path in paths])
    num_good = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
    yield f"  {table.num_rows:,} rows in {len(paths)} part(s): {num_good:,} captioned"
    for name in ("error", "finish_reason", "model"):
        counts = _tally(table[name])
        if counts:
            yield f"  {name:14} {counts}"
    if num_good:
        yield f"  {'tokens':14} {_spread(table['num_tokens'])}"
    if verdicts.num_judged:
        yield f"  {'gate':14} {verdicts.line().removeprefix('gate: ')}"
    shown = Counter[str]()
    for row in (row for path in paths for row in read_table(path).to_pylist()):
        if shown[row["status"]] < num_samples:
            yield from _caption(row)
        shown[row["status"]] += 1
        if min(shown["ok"], shown["rejected"]) >= num_samples or shown.total() > _ROWS_LOOKED_AT:
            return


def _caption(row: dict[str, Any]) -> Iterator[str]:
    if row["status"] == "rejected":
        yield f"  {row['key']}: rejected, {row['error']}: {row['detail']}"
        return
    yield f"  {row['key']} ({row['width_px']} x {row['height_px']} px{_ops(row['image_ops'])})"
    yield f"    raw      {short(row['raw_caption'])}"
    yield f"    caption  {short(row['caption'])}"
    if row.get(GATE):
        yield f"    gate     fails: {', '.join(row[GATE])}; asked {row['num_attempts']} time(s)"
    for name in (name for name in row if name.startswith("caption_")):
        yield f"    {name.removeprefix('caption_'):8} {short(row[name])}"


def _fetched(paths: list[Path], num_samples: int) -> Iterator[str]:
    columns = ["key", "url", "error", "detail", "format", "size_bytes", "width_px", "height_px"]
    table = pa.concat_tables([read_table(path, columns=columns) for path in paths])
    bad = table.filter(pc.is_valid(table["error"]))
    size_gb = (pc.sum(table["size_bytes"]).as_py() or 0) / 1e9
    num_good = table.num_rows - bad.num_rows
    yield f"  {table.num_rows:,} URLs in {len(paths)} units: {num_good:,} images, {size_gb:,.2f} GB"
    for name in ("error", "format"):
        if counts := _tally(table[name]):
            yield f"  {name:14} {counts}"
    for row in table.filter(pc.is_null(table["error"])).slice(0, num_samples).to_pylist():
        yield f"  {row['key']}: {row['width_px']} x {row['height_px']} px {row['format']}, {short(row['url'])}"
    for row in bad.slice(0, num_samples).to_pylist():
        yield f"  {row['key']}: rejected, {row['error']}: {row['detail']}, {short(row['url'])}"


def _rejected(path: Path, num_samples: int) -> Iterator[str]:
    table = read_table(path)
    if table.num_rows:
        yield f"  rejected {_tally(table['error'])}"
    for row in table.slice(0, num_samples).to_pylist():
        yield f"    {row['key']}: {row['error']}: {row['detail']}"


def _statistics(path: Path) -> Iterator[str]:
    from pixart_data.corpora import from_json
    from pixart_data.reports import terminal_table

    try:
        yield terminal_table(from_json(json.loads(read_bytes(path))))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run `pixart stats` again") from error
    if exists(path.parent / MANIFEST):
        yield ""
        for file in read_bundle(path.parent):
            yield f"  {file.path}, {file.size_bytes:,} bytes"
    records = read_records(path.parent).values()
    for folder, what in (
        ("counts", "nouns and how often they occur"),
        ("measures", "the quality of each caption"),
        ("drawn", "rows that the gallery may show"),
    ):
        files = [file for record in records for file in record.files if file.path.startswith(f"{folder}/")]
        if files:
            size_bytes = sum(file.size_bytes for file in files)
            yield f"  {folder}/*.parquet, {len(files)} part(s), {size_bytes:,} bytes: {what}"


def _checkpoint(path: Path) -> Iterator[str]:
    from pixart_model.checkpoint import find, read_meta

    found = find(path)
    meta = read_meta(found)
    size_bytes = sum(file.stat().st_size for file in found.rglob("*") if file.is_file())
    yield f"  checkpoint {found}, step {meta.step:,}, {size_bytes:,} bytes"
    yield f"  model      {', '.join(f'{key} {value}' for key, value in meta.model.items())}"
    for kind in ("image", "text"):
        if kind not in meta.features:  # a model of classes
            continue
        model = meta.features[kind]["model"]
        yield f"  {kind:10} features of {model.get('id', 'unknown')}"
    if meta.null_caption is not None:
        yield f"  dropped    captions become {_NULL.get(meta.null_caption, meta.null_caption)}"
    yield f"  trained on {', '.join(f'{key} {value}' for key, value in meta.features['counts'].items())}"
    yield f"  goes on    {', '.join(f'{key} {value}' for key, value in meta.position.items())}"
    yield f"  written by {', '.join(f'{key} {value}' for key, value in meta.world.items())}"
    yield f"  versions   {', '.join(f'{key} {value}' for key, value in meta.versions.items())}"


def _weights(path: Path) -> Iterator[str]:
    from pixart_model.nulls import is_repeated
    from pixart_model.shapes import HEADS
    from pixart_model.weights import read

    found = read(path, given={"heads": 1})  # nothing is computed with them
    unread = {"num_classes"} if found.config.condition == "caption" else {"caption_width"}
    unread |= {"size", "heads", *found.assumed} | (set() if found.config.kv_compression else {"kv_compression_factor"})
    config = found.config.model_dump(exclude=unread, exclude_none=True)
    heads = found.config.heads if found.config.heads > 1 else HEADS.get(found.config.width, "not told")
    count = sum(tensor.numel() for tensor in found.tensors.values())
    average = ", the moving average of the weights" if found.is_ema else ""
    yield f"  {count:,} numbers in {len(found.tensors):,} tensors{average}"
    yield f"  model      {', '.join(f'{key} {value}' for key, value in {**config, 'heads': heads}.items())}"
    if found.assumed:
        yield f"  not told   {', '.join(found.assumed)}"
    if found.null_caption is not None or (found.null_table is not None and is_repeated(found.null_table)):
        yield f"  dropped    captions become {_NULL['own_length']}"
    elif found.null_table is not None:
        yield f"  dropped    captions become {_NULL['caption_length']}, {len(found.null_table)} rows"


def _table(path: Path, num_samples: int) -> Iterator[str]:
    with local_copy(path) as copy, pq.ParquetFile(copy) as file:
        yield f"  {file.metadata.num_rows:,} rows"
        for column in file.schema_arrow:
            yield f"  {column.name:20} {column.type}"
        for row in next(iter(file.iter_batches(max(num_samples, 1))), pa.RecordBatch.from_pylist([])).to_pylist():
            yield f"  {short(json.dumps(row, default=str, ensure_ascii=False))}"


def _tar(path: Path, num_samples: int) -> Iterator[str]:
    count = 0
    try:
        with local_copy(path) as copy, tarfile.open(copy) as tar:
            for count, member in enumerate(tar, 1):
                if count <= num_samples:
                    yield f"  {member.name}, {member.size:,} bytes"
                    if member.name.endswith(f".{MEMBER}"):
                        yield from _tensors(tar, member)
    except tarfile.TarError as error:
        raise DataError(f"{path}: unreadable after {count} members: {error}; is it cut off?") from error
    yield f"  {count:,} members in all"


def _tensors(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[str]:
    """Name the tensors of a safetensors member from its header."""
    file = tar.extractfile(member)
    if file is None:
        return
    try:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _MOST_HEADER_BYTES)))
        tensors = {name: fact for name, fact in header.items() if name != "__metadata__"}
        for name, fact in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            yield f"    {name:12} {fact['dtype']:5} {tuple(fact['shape'])}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"    damaged: its safetensors header cannot be read ({error}); `pixart verify` of its dataset says more"


def _tally(column: pa.ChunkedArray) -> str:
    counts = column.drop_null().value_counts().to_pylist()
    return ", ".join(f"{count['values']} {count['counts']:,}" for count in counts)


def _spread(column: pa.ChunkedArray) -> str:
    return f"{pc.min(column).as_py()} to {pc.max(column).as_py()}, mean {pc.mean(column).as_py():.1f}"


def _ops(ops: str | None) -> str:
    return f", {ops}" if ops else ""
