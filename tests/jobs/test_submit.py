import socket
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from aiohttp import ServerDisconnectedError

from jobs import cli, submit
from jobs.cli import submit_parser
from jobs.config import Verify
from pixart_data.errors import JobError


class FakeClient:
    """Stands for Ray's client: takes one job, says a few words, and ends as it is told to."""

    def __init__(self, exit_code=0, status="SUCCEEDED", refuse=None, lose=None, lose_info=None):
        self.info = SimpleNamespace(driver_exit_code=exit_code, status=status, message="what happened")
        self.refuse, self.lose, self.lose_info = refuse, lose, lose_info
        self.jobs = []

    def submit_job(self, **job):
        if self.refuse:
            raise self.refuse
        [path] = Path(job["runtime_env"]["working_dir"]).iterdir()
        self.jobs.append({**job, "name": path.name, "file": tomllib.loads(path.read_text())})
        return "raysubmit_1"

    async def tail_job_logs(self, name):
        yield f"log of {name}\n"
        if self.lose:
            raise self.lose
        yield "done\n"

    def get_job_info(self, name):
        if self.lose_info:
            raise self.lose_info
        return self.info


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Run `pixart submit ...` against a fake cluster; returns the client it met and the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)

    def run(*words, **behaviour):
        client = FakeClient(**behaviour)
        client.addresses = []
        monkeypatch.setattr(submit, "_connect", lambda address: client.addresses.append(address) or client)
        return client, cli.main(["submit", *words])

    return run


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job.toml").write_text('output = "out"\n[source]\npaths = ["pictures"]\n[captioner]\nmodel = "./m"\n')
    return "job.toml"


def test_the_resolved_job_travels_with_absolute_paths(cluster, job, tmp_path, capsys):
    client, code = cluster("caption", job, "--set", "captioner.batch_size=3")
    [sent] = client.jobs
    assert code == 0
    assert (sent["name"], sent["metadata"], sent["entrypoint_num_gpus"]) == ("job.toml", {"pixart": "caption"}, None)
    assert sent["file"]["output"] == f"{tmp_path}/out"
    assert sent["file"]["source"]["paths"] == [f"{tmp_path}/pictures"]
    assert sent["file"]["captioner"]["model"] == f"{tmp_path}/m"
    assert sent["file"]["captioner"]["batch_size"] == 3
    assert sent["file"]["cluster"]["address"] == "auto"  # inside the job that is the cluster itself
    assert capsys.readouterr().out == "log of raysubmit_1\ndone\n"


def test_the_entrypoint_runs_the_same_command(cluster, job):
    client, _ = cluster("caption", job)
    assert "exec pixart caption job.toml" in client.jobs[0]["entrypoint"]
    assert "-m jobs.cli caption job.toml" in client.jobs[0]["entrypoint"]


def test_a_job_without_a_file_travels_as_one(cluster, tmp_path):
    client, _ = cluster("stats", "name=captions.parquet", "--out", "report")
    [sent] = client.jobs
    assert sent["file"]["sets"][0]["path"] == f"{tmp_path}/captions.parquet"
    assert "stats job.toml" in sent["entrypoint"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_its_own_options_may_stand_anywhere(cluster, job, place):
    own = ["--address", "http://head:8265", "--gpus", "2"]
    words = [*own, "caption", job] if place == "before" else ["caption", job, *own]
    client, code = cluster(*words)
    assert (code, client.addresses) == (0, ["http://head:8265"])
    assert client.jobs[0]["entrypoint_num_gpus"] == 2.0


def test_the_address_may_come_from_the_environment(cluster, job, monkeypatch):
    assert cluster("caption", job)[0].addresses == [submit.DEFAULT_ADDRESS]
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    assert cluster("caption", job)[0].addresses == ["http://elsewhere:1"]


@pytest.mark.parametrize("exit_code", [0, 1, 2, 3, 4, 130])
def test_the_exit_code_is_the_job_s(cluster, job, exit_code):
    _, code = cluster("caption", job, exit_code=exit_code, status="SUCCEEDED" if not exit_code else "FAILED")
    assert code == exit_code


def test_a_job_that_ended_without_an_exit_code_is_judged_by_its_status(cluster, job, capsys):
    assert cluster("caption", job, exit_code=None)[1] == 0
    assert cluster("caption", job, exit_code=None, status="STOPPED")[1] == 4
    assert "pixart submit: raysubmit_1: STOPPED: what happened" in capsys.readouterr().err


def test_a_dry_run_shows_the_job_and_sends_nothing(cluster, job, capsys):
    client, code = cluster("caption", job, "--dry-run")
    out = capsys.readouterr().out
    assert (code, client.jobs, client.addresses) == (0, [], [])
    assert out.startswith(f"submit: to {submit.DEFAULT_ADDRESS}: ")
    assert tomllib.loads(out.partition("job.toml:\n")[2])["captioner"]["max_new_tokens"] == 512


def test_a_wrong_job_is_not_sent(cluster, job, capsys):
    client, code = cluster("caption", job, "--set", "captioner.modle=x")
    assert (code, client.jobs) == (2, [])
    assert "did you mean 'model'?" in capsys.readouterr().err


def lost():
    return [
        RuntimeError("Request failed with status code 500"),
        ConnectionError("reset by peer"),
        requests.exceptions.ConnectionError("connection refused"),
        requests.exceptions.ReadTimeout("timed out"),
        ServerDisconnectedError(),
    ]


@pytest.mark.parametrize("error", lost(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["lose", "lose_info"])
def test_a_cluster_that_is_lost_sight_of_is_one_line(cluster, job, capsys, when, error):
    _, code = cluster("caption", job, **{when: error})
    assert code == 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixart")]
    assert "lost sight of raysubmit_1" in line
    assert "pixart submit logs raysubmit_1" in line


@pytest.mark.parametrize("error", lost()[:4], ids=lambda error: type(error).__name__)
def test_a_cluster_that_refuses_the_job_is_one_line(cluster, job, capsys, error):
    _, code = cluster("caption", job, refuse=error)
    assert code == 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pixart")]
    assert "the cluster refused the job" in line


def test_to_stop_following_leaves_the_job_alone(cluster, job, capsys):
    _, code = cluster("caption", job, lose_info=KeyboardInterrupt())
    assert code == 130
    assert "raysubmit_1 goes on. Stop it: pixart submit stop raysubmit_1" in capsys.readouterr().err


def test_nobody_at_the_address_is_one_line(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/token")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(
            JobError, match=f"{address}: no Ray dashboard answers: .*; start one with `ray start --head`"
        ):
            submit.submit("verify", Verify(path="/x"), submit_parser().parse_args(["--address", address]))
