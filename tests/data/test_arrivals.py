import numpy as np
import pytest
import torch

from pixart_data import mds
from pixart_data.arrivals import (
    Rounding,
    Unusable,
    is_key,
    moments,
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
