import pytest
import torch

from pixart_model.conversion import to_diffusers
from pixart_model.dit import DiT
from pixart_model.model import PixArt
from pixart_model.packing import pack
from pixart_model.reparameterisation import reparameterise
from pixart_model.sizes import Model

diffusers = pytest.importorskip("diffusers")

SMALL = {"depth": 2, "width": 96, "heads": 4}
INSIDE = {
    "attn.proj": ["attn1.to_out.0"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
    "adaLN_modulation.1": ["norm1.linear"],
}
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
torch.set_num_threads(1)


def draw_dit(sizes, **more):
    config = Model(condition="class", num_classes=5, base_size=8, **sizes, **more)
    dit = DiT(config).eval()
    with torch.no_grad():  # as after training: nothing may hide behind zeros
        for name, parameter in dit.named_parameters():
            std = 0.3 if "embedding_table" in name else 0.04
            parameter.add_(torch.randn_like(parameter) * std)
    return dit


def their_dit(dit, class_vector):
    """diffusers' DiT with the same weights, whose class 0 is `class_vector`.

    Two of its numbers are not those that DiT was trained and published with: the frequencies of its timestep, which
    cannot be configured, and the epsilon of half of its norms. They are set to DiT's.
    """
    c = dit.config
    model = diffusers.DiTTransformer2DModel(
        c.heads, c.width // c.heads, c.in_channels, 2 * c.in_channels, c.depth, sample_size=c.base_size,
        patch_size=c.patch, num_embeds_ada_norm=c.num_classes, norm_eps=1e-6,
    ).eval()  # fmt: skip
    state, theirs = dit.state_dict(), {}
    for kind in ("weight", "bias"):
        theirs |= {f"{target}.{kind}": state[f"{name}.{kind}"] for name, target in OUTSIDE.items()}
        for i, block in enumerate(model.transformer_blocks):
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            prefix = f"transformer_blocks.{i}"
            for name, targets in INSIDE.items():
                parts = state[f"blocks.{i}.{name}.{kind}"].chunk(len(targets))
                theirs |= {f"{prefix}.{target}.{kind}": part for target, part in zip(targets, parts, strict=True)}
            for n, layer in ((0, "linear_1"), (2, "linear_2")):
                theirs[f"{prefix}.norm1.emb.timestep_embedder.{layer}.{kind}"] = state[f"t_embedder.mlp.{n}.{kind}"]
            table = state["y_embedder.embedding_table.weight"].clone()
            table[0] = class_vector
            theirs[f"{prefix}.norm1.emb.class_embedder.embedding_table.weight"] = table
    model.load_state_dict(theirs, strict=True)
    return model


def class_vector(dit, without_class):
    table = dit.state_dict()["y_embedder.embedding_table.weight"]
    return {"zero": torch.zeros_like(table[0]), "null": table[5], "mean": table[:5].sum(0) / 5}[without_class]


def start(dit, shared_mlp, without_class, **more):
    wanted = dit.config.model_dump() | {"condition": "caption", "caption_width": 16} | more
    target = Model.model_validate(wanted)
    base = PixArt(target).state_dict()
    model = PixArt(target).eval()
    model.load_state_dict(
        reparameterise(dit.state_dict(), dit.config, target, shared_mlp, without_class, base), strict=True
    )
    return model


def outputs(model, theirs, t):
    x = torch.randn(3, model.config.in_channels, 8, 8)
    t = torch.full((3,), float(t))
    captions = pack([torch.randn(n, 16) for n in (5, 1, 9)])
    size_px, ratio = torch.tensor([[300.0, 411.0], [1024.0, 512.0], [64.0, 64.0]]), torch.tensor([0.72, 2.0, 1.0])
    with torch.no_grad():
        expected = theirs(x, timestep=t.long(), class_labels=torch.zeros(3, dtype=torch.long)).sample
        return model(x, t, captions, None, size_px, ratio), expected, (x, t, captions, size_px, ratio)


CASES = [
    *((SMALL, mlp, without_class) for mlp in ("mean", "first") for without_class in ("zero", "null", "mean")),
    ({"depth": 3, "width": 48, "heads": 2, "in_channels": 16}, "mean", "null"),
    ({"depth": 5, "width": 120, "heads": 6, "patch": 4}, "first", "mean"),
    ({"depth": 28, "width": 48, "heads": 2}, "mean", "zero"),
    ({"depth": 28, "width": 48, "heads": 2}, "first", "null"),
]


@pytest.mark.parametrize(("sizes", "shared_mlp", "without_class"), CASES, ids=lambda case: str(case).strip("{}"))
def test_the_start_is_dit_without_class_at_500(sizes, shared_mlp, without_class):
    torch.manual_seed(sizes["depth"])
    dit = draw_dit(sizes)
    theirs = their_dit(dit, class_vector(dit, without_class))
    model = start(dit, shared_mlp, without_class)
    found, expected, (x, t, captions, _, _) = outputs(model, theirs, 500)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    weights, arguments = to_diffusers(model.state_dict(), model.config)
    converted = diffusers.PixArtTransformer2DModel(**arguments).eval()
    converted.load_state_dict(weights, strict=True)
    text, mask = captions.padded()
    conditions = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        out = converted(
            x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=conditions, encoder_attention_mask=mask
        ).sample
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)

    for elsewhere in (0, 999):
        found, expected, _ = outputs(model, theirs, elsewhere)
        assert not torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("without_class", ["zero", "null", "mean"])
def test_micro_conditioning_does_nothing_yet(without_class):
    torch.manual_seed(1)
    dit = draw_dit(SMALL)
    model = start(dit, "mean", without_class, micro_conditioning=True)
    found, expected, _ = outputs(model, their_dit(dit, class_vector(dit, without_class)), 500)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("without_class", ["zero", "null", "mean"])
@pytest.mark.parametrize("micro", [False, True], ids=["single", "micro"])
def test_blocks_that_keep_their_mlps_are_dits_at_every_timestep(micro, without_class):
    """The last layer has none in PixArt: it is DiT's at 500 only, so its modulation is set to DiT's for the others."""
    torch.manual_seed(2)
    dit = draw_dit(SMALL)
    y = class_vector(dit, without_class)
    theirs = their_dit(dit, y)
    model = start(dit, "mean", without_class, modulation="blocks", micro_conditioning=micro)
    found, expected, _ = outputs(model, theirs, 500)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for t in (0, 130, 999):
        with torch.no_grad():
            e = dit.t_embedder(torch.tensor([float(t)])) + y  # (1, D)
            shift_scale = dit.final_layer.adaLN_modulation(e).view(2, -1)
            model.final_layer.scale_shift_table.copy_(shift_scale - e)
        found, expected, _ = outputs(model, theirs, t)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
