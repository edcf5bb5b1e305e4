import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import extract
from pipelines.config import Extract
from pipelines.features import ImageStage, NullCaption, TextStage
from pixart_data import canvases
from pixart_data.canvases import preparation
from pixart_data.errors import JobError
from pixart_data.sections import ImageFeatures, Source, TextFeatures
from pixart_data.sources import find_units


@pytest.fixture
def photographs(tmp_path):
    """A folder with a JPEG of 1200 x 1100 pixels, the same turned by its EXIF orientation, and the same as a PNG."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    y, x = np.mgrid[0:1100, 0:1200]
    waves = np.stack([127 + 120 * np.sin(x / 40), 127 + 120 * np.sin(y / 60), (x + y) % 256], axis=-1)
    image = Image.fromarray(waves.astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "plain.jpg", quality=90)
    image.save(folder / "turned.jpg", quality=90, exif=turned)
    image.save(folder / "plain.png")
    return folder


def test_jpegs_are_decoded_at_the_scale_of_their_bucket(photographs, tmp_path, miniatures):
    source = Source(paths=[str(photographs)])
    config = ImageFeatures(model=miniatures["vae"], batch_size=2)
    stage = ImageStage(tmp_path / "set", source, config, preparation())
    [unit] = find_units(source)
    record = stage(unit, lambda count, num_rejected: None)
    [part] = [file.path for file in record.files if file.path.endswith(".parquet")]
    rows = {row["key"].split("/")[-1]: row for row in pq.read_table(tmp_path / "set" / part).to_pylist()}
    assert {key: (row["image_ops"], row["bucket"]) for key, row in rows.items()} == {
        "plain": ("draft2", "0.94"),
        "plain~png": ("", "0.94"),
        "turned": ("draft2,exif6", "1.07"),
    }
    assert (rows["plain"]["original_width_px"], rows["plain"]["original_height_px"]) == (1200, 1100)
    assert (rows["turned"]["original_width_px"], rows["turned"]["original_height_px"]) == (1100, 1200)


def test_another_way_to_prepare_images_redoes_the_image_features(photographs, tmp_path, miniatures, monkeypatch):
    image = ImageFeatures(model=miniatures["vae"])
    job = Extract(output=str(tmp_path / "out"), source=Source(paths=[str(photographs)]), image=image)

    def settings():
        [(run, _)] = extract.plan(job)
        return run.settings(run.units[0])

    before = settings()
    assert before["image"]["preparation"] == preparation()
    monkeypatch.setattr(canvases.jpegs, "decoder", lambda: "pillow")
    assert settings()["image"]["preparation"] == "dct-1, pillow, torch lanczos"
    assert {**settings(), "image": None} == {**before, "image": None}


def test_a_worker_that_prepares_images_otherwise_does_not_start(photographs, tmp_path, miniatures):
    source = Source(paths=[str(photographs)])
    with pytest.raises(JobError, match="image preparation on .*: expected 'dct-0', .*; install the same packages"):
        ImageStage(tmp_path / "set", source, ImageFeatures(model=miniatures["vae"]), "dct-0")


def staged_files(root):
    return [path for path in root.rglob("*") if path.is_file() and path.name.startswith(".tmp-")]


@pytest.mark.parametrize("attempt", ["first", "again"])
def test_a_failed_attempt_at_images_leaves_no_staged_shard(photographs, tmp_path, miniatures, attempt):
    source, root = Source(paths=[str(photographs)]), tmp_path / "set"
    stage = ImageStage(root, source, ImageFeatures(model=miniatures["vae"], batch_size=1))
    [unit] = find_units(source)
    (photographs / "bad.jpg").write_bytes(b"no image")
    [with_bad] = find_units(source)
    record = stage(with_bad, lambda count, num_rejected: None)
    image = (photographs / "plain.jpg").read_bytes()
    (photographs / "bad.jpg").write_bytes(image)
    staged = []

    def fail(count, num_rejected):
        staged.extend(staged_files(root))
        if staged:
            raise JobError("the store is away")

    attempts = {
        "first": lambda: stage(unit, fail),
        "again": lambda: stage.retry(with_bad, sorted(record.rejected), record, fail),
    }
    with pytest.raises(JobError, match="the store is away"):
        attempts[attempt]()
    assert staged
    assert not staged_files(root)


@pytest.mark.parametrize("attempt", ["first", "again", "null"])
def test_a_failed_attempt_at_captions_leaves_no_staged_shard(tmp_path, miniatures, monkeypatch, attempt):
    folder, root = tmp_path / "captioned", tmp_path / "set"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a red square")
    source = Source(paths=[str(folder)])
    stage = TextStage(root, source, "caption", TextFeatures(model=miniatures["t5"]))
    [unit] = find_units(source)
    record = stage(unit, lambda count, num_rejected: None)
    (folder / "b.txt").write_text("a blue square")
    staged = []

    def fail(*_):
        staged.extend(staged_files(root))
        raise JobError("the store is away")

    monkeypatch.setattr("pipelines.features.publish", fail)
    attempts = {
        "first": lambda: stage(unit, lambda count, num_rejected: None),
        "again": lambda: stage.retry(unit, sorted(record.rejected), record, lambda count, num_rejected: None),
        "null": lambda: stage(NullCaption(), lambda count, num_rejected: None),
    }
    with pytest.raises(JobError, match="the store is away"):
        attempts[attempt]()
    assert staged
    assert not staged_files(root)
