import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_data.codecs import CODECS, Measure, Part, calibrate, from_manifest, merge
from pixart_data.errors import DataError

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs" / "format.md"
FIGURES = {"num_tokens", "relative_error", "cosine_mean", "cosine_lowest", "channel_error", "worst_channel_error"}
quick = settings(derandomize=True, deadline=None, max_examples=40)
shapes = st.tuples(st.integers(1, 7), st.sampled_from([1, 2, 7, 24, 127, 128, 256, 384]))


def features(bits) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits, np.uint16).view(np.int16)).view(torch.bfloat16)


def same_bits(a, b) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def normal(num_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_tokens, width))).bfloat16()


def heavy_tailed(num_tokens: int, width: int, num_massive: int, seed: int = 0) -> torch.Tensor:
    """Log-normal channel scales, 8 channels x20..60, 40 x4..10, some x20 more; heavy-tailed entries, unlike gains."""
    channels, rng = np.random.default_rng(1), np.random.default_rng(seed)
    scales = channels.lognormal(-2, 0.7, width)
    large = channels.permutation(width)
    scales[large[:8]] *= channels.uniform(20, 60, 8)
    scales[large[8:48]] *= channels.uniform(4, 10, 40)
    scales[large[48 : 48 + num_massive]] *= 20 * channels.uniform(20, 60, num_massive)
    means = 0.3 * channels.standard_normal(width)
    shape = (num_tokens, width)
    entries = rng.standard_normal(shape) * np.exp(0.3 * rng.standard_normal(shape)) + means
    return torch.from_numpy(entries * scales * rng.lognormal(0, 0.2, (num_tokens, 1))).bfloat16()


def in_batch(codec, captions):
    """Encode captions and return what a reader holds of the batch: parts and starts."""
    encoded = [codec.encode(caption) for caption in captions]
    parts = [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*encoded, strict=True)]
    parts = [p.view(torch.bfloat16) if d == "BF16" else p for p, (_, d) in zip(parts, codec.tensors, strict=True)]
    firsts = np.cumsum([0, *map(len, captions[:-1])])
    return parts, torch.from_numpy(np.repeat(firsts, [len(arrays[-1]) for arrays in encoded]))


def errors(original, decoded) -> dict[str, float]:
    """The figures of `Measure`, by other formulas: features are normalised first, and then compared."""
    x, y = original.double().numpy(), decoded.double().numpy()
    rms = np.sqrt((x**2).mean(axis=0))
    u, v = x / rms, y / rms
    return {
        "num_tokens": len(x),
        "relative_error": np.linalg.norm(y - x) / np.linalg.norm(x),
        "cosine_mean": torch.cosine_similarity(original.double(), decoded.double(), dim=1).mean().item(),
        "cosine_lowest": torch.cosine_similarity(original.double(), decoded.double(), dim=1).min().item(),
        "channel_error": np.linalg.norm(v - u) / np.linalg.norm(u),
        "worst_channel_error": (np.linalg.norm(v - u, axis=0) / np.linalg.norm(u, axis=0)).max(),
    }


def figures(facts) -> dict[str, float]:
    return {name: value for name, value in facts.items() if name in FIGURES}


class TestLayout:
    @pytest.mark.parametrize(
        ("name", "types"),
        [
            ("bf16", [("t5", "BF16", 2)]),
            ("bf16-packed", [("t5_low", "U8", 1), ("t5_high", "U8", 1), ("t5_rare", "U16", 2)]),
            ("int8", [("t5", "I8", 1), ("t5_scale", "BF16", 2)]),
        ],
    )
    @pytest.mark.parametrize("width", [1, 24, 25, 128, 384])
    def test_parts_are_what_encode_gives(self, name, types, width):
        caption = normal(3, width)
        caption[1, 0] = 1e30  # an exponent that is rare
        codec = calibrate(name, [normal(50, width, seed=1)])
        arrays = codec.encode(caption)
        size_bytes = sum(array.nbytes for array in arrays)
        parts = codec.parts(3, size_bytes)
        assert [(part.name, part.dtype) for part in parts] == [(n, d) for n, d, _ in types] == list(codec.tensors)
        assert [part.shape for part in parts] == [array.shape for array in arrays]
        assert [part.size_bytes for part in parts] == [array.nbytes for array in arrays]
        assert [array.itemsize for array in arrays] == [size for _, _, size in types]
        assert codec.size_bytes(3) == (None if name == "bf16-packed" else size_bytes)

    def test_of_t5_xxl(self):
        assert from_manifest({"name": "int8"}, 4096, {}).parts(10, 10 * 4160) == (
            Part("t5", "I8", (10, 4096)),
            Part("t5_scale", "BF16", (10, 32)),
        )
        assert from_manifest({}, 4096, {}).parts(2, 16384) == (Part("t5", "BF16", (2, 4096)),)
        packed = from_manifest({"name": "bf16-packed"}, 4096, {})
        assert packed.parts(10, 10 * 6144 + 18)[2] == Part("t5_rare", "U16", (3, 3))

    def test_a_group_is_128_channels_where_they_fit(self):
        def shape(width, **codec):
            found = from_manifest({"name": "int8", **codec}, width, {})
            return found.parts(1, found.size_bytes(1))[1].shape

        assert [shape(24), shape(200), shape(128), shape(256)] == [(1, 1), (1, 1), (1, 1), (1, 2)]
        assert shape(256, group=64) == (1, 4)

    @pytest.mark.parametrize(
        ("name", "size_bytes"),
        [
            *[("bf16", size) for size in (0, 2 * 24 * 2 - 2, 2 * 24 * 2 + 6)],
            *[("int8", size) for size in (0, 2 * 26 - 1, 2 * 26 + 6, 2 * 26 - 6)],
            *[("bf16-packed", size) for size in (0, 2 * 36 - 6, 2 * 36 + 5, 2 * 36 + 6 * 49)],
        ],
    )
    def test_a_size_that_no_caption_has(self, name, size_bytes):
        with pytest.raises(ValueError, match=rf"codec {name}: expected .* for 2 tokens, found {size_bytes}"):
            from_manifest({"name": name}, 24, {}).parts(2, size_bytes)

    def test_sizes_that_captions_have(self):
        packed = from_manifest({"name": "bf16-packed"}, 24, {})
        assert [packed.parts(2, 2 * 36 + 6 * k)[2].shape for k in (0, 1, 48)] == [(0, 3), (1, 3), (48, 3)]

    def test_no_torch_is_loaded_to_know_them(self):
        code = "import sys; from pixart_data.codecs import from_manifest as f; f({'name': 'int8'}, 24, {}).parts(2, 52)"
        code += "; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout == "False\n"

    @pytest.mark.parametrize("width", [0, 1 << 16])
    def test_widths_that_cannot_be_numbered(self, width):
        with pytest.raises(ValueError, match=f"expected 1 to 65535 channels, got {width}"):
            from_manifest({"name": "bf16-packed"}, width, {})

    def test_features_that_are_none_of_its(self):
        codec = calibrate("bf16-packed", [normal(4, 2)])
        for wrong in (normal(4, 3), normal(4, 2).float(), normal(4, 2)[0]):
            with pytest.raises(ValueError, match=r"expected torch.bfloat16 \(n, 2\), got "):
                codec.encode(wrong)
        with pytest.raises(ValueError, match="expected under 65536 tokens, got 65536"):
            codec.encode(torch.zeros(1 << 16, 2, dtype=torch.bfloat16))


class TestPacked:
    @pytest.mark.parametrize("width", [1, 3, 24, 128, 256])
    def test_every_value_comes_back(self, width):
        bits = np.arange(1 << 16, dtype=np.uint16)
        rows = np.resize(np.random.default_rng(0).permutation(bits), (-(-len(bits) // width), width))
        codec = calibrate("bf16-packed", [normal(20, width)])
        for start in range(0, len(rows), 60000):  # of width 1 they are more than a caption can have
            x = features(rows[start : start + 60000])
            assert same_bits(codec.decode_arrays(codec.encode(x)), x)

    @quick
    @given(shapes, st.integers(0, 2**32), st.integers(0, 255))
    def test_any_bits_come_back(self, shape, seed, spread):
        rng = np.random.default_rng(seed)
        exponents = (128 + rng.integers(-spread, spread + 1, shape)) & 0xFF  # from one exponent to all
        bits = rng.integers(0, 1 << 16, shape) & 0x807F | exponents << 7
        x = features(bits)
        codec = calibrate("bf16-packed", [features(rng.integers(0x3C00, 0x4000, (9, shape[1])))])
        low, high, rare = codec.encode(x)
        assert same_bits(codec.decode_arrays([low, high, rare]), x)
        known = codec.calibration()["exponents"].numpy()
        assert len(rare) == (~np.isin(exponents, known)).sum()
        assert (bits[rare[:, 0], rare[:, 1]] == rare[:, 2]).all()

    def test_tokens_and_channels_of_large_numbers(self):
        codec = calibrate("bf16-packed", [torch.ones(1, 1, dtype=torch.bfloat16)])
        tall = torch.ones(65535, 1, dtype=torch.bfloat16)
        tall[[40000, 65534]] = 1e-30
        assert codec.encode(tall)[2][:, 0].tolist() == [40000, 65534]
        assert same_bits(codec.decode_arrays(codec.encode(tall)), tall)
        codec = calibrate("bf16-packed", [torch.ones(1, 65535, dtype=torch.bfloat16)])
        wide = torch.ones(2, 65535, dtype=torch.bfloat16)
        wide[1, [40000, 65534]] = float("nan")
        assert codec.encode(wide)[2][:, 1].tolist() == [40000, 65534]
        assert same_bits(codec.decode_arrays(codec.encode(wide)), wide)

    def test_the_table_has_the_commonest_exponents(self):
        counts = {127 - i: 40 - i for i in range(20)}
        values = [2.0 ** (exponent - 127) for exponent, count in counts.items() for _ in range(count)]
        codec = calibrate("bf16-packed", [torch.tensor(values, dtype=torch.bfloat16)[:, None]])
        assert codec.calibration()["exponents"].tolist() == list(range(113, 128))

    def test_the_table_is_filled_up_with_neighbours(self):
        codec = calibrate("bf16-packed", [torch.tensor([[1.0, 1.5], [1.0, 0.0]], dtype=torch.bfloat16)])
        assert codec.calibration()["exponents"].tolist() == [0, *range(120, 134)]

    def test_takes_three_quarters_of_the_bytes(self):
        caption = heavy_tailed(120, 4096, 4)
        codec = calibrate("bf16-packed", [heavy_tailed(120, 4096, 4, seed=1)])
        assert 0.75 < sum(array.nbytes for array in codec.encode(caption)) / caption.nbytes < 0.765


class TestInt8:
    @quick
    @given(shapes, st.integers(0, 2**32), st.integers(0, 30))
    def test_is_off_by_half_a_step_at_most(self, shape, seed, spread):
        rng = np.random.default_rng(seed)
        magnitudes = 2.0 ** rng.integers(-spread, spread + 1, shape[1])
        x = torch.from_numpy(rng.standard_normal(shape) * magnitudes).bfloat16()
        known = torch.from_numpy(rng.standard_normal((9, shape[1])) * magnitudes).bfloat16()
        codec = calibrate("int8", [known])
        values, scales = codec.encode(x)
        group = shape[1] // scales.shape[1]
        step = features(scales).double().repeat_interleave(group, 1) * codec.calibration()["channel_scale"].double()
        decoded = codec.decode_arrays([values, scales]).double()
        # To bf16 the decoded value is rounded by 2 ** -9 of itself; fp32 takes part in the rest.
        bound = (step / 2 + decoded.abs() * 2**-8) * (1 + 1e-5)
        assert ((decoded - x.double()).abs() <= bound).all()
        assert np.abs(values.astype(int)).max(initial=0) <= 127
        tops = np.abs(values.reshape(len(x), -1, group).astype(int)).max(axis=2)
        assert (tops >= 126).all()  # a scale is no larger than it must be

    @pytest.mark.parametrize("num_massive", [0, 4])
    def test_spares_ordinary_channels_beside_large_ones(self, num_massive):
        known, x = heavy_tailed(2000, 1024, num_massive), heavy_tailed(500, 1024, num_massive, seed=2)
        codec = calibrate("int8", [known])
        found = errors(x, codec.decode_arrays(codec.encode(x)))
        scale = x.float().abs().amax(1, keepdim=True) / 127
        plain = errors(x, (x.float() / scale).round() * scale)
        assert found["channel_error"] <= 0.0095
        assert found["worst_channel_error"] <= 0.011
        assert plain["channel_error"] > 0.2
        # A few hundred tokens are enough to calibrate on.
        few = calibrate("int8", [known[:200]])
        assert errors(x, few.decode_arrays(few.encode(x)))["channel_error"] <= 0.0095

    def test_zeros_of_both_signs(self):
        x = normal(4, 256)
        x[0] = 0.0
        x[1, :128] = -0.0
        x[2, 5] = -0.0
        codec = calibrate("int8", [normal(50, 256, seed=1)])
        values, scales = codec.encode(x)
        assert (features(scales).double() >= 2.0**-126).all()  # a device that flushes to zero can divide by it
        decoded = codec.decode_arrays([values, scales])
        assert decoded.isfinite().all()
        assert (decoded[x == 0] == 0).all()
        assert (decoded[x.abs() > 0.1] != 0).all()

    def test_a_channel_that_calibration_never_saw(self):
        known, x = normal(50, 24), normal(4, 24, seed=1)
        known[:, 3] = 0.0
        codec = calibrate("int8", [known])
        assert codec.calibration()["channel_scale"][3] == 1.0
        assert errors(x, codec.decode_arrays(codec.encode(x)))["worst_channel_error"] < 0.05

    @pytest.mark.parametrize("exponent", [-133, -130, -126, -100, 60, 100, 120])
    def test_the_ends_of_the_range(self, exponent):
        x = (normal(4, 256).double() * 2.0**exponent).bfloat16()
        codec = calibrate("int8", [x])
        decoded = codec.decode_arrays(codec.encode(x))
        assert decoded.isfinite().all()
        # About the smallest normal number, 2 ** -126, and under it, values may become zero, and nothing else.
        assert (decoded.double() - x.double()).abs().max() <= max(x.double().abs().max() * 0.01, 2.0**-124)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, bad):
        x = normal(4, 24)
        codec = calibrate("int8", [x])
        x[2, 7] = bad
        with pytest.raises(ValueError, match="codec int8: expected finite features"):
            codec.encode(x)
        with pytest.raises(ValueError, match="codec int8: expected finite features"):
            calibrate("int8", [x])

    def test_the_scale_of_a_channel_is_its_rms(self):
        captions = [heavy_tailed(n, 256, 4, seed=n) for n in (3, 90, 41)]
        rms = torch.cat(captions).double().square().mean(0).sqrt()
        assert torch.allclose(calibrate("int8", captions).calibration()["channel_scale"].double(), rms, rtol=1e-6)


class TestAnyCodec:
    @pytest.mark.parametrize("name", CODECS)
    @pytest.mark.parametrize("width", [25, 4096])
    def test_a_batch_decodes_as_its_captions_do(self, name, width):
        captions = [heavy_tailed(n, width, 0, seed=n) if width > 48 else normal(n, width, n) for n in (1, 90, 77, 30)]
        for caption in captions[1:]:
            caption[-1, -1] = 1e30 if name == "bf16-packed" else 3.0
        codec = calibrate(name, captions[:1])
        parts, starts = in_batch(codec, captions)
        decoded = codec.decode(parts, starts)
        apart = torch.cat([codec.decode_arrays(codec.encode(caption)) for caption in captions])
        assert decoded.dtype == torch.bfloat16
        assert same_bits(decoded, apart)
        if name != "int8":
            assert same_bits(decoded, torch.cat(captions))

    def test_bits_of_rare_values_come_signed_too(self):
        captions = [normal(5, 24), normal(3, 24, seed=1)]
        captions[1][2, 1] = -1e30
        codec = calibrate("bf16-packed", [normal(9, 24, seed=2)])
        (low, high, rare), starts = in_batch(codec, captions)
        assert len(rare) >= 1
        assert same_bits(codec.decode([low, high, rare.view(torch.int16)], starts), torch.cat(captions))

    @pytest.mark.parametrize("name", CODECS)
    def test_a_batch_of_nothing(self, name):
        codec = calibrate(name, [normal(5, 256)])
        empty = normal(0, 256)
        assert codec.decode_arrays(codec.encode(empty)).shape == (0, 256)

    @pytest.mark.parametrize("name", CODECS)
    def test_rows_that_lie_apart_are_encoded(self, name):
        wide = normal(6, 512)
        codec = calibrate(name, [wide[:, :256]])
        for view in (wide[:, :256], wide[::2, :256], wide[:, ::2], normal(256, 6).T):
            arrays, expected = codec.encode(view), codec.encode(view.clone())
            assert all(np.array_equal(a, b) for a, b in zip(arrays, expected, strict=True))

    @pytest.mark.parametrize("name", ["bf16-packed", "int8"])
    def test_calibration_is_the_same_every_time(self, name):
        captions = [heavy_tailed(n, 512, 0, seed=n) for n in (20, 90)]
        threads = torch.get_num_threads()
        saved = set()
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            saved.add(safetensors.torch.save(calibrate(name, captions).calibration()))
        torch.set_num_threads(threads)
        assert len(saved) == 1

    @pytest.mark.parametrize("name", CODECS)
    def test_is_remade_from_what_a_set_stores_and_from_a_pickle(self, name):
        x = normal(5, 256)
        codec = calibrate(name, [normal(9, 256, seed=1)])
        stored = safetensors.torch.load(safetensors.torch.save(codec.calibration()))
        arrays = codec.encode(x)  # places its tables
        for copy in (from_manifest({"name": name}, 256, stored), pickle.loads(pickle.dumps(codec))):
            assert (copy.name, copy.width) == (name, 256)
            assert same_bits(copy.decode_arrays(arrays), codec.decode_arrays(arrays))
            assert all(np.array_equal(a, b) for a, b in zip(copy.encode(x), arrays, strict=True))
        assert "_placed={}" not in repr(codec)
        assert len(pickle.dumps(codec)) == len(pickle.dumps(from_manifest({"name": name}, 256, stored)))

    @pytest.mark.parametrize("name", ["bf16-packed", "int8"])
    def test_without_its_calibration_it_knows_sizes_only(self, name):
        codec = from_manifest({"name": name}, 24, {})
        with pytest.raises(ValueError, match=f"codec {name}: made without its calibration"):
            codec.encode(normal(2, 24))
        with pytest.raises(ValueError, match=f"codec {name}: made without its calibration"):
            codec.calibration()

    @pytest.mark.parametrize(("name", "part"), [("bf16-packed", "t5_low"), ("int8", "t5_scale")])
    def test_the_decoder_of_the_guide(self, name, part):
        [code] = [block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if part in block]
        scope = {}
        exec(code, scope)
        x = heavy_tailed(7, 256, 4)
        x[3, 5] = 1e30 if name == "bf16-packed" else 1.0
        codec = calibrate(name, [heavy_tailed(50, 256, 4, seed=1)])
        parts, _ = in_batch(codec, [x])
        member = {tensor: values for (tensor, _), values in zip(codec.tensors, parts, strict=True)}
        decoded = scope["decode_packed" if name == "bf16-packed" else "decode_int8"](member, codec.calibration())
        assert same_bits(decoded, codec.decode(parts))


class TestManifest:
    def test_an_unknown_codec(self):
        with pytest.raises(DataError, match="codec.name: expected one of bf16, bf16-packed, int8, found fp4; update"):
            from_manifest({"name": "fp4"}, 24, {})
        with pytest.raises(ValueError, match="expected one of bf16, bf16-packed, int8, got fp4"):
            calibrate("fp4", [normal(2, 24)])

    @pytest.mark.parametrize("group", [0, -24, 7, 2.0, "24"])
    def test_a_group_that_does_not_fit(self, group):
        with pytest.raises(DataError, match=f"codec.group: expected a divisor of the width 24, found {group}"):
            from_manifest({"name": "int8", "group": group}, 24, {})

    @pytest.mark.parametrize(
        ("name", "calibration", "found"),
        [
            ("int8", {"channel_scale": torch.ones(23)}, r"expected channel_scale float32 \(24,\), found .*\(23,\)"),
            ("int8", {"channel_scale": torch.ones(24).double()}, "expected channel_scale float32"),
            ("int8", {"exponents": torch.arange(15).byte()}, "expected channel_scale .* found exponents"),
            ("int8", {"channel_scale": torch.zeros(24)}, "above zero"),
            ("int8", {"channel_scale": torch.full((24,), math.nan)}, "above zero"),
            ("int8", {"channel_scale": torch.full((24,), math.inf)}, "above zero"),
            ("bf16-packed", {"exponents": torch.arange(14).byte()}, r"expected exponents uint8 \(15,\)"),
            ("bf16-packed", {"exponents": torch.zeros(15).byte()}, "15 different exponents"),
        ],
    )
    def test_a_calibration_that_does_not_fit(self, name, calibration, found):
        codec = {"name": name, "calibration": {"path": "codec-12.safetensors"}}
        with pytest.raises(DataError, match=f"^codec-12.safetensors: .*{found}"):
            from_manifest(codec, 24, calibration)

    def test_nothing_to_calibrate_on(self):
        with pytest.raises(ValueError, match="codec int8: expected captions to calibrate on, got none"):
            calibrate("int8", [])


class TestMeasure:
    def test_measures_what_another_formula_says(self):
        x = heavy_tailed(200, 256, 4)
        y = (x.double() * (1 + 0.05 * torch.from_numpy(np.random.default_rng(3).standard_normal(x.shape)))).bfloat16()
        y[7] = -y[7]
        measure = Measure()
        for start, stop in ((0, 1), (1, 120), (120, 200)):
            measure.add(x[start:stop], y[start:stop])
        found = measure.facts()
        assert figures(found) == pytest.approx(errors(x, y), rel=1e-6)
        assert found["cosine_lowest"] < -0.9
        assert json.loads(json.dumps(found)) == found

    def test_units_join_to_what_all_have_in_common_and_to_the_worst(self):
        rng = np.random.default_rng(5)
        whole, parts = Measure(), []
        for count, error in ((400, 0.01), (100, 0.03), (0, 0.0)):
            x = torch.from_numpy(rng.standard_normal((count, 24)) * 1e3).bfloat16()
            y = (x.double() * (1 + error * torch.from_numpy(rng.standard_normal((count, 24))))).bfloat16()
            part = Measure()
            part.add(x, y)
            whole.add(x, y)
            parts.append(json.loads(json.dumps(part.facts())))
        joined, exact = merge(parts), whole.facts()
        assert joined["num_tokens"] == exact["num_tokens"] == 500
        for name in ("relative_error", "channel_error"):
            assert joined[name] == pytest.approx(exact[name], rel=0.05)
            assert parts[0][name] < joined[name] < parts[1][name]
        assert joined["cosine_mean"] == pytest.approx(exact["cosine_mean"], rel=1e-9)
        assert joined["cosine_lowest"] == exact["cosine_lowest"] == parts[1]["cosine_lowest"]
        assert joined["worst_channel_error"] == parts[1]["worst_channel_error"] > exact["worst_channel_error"]

    def test_nothing_lost(self):
        measure = Measure()
        measure.add(normal(5, 24), normal(5, 24))
        expected = {"relative_error": 0, "cosine_mean": 1, "cosine_lowest": 1, "channel_error": 0}
        assert figures(measure.facts()) == pytest.approx({"num_tokens": 5, "worst_channel_error": 0, **expected})

    def test_nothing_measured(self):
        facts = Measure().facts()
        assert facts == merge([]) == merge([facts, facts])
        assert facts["num_tokens"] == facts["channel_error"] == 0
        assert facts["cosine_lowest"] == 1

    def test_zeros(self):
        measure = Measure()
        x = torch.zeros(3, 4, dtype=torch.bfloat16)
        measure.add(x, x)
        assert figures(measure.facts()) == figures({**merge([]), "num_tokens": 3})
        x[1, 2] = 1.0  # the other channels stay zero, and are no error
        measure.add(x, x / 2)
        facts = measure.facts()
        assert facts["channel_error"] == facts["worst_channel_error"] == facts["relative_error"] == 0.5
        measure.add(x, torch.zeros_like(x))
        assert measure.facts()["cosine_lowest"] == 0.0
