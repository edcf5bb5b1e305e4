import io
import itertools
import logging
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.cli import main
from jobs.sample import sample
from pixart_data.errors import ConfigError, DataError
from pixart_data.sections import Source
from pixart_data.sources import find_units, read_samples
from pixart_model.config import Data, Sample
from pixart_model.dataset import open_dataset
from pixart_model.train import run
from tests.model.conftest import damage, write_image_set, write_text_set

CPU = torch.device("cpu")
FOLDERS = ("owl", "big%20cat", "dog")  # sorted by their names: big cat, dog, owl
CLASSES = {"big%20cat": 0, "dog": 1, "owl": 2}
KEYS = [f"train/{FOLDERS[i % 3]}/{i:03d}" for i in range(30)]


def folder_class(key):
    return CLASSES[key.split("/")[-2]]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 images in three folders, and no text set."""
    root = tmp_path_factory.mktemp("classes")
    write_image_set(root / "256px", KEYS, np.random.default_rng(0), flips=True)
    return root


@pytest.fixture
def opened(images):
    datasets = []

    def open_(root=images, seed=0, classes=3, **data):
        data = Data(features=str(root), **{"batch_size": 4, **data})
        datasets.append(open_dataset(data, seed, classes))
        return datasets[-1]

    yield open_
    for dataset in datasets:
        dataset.close()


@pytest.fixture
def table(tmp_path):
    """Writes a table of labels, and returns its path."""

    def write(labels, name="labels.parquet", **columns):
        columns = {"key": list(labels), "label": list(labels.values())} | columns
        pq.write_table(
            pa.table({key: column for key, column in columns.items() if column is not None}), tmp_path / name
        )
        return str(tmp_path / name)

    return write


def labels_by_key(dataset, count=30):
    found = {}
    for host in itertools.islice(dataset.batches(), count):
        batch = host.to(CPU)
        for key, label in zip(host.keys, batch.labels.tolist(), strict=True):
            assert found.setdefault(key, label) == label
    return found


def test_the_class_is_the_folder_and_folders_count_by_name(opened, caplog):
    with caplog.at_level(logging.INFO):
        dataset = opened()
    assert labels_by_key(dataset) == {key: folder_class(key) for key in KEYS}
    assert (len(dataset), list(dataset.classes)) == (30, ["big cat", "dog", "owl"])
    assert "3 of 3 classes have samples, 10 to 10 each" in caplog.text


def test_a_batch_of_classes_has_labels_and_no_caption(opened):
    host = opened().read(0)
    packed, padded = host.to(CPU, packed=True), host.to(CPU)
    assert (host.labels.dtype, host.labels.shape, len(host.texts)) == (torch.int64, (4,), 0)
    assert host.lengths.tolist() == [0] * 4
    assert torch.equal(packed.labels, host.labels)
    assert torch.equal(padded.labels, host.labels)
    assert packed.labels.data_ptr() != host.labels.data_ptr()
    assert packed.captions.lengths == (0, 0, 0, 0)
    assert (packed.offsets.tolist(), packed.offsets.dtype) == ([0] * 5, torch.int32)
    assert padded.mask.shape == (4, 0)
    again = pickle.loads(pickle.dumps(host))
    assert torch.equal(again.labels, host.labels)


def test_batches_of_classes_are_those_of_captions(opened, images, tmp_path):
    """Order, mirroring, positions and ranks do not know what a sample is trained with."""
    shutil.copytree(images, tmp_path / "both")
    write_text_set(tmp_path / "both/text", KEYS, np.random.default_rng(1))
    captions = opened(tmp_path / "both", classes=None, seed=3, flip=0.5)
    classes = opened(seed=3, flip=0.5)

    def told(dataset, **position):
        batches = itertools.islice(dataset.batches(**position), 9)
        return [(batch.keys, batch.step, batch.moments.tolist(), batch.size_px.tolist()) for batch in batches]

    assert told(classes) == told(captions)
    assert told(classes, step=3, rank=1, world=2) == told(captions, step=3, rank=1, world=2)
    assert captions.read(0).labels is None


def test_labels_go_with_samples_that_take_the_place_of_damaged_ones(opened, images, tmp_path):
    shutil.copytree(images, tmp_path / "copy")
    damage(tmp_path / "copy/256px", KEYS[4])
    dataset = opened(tmp_path / "copy", damaged="skip")
    batches = list(itertools.islice(dataset.batches(), 16))
    assert any(batch.skipped for batch in batches)
    for batch in (dataset.read(i) for i in range(16)):
        assert batch.labels.tolist() == [folder_class(key) for key in batch.keys]


def test_a_query_does_not_renumber_classes_and_a_copy_elsewhere_has_them_too(opened):
    dataset = opened(where="original_width_px < 150")
    found = labels_by_key(dataset)
    assert 0 < len(found) < 30
    assert found == {key: folder_class(key) for key in found}
    again = pickle.loads(pickle.dumps(dataset))
    assert again.read(3).labels.tolist() == dataset.read(3).labels.tolist()
    again.close()


def test_datasets_that_are_mixed_share_their_classes(opened, tmp_path):
    keys = [f"more/{folder}/{i}" for i in range(10) for folder in ("ant", "dog")]
    write_image_set(tmp_path / "more/256px", keys, np.random.default_rng(4))
    mixed = opened(classes=4, mix=[{"features": str(tmp_path / "more")}])
    found = labels_by_key(mixed, 60)
    classes = {"ant": 0, "big%20cat": 1, "dog": 2, "owl": 3}
    assert found == {key: classes[key.split("/")[1]] for key in (*KEYS, *keys)}
    assert len(mixed.order_facts()["data.labels"].split(", ")) == 2


def test_a_file_fixes_the_classes(opened, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("owl\n\nzebra\ndog\nbig cat\n")
    data = {"classes": 4, "root": opened().images.root.parent}
    dataset = open_dataset(Data(features=str(data["root"]), batch_size=4, classes=str(path)), 0, 4)
    assert labels_by_key(dataset) == {key: {0: 3, 1: 2, 2: 0}[folder_class(key)] for key in KEYS}
    assert dataset.facts()["classes"] == ["owl", "zebra", "dog", "big cat"]
    dataset.close()


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("owl\ndog\nbig cat\n", 4, r"data.classes: .*: expected 4 names \(model.num_classes\), found 3"),
        ("owl\ndog\nant\n", 3, "expected the name of every folder .*, found none of 1 of 3, 'big cat' first"),
        ("owl\ndog\nowl\n", 3, "expected each name once, found 'owl' 2 times"),
        ("", 3, "expected 3 names .*, found 0"),
        (b"\xff\xfe\xff", 3, "expected a text file in UTF-8"),
        (None, 3, "data.classes: .*: no such file or folder"),
    ],
)
def test_a_file_of_classes_that_cannot_be_used_is_refused(images, tmp_path, text, classes, message):
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        open_dataset(Data(features=str(images), batch_size=4, classes=str(path)), 0, classes)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (2, r"model.num_classes: expected 3, .*\('big cat', 'dog', 'owl'; of the key 'train/owl/000'.*\), got 2; set "),
        (1000, "expected 3, .* got 1000; set model.num_classes = 3, or list the names .* as data.classes, or"),
    ],
)
def test_another_number_of_folders_than_of_classes_is_refused(opened, classes, message):
    with pytest.raises(ConfigError, match=message):
        opened(classes=classes)


def test_images_that_lie_in_no_folder_are_refused(opened, tmp_path):
    write_image_set(tmp_path / "256px", ["a/1", "b", "a/2", "c"], np.random.default_rng(0))
    with pytest.raises(ConfigError, match="expected keys with a folder .* found 2 without, .*; name a table"):
        opened(tmp_path, classes=1)


@pytest.mark.parametrize("kind", ["folder", "tar", "tars"])
def test_keys_of_sources_as_imagenet_comes_hold_the_class(opened, tmp_path, kind):
    """A folder of folders, a tar of folders, and a tar for each class."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    names = [f"{folder}/{folder}_{i}.JPEG" for folder in ("n02", "n01", "n03") for i in range(4)]
    if kind == "folder":
        for name in names:
            (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / name).write_bytes(image.getvalue())
        paths = [str(tmp_path / "train")]
    else:
        tars = {"train": names}
        if kind == "tars":
            tars = {f: [n.split("/")[1] for n in names if n.startswith(f)] for f in ("n01", "n02", "n03")}
        for tar_name, members in tars.items():
            with tarfile.open(tmp_path / f"{tar_name}.tar", "w") as tar:
                for name in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(image.getvalue())
                    tar.addfile(info, io.BytesIO(image.getvalue()))
        paths = [str(tmp_path / "*.tar")]
    source = Source(paths=paths)
    keys = [sample.key for unit in find_units(source) for sample in read_samples(unit, source, with_images=False)]
    assert len(keys) == 12
    write_image_set(tmp_path / "features/256px", keys, np.random.default_rng(0))
    dataset = opened(tmp_path / "features", batch_size=2)
    assert list(dataset.classes) == ["n01", "n02", "n03"]
    for key, label in labels_by_key(dataset).items():
        assert f"n0{label + 1}_" in key


# From a table


def test_labels_come_from_a_table_by_key(opened, table, caplog):
    labels = {key: (7 * i) % 5 for i, key in enumerate(reversed(KEYS))}
    labels["of/another/image"] = 4
    with caplog.at_level(logging.INFO):
        dataset = opened(classes=6, labels=table(labels, more=list(labels)))
    assert labels_by_key(dataset) == {key: labels[key] for key in KEYS}
    assert "5 of 6 classes have samples" in caplog.text
    assert dataset.classes == ()


def test_the_digest_of_labels_is_of_those_that_samples_have(opened, table):
    labels = {key: i % 3 for i, key in enumerate(KEYS)}
    digests = [opened(labels=table(labels, "a.parquet")).order_facts()["data.labels"]]
    turned = dict(reversed(labels.items())) | {"of/another/image": 0}
    digests.append(opened(labels=table(turned, "b.parquet")).order_facts()["data.labels"])
    digests.append(opened(labels=table(labels | {KEYS[7]: 2}, "c.parquet")).order_facts()["data.labels"])
    assert digests[0] == digests[1] != digests[2]
    folders = opened().order_facts()
    assert "data.text_set" not in folders
    assert folders["data.labels"] != digests[0]
    assert opened(classes=3).facts().keys() >= {"image", "counts", "classes"}
    assert "text" not in opened().facts()


def test_samples_without_a_label_are_refused_and_can_be_left_out_as_the_message_says(opened, table):
    path = table({key: 1 for key in KEYS[5:]})
    with pytest.raises(DataError, match="expected a row for each of 30 samples .*, found none for 5, ") as raised:
        opened(labels=path)
    advice = dict(part.split(" = ", 1) for part in str(raised.value).split(" with ")[1].split(" and "))
    data = {key.removeprefix("data."): value.strip("'") for key, value in advice.items()}
    assert set(labels_by_key(opened(labels=path, **data))) == set(KEYS[5:])
    with pytest.raises(DataError, match=r"data.where = '\(original_width_px > 0\) and label >= 0'"):
        opened(labels=path, where="original_width_px > 0")
    assert opened(labels=table({}, label=[1] * 30, key=KEYS)).read(0).labels.tolist() == [1] * 4
    with pytest.raises(DataError, match="found none for 30"):
        opened(labels=table({}, label=pa.array([], pa.int64()), key=pa.array([], pa.string())))


LABELS = {key: i % 3 for i, key in enumerate(KEYS)}


@pytest.mark.parametrize(
    ("labels", "columns", "error", "message"),
    [
        (LABELS, {"label": None, "class": [0] * 30}, ConfigError, "expected a column label, found key, class; rename"),
        (LABELS, {"key": None}, ConfigError, "data.labels: .*: expected a column key, found label; rename"),
        (LABELS, {"label": ["cat"] * 30}, ConfigError, "expected whole numbers in column label, found string"),
        (LABELS, {"label": [0.0] * 30}, ConfigError, "expected whole numbers in column label, found double"),
        (LABELS, {"label": [True] * 30}, ConfigError, "expected whole numbers in column label, found bool"),
        (LABELS, {"label": [None, *[1] * 28, None]}, DataError, "a label in each row, found none in 2 rows"),
        (LABELS, {"key": list(range(30))}, ConfigError, "expected texts in column key, .*, found int64"),
        (LABELS, {"key": [*KEYS[:-1], None]}, DataError, "expected a key in each row, found none in 1 rows"),
        (LABELS, {"key": [*KEYS[:-2], *KEYS[:2]]}, DataError, "one row for each key, .* and 1 more that repeat a key"),
        (LABELS | {KEYS[3]: 9, KEYS[8]: 12}, {}, ConfigError, "0 to 2 .* found 2 others .* 9 in row 3 .*classes = 13"),
        (LABELS | {KEYS[3]: -1}, {}, ConfigError, "found 1 others in 30 rows, -1 in row 3 first; correct them: .* 0$"),
        ({k: n + 1 for k, n in LABELS.items()}, {}, ConfigError, "labels count from 0: subtract 1 from all"),
        (LABELS, {"label": pa.array([1 << 63] * 30, pa.uint64())}, ConfigError, "found 30 others"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(opened, table, labels, columns, error, message):
    with pytest.raises(error, match=message) as raised:
        opened(labels=table(labels, **columns))
    assert "\n" not in str(raised.value)


def test_a_table_that_is_not_there_or_none_is_refused(opened, tmp_path):
    with pytest.raises(ConfigError, match=r"data.labels: .*absent.parquet: no such file or folder"):
        opened(labels=str(tmp_path / "absent.parquet"))
    (tmp_path / "text.parquet").write_text("key,label")
    with pytest.raises(DataError, match=r"text.parquet: cannot be read as a Parquet table"):
        opened(labels=str(tmp_path / "text.parquet"))


def test_keys_of_the_job_that_would_not_be_read_are_refused(opened, table, features):
    path = table(LABELS)
    with pytest.raises(ConfigError, match="data.labels: expected none where a model learns from captions"):
        opened(features, classes=None, labels=path)
    with pytest.raises(ConfigError, match=r"data.classes: expected only where folders .* found data.labels as well"):
        open_dataset(Data(features=str(features), labels=path, classes=path), 0, 3)


def test_captions_are_not_to_be_had_of_classes(opened):
    dataset = opened()
    for ask in (dataset.null_caption, lambda: dataset.first_captions(3)):
        with pytest.raises(ConfigError, match="data.text_set: expected captions, found features .* with classes"):
            ask()


def test_a_run_does_not_go_on_with_other_labels(images, make_job, table, capsys):
    def train(labels):
        data = {"features": str(images), "labels": labels and table(labels)}
        model = {"condition": "class", "num_classes": 3}
        return run(make_job(model=model, data=data, run={"num_steps": steps, "log_every": 1}))

    steps = 1
    labels = {key: folder_class(key) for key in KEYS}
    train(labels)
    steps = 2
    with pytest.raises(ConfigError, match=r"data.labels: this job has \w+, the run in .* has \w+; choose another"):
        train(labels | {KEYS[4]: (labels[KEYS[4]] + 1) % 3})
    last = train(None)  # folders, which say the same
    assert main(["inspect", str(last)]) == 0
    assert "image      features of tiny/vae" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="checkpoint: expected a model of captions, found one of 3 classes in"):
        sample(Sample(checkpoint=str(last), prompts=["a cat"], output=str(last / "pictures")), dry_run=True)
