"""MosaicML Streaming itself, run in an environment of its own by `test_interchange`; not a part of the tests' process.

    PEERS/bin/python tests/parity/streaming.py write FOLDER     write the shards of tests/data/mosaics anew
    PEERS/bin/python tests/parity/streaming.py read FOLDER      print the samples in FOLDER, one JSON object a line

How the environment is made says benchmarks/peers.txt. Modules that the library imports and never uses for MDS without
compression by snappy, torchvision and snappy, are stood in for by empty ones.
"""

import hashlib
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np

COLUMNS = {
    "key": "str",
    "caption": "str",
    "number": "int",
    "score": "float32",
    "moments": "ndarray:float16",
    "latents_256": "bytes",
    "fixed": "ndarray:float32:2,3",
    "any": "ndarray",
    "t5": "ndarray:uint16",
}


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in ("torchvision", "snappy"):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__dict__["__getattr__"] = attribute
        return module

    def exec_module(self, module):
        pass


def sample(number):
    """A sample whose every value follows from its number; `test_mds` has the same formula."""
    ramp = np.arange(8 * 4 * 6, dtype=np.float32) / 8 + number
    return {
        "key": f"source/{number:03d}",
        "caption": f"caption {number} \u00e9\u4e2d",
        "number": number - 1,
        "score": number / 2,
        "moments": ramp.astype(np.float16).reshape(2, 4, 4, 6),
        "latents_256": bytes(range(number, number + 7)),
        "fixed": np.full((2, 3), number, np.float32),
        "any": np.arange(number + 1, dtype=np.int16),
        "t5": np.arange((number + 1) * 5, dtype=np.uint16).reshape(number + 1, 5),
    }


def write(folder, streaming):
    for name, compression, hashes in (("plain", None, ["sha1", "xxh64"]), ("zstd", "zstd:7", ["sha1"])):
        out = str(folder / name)
        options = {"columns": COLUMNS, "compression": compression, "hashes": hashes, "size_limit": 1500}
        with streaming.MDSWriter(out=out, **options) as writer:
            for number in range(4):
                writer.write(sample(number))


def read(folder, streaming):
    for row in streaming.StreamingDataset(local=str(folder), batch_size=1, shuffle=False):
        shown = {}
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
                shown[name] = [value.dtype.name, list(value.shape), digest]
            else:
                shown[name] = value.hex() if isinstance(value, bytes) else getattr(value, "item", lambda v=value: v)()
        sys.stdout.write(json.dumps(shown) + "\n")


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder: the name of this file is the library's
    sys.meta_path.insert(0, Empty())
    import streaming

    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]), streaming)
