import contextlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from pixart_data.errors import ConfigError
from pixart_model import grid
from pixart_model.config import Grid
from pixart_model.dataset import open_dataset
from pixart_model.grid import Painter, contact_sheet
from pixart_model.networks import build
from pixart_model.nulls import NullCaption
from pixart_model.parallel import World, shard
from pixart_model.prompts import prompts_path, read_prompts, write_prompts
from tests.model.conftest import TEXT_WIDTH

pytest.importorskip("diffusers")
image = pytest.importorskip("PIL.Image")
ONE = World(0, 1, torch.device("cpu"))


class Vae:
    """Decodes latents to eight times their sides, which shows each of them."""

    def to(self, device):
        return self

    def decode(self, z):
        return SimpleNamespace(sample=(z[:, :3] / 40).repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1))


@pytest.fixture
def vae(monkeypatch):
    monkeypatch.setattr(grid, "load_vae", lambda given, facts: Vae())


def network(config):
    torch.manual_seed(0)
    made = build(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.15)
    return made


@contextlib.contextmanager
def painting(job, run_dir, world=ONE):
    by_class = job.model.condition == "class"
    dataset = open_dataset(job.data, job.run.seed, job.model.num_classes if by_class else None)
    with contextlib.closing(dataset):
        null = None if by_class else NullCaption(dataset.null_caption())
        yield Painter(job, dataset, null, world, run_dir), dataset


def cells(path, count, columns):
    """The pictures of a sheet, as bytes."""
    with image.open(path) as sheet:
        rows = -(-count // columns)
        width, height = sheet.width // columns, sheet.height // rows
        corners = [(i % columns * width, i // columns * height) for i in range(count)]
        return [sheet.crop((x, y, x + width, y + height)).tobytes() for x, y in corners]


@pytest.mark.parametrize(("count", "size"), [(1, (6, 5)), (2, (12, 5)), (3, (12, 10)), (5, (18, 10)), (9, (18, 15))])
def test_a_sheet_holds_every_picture_in_its_cell(count, size):
    pictures = [image.new("RGB", (6, 4) if i % 2 else (3, 5), (i + 1, 0, 0)) for i in range(count)]
    if count == 1:
        pictures = [image.new("RGB", (6, 5), (1, 0, 0))]
    sheet = contact_sheet(pictures)
    assert sheet.size == size
    columns = size[0] // 6
    for i, picture in enumerate(pictures):
        left, top = i % columns * 6, i // columns * 5
        assert sheet.crop((left, top, left + picture.width, top + picture.height)).tobytes() == picture.tobytes()


def test_the_same_pictures_come_each_time_and_whatever_the_batch(make_job, tmp_path, vae):
    given = {"num_images": 5, "num_steps": 2}
    drawn = []
    for name, batch_size in (("a", 4), ("b", 3)):
        job = make_job(grid=given, data={"batch_size": batch_size})
        with painting(job, tmp_path / name) as (painter, _):
            drawn += [painter.draw(network(job.model), step) for step in (7, 8)]
    assert [path.name for path in drawn] == ["step_00000007.png", "step_00000008.png"] * 2
    first, *others = (cells(path, 5, 3) for path in drawn)
    assert all(len(set(pictures)) == 5 for pictures in (first, *others)), "five different ones"
    assert first == others[0]
    for other in others[1:]:  # in other batches, rounding may differ
        for one, two in zip(first, other, strict=True):
            assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1
    legend = (tmp_path / "a" / "grids" / "prompts.txt").read_text().splitlines()
    assert legend[0].startswith("row 1, column 1: the caption of source/")
    assert legend[3].startswith("row 2, column 1: the caption of source/")
    assert len(set(legend)) == 5


def test_prompts_come_first_and_captions_of_the_dataset_fill_up(make_job, tmp_path, vae, monkeypatch):
    job = make_job(grid={"num_images": 3, "prompts": ["a fox", "two\nlines"], "num_steps": 1})
    features = [torch.randn(n, TEXT_WIDTH).to(torch.bfloat16) for n in (4, 2)]
    seen = {}
    real = grid.sample_latents

    def spy(model, conditions, null, bucket, seeds, *rest):
        seen.update(conditions=conditions, seeds=seeds)
        return real(model, conditions, null, bucket, seeds, *rest)

    monkeypatch.setattr(grid, "sample_latents", spy)
    with contextlib.closing(open_dataset(job.data)) as dataset:
        write_prompts(tmp_path, job.grid.prompts, dataset.mixture.main.manifest, features)
        caption = dataset.first_captions(1)[0]
        key = dataset.first_keys(1)[0]
    with painting(job, tmp_path) as (painter, _):
        painter.draw(network(job.model), 1)
    assert [torch.equal(a, b) for a, b in zip(seen["conditions"], [*features, caption], strict=True)] == [True] * 3
    assert seen["seeds"] == [0, 1, 2]
    legend = (tmp_path / "grids" / "prompts.txt").read_text().splitlines()
    assert legend == [
        "row 1, column 1: a fox", "row 1, column 2: two lines", f"row 2, column 1: the caption of {key}",
    ]  # fmt: skip


def test_stored_prompts_are_used_only_for_the_same_words_and_encoder(make_job, tmp_path):
    with contextlib.closing(open_dataset(make_job().data)) as dataset:
        texts = dataset.mixture.main.manifest
    assert read_prompts(tmp_path, ["a"], texts) is None
    write_prompts(tmp_path, ["a"], texts, [torch.ones(2, TEXT_WIDTH)])
    assert [one.shape for one in read_prompts(tmp_path, ["a"], texts)] == [(2, TEXT_WIDTH)]
    assert read_prompts(tmp_path, ["b"], texts) is None
    assert read_prompts(tmp_path, ["a", "a"], texts) is None
    for changed in ({"model": {**texts.model, "revision": "x"}}, {"policy": {"cleaning": "y"}}):
        other = type(texts)(**{**vars(texts), **changed})
        assert read_prompts(tmp_path, ["a"], other) is None
    write_prompts(tmp_path, ["b"], texts, [torch.zeros(3, TEXT_WIDTH)])
    assert len(read_prompts(tmp_path, ["a"], texts)[0]) == 2, "a run that goes on with others keeps its own"
    prompts_path(tmp_path, ["a"], texts).write_bytes(b"cut")
    assert read_prompts(tmp_path, ["a"], texts) is None


def test_prompts_that_nobody_encoded_are_an_error_that_says_who_does(make_job, tmp_path, vae):
    job = make_job(grid={"prompts": ["a fox"]})
    message = "^grid.prompts: expected them encoded in .*start the run with `pixart train`"
    with pytest.raises(ConfigError, match=message), painting(job, tmp_path):
        pass


def test_classes_are_spread_evenly(make_job, tmp_path, vae):
    model = {"condition": "class", "num_classes": 10}
    names = tmp_path / "names.txt"
    names.write_text("source\n" + "".join(f"other-{i}\n" for i in range(1, 10)))
    data = {"classes": str(names)}
    job = make_job(model=model, data=data, grid={"num_images": 4, "num_steps": 2})
    with painting(job, tmp_path) as (painter, _):
        path = painter.draw(network(job.model), 3)
    legend = (tmp_path / "grids" / "prompts.txt").read_text().splitlines()
    named = [line.split(": ")[1] for line in legend]
    assert named == ["class 0, source", "class 2, other-2", "class 5, other-5", "class 7, other-7"]
    assert len(set(cells(path, 4, 2))) == 4
    job = make_job(model=model, data=data, grid={"prompts": ["a fox"]})
    message = "^grid.prompts: expected none with model.condition = 'class'"
    with pytest.raises(ConfigError, match=message), painting(job, tmp_path):
        pass


class Second(World):
    """Another process than the first, which hears of no other's errors."""

    def any(self, flag):
        return flag

    def gather(self, thing):
        return [thing]


def test_the_first_process_loads_and_writes_and_all_of_them_draw(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "load_vae", lambda given, facts: pytest.fail("only the first process decodes"))
    job = make_job(grid={"num_images": 1, "num_steps": 1})
    calls = []
    model = network(job.model)
    model.register_forward_hook(lambda *_: calls.append(1))
    with painting(job, tmp_path, Second(1, 2, torch.device("cpu"))) as (painter, _):
        path = painter.draw(model, 1)
    assert calls
    assert not path.parent.exists()


def test_what_is_decoded_is_what_the_vae_encoded(make_job, tmp_path, monkeypatch):
    """Training scales the VAE's latents as (z - shift) * scale; its decoder wants z."""
    seen = []

    class Spy(Vae):
        def decode(self, z):
            seen.append(z)
            return super().decode(z)

    monkeypatch.setattr(grid, "load_vae", lambda given, facts: Spy())
    monkeypatch.setattr(grid, "sample_latents", lambda *_: torch.full((1, 4, 8, 8), 3.0))
    job = make_job(grid={"num_images": 1})
    with painting(job, tmp_path) as (painter, dataset):
        painter.draw(network(job.model), 1)
        facts = dataset.images.manifest.model
    assert (facts["scaling_factor"], facts["shift_factor"]) == (0.18215, 0.1)
    torch.testing.assert_close(seen[0], torch.full((1, 4, 8, 8), 3.0 / 0.18215 + 0.1))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nMore"), RuntimeError("cuDNN error")])
def test_a_vae_that_fails_costs_a_sheet_and_not_the_run(make_job, tmp_path, monkeypatch, caplog, error):
    class Failing(Vae):
        def decode(self, z):
            raise error

    monkeypatch.setattr(grid, "load_vae", lambda given, facts: Failing())
    job = make_job(grid={"num_images": 2, "num_steps": 1})
    with painting(job, tmp_path) as (painter, _):
        assert painter.draw(network(job.model), 1) is None
        why = str(error).partition("\n")[0]
        assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
            f"{tmp_path}/grids/step_00000001.png: could not be drawn ({why}); training goes on without it; "
            "grid.num_images = 0 draws none"
        ]
        painter._vae = Vae()  # the memory is there again
        assert painter.draw(network(job.model), 2).is_file()


def test_memory_that_is_lacking_costs_a_sheet_unless_others_wait(make_job, tmp_path, vae, monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grid, "sample_latents", fail)
    job = make_job(grid={"num_images": 1})
    with painting(job, tmp_path) as (painter, _):
        assert painter.draw(network(job.model), 1) is None
        assert "could not be drawn (CUDA out of memory)" in caplog.text
        with pytest.raises(torch.OutOfMemoryError):
            painter.draw(SimpleNamespace(reshard=None), 1)


def test_what_drawing_needs_is_asked_for_at_the_start_in_every_process(make_job, tmp_path, monkeypatch):
    job = make_job(grid={"num_images": 1, "vae": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="^grid.vae: .*none cannot be loaded"), painting(job, tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for world in (ONE, Second(1, 2, torch.device("cpu"))):
        with pytest.raises(ConfigError, match="^grid: needs diffusers"), painting(job, tmp_path, world):
            pass


def test_a_model_in_shares_is_in_shares_again_when_it_has_been_drawn_with(make_job, tmp_path, vae):
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        job = make_job(grid={"num_images": 1, "num_steps": 1}, run={"parallel": "fsdp"})
        model = network(job.model)
        with painting(job, tmp_path) as (painter, _):
            whole = painter.draw(model, 1).read_bytes()
            shard(model, ONE, job.run)
            assert painter.draw(model, 2).read_bytes() == whole
            assert {type(parameter).__name__ for parameter in model.parameters()} == {"DTensor"}
            assert not any(parameter.is_inference() for parameter in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("every", "due"), [(None, [(10, True)]), (4, [(4, False), (8, False), (10, True)]), (5, [(5, False), (10, True)])]
)
def test_a_grid_is_drawn_at_its_interval_or_at_checkpoints(make_job, tmp_path, vae, every, due):
    job = make_job(grid={"num_images": 1, "every": every}, run={"num_steps": 10})
    with painting(job, tmp_path) as (painter, _):
        steps = [(step, step == 10) for step in range(1, 11)]
        assert [one for one in steps if painter.is_due(*one)] == due


def test_unset_the_number_of_pictures_is_that_of_the_prompts():
    assert Grid(prompts=["a", "b"]).num_images == 2
    assert Grid(prompts=["a", "b"], num_images=0).num_images == 0
    assert Grid(prompts=["a", "b"], num_images=3).num_images == 3
    assert Grid().num_images == 0
    with pytest.raises(ValueError, match="num_images: expected at least 2, one for each prompt"):
        Grid(prompts=["a", "b"], num_images=1)
    assert json.loads(Grid(prompts=["a"]).model_dump_json())["num_images"] == 1
