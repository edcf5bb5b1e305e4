"""The columns of every table the toolkit writes: names, types and units, in one place.

Keys name a sample across all tables: `<source>/<path without extension>`, percent-encoded so that a key holds no dot
and can be a member name in a WebDataset tar. A row with an `error` is a rejected row; its other columns may be null.
"""

from collections.abc import Iterable
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
    IMAGE_UNSEEN = "image_unseen"
    REFUSED = "refused"
    DUPLICATE_KEY = "duplicate_key"
    NONFINITE_FEATURES = "nonfinite_features"
    DAMAGED_FILE = "damaged_file"
    BAD_SHAPE = "bad_shape"
    BAD_URL = "bad_url"
    PRIVATE_ADDRESS = "private_address"
    HOST_NOT_FOUND = "host_not_found"
    CONNECTION_FAILED = "connection_failed"
    TIMED_OUT = "timed_out"
    BAD_RESPONSE = "bad_response"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    ROBOTS_DISALLOWED = "robots_disallowed"
    OPTED_OUT = "opted_out"
    TOO_SMALL = "too_small"
    EXTREME_ASPECT = "extreme_aspect"
    BLURRED = "blurred"
    WATERMARK = "watermark"
    OTHER_LANGUAGE = "other_language"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"


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
        ("gate", pa.list_(pa.string())),  # what the caption fails; [] if it passes, null if it was not judged
        ("gate_first", pa.list_(pa.string())),  # what the first answer failed
        ("num_attempts", pa.int32()),  # how often it was asked for; null if it was not judged
        ("kept_attempt", pa.int32()),  # which of these gave the caption, from 1 on
    ]
)


def captions_schema(more: Iterable[str]) -> pa.Schema:
    """Return the columns of a caption table with further columns of captions, such as `caption_short`.

    Each comes with how its answer ended and its length, like the main one, and with a `Reason` where it is null, for
    a row is rejected for want of its main caption only.
    """
    schema = CAPTIONS
    for name in more:
        suffix = name.removeprefix("caption")
        schema = schema.append(pa.field(name, pa.string()))
        schema = schema.append(pa.field(f"finish_reason{suffix}", pa.string()))
        schema = schema.append(pa.field(f"num_tokens{suffix}", pa.int32()))
        schema = schema.append(pa.field(f"error{suffix}", pa.string()))
    return schema


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
        ("flipped_offset_bytes", pa.int64()),  # of the mirrored image's tensor, which is as large; null: there is none
        ("flipped_crc32", pa.uint32()),
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
        ("offset_bytes", pa.int64()),  # of the first tensor; rows with one caption share a member
        ("size_bytes", pa.int64()),  # of all tensors of the member
        ("crc32", pa.uint32()),
        ("num_tokens", pa.int32()),  # true tokens stored, the end-of-sequence token included
        ("truncated", pa.bool_()),  # the caption was longer than max_tokens
        ("caption", pa.string()),  # as encoded, after the cleaning policy
        ("error", pa.string()),
        ("detail", pa.string()),
    ]
)

FETCHED = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),  # as the list has it
        ("status", pa.string()),  # "ok" or "rejected"
        ("error", pa.string()),  # a Reason, or null
        ("detail", pa.string()),
        ("http_status", pa.int32()),  # of the last answer, if there was one
        ("num_attempts", pa.int32()),  # 0: nothing was asked of the server for this row
        ("shard", pa.string()),  # path of the tar relative to the output directory
        ("format", pa.string()),  # "jpg", "png" ...: the member's extension
        ("size_bytes", pa.int64()),  # as downloaded
        ("width_px", pa.int32()),  # after the EXIF rotation
        ("height_px", pa.int32()),
        ("sha256", pa.string()),  # of the bytes as downloaded
    ]
)

MEASURES = pa.schema(
    [
        ("key", pa.string()),
        ("width_px", pa.int32()),  # after the EXIF rotation
        ("height_px", pa.int32()),
        ("sharpness", pa.float32()),  # variance of the Laplacian of the grey picture, its longer side at most 512 px
        ("sha256", pa.binary(32)),  # of the compressed image
        ("phash", pa.uint64()),  # perceptual hash; null where the picture is all but one colour
        ("language", pa.string()),  # of the raw caption, ISO 639; null where there is none
        ("language_probability", pa.float32()),
        ("watermark", pa.float32()),  # probability, from the metadata; null where it has none
        ("error", pa.string()),  # why the image cannot be read: a Reason, or null
        ("detail", pa.string()),
    ]
)

KEPT = pa.schema([("key", pa.string())])

REJECTED = pa.schema([("key", pa.string()), ("error", pa.string()), ("detail", pa.string())])

NOUNS = pa.schema(
    [
        ("surface", pa.large_string()),  # as in the captions
        ("tag", pa.string()),  # NN, NNP, NNPS or NNS
        ("count", pa.int64()),  # how often it occurs
        ("captions", pa.int64()),  # how many captions hold it
        ("first_captions", pa.int64()),  # of these, where no noun of the same lower case comes before it
    ]
)
