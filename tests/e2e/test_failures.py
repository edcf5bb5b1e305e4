"""Failures that no other test provokes: what docs/failures.md promises of them, by the command or a real driver."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image
from ray import cloudpickle

from jobs import cli
from pipelines.images import ImageStage
from pixart_data.commits import read_records
from pixart_data.storage import list_files, location
from tests.faults import FaultyProxy
from tests.raylets import Cluster, below, send
from tests.web import Web, http, picture

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

WAIT_S = 120
TERM_S = 30
"""What Slurm, Kubernetes and Ray leave between SIGTERM and SIGKILL."""


def wait_until(true, process=None):
    deadline_s = time.monotonic() + WAIT_S
    while not true():
        assert process is None or process.poll() is None, "ended too early"
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def start(*words, cwd, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, **pipes, **options)


def images_of(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if not path.name.startswith(".tmp-")  # of a worker that was ended with the command; see `temporary`
        and (path.suffix in (".tar", ".parquet") or path.parent.name == "commits" or path.name == "manifest.json")
    }


def temporary(root):
    return [path for folder in (root, *root.rglob("*")) if folder.is_dir() for path in folder.glob(".tmp-*")]


# In the middle of a unit, through the command


@dataclass
class Held:
    """A web whose pictures come when `go` is set, and the job that fetches them."""

    web: Web
    go: threading.Event
    job: Path
    output: Path

    @property
    def asked(self):
        return {path for path in self.web.asked if path.endswith(".jpg")}


@pytest.fixture
def held(bucket, tmp_path, job_file):
    output = location(f"{bucket}/out")
    go = threading.Event()

    def page(number):
        async def answer(http_request, writer):
            while not go.is_set():
                await asyncio.sleep(0.02)
            writer.write(http(200, picture(seed=number)))

        return answer

    with Web() as web:
        web.pages |= {f"{number}.jpg": page(number) for number in range(20)}
        rows = [{"url": web.url(f"{number}.jpg"), "caption": str(number)} for number in range(20)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
        slow = {"read_timeout_s": 300.0, "total_timeout_s": 300.0}
        job = {
            "output": str(output),
            "urls": {"paths": [str(tmp_path / "list.parquet")], "rows_per_unit": 4},
            "downloads": {"allow_private_addresses": True, "concurrency_per_host": 64, **slow},
            "cluster": {"num_workers": 1},
        }
        yield Held(web, go, job_file("fetch", job), output)


def test_sigterm_lets_units_in_flight_end_and_a_second_command_is_refused(held, pixart, tmp_path):
    first = start("-m", "jobs.cli", "fetch", held.job, cwd=tmp_path)
    wait_until(lambda: held.asked, first)

    second = pixart("fetch", held.job)
    assert second.returncode == 4
    assert f"{held.output}: another run is writing here" in second.stderr
    assert "wait for it, or choose another output" in second.stderr
    assert first.poll() is None

    began_s = time.monotonic()
    first.send_signal(signal.SIGTERM)
    held.go.set()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - began_s < TERM_S
    assert first.returncode == 4, said
    assert "pixart fetch: stopped by SIGTERM; run the same command again to go on where it was" in said
    records = read_records(held.output)
    ended = {f"{number}.jpg" for unit in records for number in range(4 * int(unit), 4 * int(unit) + 4)}
    assert 0 < len(ended) < 20
    assert held.asked == ended  # what was in flight ended, and nothing else began

    again = pixart("fetch", held.job)
    assert again.returncode == 0, again.stderr
    assert "20 in = 20 out + 0 rejected" in again.stdout
    assert {name: record for name, record in read_records(held.output).items() if name in records} == records
    assert {held.web.asked[path] for path in held.asked} == {1}  # and nothing was done again
    assert len(held.asked) == 20
    verified = pixart("verify", held.output)
    assert verified.returncode == 0, verified.stdout
    folders = (held.output, *(held.output / name for name in ("commits", "images", "rows", ".lease")))
    assert not [path for folder in folders for path in list_files(folder) if path.name.startswith(".tmp-")]


def test_a_source_that_is_away_for_a_while_is_waited_for(bucket, s3_server, miniatures, job_file, tmp_path):
    """All requests to the store of the images fail for some seconds, in the middle of the run."""
    data = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(data, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(40):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    store = s3fs.S3FileSystem(use_listings_cache=False)
    for name in "abcdef":
        store.put_file(str(tmp_path / "a.tar"), f"{bucket}/data/{name}.tar")
    root = tmp_path / "out/256px"
    job = job_file(
        "extract",
        {
            "output": str(tmp_path / "out"),
            "source": {"paths": [f"{bucket}/data/*.tar"]},
            "image": {"model": miniatures["vae"]},
        },
    )
    with FaultyProxy(s3_server) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        run = start("-m", "jobs.cli", "extract", job, cwd=tmp_path, env=environment)
        wait_until(lambda: list((root / "commits").glob("[!.]*.json")), run)
        proxy.error_rate = 1.0
        wait_until(lambda: proxy.num_faults >= 4, run)
        proxy.error_rate = 0.0
        printed, said = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, said
    assert "240 in = 240 out + 0 rejected" in printed
    assert json.loads((root / "status.json").read_text())["events"]["storage_retry"] >= 1


# A driver of its own


DRIVER = """
import logging, mmap, os, sys, time
from functools import partial
from pathlib import Path
from pipelines.config import Cluster, Stats
from pipelines.driver import Run, execute
from pixart_data.commits import Record
from pixart_data.errors import PixArtError

folder, address, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class Task:
    def __init__(self, id):
        self.id = id

class Stage:
    def __init__(self, folder, what):
        self.folder, self.what = folder, what
        if what == "loads":
            (folder / "reached").touch()
            time.sleep(600)

    def __call__(self, unit, report):
        report(1, 0)
        with (self.folder / "pids").open("a") as file:
            file.write(f"{unit.id} {os.getpid()}\\n")
        tries = (self.folder / "pids").read_text().count(f"{unit.id} ")
        if unit.id == "u1" and self.what == "hangs":
            (self.folder / "reached").touch()
            time.sleep(600)
        if unit.id == "u1" and self.what == "memory" and tries == 1:
            held = []
            for _ in range(80):  # 5 GiB, if nobody minds
                held.append(mmap.mmap(-1, 64 << 20))
                held[-1].write(b"x" * (64 << 20))
                time.sleep(0.05)
        return Record(unit.id, "", {}, 2, 2, {}, [])

logging.basicConfig(stream=sys.stderr)
logging.getLogger("pipelines").setLevel(logging.INFO)
run = Run(
    stage="copy",
    root=folder / "out",
    units=[Task("u0"), Task("u1"), Task("u2")],
    settings=lambda unit: {},
    build=partial(Stage, folder, what),
    cluster=Cluster(address=address, num_workers=1, cpus_per_worker=0.1, max_attempts=3),
    swept=[],
    count=lambda unit: 2,
)
try:
    print(execute(run, Stats(output=str(folder / "out"), sets=[{"name": "n", "path": "/p"}])).line())
except PixArtError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def drive(folder, what, address="local", **environment):
    folder.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = Path(__file__).parents[2]
    return start("-c", DRIVER, folder, address, what, cwd=root, env={**clean, **environment})


def drive_into_the_limit(folder):
    """Run the driver whose unit takes 5 GiB, with Ray's limit 3 GiB above what is in use now."""
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + (3 << 30)) / memory.total
    settings = {"RAY_memory_usage_threshold": f"{limit:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    run = drive(folder, "memory", **settings)
    printed, said = run.communicate(timeout=WAIT_S)
    return run.returncode, printed, said


@pytest.mark.skipif(psutil.virtual_memory().available < 8 << 30, reason="takes 3 GiB for a moment, and leaves others 5")
def test_a_worker_that_takes_all_memory_is_killed_and_its_unit_tried_again(tmp_path):
    """Ray's own memory monitor kills the worker that grows. It counts the whole machine, other people's work too."""
    for number in range(3):
        folder = tmp_path / f"run-{number}"
        code, printed, said = drive_into_the_limit(folder)
        if not (code == 4 and "while they load the model (memory ran out on its machine" in said):
            break  # else somebody else took the memory
    assert code == 0, said
    assert printed == "6 in = 6 out + 0 rejected\n"
    assert "u1: attempt 1 failed: its worker died (memory ran out on its machine, and Ray killed it)" in said
    tries = [line.split()[1] for line in (folder / "pids").read_text().splitlines() if line.startswith("u1 ")]
    assert len(set(tries)) >= 2
    assert json.loads((folder / "out/status.json").read_text())["events"]["worker_died"] >= 1


@pytest.fixture
def clusters(tmp_path):
    """Two heads, each in a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    made = []
    try:
        for name in ("frozen", "dead"):
            logs = tmp_path / f"{name}-logs"
            logs.mkdir()
            made.append(Cluster(environment, logs, num_nodes=1))
            made[-1].start()
        yield made
    finally:
        for cluster in made:
            for node in cluster.nodes:
                send([*below(node.process), node.process], signal.SIGKILL)
                node.process.wait()
            cluster.close()


def test_sigterm_ends_a_driver_in_time_whatever_it_waits_for(clusters, tmp_path):
    """A unit that does not end, a model that is being loaded, a head that is frozen and one that is dead."""
    frozen, dead = clusters
    tokens = [{k: v for k, v in c.environment.items() if k.startswith("RAY_")} for c in clusters]
    runs = {
        "frozen": drive(tmp_path / "frozen", "hangs", tokens[0]["RAY_ADDRESS"], **tokens[0]),
        "dead": drive(tmp_path / "dead", "hangs", tokens[1]["RAY_ADDRESS"], **tokens[1]),
        "unit": drive(tmp_path / "unit", "hangs"),
        "load": drive(tmp_path / "load", "loads"),
    }
    ended_s = {}
    try:
        for name, run in runs.items():
            wait_until((tmp_path / name / "reached").exists, run)
        head = frozen.nodes[0].process
        assert send([process for process in below(head) if process.name() == "gcs_server"], signal.SIGSTOP) == 1
        dead.lose_head()
        began_s = time.monotonic()
        for run in runs.values():
            run.send_signal(signal.SIGTERM)
        while len(ended_s) < len(runs) and time.monotonic() - began_s < 2 * TERM_S:
            for name, run in runs.items():
                if name not in ended_s and run.poll() is not None:
                    ended_s[name] = time.monotonic() - began_s
            time.sleep(0.05)
    finally:
        said = {}
        for name, run in runs.items():
            run.kill()
            said[name] = run.communicate()[1]
    assert ended_s.keys() == runs.keys(), said
    assert max(ended_s.values()) < TERM_S, ended_s
    assert {name: run.returncode for name, run in runs.items()} == dict.fromkeys(runs, 4), said
    assert all("run the same command again to go on" in text for text in said.values()), said
    assert ended_s["load"] < 15  # nothing is in flight, so nothing is waited for
    assert all(list(read_records(tmp_path / name / "out")) == ["u0"] for name in ("frozen", "dead", "unit"))


# In this process's Ray


def draw(folder, count=6):
    folder.mkdir(parents=True)
    for number in range(count):
        size = (96 + 8 * number, 64)
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{number}.jpg")
    return folder


@dataclass(frozen=True)
class Poisoned:
    """Builds the stage of `extract`, whose process one unit kills for as long as `cause` is there."""

    cause: Path
    unit: str

    def __call__(self, *args):
        stage = ImageStage(*args)
        cause, poison = self.cause, self.unit

        def work(unit, report):
            if unit.id == poison and cause.exists():
                with cause.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGSEGV)  # as a bug of a decoder in C does
            return stage(unit, report)

        return work


@pytest.mark.usefixtures("ray_here")
class TestHere:
    def test_a_shard_that_kills_its_workers_is_set_aside_and_named(
        self, miniatures, job_file, tmp_path, monkeypatch, capsys
    ):
        cause, root = tmp_path / "cause", tmp_path / "out/256px"
        cause.touch()
        job = {
            "output": str(tmp_path / "out"),
            "source": {"paths": [str(draw(tmp_path / "pictures"))], "rows_per_unit": 2},
            "image": {"model": miniatures["vae"]},
            "cluster": {"max_attempts": 2, "cpus_per_worker": 1.0},
        }
        path = job_file("extract", job)
        monkeypatch.setattr("pipelines.extract.ImageStage", Poisoned(cause, "pictures-00001"))
        assert cli.main(["extract", str(path)]) == 4
        said = capsys.readouterr().err
        assert "1 of 3 shards failed 2 times and were set aside, the others are done: pictures-00001: its work" in said
        assert "mend the cause, then run the same command again" in said
        assert cause.read_text() in ("xx", "xxx")  # once more where it shared its worker with a neighbour
        before = images_of(root)
        assert sorted(name for name in before if name.startswith("commits/")) == [
            "commits/pictures-00000.json",
            "commits/pictures-00002.json",
        ]
        assert not {"manifest.json", "index.parquet"} & before.keys()
        assert "pictures-00001" in (root / "summary.html").read_text()
        assert cli.main(["status", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert "1 set aside" in shown
        assert "pictures-00001: set aside after 2 attempt(s): its worker died" in shown

        cause.unlink()
        assert cli.main(["extract", str(path)]) == 0
        assert "6 in = 6 out + 0 rejected" in capsys.readouterr().out
        after = images_of(root)
        assert after.items() >= before.items()
        assert {"manifest.json", "index.parquet"} < after.keys()
        assert cli.main(["verify", str(tmp_path / "out")]) == 0

    def test_after_a_full_disk_the_same_command_finishes(self, miniatures, job_file, tmp_path, capsys):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root; tests/e2e/test_bad_inputs.py covers the message")
        try:
            self._fill_and_free(disk, miniatures["vae"], job_file, tmp_path, capsys)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)

    def _fill_and_free(self, disk, model, job_file, tmp_path, capsys):
        source = {"paths": [str(draw(tmp_path / "pictures", 12))], "rows_per_unit": 2}
        image = {"model": model}
        here = {"output": str(tmp_path / "expected"), "source": source, "image": image}
        assert cli.main(["extract", str(job_file("here", here))]) == 0
        path = job_file("there", {**here, "output": str(disk / "out")})
        (disk / "filler").write_bytes(bytes((4 << 20) - (96 << 10)))
        assert cli.main(["extract", str(path)]) == 4
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixart")]
        assert "the disk is full; free space or choose another output, then run the same command again" in line
        assert not (disk / "out/256px/manifest.json").exists()
        (disk / "filler").unlink()
        assert cli.main(["extract", str(path)]) == 0
        assert images_of(disk / "out") == images_of(tmp_path / "expected")
        assert not temporary(disk)

    def test_a_limit_for_one_reason_is_a_key_of_the_job_file(self, miniatures, job_file, tmp_path, capsys):
        folder = draw(tmp_path / "pictures", 100)
        for number in range(3):
            (folder / f"{number}.jpg").write_bytes(b"")
        job = {
            "output": str(tmp_path / "out"),
            "source": {"paths": [str(folder)]},
            "image": {"model": miniatures["vae"], "batch_size": 32},
            "cluster": {"max_rejected_by_reason": {"zero_bytes": 0.02, "truncated_image": 0.0}},
        }
        path = job_file("extract", job)
        assert cli.main(["extract", str(path)]) == 3
        said = capsys.readouterr().err
        assert "100 in = 97 out + 3 rejected (zero_bytes 3): 3% zero_bytes, limit 2%" in said
        assert "(cluster.max_rejected_by_reason); everything is committed in" in said
        assert cli.main(["extract", str(path), "--set", "cluster.max_rejected_by_reason.zero_bytes=0.03"]) == 0
        assert "100 in = 97 out + 3 rejected" in capsys.readouterr().out
        wrong = path.with_name("wrong.toml")
        wrong.write_text(path.read_text().replace("zero_bytes", "zero_byte"))
        assert cli.main(["extract", str(wrong)]) == 2
        assert "did you mean 'zero_bytes'?" in capsys.readouterr().err

    def test_a_dry_run_says_what_is_redone_and_why(self, miniatures, job_file, tmp_path, capsys):
        source = {"paths": [str(draw(tmp_path / "pictures", 4))], "rows_per_unit": 2}
        captioner = {"model": miniatures["llava"], "max_new_tokens": 2}
        captions = job_file("caption", {"output": str(tmp_path / "c"), "source": source, "captioner": captioner})
        features = job_file(
            "extract",
            {
                "output": str(tmp_path / "f"),
                "source": source,
                "captions": {"path": str(tmp_path / "c")},
                "image": {"model": miniatures["vae"]},
                "text": {"model": miniatures["t5"]},
            },
        )
        assert cli.main(["caption", str(captions)]) == 0
        assert cli.main(["extract", str(features)]) == 0
        before = images_of(tmp_path)
        capsys.readouterr()

        prompt = ["--set", "captioner.prompt=Say it in one word"]
        assert cli.main(["caption", str(captions), "--dry-run", *prompt]) == 0
        printed = capsys.readouterr().out
        assert "2 shards, 0 done, 2 to do (0 new; 2 redone: captioner.prompt changed)" in printed
        assert "caption: captioner.prompt changed: pictures-00000, pictures-00001" in printed
        from pixart_data.miniatures import build_vae

        build_vae(tmp_path / "vae", seed=1)
        vae = ["--set", f"image.model={tmp_path / 'vae'}"]
        assert cli.main(["extract", str(features), "--dry-run", *vae]) == 0
        printed = capsys.readouterr().out
        assert "extract 256px: 2 shards, 0 done, 2 to do (0 new; 2 redone: image.model changed)" in printed
        assert "extract 256px: image.model changed: pictures-00000, pictures-00001" in printed
        assert "extract text: 3 shards, 3 done, 0 to do" in printed
        assert images_of(tmp_path) == before

        assert cli.main(["extract", str(features), *vae]) == 0
        after = images_of(tmp_path)
        texts = {name: data for name, data in before.items() if not name.startswith("f/256px/")}
        assert {name: after.get(name) for name in texts} == texts
        assert after["f/256px/index.parquet"] != before["f/256px/index.parquet"]
        assert cli.main(["caption", str(captions), *prompt]) == 0
        features_now = {name: data for name, data in images_of(tmp_path).items() if name.startswith("f/")}
        assert features_now == {name: data for name, data in after.items() if name.startswith("f/")}

    def test_images_behind_a_mount_that_went_away_are_retried_when_it_is_back(
        self, miniatures, job_file, tmp_path, capsys
    ):
        mount = tmp_path / "mount"
        mount.mkdir()
        bind = ["mount", "--bind", str(draw(tmp_path / "pictures", 100)), str(mount)]
        if subprocess.run(bind, capture_output=True, check=False).returncode:
            pytest.skip("mounting a folder needs root")
        job = {
            "output": str(tmp_path / "out"),
            "source": {"paths": [str(mount)], "rows_per_unit": 5},
            "image": {"model": miniatures["vae"]},
            "cluster": {"max_rejected": 1.0, "max_rejected_by_reason": {"missing_file": 0.0}},
        }
        path, commits = job_file("extract", job), tmp_path / "out/256px/commits"

        def unmount():
            wait_until(lambda: list(commits.glob("[!.]*.json")))
            subprocess.run(["umount", "-l", mount], check=True)

        thread = threading.Thread(target=unmount)
        thread.start()
        try:
            assert cli.main(["extract", str(path)]) == 3
        finally:
            thread.join()
        assert "missing_file, limit 0% (cluster.max_rejected_by_reason)" in capsys.readouterr().err
        subprocess.run(bind, check=True)
        try:
            assert cli.main(["retry", str(tmp_path / "out"), "--reason", "missing_file"]) == 0
        finally:
            subprocess.run(["umount", "-l", mount], check=True)
        assert "100 in = 100 out + 0 rejected" in capsys.readouterr().out
