import pytest
import torch

from pixart_data.errors import ConfigError, DataError
from pixart_model import conversion
from pixart_model.networks import build
from pixart_model.sizes import Model
from tests.officials import drawn, pixart_shapes


def config(**section):
    return Model.model_validate({"depth": 2, "width": 96, "heads": 4, "caption_width": 32, **section})


@pytest.mark.parametrize("micro", [False, True], ids=["single", "micro"])
def test_there_and_back_is_exact_and_copies_only_what_it_joins(micro):
    weights = drawn(pixart_shapes(2, 96, 32, micro))
    there, arguments = conversion.to_diffusers(weights, config(micro_conditioning=micro))
    assert arguments["use_additional_conditions"] is micro
    assert conversion.is_diffusers(there)
    assert not conversion.is_diffusers(weights)
    parts = [there[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), weights["blocks.1.attn.qkv.weight"])
    assert {p.untyped_storage().data_ptr() for p in parts} == {
        weights["blocks.1.attn.qkv.weight"].untyped_storage().data_ptr()
    }
    back = conversion.native("x", there)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert back["blocks.0.mlp.fc1.weight"] is there["transformer_blocks.0.ff.net.0.proj.weight"]


def test_names_of_the_network_are_the_reference_s():
    for micro in (False, True):
        model = build(config(micro_conditioning=micro))
        found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert found == pixart_shapes(2, 96, 32, micro)


@pytest.mark.parametrize("key", ["mlp_ratio", "condition", "modulation", "qk_norm", "kv_compression"])
def test_what_diffusers_cannot_express_is_named(key):
    value = {
        "mlp_ratio": 2.0,
        "condition": "class",
        "modulation": "blocks",
        "qk_norm": True,
        "kv_compression": "uniform",
    }
    with pytest.raises(ConfigError, match=f"^model.{key}: diffusers' .*; convert with --to pth or safetensors$"):
        conversion.require_expressible(config(**{key: value[key]}))
    conversion.require_expressible(config())


def test_a_block_that_is_not_there_is_missing():
    there, _ = conversion.to_diffusers(drawn(pixart_shapes(3, 96, 32, False)), config(depth=3))
    gap = {name: tensor for name, tensor in there.items() if not name.startswith("transformer_blocks.1.")}
    with pytest.raises(DataError, match=r"x: transformer_blocks.1\S+ is missing \(21 such\)"):
        conversion.native("x", gap)
    with pytest.raises(DataError, match=r"x: transformer_blocks\.0\.\S+ is missing"):
        conversion.native("x", {"transformer_blocks.999999999.x": torch.zeros(1)})


def test_projections_that_do_not_go_together():
    there, _ = conversion.to_diffusers(drawn(pixart_shapes(1, 96, 32, False)), config(depth=1))
    there["transformer_blocks.0.attn2.to_v.weight"] = torch.zeros(96, 95)
    with pytest.raises(DataError, match=r"attn2.to_v.weight: expected shape \(96, 96\) as .*attn2.to_k.weight, found"):
        conversion.native("x", there)


def test_weights_are_checked_against_the_model():
    expected = build(config()).state_dict()
    conversion.require_weights("x", expected, expected)
    for change, words in (
        ({"t_block.1.bias": torch.zeros(2)}, r"x: t_block.1.bias: expected shape \(576,\), found \(2,\)"),
        (
            {"t_block.1.bias": torch.zeros(576).long()},
            "x: t_block.1.bias: expected floating-point numbers, found int64",
        ),
        ({"more": torch.zeros(1)}, "x: more is one too many"),
    ):
        with pytest.raises(DataError, match=words):
            conversion.require_weights("x", expected, {**expected, **change})
