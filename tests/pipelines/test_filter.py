import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from pipelines import caption, filter
from pipelines.config import Caption, Filter
from pixart_data.commits import read_records, read_table
from pixart_data.config import load
from pixart_data.errors import ConfigError, DataError
from pixart_data.selection import read_selection
from pixart_data.sources import find_units, read_samples
from pixart_data.storage import location, write_atomic

pytestmark = pytest.mark.usefixtures("ray_here")

CLUSTER = {"num_workers": 1, "cpus_per_worker": 0.1}
ENGLISH = "A small dog runs along the beach with a red ball"
GERMAN = "Ein kleiner Hund läuft mit einem roten Ball am Strand entlang"


def photograph(seed, width_px=480, height_px=360):
    """Smooth shapes and grain: no two seeds look alike."""
    generator = np.random.default_rng(seed)
    picture = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(picture.resize((width_px, height_px), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = generator.integers(-25, 26, (height_px, width_px, 1))
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def crop(image, share):
    left, top = int(image.width * share), int(image.height * share)
    return image.crop((left, top, image.width - left, image.height - top))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Pictures named in the order of the source, most of them with something that a filter can object to."""
    folder = tmp_path_factory.mktemp("source") / "pictures"
    folder.mkdir()
    first = photograph(1)
    pictures = {
        "a0": first,
        "a1": photograph(2),
        "a2_lower_quality": first,
        "a3_smaller": first.resize((240, 180), Image.Resampling.LANCZOS),
        "b0_cropped_little": crop(first, 0.005),
        "b1_cropped_much": crop(first, 0.15),
        "b2_blurred": photograph(3).filter(ImageFilter.GaussianBlur(6)),
        "b3_tiny": photograph(4, 80, 60),
        "c0_strip": photograph(5, 800, 200),
        "c1_german": photograph(6),
        "c2_english": photograph(7),
        "c4_flat": Image.new("RGB", (300, 300), "white"),
        "d0_flat_too": Image.new("RGB", (300, 301), "white"),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.jpg", quality=40 if name == "a2_lower_quality" else 92)
    shutil.copy(folder / "a1.jpg", folder / "c3_copy.jpg")
    (folder / "d1_broken.jpg").write_bytes((folder / "a0.jpg").read_bytes()[:2000])
    (folder / "c1_german.txt").write_text(GERMAN)
    (folder / "c2_english.txt").write_text(ENGLISH)
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "pictures")


ALL = {
    "min_side_px": 150,
    "max_aspect": 3.0,
    "min_sharpness": 30.0,
    "languages": ["en"],
    "exact_duplicates": True,
    "near_duplicates_bits": 4,
}
REJECTED = {
    "a2_lower_quality": "near_duplicate",
    "a3_smaller": "near_duplicate",
    "b0_cropped_little": "near_duplicate",
    "b2_blurred": "blurred",
    "b3_tiny": "too_small",
    "c0_strip": "extreme_aspect",
    "c1_german": "other_language",
    "c3_copy": "duplicate",
    "c4_flat": "blurred",
    "d0_flat_too": "blurred",
    "d1_broken": "truncated_image",
}


def job_of(folder, output, filters=None, **cluster):
    source = {"paths": [str(folder)], "rows_per_unit": 4}
    given = {"output": str(output), "source": source, "filters": filters or {}, "cluster": {**CLUSTER, **cluster}}
    return load(Filter, None, [], given)


def rejected_rows(root):
    """Names of rejected pictures with (error, detail)."""
    table = read_table(root / read_selection(root).rejected_file.path).to_pylist()
    return {row["key"].split("/")[1]: (row["error"], row["detail"]) for row in table}


def reasons(root):
    return {name: error for name, (error, _) in rejected_rows(root).items()}


def kept(root):
    """Names of kept pictures, in the order of the source."""
    keys = [key for part in read_selection(root).parts for key in read_table(root / part.file.path)["key"].to_pylist()]
    return [key.split("/")[1] for key in keys]


def contents(root):
    """Every file that is a result; the rest tells of a run."""
    folders = ("measures", "kept", "rejected", "commits")
    files = [root / "manifest.json", *(path for name in folders for path in (root / name).iterdir())]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_each_picture_is_kept_or_rejected_for_its_own_reason(folder, tmp_path):
    [(run, account)] = filter.run(job_of(folder, tmp_path / "out", ALL))
    assert reasons(run.root) == REJECTED
    assert kept(run.root) == ["a0", "a1", "b1_cropped_much", "c2_english"]
    assert account.line() == (
        "15 in = 4 out + 11 rejected (blurred 3, duplicate 1, extreme_aspect 1, near_duplicate 3, other_language 1, "
        "too_small 1, truncated_image 1)"
    )
    details = rejected_rows(run.root)
    assert details["c3_copy"][1] == "the bytes of pictures/a1"
    assert details["a3_smaller"][1] in ("looks like pictures/a0", "looks like pictures/a2_lower_quality")
    assert details["b3_tiny"][1] == "80 x 60 px, a side under 150"
    assert "damaged JPEG" in details["d1_broken"][1]


def test_without_filters_only_unreadable_images_are_rejected(folder, tmp_path):
    [(run, account)] = filter.run(job_of(folder, tmp_path / "out"))
    assert account.line() == "15 in = 14 out + 1 rejected (truncated_image 1)"
    assert reasons(run.root) == {"d1_broken": "truncated_image"}


def test_pictures_of_one_colour_are_no_near_duplicates_of_each_other(folder, tmp_path):
    [(run, _)] = filter.run(job_of(folder, tmp_path / "out", {"near_duplicates_bits": 8, "exact_duplicates": True}))
    assert {"c4_flat", "d0_flat_too"} <= set(kept(run.root))
    assert reasons(run.root)["c3_copy"] == "duplicate"


def test_the_first_that_passes_the_other_filters_stays(folder, tmp_path):
    """The smaller picture comes first here, and is too small: it is not what the larger one repeats."""
    first = photograph(1)
    first.resize((120, 90), Image.Resampling.LANCZOS).save(folder / "0_small.jpg")
    [(run, _)] = filter.run(job_of(folder, tmp_path / "out", ALL))
    assert reasons(run.root)["0_small"] == "too_small"
    assert "a0" in kept(run.root)
    filter.run(job_of(folder, tmp_path / "out", ALL | {"min_side_px": 20}))
    assert "0_small" in kept(run.root)
    assert reasons(run.root)["a0"] == "near_duplicate"


def test_results_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    filter.run(job_of(folder, tmp_path / "one", ALL))
    filter.run(job_of(folder, tmp_path / "two", ALL, num_workers=2))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) == 1 + 4 + 4 + 1 + 4
    assert one == two


def test_other_thresholds_decode_nothing_again(folder, tmp_path):
    [(run, _)] = filter.run(job_of(folder, tmp_path / "out", ALL))
    first = contents(run.root)
    for path in folder.glob("*.jpg"):
        path.write_bytes(bytes(path.stat().st_size))  # whoever decodes them now finds zeros
    [(_, account)] = filter.run(job_of(folder, tmp_path / "out", {"min_side_px": 200}))
    assert account.line() == "15 in = 12 out + 3 rejected (too_small 2, truncated_image 1)"
    assert set(reasons(run.root)) == {"a3_smaller", "b3_tiny", "d1_broken"}
    assert len(list((run.root / "kept").iterdir())) == 4, "what an earlier run kept is gone"
    assert len(list((run.root / "rejected").iterdir())) == 1
    filter.run(job_of(folder, tmp_path / "out", ALL))
    assert contents(run.root) == first


def test_a_unit_that_was_lost_is_measured_again_alone(folder, tmp_path):
    job = job_of(folder, tmp_path / "out", ALL)
    [(run, _)] = filter.run(job)
    first = contents(run.root)
    (run.root / "commits/pictures-00001.json").unlink()
    (run.root / "manifest.json").unlink()
    (run.root / "kept/.tmp-left").write_bytes(b"of a run that was killed")
    [(_, plan)] = filter.plan(job)
    assert [unit.id for unit, _ in plan.todo] == ["pictures-00001"]
    filter.run(job)
    assert contents(run.root) == first


def test_a_picture_that_changed_is_measured_again(folder, tmp_path):
    job = job_of(folder, tmp_path / "out", ALL)
    filter.run(job)
    photograph(9).save(folder / "b3_tiny.jpg")
    [(run, plan)] = filter.plan(job)
    assert list(plan.redo.values()) == [["pictures-00001"]]
    filter.run(job)
    assert "b3_tiny" in kept(run.root)


def test_later_stages_read_what_was_kept_and_redo_what_changed(folder, tmp_path, miniatures):
    [(filtered, _)] = filter.run(job_of(folder, tmp_path / "filtered", ALL))
    source = {"paths": [str(folder)], "rows_per_unit": 4, "kept": str(filtered.root)}
    captioner = {"model": miniatures["llava"], "max_new_tokens": 2, "dtype": "fp32", "device": "cpu"}
    given = {"output": str(tmp_path / "captions"), "source": source, "captioner": captioner, "cluster": CLUSTER}
    job = load(Caption, None, [], given)
    [(run, plan)] = caption.plan(job)
    assert plan.count_line(run) == "caption: 4 rows, 0 done, 4 to do"
    [(run, account)] = caption.run(job)
    assert account.rows_in == 4
    files = [file.path for _, record in sorted(read_records(run.root).items()) for file in record.files]
    rows = pa.concat_tables([pq.read_table(run.root / path) for path in files]).to_pylist()
    assert [row["key"].split("/")[1] for row in rows] == kept(filtered.root)
    filter.run(job_of(folder, tmp_path / "filtered", ALL | {"min_side_px": 60}))
    [(_, plan)] = caption.plan(job)
    assert plan.redo == {"shard changed": ["pictures-00001"]}
    filter.run(job_of(folder, tmp_path / "filtered", ALL | {"min_sharpness": 31.0}))
    [(_, plan)] = caption.plan(job)
    assert plan.todo == [], "another threshold that keeps the same pictures changes nothing"


def test_watermarks_are_judged_by_the_metadata(tmp_path):
    rows = []
    for i in range(6):
        photograph(i, 60, 50).save(tmp_path / f"{i}.jpg")
        rows.append({"path": f"{i}.jpg", "pwatermark": None if i == 5 else i / 5})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    filters = {"watermark_column": "pwatermark", "max_watermark": 0.5}
    [(run, account)] = filter.run(job_of(tmp_path / "l.parquet", tmp_path / "out", filters))
    assert account.line() == "6 in = 4 out + 2 rejected (watermark 2)"
    assert kept(run.root) == ["0", "1", "2", "5"]
    assert rejected_rows(run.root)["3"] == ("watermark", "probability 0.600, over 0.5")
    with pytest.raises(
        ConfigError, match="expected numbers in 'watermark' of the images' metadata, found none in .*l.p"
    ):
        filter.plan(job_of(tmp_path / "l.parquet", tmp_path / "out", filters | {"watermark_column": "watermark"}))


def test_filters_may_reject_most_and_unreadable_images_may_not(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(100):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i:03d}.png")
    [(_, account)] = filter.run(job_of(folder, tmp_path / "out", {"min_side_px": 9}))
    assert account.line() == "100 in = 0 out + 100 rejected (too_small 100)"
    for i in range(30):
        (folder / f"{i:03d}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"30 rejected \(not_an_image 30\): 30% rejected, limit 20%"):
        filter.run(job_of(folder, tmp_path / "out", {"min_side_px": 9}))


def test_a_filter_of_a_filter_and_an_unknown_language_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"source\.kept: expected none, as a filter reads the whole source"):
        load(Filter, None, [], {"output": "o", "source": {"paths": [str(folder)], "kept": "k"}})
    with pytest.raises(ConfigError, match="expected codes such as 'en', found 'english'"):
        filter.plan(job_of(folder, tmp_path / "out", {"languages": ["english"]}))


def test_the_command_prints_the_plan_and_the_account(folder, tmp_path, pixart):
    text = f'output = "{tmp_path}/out"\n[source]\npaths = ["{folder}"]\n[filters]\nmin_side_px = 150\n'
    path = tmp_path / "filter.toml"
    path.write_text(text)
    planned = pixart("filter", path, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("filter: 1 shards, 0 done, 1 to do")
    assert "filter: 15 rows, 0 done, 15 to do" in planned.stdout
    done = pixart("filter", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"filter: 15 in = 13 out + 2 rejected (too_small 1, truncated_image 1) -> {tmp_path}/out\n"


def by_hand(job):
    """Do a job without Ray, whose workers would not know where the object store is; returns the root."""
    run = filter.prepare(job)
    stage = run.build()
    records = [replace(stage(unit, lambda rows, rejected: None), settings=run.settings(unit)) for unit in run.units]
    filter.decide(run.root, job.filters, records)
    return run.root


def test_an_object_store_gets_what_a_disk_gets(folder, tmp_path, bucket):
    (folder / "a0.json").write_text('{"pwatermark": 0.9}')
    filters = ALL | {"watermark_column": "pwatermark", "max_watermark": 0.8}
    here = by_hand(job_of(folder, tmp_path / "out", filters))
    there = location(f"{bucket}/filtered")
    for path in folder.iterdir():
        write_atomic(location(f"{bucket}/pictures/{path.name}"), path.read_bytes())
    job = job_of(f"{bucket}/pictures", there, filters)
    assert by_hand(job) == there
    one, other = read_selection(here), read_selection(there)
    assert [part.file for part in one.parts] == [part.file for part in other.parts]
    assert one.rejected_file == other.rejected_file
    assert one.rejected["watermark"] == 1
    source = job.source.model_copy(update={"kept": str(there)})
    read = [sample.key for unit in find_units(source) for sample in read_samples(unit, source)]
    assert [key.split("/")[1] for key in read] == kept(here)
    assert "a0" not in kept(here)
