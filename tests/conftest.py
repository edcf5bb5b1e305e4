"""What the tests of more than one package need: miniature models, the demo's pictures, and the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it, so that Ray's workers inherit it too
os.environ.pop("RAY_ADDRESS", None)  # tests start a Ray of their own


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory):
    """Folders of the miniature `llava`, `t5` and `vae`."""
    from jobs.demo.prepare import build_models

    folder = tmp_path_factory.mktemp("models")
    build_models(folder)
    return {name: str(folder / name) for name in ("llava", "t5", "vae")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The demo's folder of twelve pictures, ten with a raw caption."""
    from jobs.demo.prepare import draw_pictures

    folder = tmp_path_factory.mktemp("source") / "pictures"
    draw_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def ray_here():
    """One small Ray for all tests that run a pipeline in this process."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def pixart(tmp_path):
    """Run the command in a process of its own, as a user does; returns the finished process."""

    def run(*words, timeout_s=180, **options):
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=tmp_path,
            **options,
        )

    return run


@pytest.fixture
def job_file(tmp_path):
    """Write a job file from a dict and return its path."""
    import tomli_w

    def write(name, job):
        path = tmp_path / f"{name}.toml"
        path.write_text(tomli_w.dumps(job))
        return path

    return write
