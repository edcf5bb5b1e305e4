import json
import math
import os
import tracemalloc
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch

from pixart_data import mds
from pixart_data.arrivals import (
    Rounding,
    Unusable,
    is_key,
    moments,
    original_px,
    posterior,
    stored_moments,
    stored_tokens,
    tokens,
    widened,
)
from pixart_data.mosaics import Mosaics
from pixart_data.references import References
from pixart_data.tensorfiles import TensorFiles
from tests.layouts import bits, made, write_reference

RANDOM = np.random.default_rng(0)


def test_text_is_rounded_as_torch_rounds_and_the_loss_is_counted():
    values = RANDOM.normal(size=(50, 24)).astype(np.float32)
    values[0] = bits(values[0]).astype(np.uint32).__lshift__(np.uint32(16)).view(np.float32)  # this row is exact
    stored, rounding = stored_tokens(values)
    assert np.array_equal(stored, bits(values))
    error = np.abs(
        values.astype(np.float64) - torch.from_numpy(stored.view("i2")).view(torch.bfloat16).double().numpy()
    )
    assert rounding == Rounding(1, int((error > 0).sum()), error.max())
    assert not error[0].any()
    assert np.all(error <= np.abs(values) * 2**-8)


def test_latents_are_rounded_to_nearest_and_the_loss_is_counted():
    values = RANDOM.normal(size=(2, 4, 8, 8)).astype(np.float32)
    stored, rounding = stored_moments(values)
    error = np.abs(values.astype(np.float64) - stored)
    assert rounding == Rounding(1, int((error > 0).sum()), error.max())
    assert np.all(error <= np.abs(values) * 2**-11 + 2**-25)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_came_from_fp16_is_kept(dtype):
    values = np.array([-0.0, 6e-8, 65504, -1.5], np.float16).reshape(1, 1, 2, 2)
    stored, rounding = stored_moments(values.astype(dtype))
    assert stored.tobytes() == values.tobytes()
    assert rounding == Rounding()


def test_every_finite_bf16_is_kept():
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[np.isfinite(widened(every))].reshape(-1, 2)
    stored, rounding = stored_tokens(widened(every))
    assert stored.tobytes() == every.tobytes()
    assert rounding == Rounding()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_stored(bad):
    for store in (stored_moments, stored_tokens):
        with pytest.raises(Unusable) as why:
            store(np.array([[1.0, bad]], np.float32))
        assert why.value.reason == "nonfinite_features"
    with pytest.raises(Unusable, match="beyond fp16"):
        stored_moments(np.array([70000.0], np.float32))


@pytest.mark.parametrize("shape", [(8, 4, 6), (1, 8, 4, 6), (2, 4, 4, 6), (1, 2, 4, 4, 6)])
def test_posteriors_come_in_four_shapes(shape):
    values = RANDOM.normal(size=shape)
    assert np.array_equal(posterior(values, 4), values.reshape(2, 4, 4, 6))
    assert np.array_equal(moments(values, 4, 0.5), values.reshape(2, 4, 4, 6))


@pytest.mark.parametrize("shape", [(4, 4, 6), (1, 4, 4, 6)])
def test_drawn_latents_are_posteriors_without_deviation(shape):
    values = RANDOM.normal(size=shape)
    found = moments(values, 4, 0.5)
    assert np.allclose(found[0], values.reshape(4, 4, 6) * 2)
    assert not found[1].any()


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 5), (8, 0, 4), (3, 4, 4), (2, 8, 4, 4), (2, 4, 4, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(Unusable) as why:
        moments(np.zeros(shape), 4, 1.0)
    assert why.value.reason == "bad_shape"


def test_tokens_are_cut_to_their_mask():
    values = RANDOM.normal(size=(1, 5, 3)).astype(np.float32)
    assert np.array_equal(tokens(values, np.array([[1, 1, 0, 0, 0]]), 3), values[0, :2])
    assert np.array_equal(tokens(values, np.array([False, True, True, True, False]), None), values[0, 1:4])
    assert np.array_equal(tokens(values[0], None, 3), values[0])
    exact = np.arange(15, dtype=np.uint16).reshape(5, 3)
    assert np.array_equal(stored_tokens(tokens(exact, None, 3))[0], exact)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((5,), None), ((2, 5, 3), None), ((5, 4), None), ((0, 3), None), ((5, 3), [1] * 4), ((5, 3), [0] * 5)],
)
def test_tokens_of_other_shapes_are_refused(shape, mask):
    with pytest.raises(Unusable) as why:
        tokens(np.zeros(shape, np.float32), mask, 3)
    assert why.value.reason == "bad_shape"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("a/b-c_d~2", True),
        ("a%20b", True),
        ("a.b", False),
        ("a//b", False),
        ("/a", False),
        ("", False),
        (3, False),
        ("ä", False),
    ],
)
def test_keys_are_told_from_other_texts(text, good):
    assert is_key(text) is good


def damaged(data, random):
    """The bytes with a few flipped, overwritten, cut off or doubled."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(data)))
        kind = random.integers(4)
        if kind == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            data[at : at + 8] = random.bytes(8)
        elif kind == 2:
            del data[max(at, 1) :]
        else:
            data[at:at] = data[at // 2 : at]
    return bytes(data)


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "mds"])
def test_a_damaged_file_is_a_rejected_sample_or_none_whatever_the_damage(tmp_path, kind):
    root = tmp_path / "toy"
    samples = made(2, canvases=[(32, 32)])
    if kind == "mds":
        root.mkdir()
        columns = {"moments": "ndarray:float16", "t5": "ndarray:uint16", "caption": "str"}
        rows = [{"moments": one.moments.astype("f2"), "t5": bits(one.tokens), "caption": one.prompt} for one in samples]
        entry = mds.write_shard(root, 0, columns, rows)
        mds.write_index(root, [{**entry, "raw_data": {**entry["raw_data"], "hashes": {}}}])
        reader, path = Mosaics(root, None, None, "caption", 256, 4, None, 1.0, "float16"), root / "shard.00000.mds"
    elif kind == "pt":
        root.mkdir()
        path, reader = root / "a.pt", TensorFiles(root, "", "", 4, None, 1.0, 10)
        held = {"latents": torch.from_numpy(samples[0].moments[:4, :4, :4]), "prompt_attention_mask": torch.ones(12)}
        torch.save({**held, "prompt_embeds": torch.from_numpy(samples[0].feature)}, path)
    else:
        write_reference(root, samples[:1])
        [path] = root.rglob(f"*.{kind}")
        reader = References(root, (), None, None, "prompt", 256, 4, None, 10)
    [portion] = reader.portions()
    random, whole, count, lost = np.random.default_rng(0), path.read_bytes(), portion.num_rows, 0
    assert [found.error for found in (*reader.images(portion), *reader.texts(portion))] == [None] * 2 * count
    for _ in range(150):
        path.write_bytes(damaged(whole, random))
        for found in (list(reader.images(portion)), list(reader.texts(portion))):
            assert len(found) == count
            lost += sum(one.error is not None for one in found)
    assert lost > 50


def reference(tmp_path, samples):
    write_reference(tmp_path / "toy", samples)
    return tmp_path / "toy", References(tmp_path / "toy", (), None, None, "prompt", 256, 4, None, 10)


def both(reader):
    """What each reader's two iterators find, images first."""
    [portion] = reader.portions()
    return list(reader.images(portion)), list(reader.texts(portion))


@pytest.mark.parametrize("path", ["../secret/a.png", "{outside}/a.png", "Imgs/../../secret/a.png"])
def test_a_list_that_leads_out_of_the_folder_is_a_bad_row(tmp_path, path):
    samples = made(1, canvases=[(32, 32)])
    root, reader = reference(tmp_path, samples)
    for folder in ("img_vae_fatures_256_multiscale/secret", "caption_feature_wmask/../secret", "../secret"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        np.save(root / folder / "a.npy", samples[0].moments)
        np.savez(root / folder / "a.npz", caption_feature=samples[0].feature)
    path = path.format(outside=tmp_path / "secret")
    (root / "partition/data_info.json").write_text(f'[{{"path": "{path}"}}, {{"path": "a/../Imgs/000.png"}}]')
    (root / "caption_feature_wmask" / "a" / ".._Imgs_000.npz").parent.mkdir()
    for found in both(reader):
        assert found[0].error == "bad_row"
        assert "expected one below the folder" in found[0].detail
        assert found[1].error != "bad_row"


def test_ids_of_sam_that_lead_out_of_the_folder_are_bad_rows(tmp_path):
    samples = made(1, canvases=[(32, 32)])
    root, reader = reference(tmp_path, samples)
    (root / "partition/data_info.json").unlink()
    (root / "partition/part0.txt").write_text("../../secret Imgs_000 /etc/passwd")
    (root / "captions").mkdir()
    (root / "captions/Imgs_000.txt").write_text("mine")
    (tmp_path / "secret.txt").write_text("secret")
    images, texts = both(reader)
    assert [one.error for one in images] == [one.error for one in texts] == ["bad_row", None, "bad_row"]
    assert [one.caption for one in texts] == [None, "mine", None]


@pytest.mark.parametrize("more", [{}, {"prompt": "own"}])
def test_an_id_in_a_json_list_reads_no_file_outside(tmp_path, more):
    root, reader = reference(tmp_path, made(1, canvases=[(32, 32)]))
    (root / "captions").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (root / "partition/data_info.json").write_text(json.dumps([{"path": "Imgs/000.png", "id": "../../secret"} | more]))
    _, [text] = both(reader)
    assert (text.error, text.caption) == (None, more.get("prompt"))


def header(shape, descr="<f4"):
    """A .npy of this shape without its data."""
    packed = BytesIO()
    np.lib.format.write_array_header_1_0(packed, {"descr": descr, "fortran_order": False, "shape": shape})
    return packed.getvalue()


@pytest.mark.parametrize(
    ("held", "reason", "detail"),
    [
        ({"caption_feature.npy": header((1, 180_000, 24))}, "bad_shape", "expected 4,096 tokens at most"),
        ({"caption_feature.npy": header((1 << 40,))}, "bad_shape", "expected 4,096 tokens at most"),
        ({"caption_feature.npy": header((1, 1, 24), "<U9999999")}, "damaged_file", "expected numbers"),
        (
            {"caption_feature.npy": header((1, 2, 24)) + bytes(192), "attention_mask.npy": header((1 << 40,))},
            "bad_shape",
            "expected a mask of 4,096 tokens at most",
        ),
        ({"caption_feature": bytes(1 << 26)}, "damaged_file", "caption_feature.npy"),
    ],
)
def test_a_npz_that_would_inflate_is_refused_by_its_header(tmp_path, held, reason, detail):
    root, reader = reference(tmp_path, made(1, canvases=[(32, 32)]))
    [path] = root.rglob("*.npz")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
                for _ in range(64 if "." in name else 0):
                    member.write(bytes(1 << 20))
    tracemalloc.start()
    _, [text] = both(reader)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (text.error, detail in text.detail) == (reason, True), text.detail
    assert peak_bytes < 8 << 20


def tensor_file(tmp_path, **held):
    good = {"latents": torch.zeros(4, 4, 4), "prompt_embeds": torch.ones(3, 24)}
    (tmp_path / "toy").mkdir()
    torch.save(good | held, tmp_path / "toy" / "a.pt")
    return both(TensorFiles(tmp_path / "toy", "", "", 4, None, 1.0, 10))


HUGE = 1 << 40


@pytest.mark.parametrize(
    ("held", "errors"),
    [
        ({"latents": torch.zeros(1).bfloat16().expand(4, HUGE, 2)}, ("bad_shape", None)),
        ({"prompt_embeds": torch.zeros(1).bfloat16().expand(HUGE, 24)}, (None, "bad_shape")),
        ({"prompt_attention_mask": torch.zeros(1).int().expand(HUGE)}, (None, "bad_shape")),
        ({"original_size": torch.zeros(1).expand(HUGE)}, (None, None)),
        ({"prompt_attention_mask": torch.ones(1).int().expand(3)}, (None, None)),
    ],
)
def test_a_tensor_that_is_larger_than_its_file_takes_no_memory(tmp_path, held, errors):
    [image], [text] = tensor_file(tmp_path, **held)
    assert (image.error, text.error) == errors


def test_a_file_of_tensors_that_would_inflate_is_refused(tmp_path):
    tensor_file(tmp_path)
    path = tmp_path / "toy" / "a.pt"
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data + bytes(1 << 20) * name.endswith("data/0"))
    for [found] in both(TensorFiles(tmp_path / "toy", "", "", 4, None, 1.0, 10)):
        assert found.error == "damaged_file"
        assert "expected tensors stored as they are" in found.detail


BAD_SIDES = [[math.inf, 1], [1, math.nan], [1e300, 5], [1 << 70, 5], [0, 5], [-1, 5], ["5", 5], [5], [5, 5, 5], None, 5]


@pytest.mark.parametrize("sides", BAD_SIDES)
def test_sizes_that_can_be_none_are_unknown(tmp_path, sides):
    assert original_px(sides) is None
    [image], [text] = tensor_file(tmp_path, original_size=sides)
    assert (image.error, image.original_px, text.error) == (None, None, None)


def test_sizes_are_height_and_width(tmp_path):
    assert original_px([3, 4.9]) == (3, 4)
    [image], _ = tensor_file(tmp_path, original_size=torch.tensor([300, 400]))
    assert image.original_px == (300, 400)


def test_tensors_that_numpy_does_not_take_are_rejected_samples(tmp_path):
    latents = torch.zeros(4, 4, 4, dtype=torch.complex64).conj().imag  # negated lazily: numpy() refuses
    [image], [text] = tensor_file(tmp_path, latents=latents.clone()._neg_view(), prompt_embeds=torch.ones(2, 24))
    assert (image.error, text.error) == ("bad_shape", None)
    assert "a.pt: cannot be converted" in image.detail


MOSAIC = {"moments": "ndarray:float16", "t5": "ndarray:uint16", "caption": "str"}


def mosaic(tmp_path, change, **more):
    """What is found of one sample; `change` edits the shard's entry in the index, `more` its columns."""
    root = tmp_path / "toy"
    root.mkdir()
    [one] = made(1, canvases=[(32, 32)])
    row = {"moments": one.moments.astype("f2"), "t5": bits(one.tokens), "caption": one.prompt}
    columns = MOSAIC | {name: encoding for name, (encoding, _) in more.items()}
    entry = mds.write_shard(root, 0, columns, [row | {name: value for name, (_, value) in more.items()}])
    change(entry)
    mds.write_index(root, [entry])
    [image], [text] = both(Mosaics(root, None, None, "caption", 256, 4, None, 1.0, "float16"))
    return image, text


def encoded(**encodings):
    """Change the encodings of columns in the index alone."""

    def change(entry):
        for name, encoding in encodings.items():
            entry["column_encodings"][entry["column_names"].index(name)] = encoding

    return change


@pytest.mark.parametrize(
    ("change", "more", "errors"),
    [
        (encoded(), {"caption": ("int", 7)}, (None, None)),
        (encoded(), {"height": ("str", "inf"), "width": ("str", "1e300")}, (None, None)),
        (
            encoded(height="str_float", width="str_float"),
            {"height": ("str", "inf"), "width": ("str", "1")},
            (None,) * 2,
        ),
        (encoded(), {"height": ("int", 1 << 62), "width": ("int", 5)}, (None, None)),
        (encoded(moments="ndarray:foo"), {}, ("damaged_file", None)),
        (encoded(t5="ndarray:O"), {}, (None, "damaged_file")),
        (encoded(), {"moments": ("int", 3)}, ("bad_shape", None)),
        (encoded(), {"attention_mask": ("str", "yes")}, (None, "bad_shape")),
    ],
)
def test_odd_columns_of_mds_cost_a_sample_at_most(tmp_path, change, more, errors):
    image, text = mosaic(tmp_path, change, **more)
    assert (image.error, text.error) == errors
    assert image.original_px is None
    assert text.caption == (None if errors[1] or "caption" in more else "caption 0")


def test_a_file_far_too_large_for_a_sample_is_not_read(tmp_path):
    root, reader = reference(tmp_path, made(1, canvases=[(32, 32)]))
    for path in (*root.rglob("*.npy"), *root.rglob("*.npz")):
        os.truncate(path, 1 << 42)  # sparse
    for [found] in both(reader):
        assert (found.error, found.detail.endswith(": 4,398,046,511,104 bytes")) == ("too_large", True)
