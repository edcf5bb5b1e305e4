"""What docs/dataset.md shows runs."""

import re
import tomllib
from pathlib import Path

import pytest

from pixart_data.queries import parse
from pixart_model.config import Data

TEXT = (Path(__file__).parents[2] / "docs/dataset.md").read_text().partition("## Reading in training code")[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_examples_are_found():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_runs(code, features, tmp_path, monkeypatch):
    (tmp_path / "features").symlink_to(features)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)  # noqa: S102
    assert found["host_batch"].step == 99
    assert len(found["batch"]) == 64
    found["dataset"].close()


def test_the_job_files_shown_are_read():
    jobs = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    [subset, mixture, store] = (Data.model_validate(tomllib.loads(job)["data"]) for job in jobs)
    assert subset.where.endswith("aesthetic > 5.5")
    assert [one.weight for one in mixture.mix] == [1.0]
    assert store.features.startswith("s3://")
    assert parse(subset.where).columns == {"original_height_px", "original_width_px", "bucket", "aesthetic"}
