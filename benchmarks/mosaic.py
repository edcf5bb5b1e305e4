"""MosaicML Streaming over its own layout, MDS: what `benchmarks.read_shards` runs in an environment of its own.

    .venv-peers/bin/python -m benchmarks.mosaic SAMPLES OUT none|zstd      writes the samples

The library imports torchvision when it is imported, for image classes that are not used here, and the wheel does not
fit every torch; an empty module stands in for it. Nothing that reads or writes MDS touches it. A sample is one row:
key, caption, moments as an array of fixed shape, tokens as bare bytes, the cheapest of its encodings.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.batches import BATCH_SIZE, PLANNED, SEQUENTIAL, Batch, Buffers
from benchmarks.samples import CHANNELS, SIDE, Samples, load

_COLUMNS = {"key": "str", "caption": "str", "moments": f"ndarray:float16:2,{CHANNELS},{SIDE},{SIDE}", "t5": "bytes"}
_STAND_IN = "torchvision"


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds empty modules under one name; whatever is asked of them is an empty class."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != _STAND_IN:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__dict__["__getattr__"] = attribute
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


def _streaming() -> Any:
    sys.meta_path.insert(0, _StandIn())
    return importlib.import_module("streaming")


def write(root: Path, samples: Samples, compression: str | None) -> None:
    """Write MDS shards, of the library's default size."""
    with _streaming().MDSWriter(out=str(root), columns=_COLUMNS, compression=compression) as writer:
        for i in range(len(samples)):
            row = {"key": samples.key(i), "caption": samples.caption(i), "moments": np.array(samples.moments[i])}
            writer.write({**row, "t5": samples.text(i).tobytes()})


class Mosaic:
    """StreamingDataset on local shards, in one process: in order, or shuffled by its default, `py1e`.

    Text is packed: its arrays are views of the bytes that the library returns, and are copied once, into the batch.
    """

    def __init__(self, root: Path) -> None:
        streaming = _streaming()
        self.datasets = {
            order: streaming.StreamingDataset(
                local=str(root), batch_size=BATCH_SIZE, shuffle=order == PLANNED, num_canonical_nodes=1
            )
            for order in (SEQUENTIAL, PLANNED)
        }
        self.buffers = Buffers()

    def stream(self, order: str) -> Generator[Batch, None, None]:
        """Yield the batches of one pass after another, without end; the tail of a pass is left out."""
        while True:
            rows: list[dict[str, Any]] = []
            for row in self.datasets[order]:
                rows.append(row)
                if len(rows) == BATCH_SIZE:
                    yield self._collate(rows)
                    rows = []

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        texts = [np.frombuffer(row["t5"], np.int16) for row in rows]
        return self.buffers.pack([row["key"] for row in rows], [row["moments"] for row in rows], texts)


def main() -> None:
    """Write the samples."""
    samples, out, compression = sys.argv[1:]
    torch.set_num_threads(1)
    write(Path(out), load(Path(samples)), None if compression == "none" else compression)


if __name__ == "__main__":
    main()
