"""Small sealed datasets, written as `extract` writes them, with features that follow from keys and captions."""

import zlib
from dataclasses import asdict

import numpy as np
import safetensors.numpy

from pipelines.driver import Account
from pipelines.features import FeatureWriter
from pixart_data.commits import file_sha256, write_record
from pixart_data.records import IMAGE_INDEX, TEXT_INDEX, Reason
from pixart_data.seals import seal
from pixart_data.shards import MOMENTS, Manifest
from pixart_data.storage import read_bytes, write_atomic

RATIOS = ("0.50", "1.00", "2.00")
BUCKETS = {"0.50": (16, 32), "1.00": (16, 16), "2.00": (32, 16)}
WIDTH = 4


def numbers(text, count):
    """Values that follow from a text."""
    return np.random.default_rng(zlib.crc32(text.encode())).integers(0, 1 << 15, count, dtype=np.uint16)


def write_images(root, units, flips=False, rejected=(), model=None):
    """Write an image set.

    Args:
        units: (key, ratio) of each sample by unit.
        rejected: Keys of rejected rows, in the last unit.
    """
    records = []
    for number, (unit, samples) in enumerate(units.items()):
        with FeatureWriter(root, unit, MOMENTS) as writer:
            for key, ratio in samples:
                height_px, width_px = BUCKETS[ratio]
                shape = (2, 1, height_px // 8, width_px // 8)
                values, flipped = (
                    numbers(name, np.prod(shape)).view(np.float16).reshape(shape) for name in (key, f"~{key}")
                )
                row = {
                    "key": key, "bucket": ratio, "height_px": height_px, "width_px": width_px,
                    "original_width_px": 2 * width_px + len(key), "original_height_px": 2 * height_px,
                    "resized_width_px": width_px, "resized_height_px": height_px, "crop_left_px": 0, "crop_top_px": 0,
                    "image_ops": "draft2" if len(key) % 2 else "",
                }  # fmt: skip
                writer.add(ratio, [values], row, flipped if flips else None)
            for key in rejected if number == len(units) - 1 else ():
                writer.reject(key, Reason.TRUNCATED_IMAGE, f"{key}: cut off")
            records.append(writer.record(writer.finish(IMAGE_INDEX), {}))
    buckets = [{"ratio": r, "height_px": h, "width_px": w} for r, (h, w) in BUCKETS.items()]
    facts = {"channels": 1, "downsampling": 8, **(model or {})}
    counts = asdict(Account.of(records))
    manifest = Manifest("image", "moments", "F16", facts, {"resize": "cover"}, counts, buckets=buckets)
    return _seal(root, records, IMAGE_INDEX, manifest)


def write_texts(root, units, noise="", null="", calibration=None, measured=None, with_captions=True):
    """Write a text set with a null caption.

    Args:
        units: (key, caption) of each sample by unit; None is rejected. Equal captions of a unit share a member.
        noise: Makes the features of the same captions others; a unit with "~" in its name has features of its own.
        with_captions: False leaves them out of the index, as other tools' sets do.
        calibration: Values of the set's codec, which is int8 then.
    """
    codec, types = {"name": "bf16"}, [("t5", "BF16")]
    if calibration is not None:
        path = root / "codec-1234.safetensors"
        write_atomic(path, safetensors.numpy.save({"channel_scale": np.array(calibration, np.float32)}))
        place = {"path": path.name, "sha256": file_sha256(path)}
        codec, types = {"name": "int8", "group": WIDTH, "calibration": place}, [("t5", "I8"), ("t5_scale", "BF16")]
    codec |= {"measured": measured} if measured else {}
    records, facts = [], {"width": WIDTH}
    for unit, samples in {"null-caption": [], **units}.items():
        with FeatureWriter(root, unit, types) as writer:
            if unit == "null-caption":
                writer.add("shards", _tensors(f"null{null}", 1, codec), {"key": unit, "num_tokens": 1})
                [file] = writer.finish(schema=None)
                place = {name: writer.rows[0][name] for name in ("offset_bytes", "size_bytes", "crc32", "num_tokens")}
                facts["null"] = {"path": file.path, **place}
                writer.rows.clear()
                records.append(writer.record([file], {}))
                continue
            done = {}
            for key, caption in samples:
                if caption is None:
                    writer.reject(key, Reason.NO_CAPTION, "")
                elif caption in done:
                    writer.share(done[caption], key)
                else:
                    num_tokens = 1 + len(caption) % 5
                    values = _tensors(caption + noise + (unit if "~" in unit else ""), num_tokens, codec)
                    row = {
                        "key": key,
                        "caption": caption if with_captions else None,
                        "truncated": False,
                        "num_tokens": num_tokens,
                    }
                    done[caption] = writer.add("shards", values, row)
            records.append(writer.record(writer.finish(TEXT_INDEX), {}))
    manifest = Manifest("text", "t5", "BF16", facts, {"max_tokens": 9}, asdict(Account.of(records)), codec=codec)
    return _seal(root, records, TEXT_INDEX, manifest)


def _tensors(text, num_tokens, codec):
    if codec["name"] == "bf16":
        return [numbers(text, num_tokens * WIDTH).reshape(num_tokens, WIDTH)]
    values = numbers(text, num_tokens * WIDTH).astype(np.uint8).view(np.int8)
    return [values.reshape(num_tokens, WIDTH), numbers(f"{text} scale", num_tokens).reshape(num_tokens, 1)]


def _seal(root, records, schema, manifest):
    for record in records:
        write_record(root, record)
    return seal(root, records, schema, manifest)


def contents(root):
    """What a set holds, whatever its shards are: all of each row but its place, and the bytes of its members."""
    from pixart_data.editions import Original

    original = Original(root)
    shards = {shard["path"]: read_bytes(root / shard["path"]) for shard in original.manifest.shards}
    rows = {}
    for _, table in original.tables():
        for row in table.to_pylist():
            shard, size = shards[row.pop("shard")], row["size_bytes"]
            offsets = [row.pop("offset_bytes"), row.pop("flipped_offset_bytes", None)]
            rows[row["key"]] = (row, [o if o is None else shard[o : o + size] for o in offsets])
    rejected = [row for table in original.rejected() for row in table.to_pylist()]
    null = original.manifest.model.get("null")
    if null:
        start = null["offset_bytes"]
        rejected.append(shards[null["path"]][start : start + null["size_bytes"]])
    return rows, rejected
