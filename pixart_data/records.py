"""The columns of every table the toolkit writes: names, types and units, in one place.

Keys name a sample across all tables: `<source>/<path without extension>`, percent-encoded so that a key holds no dot
and can be a member name in a WebDataset tar. A row with an `error` is a rejected row; its other columns may be null.
"""

from enum import StrEnum

import pyarrow as pa

SCHEMA_VERSION = 1


class Reason(StrEnum):
    """Why a row was rejected. The `detail` column says more."""

    MISSING_FILE = "missing_file"
    ZERO_BYTES = "zero_bytes"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MODE = "unsupported_mode"
    NO_IMAGE = "no_image"
    UNREADABLE_TAR = "unreadable_tar"
    TRUNCATED_TAR = "truncated_tar"
    NOT_A_FILE = "not_a_file"
    BAD_ROW = "bad_row"
    NO_CAPTION = "no_caption"
    EMPTY_CAPTION = "empty_caption"
    DUPLICATE_KEY = "duplicate_key"
    NONFINITE_FEATURES = "nonfinite_features"


CAPTIONS = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),  # the model's words; null on rejected rows
        ("raw_caption", pa.string()),  # what came with the image: alt text, .txt, the list's caption
        ("prompt", pa.string()),  # as sent, the raw caption filled in
        ("model", pa.string()),
        ("status", pa.string()),  # "ok" or "rejected"
        ("error", pa.string()),  # a Reason, or null
        ("detail", pa.string()),
        ("finish_reason", pa.string()),  # "stop" (the model ended) or "length" (max_new_tokens ended it)
        ("num_prompt_tokens", pa.int32()),  # image tokens included
        ("num_tokens", pa.int32()),  # of the caption
        ("width_px", pa.int32()),  # after the EXIF rotation
        ("height_px", pa.int32()),
        ("image_ops", pa.string()),  # what was done to get RGB pixels: "exif6,icc,cmyk", "" for nothing
    ]
)

IMAGE_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("bucket", pa.string()),  # height / width with two decimals: the folder
        ("height_px", pa.int32()),  # of the bucket
        ("width_px", pa.int32()),
        ("shard", pa.string()),  # path relative to the feature set
        ("offset_bytes", pa.int64()),  # of the tensor's first byte in the shard
        ("size_bytes", pa.int64()),  # of the tensor
        ("crc32", pa.uint32()),  # of the tensor
        ("original_width_px", pa.int32()),  # after the EXIF rotation
        ("original_height_px", pa.int32()),
        ("resized_width_px", pa.int32()),
        ("resized_height_px", pa.int32()),
        ("crop_left_px", pa.int32()),
        ("crop_top_px", pa.int32()),
        ("image_ops", pa.string()),
        ("error", pa.string()),
        ("detail", pa.string()),
    ]
)

TEXT_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("offset_bytes", pa.int64()),
        ("size_bytes", pa.int64()),
        ("crc32", pa.uint32()),
        ("num_tokens", pa.int32()),  # true tokens stored, the end-of-sequence token included
        ("truncated", pa.bool_()),  # the caption was longer than max_tokens
        ("caption", pa.string()),  # as encoded, after the cleaning policy
        ("error", pa.string()),
        ("detail", pa.string()),
    ]
)

REJECTED = pa.schema([("key", pa.string()), ("error", pa.string()), ("detail", pa.string())])

NOUNS = pa.schema([("surface", pa.string()), ("tag", pa.string()), ("count", pa.int64())])
