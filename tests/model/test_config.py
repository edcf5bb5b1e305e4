import subprocess
import sys
import tomllib

import pytest

from pixart_data.config import load, resolved_toml
from pixart_data.errors import ConfigError
from pixart_model.config import Sample, Train
from pixart_model.sizes import SIZES, pixart_b_2, pixart_s_2, pixart_tiny, pixart_xl_2

MINIMAL = 'data = {features = "features"}\nrun = {output = "runs/a", num_steps = 10}\n'


def job(tmp_path, text, cls=Train, overrides=()):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load(cls, path, overrides)


def test_sizes_are_complete():
    numbers = [(m.depth, m.width, m.heads, m.patch) for m in (pixart_xl_2(), pixart_b_2(), pixart_s_2())]
    assert numbers == [(28, 1152, 16, 2), (12, 768, 12, 2), (12, 384, 6, 2)]
    assert all(SIZES[name]().size == name for name in SIZES)


def test_a_minimal_job_trains_the_papers_model(tmp_path):
    found = job(tmp_path, MINIMAL)
    assert found.model == pixart_xl_2()
    assert (found.optim.lr, found.optim.weight_decay, found.optim.eps) == (2e-5, 0.05, 1e-10)
    assert found.run.output.startswith("/")


def test_a_size_names_the_numbers_and_a_number_beside_it_wins(tmp_path):
    found = job(tmp_path, MINIMAL + 'model = {size = "tiny", depth = 5}').model
    assert found == pixart_tiny().model_copy(update={"depth": 5})
    found = job(tmp_path, MINIMAL + "model = {micro_conditioning = true}").model
    assert found == pixart_xl_2().model_copy(update={"micro_conditioning": True})


def test_a_model_given_in_numbers_is_not_called_a_size(tmp_path):
    found = job(tmp_path, MINIMAL + "model = {depth = 3, width = 96, heads = 4}")
    assert found.model.size is None
    assert "size" not in tomllib.loads(resolved_toml(found))["model"]
    assert job(tmp_path, resolved_toml(found)) == found
    assert job(tmp_path, MINIMAL + "model = {depth = 3, heads = 4}").model.size == "xl-2", "its width is"


def test_the_resolved_job_is_the_job(tmp_path):
    first = job(tmp_path, MINIMAL + 'model = {size = "s-2", heads = 12}\ngrid = {num_images = 4}')
    assert job(tmp_path, resolved_toml(first)) == first


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('model = {size = "xxl"}', "model.size: expected 'xl-2', 'l-2', 'b-2', 's-2' or 'tiny', got 'xxl'"),
        ("model = {heads = 7}", "model: width: expected a multiple of 7"),
        (
            'model = {size = "tiny", width = 64, micro_conditioning = true}',
            "needs a multiple of 3, got 64; set width = 72, or",
        ),
        ("model = {base_size = 33}", "base_size: expected a multiple of patch"),
        (
            'model = {size = "tiny", kv_compression = "conv", kv_compression_from = 2}',
            "kv_compression_from: expected a block of the 2, 0 to 1, got 2",
        ),
        ("model = {dept = 3}", "model.dept: unknown key; did you mean 'depth'?"),
        ("optim = {lrr = 3.0}", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("data.drop_caption = 1.5", "data.drop_caption: expected less than or equal to 1"),
    ],
)
def test_complaints_name_the_key(tmp_path, text, complaint):
    if text.startswith("data."):
        body = MINIMAL.replace('"features"}', '"features", drop_caption = 1.5}')
    else:
        body = MINIMAL + text
    with pytest.raises(ConfigError) as error:
        job(tmp_path, body)
    assert complaint in str(error.value)


def test_sampling_needs_a_prompt_and_a_ratio(tmp_path):
    base = 'checkpoint = "runs/a"\noutput = "images"\n'
    with pytest.raises(ConfigError, match="prompts: expected at least one, found none"):
        job(tmp_path, base, Sample)
    for wrong in ("wide", "0:1", "3x4", "-1:1", "1:"):
        with pytest.raises(ConfigError, match=f"expected height:width, e.g. 3:4, got '{wrong}'"):
            job(tmp_path, base + f'prompts = ["a"]\naspect_ratio = "{wrong}"', Sample)
    found = job(tmp_path, base + 'prompts = ["a"]\naspect_ratio = "3:4"', Sample)
    assert found.height_over_width == 0.75
    assert job(tmp_path, resolved_toml(found), Sample) == found


def test_every_field_of_a_section_says_what_it_is_or_is_plain():
    plain = {"heads", "beta1", "beta2", "model", "data", "optim", "run", "grid"}
    for section in (*(f.annotation for f in Train.model_fields.values()), Sample):
        undocumented = {name for name, field in section.model_fields.items() if not field.description}
        assert undocumented <= plain


def imported_by(module):
    code = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_config_is_light():
    assert not {"torch", "numpy", "pyarrow"} & imported_by("pixart_model.config")


def test_training_needs_no_heavy_library():
    heavy = {"ray", "transformers", "nltk", "PIL", "diffusers"}
    assert not heavy & imported_by(
        "pixart_model.train, pixart_model.sampling, pixart_model.grid, pixart_model.conversion"
    )
