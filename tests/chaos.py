"""Chaos: workers, nodes, drivers and whole clusters are killed at random until a job is done, again and again.

python -m tests.chaos --storage local --kills 30 --seed 1
python -m tests.chaos --storage s3 --kills 30 --seed 1

`pixart extract` runs on a Ray cluster of a few nodes on this machine. A die kills -9 a worker, the raylet of a node,
the driver, or the head together with the driver; it stops a worker for a while, asks the driver to end by SIGTERM, and
gives the command a second time while it runs. However the command ends, it is given again. Once it has exited with 0,
all files must be those of an undisturbed run, byte for byte, with nothing beside them, and no commit record may ever
have changed. Then comes the next round, until there were enough kills. With `--storage s3` the output lies on an
S3-compatible server behind a proxy that injects errors. The seed decides what is done and after which delay; what it
hits depends on the machine's pace.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import tomli_w

from tests.conftest import SHARED
from tests.faults import FaultyProxy
from tests.raylets import Cluster, adopt, bury, end_all, send

GENTLE = ["pause", "term", "rival"]
BAG = ["worker"] * 4 + ["driver"] * 2 + ["raylet"] * 2 + ["head", *GENTLE]
"""What is done, drawn without putting back until the bag is empty; all but the gentle ones are kills."""

SETS = ("256px", "text")
NOT_COMPARED = {"status.json", "summary.html", "job.toml"}  # clock times, and the output's own path

_TERM_S = 30.0  # what a driver has after SIGTERM
_PATIENCE_S = 60.0  # without a new commit; then something is done all the same
_STUCK_S = 300.0
_MAX_ENDS_IN_A_ROW = 8


class ChaosError(Exception):
    """What chaos has found."""


@dataclass(frozen=True)
class Settings:
    """What to do.

    Attributes:
        kills: At least so many, over as many rounds as it takes.
        limit_s: The whole must be done by then.
    """

    storage: str
    kills: int
    seed: int
    num_units: int
    rows_per_unit: int
    num_nodes: int
    limit_s: float


# Sources


def real_photographs() -> list[tuple[bytes, bytes | None]]:
    """Return the photographs that lie beside the checkout with their alt texts, if any; empty where there are none."""
    pictures = []
    for path in sorted((SHARED / "photos").glob("*.tar")):
        with tarfile.open(path) as file:
            members = {m.name: file.extractfile(m).read() for m in file.getmembers() if m.isfile()}
        names = sorted(name for name in members if name.endswith(".jpg"))
        pictures += [(members[name], members.get(f"{name[:-4]}.txt")) for name in names]
    return pictures


def drawn_photographs(count: int) -> list[tuple[bytes, bytes | None]]:
    """Return pictures of noise and gradients in the sizes that photographs have; every third has no text."""
    import numpy as np
    from PIL import Image

    die = np.random.default_rng(0)
    pictures: list[tuple[bytes, bytes | None]] = []
    for number in range(count):
        width, height = (int(side) for side in die.integers(300, 900, 2))
        small = die.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(small).resize((width, height)).save(data, "JPEG", quality=90)
        pictures.append((data.getvalue(), f"picture number {number}".encode() if number % 3 else None))
    return pictures


def write_tars(folder: Path, settings: Settings) -> int:
    """Write the units as tars of a few pictures, every fiftieth cut off in the middle; return the number of rows."""
    num_rows = settings.num_units * settings.rows_per_unit
    pictures = real_photographs()
    pictures = pictures if len(pictures) >= num_rows else drawn_photographs(num_rows)
    folder.mkdir()
    for unit in range(settings.num_units):
        with tarfile.open(folder / f"photos-{unit:03d}.tar", "w") as file:
            for number in range(unit * settings.rows_per_unit, (unit + 1) * settings.rows_per_unit):
                image, text = pictures[number]
                image = image[: len(image) // 2] if number % 50 == 7 else image
                for suffix, data in ((".jpg", image), (".txt", text)):
                    if data is not None:
                        info = tarfile.TarInfo(f"{number:06d}{suffix}")
                        info.size = len(data)
                        file.addfile(info, io.BytesIO(data))
    return num_rows


# What is found in an output


def contents(root: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder by its path, but of those that no two runs have alike."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    lease = re.compile(r"[0-9]+\.json")  # numbered by the runs it took
    compared = (
        path
        for path in files
        if not (path.name in NOT_COMPARED or (path.parent.name == ".lease" and lease.fullmatch(path.name)))
    )
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in compared}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Name the files that are missing, that are others than expected, or that should not be there."""
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"left over: {name}" for name in sorted(found.keys() - expected.keys())]
    return lines + [
        f"differs: {name}" for name in sorted(expected) if found.get(name, expected[name]) != expected[name]
    ]


def accounts(root: Path, printed: str, num_rows: int) -> list[str]:
    """Compare what the command printed with what its tables hold and its sources held; name what does not add up."""
    lines = []
    for name in SETS:
        index = pq.read_table(root / name / "index.parquet", columns=["key"])["key"].to_pylist()
        rejected = pq.read_table(root / name / "rejected.parquet")["key"].to_pylist()
        said = re.search(rf"{name}\D.*?([\d,]+) in = ([\d,]+) out \+ ([\d,]+) rejected", printed)
        found = [int(number.replace(",", "")) for number in said.groups()] if said else []
        if found != [num_rows, len(index), len(rejected)] or len({*index, *rejected}) != num_rows:
            tables = f"{len(index)} rows and {len(rejected)} rejected, {len({*index, *rejected})} keys in all"
            lines.append(f"{name}: expected {num_rows} rows, the command printed {found}, the tables hold {tables}")
    return lines


# Storage


class LocalStorage:
    """Outputs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}

    def url(self, name: str) -> str:
        """Where an output is to go."""
        return str(self.folder / name)

    def commits(self, name: str) -> dict[str, str]:
        """The commit records of an output so far, each with what changes when it is written again."""
        found = {}
        for path in (path for set_name in SETS for path in (self.folder / name / set_name / "commits").glob("*.json")):
            found[f"{path.parent.parent.name}/{path.name}"] = f"{path.stat().st_ino} {path.stat().st_mtime_ns}"
        return found

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring an output where it can be read; return where."""
        return self.folder / name

    def unfinished(self) -> list[str]:
        """Uploads that were begun and not ended."""
        return []

    def faults(self) -> str:
        """Say what was injected."""
        return "none"


class S3Storage:
    """Outputs in a bucket of an S3-compatible server; the command sees it through a proxy that injects errors."""

    BUCKET = "chaos"

    def __init__(self, folder: Path, seed: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._direct = f"http://127.0.0.1:{port}"
        with (folder / "s3.log").open("wb") as log:
            words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
            self._server = psutil.Popen(words, stdout=log, stderr=log)
        self._make_bucket()
        self._proxy = FaultyProxy(self._direct, seed, error_rate=0.05, reset_rate=0.02, slow_rate=0.05)
        self._proxy.__enter__()
        self.environment = {
            "AWS_ENDPOINT_URL": self._proxy.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _make_bucket(self) -> None:
        deadline_s = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(
                    urllib.request.Request(f"{self._direct}/{self.BUCKET}", method="PUT"), timeout=30
                ).close()
                return
            except urllib.error.URLError:
                if time.monotonic() > deadline_s or self._server.poll() is not None:
                    raise
                time.sleep(0.1)

    @functools.cached_property
    def _store(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(
            key="testing",
            secret="testing",
            endpoint_url=self._direct,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def url(self, name: str) -> str:
        """Where an output is to go."""
        return f"s3://{self.BUCKET}/{name}"

    def commits(self, name: str) -> dict[str, str]:
        """The commit records of an output so far, each with what changes when it is written again."""
        found = {}
        for set_name in SETS:
            with contextlib.suppress(FileNotFoundError):
                for entry in self._store.ls(f"{self.BUCKET}/{name}/{set_name}/commits", detail=True, refresh=True):
                    found[f"{set_name}/{entry['name'].rsplit('/', 1)[-1]}"] = f"{entry['ETag']} {entry['LastModified']}"
        return found

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring an output where it can be read; return where."""
        prefix = f"{self.BUCKET}/{name}/"
        for path in self._store.find(prefix):
            target = folder / path.removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._store.cat_file(path))
        return folder

    def unfinished(self) -> list[str]:
        """Uploads that were begun and not ended."""
        return [upload["Key"] for upload in self._store.list_multipart_uploads(self.BUCKET) or []]

    def faults(self) -> str:
        """Say what was injected."""
        counters = dict(self._proxy.counters)
        return f"{self._proxy.num_faults} in {counters.pop('requests', 0)} requests: {_counted(counters)}"


# The die


class Chaos:
    """Rounds of one job, and what befalls them."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.logs = folder / "logs"
        self.logs.mkdir()
        (folder / "scratch").mkdir()
        self.storage = S3Storage(folder, settings.seed) if settings.storage == "s3" else LocalStorage(folder)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder / "scratch"), **self.storage.environment}
        self.cluster = Cluster(environment, self.logs, settings.num_nodes)
        self.num_rows = write_tars(folder / "photos", settings)
        self.struck: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.num_rounds = self.num_drivers = 0
        self.longest_term_s = 0.0
        self._die = random.Random(settings.seed)
        self._bag: list[str] = []
        self._began_s = time.monotonic()
        self._draw()

    @property
    def num_kills(self) -> int:
        """How many processes or nodes were killed -9 so far."""
        return self.struck.total() - sum(self.struck[kind] for kind in GENTLE)

    def run(self) -> None:
        """Do rounds until there were enough kills.

        Raises:
            ChaosError: If a round is not what an undisturbed run is.
        """
        from jobs.demo.prepare import build_models

        build_models(self.folder / "models")
        self.cluster.start()
        self.expected = self._undisturbed()
        while self.num_kills < self.settings.kills:
            self.num_rounds += 1
            self._round(f"round-{self.num_rounds:02d}")
            self._say(f"round {self.num_rounds} is identical, {self.num_kills} kills so far")

    def table(self) -> str:
        """Return what was done and what came of it, as lines of a table."""
        rows = {
            "storage": self.settings.storage,
            "seed": self.settings.seed,
            "units a round": f"{self.settings.num_units} of {self.settings.rows_per_unit} images, in two feature sets",
            "rounds, all identical": self.num_rounds,
            "kills": f"{self.num_kills}: {_counted(self.struck)}",
            "drivers": f"{self.num_drivers}, ended: {_counted(self.ends)}",
            "units": f"{self._num_units()} done, {self._num_again()} attempts lost with their worker and made again",
            "mended on the way": _counted(self.events),
            "longest end by SIGTERM": f"{self.longest_term_s:.1f} s",
            "faults injected": self.storage.faults(),
            "wall time": f"{time.monotonic() - self._began_s:.0f} s",
        }
        return "".join(f"{name:24}{value}\n" for name, value in rows.items())

    def _num_units(self) -> int:
        return self.num_rounds * (2 * self.settings.num_units + 1)  # and the features of the empty caption

    def _num_again(self) -> int:
        """Count what drivers said of failed attempts; those that were lost with a driver, nobody counts."""
        return sum(path.read_text().count(" attempt ") for path in self.logs.glob("driver-*.err"))

    # Rounds

    def _undisturbed(self) -> dict[str, str]:
        """Run the job once in peace, on the local disk and with one worker, and return its files."""
        output = self.folder / "expected"
        driver = self._drive(self._job(str(output), "expected"), "--set", "cluster.num_workers=1")
        if driver.process.wait(self.settings.limit_s):
            raise ChaosError(f"the undisturbed run failed: {driver.said()}")
        if wrong := accounts(output, driver.printed(), self.num_rows):
            raise ChaosError(f"the undisturbed run's accounts: {wrong}")
        return contents(output)

    def _round(self, name: str) -> None:
        job = self._job(self.storage.url(name), name)
        self._commits: dict[str, str] = {}
        num_failures = 0
        while True:
            driver = self._drive(job)
            self._disturb(driver, name)
            code = driver.process.returncode
            self.ends[str(code)] += 1
            if code == 0:
                break
            num_failures = num_failures + 1 if not driver.struck else 0
            if not self._is_fair(driver) or num_failures > _MAX_ENDS_IN_A_ROW:
                raise ChaosError(f"a driver ended with {code}, which nothing done to it explains: {driver.said()}")
        self._check(name, driver.printed(), "in a round")
        if self.num_kills < self.settings.kills:
            return
        driver = self._drive(job)  # once more, in peace: nothing to do, and nothing may change
        if driver.process.wait(self.settings.limit_s):
            raise ChaosError(f"a run with nothing to do failed: {driver.said()}")
        self._check(name, driver.printed(), "in a run with nothing to do")
        if left := [path for path in (self.folder / "scratch").glob("pixart-*/**/*") if path.is_file()]:
            raise ChaosError(f"left over in TMPDIR: {left}")

    def _check(self, name: str, printed: str, when: str) -> None:
        self._see_commits(name)
        folder = self.folder / f"fetched-{name}"
        found = self.storage.fetch(name, folder)
        wrong = differences(self.expected, contents(found)) + accounts(found, printed, self.num_rows)
        wrong += [f"unfinished upload: {key}" for key in self.storage.unfinished()]
        for path in found.glob("*/status.json"):
            self.events.update(json.loads(path.read_text())["events"])
        shutil.rmtree(folder, ignore_errors=True)
        if wrong:
            raise ChaosError(f"{when}, {name}: " + "; ".join(wrong[:20]))

    def _is_fair(self, driver: "Driver") -> bool:
        """Tell whether a driver's end is one that it may come to: by what was done, or with a clear line."""
        code = driver.process.returncode
        if code == -signal.SIGKILL:
            return "driver" in driver.struck or "head" in driver.struck
        if "term" in driver.struck and code in (-signal.SIGTERM, signal.SIGTERM, 4):
            return True  # before the run begins, by Ray's own handler between two sets, and in a run
        return code == 4 and "pixart extract: " in driver.said()

    def _job(self, output: str, name: str) -> Path:
        path = self.folder / f"{name}.toml"
        job = {
            "output": output,
            "source": {"paths": [f"{self.folder}/photos/*.tar"]},
            "image": {"model": f"{self.folder}/models/vae", "batch_size": 2},
            "text": {"model": f"{self.folder}/models/t5"},
            "cluster": {"num_workers": self.cluster.num_nodes, "max_rejected": 1.0},
        }
        path.write_text(tomli_w.dumps(job))
        return path

    def _drive(self, job: Path, *words: str) -> "Driver":
        self.num_drivers += 1
        stem = self.logs / f"driver-{self.num_drivers:03d}"
        command = [sys.executable, "-m", "jobs.cli", "extract", str(job), *words]
        with stem.with_suffix(".out").open("wb") as out, stem.with_suffix(".err").open("wb") as err:
            process = psutil.Popen(command, env=self.cluster.environment, stdout=out, stderr=err)
        return Driver(process, stem, job)

    # Strikes

    def _disturb(self, driver: "Driver", name: str) -> None:
        """Watch a driver to its end and strike meanwhile."""
        while driver.process.poll() is None:
            now_s = time.monotonic()
            if now_s - self._began_s > self.settings.limit_s:
                raise ChaosError(f"not done after {self.settings.limit_s:.0f} s: {driver.said()}")
            if self._see_commits(name) and self._armed_s is None:
                self._armed_s = now_s + self._delay_s
            if now_s - self._news_s > _STUCK_S:
                raise ChaosError(f"nothing new in {_STUCK_S:.0f} s: {driver.said()}")
            if self.num_kills < self.settings.kills and now_s > (self._armed_s or self._struck_s + _PATIENCE_S):
                self._strike(driver)
            self.cluster.mend()
            bury({driver.process.pid, *(node.process.pid for node in self.cluster.nodes)})
            time.sleep(0.1)

    def _see_commits(self, name: str) -> bool:
        """Return whether there are new commit records; there may be none that has changed."""
        found = self.storage.commits(name)
        changed = [unit for unit, stamp in self._commits.items() if found.get(unit) != stamp]
        if changed:
            raise ChaosError(f"{name}: commit records written twice or lost: {changed}")
        is_new = len(found) > len(self._commits)
        self._commits = found
        if is_new:
            self._news_s = time.monotonic()
        return is_new

    def _draw(self) -> None:
        """Draw what is done next, and when: a moment after the next commit, or a moment from now."""
        if not self._bag:
            self._bag = self._die.sample(BAG, len(BAG))
        self._next, self._delay_s, self._choice = self._bag.pop(), self._die.uniform(0.3, 3.0), self._die.random()
        is_hasty = self._die.random() < 0.25
        self._struck_s = self._news_s = time.monotonic()
        self._armed_s = self._struck_s + self._delay_s if is_hasty else None

    def _strike(self, driver: "Driver") -> None:
        if not getattr(self, f"_strike_{self._next}")(driver):
            return  # nobody is there to be struck: as soon as somebody is
        self._say(f"{self._next} after {len(self._commits)} commits")
        self.struck[self._next] += 1
        driver.struck.append(self._next)
        self._draw()

    def _strike_worker(self, driver: "Driver") -> int:
        workers = self.cluster.workers()
        return send(workers[int(self._choice * len(workers)) :][:1], signal.SIGKILL)

    def _strike_raylet(self, driver: "Driver") -> int:
        return self.cluster.lose_node(self._choice, back_after_s=1 + 4 * self._choice)

    def _strike_driver(self, driver: "Driver") -> int:
        return send([driver.process], signal.SIGKILL)

    def _strike_head(self, driver: "Driver") -> int:
        send([driver.process], signal.SIGKILL)
        self.cluster.lose_head()
        driver.process.wait()
        time.sleep(2 * self._choice)  # meanwhile workers of the other nodes go on
        self.cluster.restart()
        return 1

    def _strike_pause(self, driver: "Driver") -> int:
        workers = self.cluster.workers()
        paused = workers[int(self._choice * len(workers)) :][:1]
        count = send(paused, signal.SIGSTOP)
        time.sleep(1 + 5 * self._choice)
        send(paused, signal.SIGCONT)
        return count

    def _strike_term(self, driver: "Driver") -> int:
        count = send([driver.process], signal.SIGTERM)
        began_s = time.monotonic()
        try:
            driver.process.wait(_TERM_S)
        except psutil.TimeoutExpired:
            raise ChaosError(f"still there {_TERM_S:.0f} s after SIGTERM: {driver.said()}") from None
        self.longest_term_s = max(self.longest_term_s, time.monotonic() - began_s)
        return count

    def _strike_rival(self, driver: "Driver") -> int:
        """A second driver is refused while the first lives, and is one like any other if that ends meanwhile."""
        if "shards, " not in driver.said():
            return 0  # it does not hold the output yet, and would itself be the one that is refused
        rival = self._drive(driver.job)
        try:
            code = rival.process.wait(_PATIENCE_S)
        except psutil.TimeoutExpired:
            raise ChaosError(f"a second driver is still there after {_PATIENCE_S:.0f} s: {rival.said()}") from None
        refused = code == 4 and "another run is writing here" in rival.said()
        if not refused and not (code == 0 and driver.process.poll() is not None):
            raise ChaosError(f"a second driver was not refused, it ended with {code}: {rival.said()}")
        return 1

    def _say(self, line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - self._began_s:7.1f} s  {line}\n")
        sys.stderr.flush()


class Driver:
    """One run of the command, what it says, and what was done while it ran."""

    def __init__(self, process: psutil.Popen, stem: Path, job: Path) -> None:
        self.process, self._stem, self.job = process, stem, job
        self.struck: list[str] = []

    def printed(self) -> str:
        """Its stdout."""
        return self._stem.with_suffix(".out").read_text()

    def said(self) -> str:
        """The end of its stderr."""
        return self._stem.with_suffix(".err").read_text()[-3000:]


def _counted(counter: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"


def main() -> int:
    """Run chaos and print its table; return 1, and keep the logs, if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--storage", choices=["local", "s3"], default="local")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--rows-per-unit", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=3, help="of the cluster, the head included; at least 2")
    parser.add_argument("--limit-s", type=float, default=3600.0)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    sizes = (args.units, args.rows_per_unit, args.nodes)
    settings = Settings(args.storage, args.kills, seed, *sizes, args.limit_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt()
    folder = Path(tempfile.mkdtemp(prefix="pixart-chaos-"))
    chaos = None
    try:
        chaos = Chaos(settings, folder)
        chaos.run()
    except BaseException:
        sys.stderr.write(f"chaos: failed with --seed {seed}; everything it wrote is in {folder}\n")
        raise
    else:
        sys.stdout.write(chaos.table())
    finally:
        end_all()
        if chaos is not None:
            chaos.cluster.close()
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
