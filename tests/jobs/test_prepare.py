from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.demo import prepare

SHIPPED = Path(prepare.__file__).parent / "pictures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    prepare.draw_pictures(folder)
    return folder


def images(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def test_the_shipped_files_are_the_drawn_ones(drawn):
    assert sorted(path.name for path in SHIPPED.iterdir()) == sorted(path.name for path in drawn.iterdir())
    assert len(images(SHIPPED)) == 12


def test_the_shipped_texts_are_the_drawn_ones(drawn):
    texts = {path.name: path.read_bytes() for path in SHIPPED.glob("*.txt")}
    assert texts == {path.name: path.read_bytes() for path in drawn.glob("*.txt")}
    assert len(texts) == 10


@pytest.mark.parametrize("name", images(SHIPPED))
def test_a_shipped_picture_is_the_drawn_one(drawn, name):
    """Encoders differ between versions of Pillow: close, not equal, is asked for."""
    with Image.open(SHIPPED / name) as shipped, Image.open(drawn / name) as again:
        assert (shipped.size, shipped.mode) == (again.size, again.mode)
        assert shipped.getexif().get(0x0112) == again.getexif().get(0x0112)
        pixels = [np.asarray(picture.convert("RGBA"), dtype=np.int16) for picture in (shipped, again)]
    assert np.abs(pixels[0] - pixels[1]).mean() < 2


def test_the_pictures_come_as_real_collections_do(drawn):
    modes = set()
    for name in images(drawn):
        with Image.open(drawn / name) as picture:
            modes.add((picture.format, picture.mode, picture.getexif().get(0x0112)))
    assert {("JPEG", "RGB", None), ("JPEG", "RGB", 6), ("JPEG", "CMYK", None), ("PNG", "P", None)} <= modes


def test_drawing_again_changes_nothing(drawn, tmp_path):
    prepare.draw_pictures(tmp_path)
    for path in drawn.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
