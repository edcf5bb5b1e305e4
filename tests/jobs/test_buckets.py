"""`pixart buckets` from sizes to a feature set whose canvases are those that it proposed."""

import re
import shlex
import tomllib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import cli
from pipelines import extract
from pipelines.config import Extract
from pixart_data.buckets import bucket_table, size_name
from pixart_data.config import load
from pixart_data.sections import ImageFeatures, Source
from pixart_data.shards import INDEX, read_manifest

SIZES = [(640, 480)] * 40 + [(480, 640)] * 30 + [(900, 600)] * 20 + [(300, 300)] * 9 + [(2000, 300)]


@pytest.fixture
def table(tmp_path):
    widths, heights = zip(*SIZES, strict=True)
    pq.write_table(pa.table({"WIDTH": widths, "HEIGHT": heights}), tmp_path / "laion.parquet")
    return tmp_path / "laion.parquet"


def run(capsys, *words):
    code = cli.main(["buckets", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def proposed(capsys, *words):
    """What is to be pasted into the job file of extract, and what is to be typed."""
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    pasted = tomllib.loads("[image]" + out.split("[image]")[1].split("# or by hand")[0])["image"]
    typed = shlex.split(out.split("# or by hand")[1].replace("\\\n", ""))  # as a shell reads it
    return out, pasted, typed


def numbers(out, name):
    """A line of the comparison: used, of, and the shares in percent, and the smallest."""
    [line] = [line for line in out.splitlines() if re.match(rf"{name} +\d+/", line)]
    used, *shares, smallest = line.removeprefix(name).replace(",", "").split()
    return (*map(int, used.split("/")), *(float(share.rstrip("%")) for share in shares), int(smallest))


def test_what_is_shown_is_what_each_table_loses(capsys, table):
    words = ["--set", "num_buckets=[1, 4]", "--set", "batch_size=4", "--set", "num_gpus=2"]
    out, pasted, _ = proposed(capsys, table, *words, "--set", 'table=["512x512"]', "--set", "resolution_px=512")
    assert "100 images; 512 px, batches of 4 on 2 GPU(s)" in out
    used, of, cropped, _, enlarged, waiting, loss, rare, carried, smallest = numbers(out, "reference")
    assert (used, of, enlarged, rare, carried, smallest) == (5, 40, 9, 1, 2 + 1 + 1, 1)
    assert 0 < waiting < 5
    assert loss == pytest.approx(cropped + waiting, abs=0.011)
    # One square for all keeps 3/4 of the first 70, 2/3 of the next 20 and 3/20 of the last.
    square = numbers(out, "yours")
    assert square[2:4] == (pytest.approx(100 - (70 * 75 + 20 * 200 / 3 + 9 * 100 + 15) / 100, abs=0.01), 33.33)
    assert square[5] == 0
    assert numbers(out, "1 canvas")[2] <= square[2]
    assert numbers(out, "4 canvases")[9] == 9
    assert "recommended: 4 canvases" in out
    assert len(pasted["buckets"]) == 4
    assert "1 image(s) have sides of more than 4 : 1" in out


def test_more_canvases_have_to_be_worth_it(capsys, tmp_path):
    pq.write_table(pa.table({"width": [512, 512] * 64, "height": [512, 496] * 64}), tmp_path / "two.parquet")
    settings = ["--set", "batch_size=4", "--set", "num_gpus=1", "--set", "num_buckets=[1, 2, 3]"]
    out, pasted, _ = proposed(capsys, tmp_path / "two.parquet", *settings, "--set", "resolution_px=512")
    assert "recommended: 2 canvases, 0.00% lost" in out
    assert pasted["buckets"] == ["496x512", "512x512"]
    assert "no table of 3 canvases: not each could have 4 images" in out
    pq.write_table(pa.table({"width": [512] * 999 + [600], "height": [512] * 1000}), tmp_path / "one.parquet")
    out, pasted, _ = proposed(capsys, tmp_path / "one.parquet", *settings, "--set", "batch_size=1")
    assert numbers(out, "2 canvases")[6] < numbers(out, "1 canvas")[6] < 0.1
    assert pasted["buckets"] == ["256x256"]


def test_a_reference_that_is_hard_to_beat_is_said_to_be(capsys, tmp_path):
    squares = {"width": [512] * 7, "height": [512] * 7}
    pq.write_table(pa.table(squares), tmp_path / "squares.parquet")
    out, pasted, _ = proposed(capsys, tmp_path / "squares.parquet", "--set", "num_buckets=2")
    assert "recommended: reference, 0.00% lost: leave image.buckets out" in out
    assert "best proposal: 2 canvases, 0.00% lost" in out
    assert "7 image(s) are less than one batch for each GPU" in out
    assert "256x256" in pasted["buckets"]
    out, _, _ = proposed(capsys, tmp_path / "squares.parquet", "--set", "num_buckets=[50]")
    assert "no table of 50 canvases: there are 41 to choose from" in out


def test_pasted_and_typed_give_the_same_valid_job(capsys, table, tmp_path):
    _, pasted, typed = proposed(capsys, table, "--set", "resolution_px=1024", "--set", "batch_size=1")
    given = {"output": str(tmp_path), "source": {"paths": [str(table)]}}
    overrides = [word for word in typed if word != "--set"]
    by_hand = load(Extract, None, overrides, given)
    assert by_hand == load(Extract, None, [], {**given, "image": pasted})
    assert by_hand.image is not None
    assert [size_name(bucket) for bucket in by_hand.image.table] == pasted["buckets"]


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, (width, height) in enumerate([(320, 240)] * 3 + [(240, 330)] * 3 + [(280, 280)] * 2):
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_from_images_to_a_set_with_the_proposed_canvases_and_back(capsys, made, tmp_path, miniatures):
    settings = ["--set", "num_buckets=3", "--set", "batch_size=2", "--set", "num_gpus=1"]
    out, pasted, _ = proposed(capsys, made, *settings)
    assert "images: " in out
    image = ImageFeatures(model=miniatures["vae"], **pasted)
    job = Extract(output=str(tmp_path / "out"), source=Source(paths=[str(made)]), image=image)
    [(stage_run, finish)] = extract._runs(job)
    stage = stage_run.build()
    finish([stage(unit, lambda count, num_rejected: None) for unit in stage_run.units])

    root = tmp_path / "out" / "256px"
    index = pq.read_table(root / INDEX).to_pylist()
    found = {row["key"].split("/")[1]: f"{row['height_px']}x{row['width_px']}" for row in index}
    assert sorted(set(found.values())) == sorted(pasted["buckets"])
    assert len({found[name] for name in "012"}) == len({found[name] for name in "345"}) == 1
    assert all(row["bucket"] == f"{row['height_px'] / row['width_px']:.2f}" for row in index)
    in_manifest = [(f"{b['height_px']}x{b['width_px']}", b["rows"]) for b in read_manifest(root).buckets]
    assert in_manifest == [(name, list(found.values()).count(name)) for name in pasted["buckets"]]
    assert all((root / bucket.ratio) in stage_run.swept for bucket in (*image.table, *bucket_table(256)))

    again, same, _ = proposed(capsys, tmp_path / "out", *settings)
    assert "feature set 256px" in again
    assert same == pasted


def test_only_a_table_that_is_set_decides_and_its_order_does_not(made, tmp_path, miniatures):
    def settings(**given):
        image = ImageFeatures(model=miniatures["vae"], **given)
        job = Extract(output=str(tmp_path / "out"), source=Source(paths=[str(made)]), image=image)
        [(stage_run, _)] = extract.plan(job)
        return stage_run.settings(stage_run.units[0])

    plain, one = settings(), settings(buckets=["256x256", "224x288"])
    assert set(plain["image"]) == {"model", "resolution_px", "preparation", "dtype"}  # as before there was the key
    assert one["image"] == {**plain["image"], "buckets": ["224x288", "256x256"]}
    assert settings(buckets=["224x288", "256x256"]) == one


def test_shards_of_a_table_that_was_used_before_are_swept(made, tmp_path, miniatures):
    image = ImageFeatures(model=miniatures["vae"], buckets=["256x256"])
    job = Extract(output=str(tmp_path / "out"), source=Source(paths=[str(made)]), image=image)
    before = tmp_path / "out" / "256px" / "0.71"
    before.mkdir(parents=True)
    [(stage_run, _)] = extract.plan(job)
    assert before in stage_run.swept


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], "image.buckets: expected at least one, found none"),
        (["256"], "image.buckets: expected HEIGHTxWIDTH in px, e.g. '256x256', found '256'"),
        (["256x256 "], "image.buckets: expected HEIGHTxWIDTH in px, e.g. '256x256', found '256x256 '"),
        (["0x256"], "image.buckets: expected HEIGHTxWIDTH in px"),
        (["250x260"], "of 16 px (a latent cell of 8 px times the model's patch of 2), found '250x260'; use 256x256"),
        (["256x256", "240x240"], "found '256x256' and '240x240', both 1.00; leave one out"),
        (["512x512"], "expected canvases with half to twice the area of 256 x 256 px, found '512x512'; leave it out"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_is_refused(capsys, table, words):
    settings = ["output=o", 'source.paths=["x"]', f"image.buckets={table}"]
    code = cli.main(["extract", "--dry-run", *(word for setting in settings for word in ("--set", setting))])
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("pixart extract: command line: image.buckets: ")
    assert words in err


def test_what_is_asked_for_wrongly_is_said_in_a_line(capsys, table, tmp_path):
    for settings, words in {
        "num_buckets=[0]": "num_buckets: expected numbers from 1 to 200, found [0]",
        "multiple_px=24": "multiple_px: expected a multiple of 16 that divides 256, found 24; use 16",
        'table=["16x16"]': "table: expected canvases with half to twice the area of 256 x 256 px, found '16x16'; leave",
        "max_aspect=0.5": "max_aspect: expected greater than or equal to 1",
    }.items():
        code, out, err = run(capsys, table, "--set", settings)
        assert (code, out) == (2, "")
        assert words in err
        assert len(err.splitlines()) == 1
    code, out, err = run(capsys, tmp_path / "none")
    assert (code, out) == (2, "")
    assert f"{tmp_path}/none: expected images or what pixart wrote, found nothing; check the path" in err


def test_dry_run_says_what_would_be_read(capsys, table, made):
    code, out, _ = run(capsys, table, made, "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        f"buckets: would read the sizes in 1 table(s), table of sizes: {table}",
        f"buckets: would read the headers of 1 of 1 units: {made}",
    ]
