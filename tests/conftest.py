"""What the tests of more than one package need: miniature models, the demo's pictures, and the command."""

import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
from hypothesis import settings

from jobs.cli import PACKAGES

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it, so that Ray's workers inherit it too
os.environ.pop("RAY_ADDRESS", None)  # tests start a Ray of their own
settings.register_profile("untimed", deadline=None)  # machines are noisy
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory):
    """Plans of tests are nothing for the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _levels_of_logs():
    """A command that a test calls in this process sets how much is logged: not for the tests after it."""
    loggers = [logging.getLogger(package) for package in PACKAGES]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The URL of an S3-compatible server, in a process of its own; clients find it by the AWS variables it sets.

    A Ray that was started before does not know the variables.
    """
    log = tmp_path_factory.mktemp("s3") / "log.txt"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            _wait_for(url, server, log)
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("AWS_PROFILE", raising=False)
                patch.delenv("AWS_SESSION_TOKEN", raising=False)
                patch.setenv("AWS_ENDPOINT_URL", url)
                patch.setenv("AWS_ACCESS_KEY_ID", "testing")
                patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
                patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
                patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
                yield url
        finally:
            server.kill()


def _wait_for(url, server, log, timeout_s=90):
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"the S3 server did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def bucket(s3_server):
    """A fresh bucket on the S3 server, as `s3://name`."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{s3_server}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    return f"s3://{name}"


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


@pytest.fixture(scope="session")
def served_llava(miniatures, tmp_path_factory):
    """The URL of a real OpenAI-compatible server that serves the miniature `llava`."""
    from tests.serving import transformers_serve

    with transformers_serve(miniatures["llava"], tmp_path_factory.mktemp("serve") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def grammar(tmp_path_factory):
    """A folder with a miniature of NLTK's data files."""
    from tests.grammars import write_nltk_data

    folder = tmp_path_factory.mktemp("nltk_data")
    write_nltk_data(folder)
    return folder


@pytest.fixture
def synthetic_nltk_data(grammar, monkeypatch):
    """Have NLTK, here and in processes started from here, read the miniature; here its digests count as known."""
    from pixart_data.tagging import resources

    sums = {name: resources.digest(name, (grammar / name).read_bytes()) for name in resources.DIGESTS}
    monkeypatch.setattr(resources, "DIGESTS", sums)
    _let_nltk_read(grammar, monkeypatch)
    return grammar


@pytest.fixture
def nltk_data(request, monkeypatch):
    """Have NLTK read its real data files where they lie beside the checkout, else the miniature."""
    folder = SHARED / "nltk_data"
    if not folder.is_dir():
        return request.getfixturevalue("synthetic_nltk_data")
    _let_nltk_read(folder, monkeypatch)
    return folder


def _let_nltk_read(folder, patch, loaded=[]):  # noqa: B006 - remembers what NLTK keeps
    """Loading the real files takes a second, so NLTK's models are dropped only where others are wanted."""
    import nltk.data
    import nltk.tag
    import nltk.tokenize

    patch.setenv("NLTK_DATA", str(folder))
    patch.setattr(nltk.data, "path", [str(folder)])
    if loaded != [folder]:
        nltk.tag._get_tagger.cache_clear()
        nltk.tokenize._get_punkt_tokenizer.cache_clear()
        loaded[:] = [folder]
