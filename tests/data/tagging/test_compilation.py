"""Compiled code kept on the disk: found stale, damaged or without a place, and never the end of a run."""

import importlib.util
import logging
import os
import subprocess
import sys

import numba
import numpy as np
import pyarrow as pa
import pytest
from numba import config

from pixart_data.tagging import compilation
from pixart_data.tagging.arrays import texts

MODULE = """
from pixart_data.tagging.compilation import lean_kernel

@lean_kernel
def double(number):
    return 2 * number
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a module of one kernel, as a new process would."""
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(compilation, "_warned", set())
    path = tmp_path / "doubles.py"
    path.write_text(MODULE)

    def load():
        spec = importlib.util.spec_from_file_location("doubles", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.double

    return load


@pytest.fixture
def remarks(caplog):
    caplog.set_level(logging.INFO, logger="pixart_data.tagging.compilation")
    return lambda: [record.message for record in caplog.records]


def hits(function):
    return sum(function.stats.cache_hits.values())


def test_any_module_here_that_changes_makes_it_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "compilation.py"))
    digests = set()
    for constant in ("A = 1", "A = 2"):
        (tmp_path / "characters.py").write_text(constant)
        digests.add(compilation._sources.__wrapped__())
    assert len(digests) == 2


def test_what_is_stale_is_compiled_anew(load, monkeypatch):
    assert load()(3) == 6
    kept = load()
    assert kept(3) == 6
    assert hits(kept) == 1
    monkeypatch.setattr(compilation, "_sources", lambda: "other")
    changed = load()
    assert changed(3) == 6
    assert hits(changed) == 0


@pytest.mark.parametrize(
    ("ending", "damage"),
    [
        ("nbi", lambda content: b""),
        ("nbi", lambda content: content[:-5]),
        ("nbi", lambda content: b"\xff" * len(content)),
        ("nbc", lambda content: b""),
        ("nbc", lambda content: content[: len(content) // 2]),
        ("nbc", lambda content: b"garbage" + content),
        ("nbc", lambda content: content.replace(b"BC\xc0\xde", b"nope")),
    ],
)
def test_what_is_damaged_is_compiled_anew_and_replaced(load, remarks, tmp_path, ending, damage):
    assert load()(3) == 6
    (path,) = (tmp_path / "__pycache__").glob(f"*.{ending}")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    assert load()(3) == 6
    (remark,) = remarks()
    assert str(tmp_path / "__pycache__") in remark
    assert "delete *.nbi and *.nbc there, or set NUMBA_CACHE_DIR" in remark
    mended = load()
    assert mended(3) == 6
    assert hits(mended) == 1
    assert len(remarks()) == 1


def test_what_cannot_be_kept_is_used_all_the_same(load, remarks, tmp_path, monkeypatch):
    def full(self, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
    double = load()
    assert double(3) == 6
    assert double(1.5) == 3.0
    (remark,) = remarks()
    assert "No space left" in remark


def test_without_a_folder_each_process_compiles(load, monkeypatch):
    assert compilation.folder()
    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")  # which suits none of these files
    assert compilation.folder() is None
    double = load()
    assert double(3) == 6
    assert type(double._cache).__name__ == "NullCache"


def test_the_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "elsewhere"))
    assert str(compilation.folder()).startswith(str(tmp_path / "elsewhere"))


def test_numba_can_be_switched_off():
    script = (
        "import pixart_data.measures, pixart_data.tagging.tallies, pixart_data.tagging.compiled\n"
        "from pixart_data.tagging.vocabulary import Vocabulary\n"
        "words = Vocabulary()\n"
        "print([words.intern(word) for word in ('cat', 'mat', 'cat')], words.folded()[0])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env={**os.environ, "NUMBA_DISABLE_JIT": switch},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for switch in "01"
    ]
    assert outputs[0].startswith("[0, 1, 0] ")
    assert outputs[1] == outputs[0]


def test_captions_have_one_type_whatever_holds_them():
    captions = ["A cat.", None, "It's a mat."]
    large = pa.array(captions, pa.large_string())
    shifted = pa.py_buffer(b"1234" + large.buffers()[1].to_pybytes()).slice(4)
    mutable = pa.py_buffer(bytearray(large.buffers()[2].to_pybytes()))
    assert mutable.is_mutable
    forms = [
        pa.array(captions),
        large,
        pa.array(captions, pa.string_view()),
        pa.array(captions).dictionary_encode(),
        pa.array([*captions, "x"])[:3],
        pa.array(["x", *captions], pa.large_string())[1:],
        pa.chunked_array([captions[:1], captions[1:]]),
        pa.LargeStringArray.from_buffers(3, shifted, mutable, large.buffers()[0]),
    ]
    empty = [pa.array([], pa.string()), pa.nulls(3), pa.nulls(3, pa.string())]
    expected = numba.typeof(texts(forms[0]))
    for form in [*forms, *empty]:
        assert numba.typeof(texts(form)) == expected
    for form in forms:
        assert texts(form).present.tolist() == [True, False, True]
        assert [texts(form).text(i) for i in (0, 2)] == [captions[0], captions[2]]
    assert not any(array.flags.writeable for array in texts(large))
    assert np.shares_memory(texts(large).data, np.frombuffer(large.buffers()[2], np.uint8))
