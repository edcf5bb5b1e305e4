"""A campaign of corruptions: a small dataset damaged in a thousand ways, one at a time.

Each must be found by `pixart verify`; what is then read from the dataset must be what was written, or an error, and so
must what other commands make of it (tests/commands.py), of which a part of the corruptions is tried. Kinds:
a flipped bit anywhere, a file cut short, swapped members and shards, a missing file, index or entries of another time,
the manifest of another time or set. Run all of it with `python -m tests.corruption`.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from pipelines.features import FeatureWriter
from pixart_data import codecs
from pixart_data.commits import MANIFEST, Record, file_sha256, write_record
from pixart_data.entries import ENTRIES
from pixart_data.errors import DataError
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX, Reason
from pixart_data.seals import seal
from pixart_data.shards import (
    INDEX,
    MOMENTS,
    REJECTED_FILE,
    Manifest,
    manifest_bytes,
    read_manifest,
)
from pixart_data.verification import verify
from pixart_model.config import Data
from pixart_model.dataset import open_dataset
from tests.commands import Commands

WIDTH = 8
SIDES_PX = {"0.22": (16, 72), "0.50": (24, 48), "2.00": (48, 24)}  # tensors of one size in bytes
TABLE = ("0.50", "2.00")
UNITS = ("a", "b")
COMMANDS_EVERY = 3
SAMPLES_PER_UNIT = 6
MODEL = {"id": "vae", "revision": "abc", "scaling_factor": 0.18215, "channels": 4, "downsampling": 8}
T5 = {"id": "t5", "revision": "abc", "width": WIDTH, "dtype": "float32"}
CALIBRATION = "codec-0a1b2c3d.safetensors"
SETS = {"text": "bf16", "short": "int8", "packed": "bf16-packed"}


# The dataset


def build(
    root: Path, seed: int = 0, units: tuple[str, ...] = UNITS, table: tuple[str, ...] = TABLE, larger_px: int = 0
) -> Path:
    """Write a dataset of twelve samples: an image set with flips, and text sets of every codec with shared captions."""
    rng = np.random.default_rng(seed)
    _build_images(root / "256px", rng, units, table, larger_px)
    for name, codec in SETS.items():
        _build_texts(root / name, rng, units, codec)
    return root


def keys(unit: str) -> list[str]:
    return [f"{unit}/{number}" for number in range(SAMPLES_PER_UNIT)]


def _build_images(
    root: Path, rng: np.random.Generator, units: tuple[str, ...], table: tuple[str, ...], larger_px: int
) -> None:
    records = []
    for unit in units:
        with FeatureWriter(root, unit, MOMENTS) as writer:
            for number, key in enumerate(keys(unit)):
                ratio = TABLE[number % 2]
                height_px, width_px = SIDES_PX[ratio]
                moments = rng.standard_normal((2, 2, 4, height_px // 8, width_px // 8)).astype(np.float16)
                sizes = {"original_height_px": height_px + number + larger_px}
                sizes["original_width_px"] = width_px + 2 * number
                row = {"key": key, "bucket": ratio, "height_px": height_px, "width_px": width_px, **sizes}
                writer.add(ratio, [moments[0]], row, moments[1] if number < 5 else None)
            writer.reject(f"{unit}/bad", Reason.ZERO_BYTES, "of no bytes")
            records.append(writer.record(writer.finish(IMAGE_INDEX), MODEL))
    buckets = [{"ratio": r, "height_px": SIDES_PX[r][0], "width_px": SIDES_PX[r][1]} for r in table]
    manifest = Manifest("image", "moments", "F16", MODEL, {"resolution_px": 256}, _counts(records), buckets=buckets)
    _finish(root, records, IMAGE_INDEX, manifest)


def _build_texts(root: Path, rng: np.random.Generator, units: tuple[str, ...], name: str) -> None:
    def features(num_tokens: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((num_tokens, WIDTH))).bfloat16()

    codec = codecs.calibrate(name, [features(9)])
    facts: dict = {"name": name}
    if codec.calibration():
        root.mkdir(parents=True)
        (root / CALIBRATION).write_bytes(safetensors.torch.save(codec.calibration()))
        facts["calibration"] = {"path": CALIBRATION, "sha256": file_sha256(root / CALIBRATION)}
    with FeatureWriter(root, "null-caption", codec.tensors) as writer:
        writer.add("shards", codec.encode(features(1)), {"key": "null-caption", "num_tokens": 1})
        [file] = writer.finish(schema=None)
        null = {n: writer.rows[0][n] for n in ("offset_bytes", "size_bytes", "crc32", "num_tokens")}
    records = [Record("null-caption", "", {}, 0, 0, {}, [file], facts={"null": {"path": file.path, **null}})]
    for unit in units:
        with FeatureWriter(root, unit, codec.tensors) as writer:
            for number, key in enumerate(keys(unit)[:-2]):
                row = {"key": key, "num_tokens": 1 + number, "caption": f"caption {number}", "truncated": False}
                added = writer.add("shards", codec.encode(features(1 + number)), row)
            for key in keys(unit)[-2:]:  # these have the caption of the one before
                writer.share(added, key)
            records.append(writer.record(writer.finish(TEXT_INDEX), T5))
    model = {**T5, "null": records[0].facts["null"]}
    _finish(root, records, TEXT_INDEX, Manifest("text", "t5", "BF16", model, {}, _counts(records), codec=facts))


def _counts(records: list[Record]) -> dict:
    rejected = sum((Counter(record.rejected) for record in records), Counter())
    rows_in, rows_out = (sum(getattr(record, name) for record in records) for name in ("rows_in", "rows_out"))
    return {"rows_in": rows_in, "rows_out": rows_out, "rejected": dict(rejected)}


def _finish(root: Path, records: list[Record], schema, manifest: Manifest) -> None:
    records = [replace(record, digest="0" * 64, settings={"shard": record.unit}) for record in records]
    for record in records:
        write_record(root, record)
    seal(root, records, schema, manifest)


# Reading, as training does


def read_all(root: Path, plans: Path) -> dict[tuple[str, int], list[np.ndarray]]:
    """Read an epoch of every text set with the images: of each batch the tensors and what conditions the model.

    Mirrored images come with the last text set. `plans` is the folder of joined plans, which may be there from before.
    """
    found = {}
    for name in SETS:
        flip = float(name == list(SETS)[-1])
        data = Data(features=str(root), text_set=name, batch_size=1, flip=flip, cache_dir=str(plans))
        dataset = open_dataset(data, seed=0)
        try:
            found[name, -1] = [_array(dataset.null_caption())]
            for step in range(len(UNITS) * SAMPLES_PER_UNIT):
                batch = dataset.read(step).to(torch.device("cpu"))
                tensors = (batch.moments, batch.text, batch.mask, batch.size_px, batch.ratio)
                found[name, step] = [_array(tensor) for tensor in tensors]
        finally:
            dataset.close()
    return found


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# The corruptions


@dataclass(frozen=True)
class Corruption:
    """What is done to a dataset: the new contents of some of its files, None for one that goes missing."""

    kind: str
    what: str
    files: dict[Path, bytes | None]


class Campaign:
    """A dataset, others that resemble it, and what reading it gives."""

    def __init__(self, folder: Path) -> None:
        self.root = build(folder / "dataset")
        self.others = {
            "older": build(folder / "older", seed=1),
            "smaller": build(folder / "smaller", units=UNITS[:1]),
            "other sizes": build(folder / "sizes", larger_px=1),
            "other table": build(folder / "table", table=("0.22", *TABLE)),
        }
        self.contents = {path: path.read_bytes() for path in sorted(self.root.rglob("*")) if path.is_file()}
        self.commands = Commands(self.root, shutil.copytree(self.root, folder / "whole"), folder)
        self.plans = folder / "plans"
        self.samples = read_all(self.root, self.plans)

    def corruption(self, seed: int) -> Corruption:
        """Return the corruption of a seed; it changes something."""
        rng = random.Random(seed)
        makers = (_flip, _flip, _flip, _truncate, _swap_members, _swap_shards, _remove, _stale_table, _wrong_manifest)
        while True:
            made = rng.choice(makers)(self, rng)
            if any(self.contents[path] != content for path, content in made.files.items()):
                return made

    def undetected(self, made: Corruption) -> list[str]:
        """Return what is wrong with what verifying and reading say of a corruption."""
        with self._applied(made):
            return [*self._verified(), *self._read(made.files)]

    def misused(self, made: Corruption) -> list[str]:
        """Return what is wrong with what other commands do with a corruption."""
        with self._applied(made):
            return list(self.commands.complaints(next(iter(made.files))))

    @contextlib.contextmanager
    def _applied(self, made: Corruption) -> Iterator[None]:
        try:
            for path, content in made.files.items():
                path.unlink() if content is None else path.write_bytes(content)
            yield
        finally:
            for path in made.files:
                path.write_bytes(self.contents[path])

    def _verified(self) -> Iterator[str]:
        if not any(finding.problem for finding in verify(self.root)):
            yield "verify found nothing"

    def _read(self, files: Iterable[Path]) -> Iterator[str]:
        """Read with the plan that was made before the damage; where a new one would be another, with that too."""
        yield from self._read_with(self.plans)
        if any(path.name in (MANIFEST, ENTRIES) for path in files):
            with tempfile.TemporaryDirectory(dir=self.plans.parent) as fresh:
                yield from self._read_with(Path(fresh))

    def _read_with(self, plans: Path) -> Iterator[str]:
        try:
            found = read_all(self.root, plans)
        except DataError:
            return
        if found.keys() != self.samples.keys():
            yield "reading gave other samples"
        for key in found.keys() & self.samples.keys():
            same = zip(found[key], self.samples[key], strict=True)
            if not all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in same):
                yield f"reading gave other values of {key[0]} {key[1]}"


def _flip(campaign: Campaign, rng: random.Random) -> Corruption:
    path = rng.choice(list(campaign.contents))
    data = bytearray(campaign.contents[path])
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return Corruption("flipped bit", f"bit {bit} of {path}", {path: bytes(data)})


def _truncate(campaign: Campaign, rng: random.Random) -> Corruption:
    path = rng.choice(list(campaign.contents))
    size_bytes = rng.randrange(len(campaign.contents[path]))
    return Corruption("cut short", f"{path} to {size_bytes}", {path: campaign.contents[path][:size_bytes]})


def _shards(campaign: Campaign, rng: random.Random, count: int) -> list[Path]:
    """Choose shards, all of one set."""
    folder = campaign.root / rng.choice(("256px", *SETS))
    shards = [path for path in campaign.contents if path.suffix == ".tar" and path.is_relative_to(folder)]
    return rng.sample([path for path in shards if "null" not in path.name], count)


def _swap_members(campaign: Campaign, rng: random.Random) -> Corruption:
    """Swap two members of a shard: whole, headers included, or their tensors alone."""
    [path] = _shards(campaign, rng, 1)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    pairs = [(a, b) for a in members for b in members if a.offset < b.offset and a.size == b.size]
    if not pairs:  # captions of different lengths: exchange their places, and with them all that lies between
        pairs = [(a, b) for a in members for b in members if a.offset < b.offset]
    data = campaign.contents[path]
    first, second = rng.choice(pairs)
    begin = "offset" if rng.random() < 0.5 else "offset_data"
    spans = [(getattr(m, begin), m.offset_data + -(-m.size // 512) * 512) for m in (first, second)]
    (a, b), (c, d) = spans
    swapped = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
    return Corruption("swapped members", f"{first.name} and {second.name} of {path}", {path: swapped})


def _swap_shards(campaign: Campaign, rng: random.Random) -> Corruption:
    first, second = _shards(campaign, rng, 2)
    files: dict[Path, bytes | None] = {first: campaign.contents[second], second: campaign.contents[first]}
    return Corruption("swapped shards", f"{first} and {second}", files)


def _remove(campaign: Campaign, rng: random.Random) -> Corruption:
    path = rng.choice(list(campaign.contents))
    return Corruption("missing file", str(path), {path: None})


def _stale_table(campaign: Campaign, rng: random.Random) -> Corruption:
    """Put the index, the entries, the rejected rows, or several of them, of another dataset in place of the set's."""
    other = rng.choice(list(campaign.others))
    folder = rng.choice(("256px", *SETS))
    names = rng.choice(([INDEX], [ENTRIES], [INDEX, ENTRIES], [INDEX, ENTRIES, REJECTED_FILE]))
    files = {campaign.root / folder / n: (campaign.others[other] / folder / n).read_bytes() for n in names}
    return Corruption("stale index", f"{' and '.join(names)} of {folder} from the {other} one", files)


def _wrong_manifest(campaign: Campaign, rng: random.Random) -> Corruption:
    """Put another manifest in place of a set's: another dataset's, another set's, or an edited one."""
    folder = rng.choice(("256px", *SETS))
    path = campaign.root / folder / MANIFEST
    choice = rng.choice(("other dataset", "other set", "edited", "edited and signed"))
    if choice == "other dataset":
        source = campaign.others[rng.choice(list(campaign.others))] / folder / MANIFEST
        return Corruption("wrong manifest", f"{path}: {source}", {path: source.read_bytes()})
    if choice == "other set":
        source = campaign.root / rng.choice(("256px", *SETS)) / MANIFEST
        return Corruption("wrong manifest", f"{path}: {source}", {path: campaign.contents[source]})
    manifest = read_manifest(campaign.root / folder)
    edit = rng.choice(_EDITS)
    edited = edit(manifest, rng)
    if choice == "edited":
        fields = json.loads(campaign.contents[path]) | asdict(edited)
        return Corruption("wrong manifest", f"{path}: {edit.__name__}", {path: json.dumps(fields).encode()})
    return Corruption("wrong manifest", f"{path}: {edit.__name__}, signed", {path: manifest_bytes(edited)})


def _other_order(manifest: Manifest, rng: random.Random) -> Manifest:
    return replace(manifest, shards=manifest.shards[::-1])


def _fewer_shards(manifest: Manifest, rng: random.Random) -> Manifest:
    return replace(manifest, shards=manifest.shards[:-1])


def _other_rows(manifest: Manifest, rng: random.Random) -> Manifest:
    return replace(manifest, counts={**manifest.counts, "rows_out": manifest.counts["rows_out"] + 1})


def _other_checksum(manifest: Manifest, rng: random.Random) -> Manifest:
    name = rng.choice(("index_sha256", "entries_sha256", "rejected_sha256"))
    return replace(manifest, **{name: "0" * 64})


_EDITS: tuple[Callable[[Manifest, random.Random], Manifest], ...] = (
    _other_order, _fewer_shards, _other_rows, _other_checksum,
)  # fmt: skip


def run(campaign: Campaign, seeds: Sequence[int], commands_every: int = 0) -> tuple[Counter[str], list[str]]:
    """Try the corruptions of some seeds; return how many there were of each kind, and what went undetected.

    Args:
        commands_every: Of so many corruptions, one is tried with all commands; 0: none.
    """
    kinds: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        made = campaign.corruption(seed)
        kinds[made.kind] += 1
        problems = campaign.undetected(made)
        problems += campaign.misused(made) if commands_every and seed % commands_every == 0 else []
        failures += [f"seed {seed}, {made.kind}, {made.what}: {problem}" for problem in problems]
    return kinds, failures


def main() -> int:
    """Run the campaign and say how it went."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--first-seed", type=int, default=0)
    args = options.parse_args()
    memory = Path("/dev/shm")
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        campaign = Campaign(Path(folder))
        failures = [f"undamaged: {finding}" for finding in verify(campaign.root) if finding.problem]
        kinds, undetected = run(campaign, range(args.first_seed, args.first_seed + args.count), COMMANDS_EVERY)
        failures += undetected
    for failure in failures:
        sys.stdout.write(f"{failure}\n")
    told = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    took = f"{kinds.total()} corruptions in {time.monotonic() - started_s:.0f} s"
    sys.stdout.write(f"{took} ({told}): {len(failures)} undetected\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
