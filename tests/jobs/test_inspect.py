"""`pixart inspect` of datasets and shards: what it prints, the page it writes, and what it says where it cannot."""

import re
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from jobs import cli
from pixart_data.miniatures import build_vae
from pixart_data.shards import MOMENTS, ShardWriter, read_manifest
from tests.corruption import build
from tests.sealing import write_images, write_texts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return build(tmp_path_factory.mktemp("inspected") / "features")


def run(capsys, *words):
    code = cli.main(["inspect", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_dataset_is_described_set_by_set(capsys, dataset):
    code, out, err = run(capsys, dataset)
    assert (code, err) == (0, "")
    assert f"{dataset}: 4 feature set(s)" in out
    assert "256px: image features, 12 of 14 samples" in out
    assert "rejected zero_bytes 2" in out
    assert "a/bad: zero_bytes: of no bytes" in out
    assert re.search(r"0\.50 +24 x 48 px +6 +2 +\(2, 4, 3, 6\) +#{20}\n", out)
    assert "mirrored 10 images" in out
    assert "latents  of 12 images" in out
    assert re.search(r"ALARM +12 of 12 latents looked at have a posterior std below zero", out)
    assert "tokens   1 to 4" in out
    assert "shared   4 rows" in out
    assert "256px with packed: 12 samples train; 0 images have no text, 0 texts no image" in out
    for part in ("t5_low U8", "t5 I8", "mirrored moments", "index.parquet: metadata"):
        assert part in out
    assert max(map(len, re.findall(r"^    moments.*$", out, re.MULTILINE))) < 120


def test_no_samples_are_shown_where_none_are_wanted(capsys, dataset):
    _, out, _ = run(capsys, dataset, "--set", "num_samples=0")
    assert "a/bad" not in out
    assert "a/0" not in out
    assert "rejected zero_bytes 2" in out


def test_one_set_alone_is_described_too(capsys, dataset):
    code, out, _ = run(capsys, dataset / "short")
    assert code == 0
    assert "short: text features" in out
    assert "train;" not in out


def test_a_set_that_was_begun_only_is_said_to_be(capsys, tmp_path):
    root = build(tmp_path / "features")
    (root / "text/manifest.json").unlink()
    _, out, _ = run(capsys, root)
    assert "text: not finished, 3 shards are done; run `pixart extract` to its end" in out
    assert "256px with short: 12 samples train" in out


def test_the_page_has_pictures_by_the_vae_that_is_named(capsys, caplog, dataset, tmp_path):
    build_vae(tmp_path / "vae")
    page = tmp_path / "pages" / "page.html"
    options = ("--html", page, "--set", f"vae={tmp_path / 'vae'}", "--set", "num_pictures=3")
    code, out, _ = run(capsys, dataset, *options)
    assert code == 0
    assert f"page -> {page}" in out
    assert "decoding 3 pictures" in caplog.text
    text = page.read_text()
    assert text.count("<img ") == text.count("data:image/jpeg;base64,") == 3
    assert text.count('alt="caption ') == 3
    assert "No pictures" not in text


def test_without_its_vae_the_page_is_made_all_the_same_and_says_what_to_type(capsys, caplog, dataset, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, dataset, "--html", page, "--set", f"vae={tmp_path / 'none'}")
    assert code == 0
    assert f"page -> {page}" in out
    assert "no pictures of" in caplog.text
    text = page.read_text()
    assert "<img " not in text
    assert f"no such folder: {tmp_path / 'none'}" in text
    assert f"pixart inspect {dataset} --html {page} --set vae=FOLDER" in text
    assert "caption 3" in text


def test_no_vae_is_loaded_where_no_pictures_are_wanted(capsys, caplog, dataset, tmp_path):
    page = tmp_path / "page.html"
    code, *_ = run(capsys, dataset, "--html", page, "--set", "num_pictures=0", "--set", f"vae={tmp_path / 'none'}")
    assert (code, caplog.text) == (0, "")
    assert "Buckets: 2 of 2 hold images" in page.read_text()


def test_a_page_of_what_is_no_dataset_is_refused(capsys, dataset, tmp_path):
    code, _, err = run(capsys, dataset / "text/index.parquet", "--html", tmp_path / "page.html")
    assert code == 2
    assert "html: expected a dataset to make a page of, found Parquet table" in err
    assert not (tmp_path / "page.html").exists()


def test_a_dry_run_writes_no_page(capsys, dataset, tmp_path):
    code, out, _ = run(capsys, dataset, "--html", tmp_path / "page.html", "--dry-run")
    assert code == 0
    assert out == f"{dataset}: 4 feature set(s)\n"
    assert not (tmp_path / "page.html").exists()


def test_a_shard_names_the_tensors_of_its_members(capsys, dataset):
    root = dataset / "packed"
    shard = next(shard for shard in read_manifest(root).shards if "null" not in shard["path"])
    code, out, _ = run(capsys, root / shard["path"], "--set", "num_samples=100")
    assert code == 0
    with tarfile.open(root / shard["path"]) as tar:
        for member in tar:
            tensors = safetensors.numpy.load(tar.extractfile(member).read())
            lines = [f"    {name:12} {'U16' if name == 't5_rare' else 'U8':5} {a.shape}" for name, a in tensors.items()]
            order = {"t5_low": 0, "t5_high": 1, "t5_rare": 2}
            lines.sort(key=lambda line: order[line.split()[0]])
            assert "\n".join([f"  {member.name}, {member.size:,} bytes", *lines]) in out


def test_a_damaged_header_of_a_member_is_told_and_the_rest_is_shown(capsys, tmp_path):
    path = tmp_path / "shard.tar"
    with ShardWriter(path, MOMENTS) as writer:
        places = [writer.add(key, np.zeros((2, 4, 2, 2), np.float16)) for key in "ab"]
    data = bytearray(path.read_bytes())
    data[places[0].offset_bytes - 60] ^= 0xFF
    path.write_bytes(data)
    code, out, _ = run(capsys, path)
    assert code == 0
    first, second = out.split("b.safetensors")
    assert "damaged: its safetensors header cannot be read" in first
    assert "moments      F16   (2, 4, 2, 2)" in second
    assert "2 members in all" in second


def test_a_dataset_in_an_object_store_is_described_where_it_is(capsys, dataset, bucket, tmp_path):
    import s3fs

    s3fs.S3FileSystem().put(str(dataset), f"{bucket}/features", recursive=True)
    code, out, _ = run(capsys, f"{bucket}/features", "--html", tmp_path / "page.html", "--set", "num_pictures=0")
    assert code == 0
    _, local, _ = run(capsys, dataset, "--html", tmp_path / "local.html", "--set", "num_pictures=0")
    assert out.replace(f"{bucket}/features", str(dataset)).replace("page.html", "local.html") == local
    pages = [(tmp_path / name).read_text() for name in ("page.html", "local.html")]
    assert pages[0].replace(f"{bucket}/features", str(dataset)) == pages[1]


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        ("features/256px/index.parquet", None, "html: expected a file outside the dataset"),
        ("features/page.html", None, "html: expected a file outside the dataset"),
        ("elsewhere/../features/new.html", None, "html: expected a file outside the dataset"),
        ("elsewhere", None, "html: expected a file, found the folder"),
        (
            "elsewhere/thesis.txt",
            b"years of work",
            "html: expected a new file or a page to replace",
        ),
        ("elsewhere/empty", b"", "html: expected a new file or a page to replace"),
    ],
)
def test_a_page_never_takes_the_place_of_something_else(capsys, dataset, tmp_path, place, content, message):
    (tmp_path / "features").symlink_to(dataset)
    (tmp_path / "elsewhere").mkdir()
    page = tmp_path / place
    if content is not None:
        page.write_bytes(content)
    before = page.read_bytes() if page.is_file() else None
    code, out, err = run(capsys, dataset, "--html", page, "--set", "num_pictures=0")
    assert (code, out) == (2, "")
    assert message in err
    assert (page.read_bytes() if page.is_file() else None) == before


def test_a_page_takes_the_place_of_an_earlier_one(capsys, dataset, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html>\nold")
    assert run(capsys, dataset, "--html", page, "--set", "num_pictures=0")[0] == 0
    assert "Buckets: 2 of 2 hold images" in page.read_text()


def test_escape_sequences_in_other_people_s_words_do_not_reach_the_terminal(capsys, tmp_path):
    evil = "a/\x1b]0;owned\x07\u202e"
    write_images(tmp_path / "set" / "256px", {"u": [(evil, "1.00")]}, rejected=[f"{evil}bad"], model={"id": evil})
    write_texts(tmp_path / "set" / "text", {"u": [(evil, f"caption {evil}")]})
    for root in (tmp_path / "set", *(tmp_path / "set").rglob("*.tar"), *(tmp_path / "set").rglob("index.parquet")):
        code, out, _ = run(capsys, root)
        assert code == 0
        assert all(char.isprintable() or char == "\n" for char in out)
        assert "]0;owned" in out or "null" in root.name


def test_a_dataset_whose_model_is_not_told_is_described_all_the_same(capsys, caplog, tmp_path):
    root = tmp_path / "set"
    write_images(root / "256px", {"u": [("a", "1.00")]})  # neither id nor scaling factor
    write_texts(root / "text", {"u": [("a", "one")]})
    code, out, _ = run(capsys, root, "--html", tmp_path / "page.html")
    assert code == 0
    assert out.count("model    unknown, computed in unknown precision") == 2
    assert "scaling  unknown, not applied to what is stored" in out
    assert "latents  of" not in out
    assert "no pictures of" in caplog.text
    page = (tmp_path / "page.html").read_text()
    assert "unknown, computed in unknown precision" in page
    assert "expected the manifest to name the model that made the latents" in page
