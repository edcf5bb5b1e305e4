import socket
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from aiohttp import ServerDisconnectedError
from ray.job_submission import JobStatus

from jobs import cli, submit, workers
from jobs.cli import submit_parser
from jobs.config import Verify
from pixart_data.errors import JobError


class FakeClient:
    """Stands for Ray's client: takes one job, says a few words, and ends as it is told to."""

    def __init__(
        self, exit_code=0, status="SUCCEEDED", refuse=None, lose=None, lose_info=None, stops_after=0, command="caption"
    ):
        self.info = SimpleNamespace(
            driver_exit_code=exit_code,
            status=JobStatus(status),
            message="what happened",
            submission_id="raysubmit_1",
            metadata={"pixart": command},
            start_time=1000,
            end_time=1000 + 3_661_000,
        )
        self.refuse, self.lose, self.lose_info, self.stops_after = refuse, lose, lose_info, stops_after
        self.jobs, self.stopped = [], []

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
        if self.stopped and not self.info.status.is_terminal():
            self.stops_after -= 1
            if self.stops_after <= 0:
                self.info.status = JobStatus.STOPPED
        return self.info

    def get_job_logs(self, name):
        return "so far\n"

    def list_jobs(self):
        return [self.info, SimpleNamespace(metadata={}, start_time=1)]  # somebody else's too

    def stop_job(self, name):
        self.stopped.append(name)
        return not self.info.status.is_terminal()


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


def test_what_is_said_of_logs_travels_with_the_job(monkeypatch, cluster, job):
    monkeypatch.setattr("jobs.cli.talk", lambda *_: None)  # it would stay so for all tests that follow
    client, _ = cluster("caption", job, "-v", "--log-json")
    assert "caption job.toml -v --log-json" in client.jobs[0]["entrypoint"]


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


def test_without_following_it_says_the_id_and_stops(cluster, job, capsys):
    client, code = cluster("caption", job, "--no-follow", lose=AssertionError("followed"))
    assert (code, capsys.readouterr().out, len(client.jobs)) == (0, "raysubmit_1\n", 1)


def test_it_waits_for_nodes_when_told_how_many(cluster, job):
    client, _ = cluster("caption", job, "--nodes", "8", "--gpus-per-node", "4")
    entrypoint = client.jobs[0]["entrypoint"]
    assert "python -m jobs.nodes 8 --gpus-per-node 4 --ask --at-least 1 && exec pixart caption job.toml" in entrypoint
    assert subprocess.run(["sh", "-n"], input=entrypoint, text=True).returncode == 0


def test_without_a_number_it_does_not_wait_for_nodes(cluster, job):
    client, _ = cluster("caption", job)
    assert "jobs.nodes" not in client.jobs[0]["entrypoint"]


@pytest.fixture
def training(tmp_path):
    text = '[data]\nfeatures = "features"\nbatches_per_step = 16\n[run]\noutput = "run"\nnum_steps = 1\n'
    (tmp_path / "train.toml").write_text(text)
    return "train.toml"


def test_training_on_nodes_has_a_worker_for_each_gpu_and_needs_all_of_them(cluster, training):
    client, code = cluster("train", training, "--nodes", "2")
    [sent] = client.jobs
    assert (code, sent["file"]["run"]["num_workers"], sent["entrypoint_num_gpus"]) == (0, 16, None)
    assert "jobs.nodes 2 --gpus-per-node 8 --ask && exec pixart train job.toml" in sent["entrypoint"]
    assert int(sent["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > workers._SAVE_S


def test_training_without_nodes_is_as_the_job_says(cluster, training, caplog):
    client, _ = cluster("train", training, "--set", "run.num_workers=4")
    assert client.jobs[0]["file"]["run"]["num_workers"] == 4
    assert "jobs.nodes" not in client.jobs[0]["entrypoint"]
    assert "without a GPU" not in caplog.text
    client, _ = cluster("train", training, "--gpus", "1")
    assert (client.jobs[0]["file"]["run"]["num_workers"], client.jobs[0]["entrypoint_num_gpus"]) == (0, 1)
    assert "without a GPU" not in caplog.text
    cluster("train", training)
    assert "train runs without a GPU: it was not given one with --gpus 1, or several with --nodes" in caplog.text


def test_a_step_that_cannot_be_shared_out_is_not_sent(cluster, training, capsys):
    client, code = cluster("train", training, "--set", "run.num_workers=3")
    assert (code, client.jobs) == (2, [])
    assert "data.batches_per_step: expected a multiple of the 3 GPUs" in capsys.readouterr().err


def test_stop_waits_for_training_to_save(cluster, caplog):
    caplog.set_level("INFO", "jobs")
    client, code = cluster("stop", "raysubmit_1", exit_code=None, status="RUNNING", stops_after=1, command="train")
    assert (code, client.stopped) == (0, ["raysubmit_1"])
    assert "asked raysubmit_1 to stop; it may take 300 s to save" in caplog.text


def test_status_is_one_line(cluster, capsys):
    assert cluster("status", "raysubmit_1", exit_code=None, status="RUNNING")[1] == 0
    line = capsys.readouterr().out
    assert line.startswith("raysubmit_1  caption  RUNNING  since ")
    assert line.endswith("for 1:01:01\n")


def test_status_without_an_id_lists_the_jobs_that_are_ours(cluster, capsys):
    assert cluster("status", exit_code=3, status="FAILED")[1] == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("raysubmit_1  caption  FAILED")
    assert line.endswith("exit code 3")


def test_logs_follow_to_the_end_and_exit_as_the_job_does(cluster, capsys):
    assert cluster("logs", "raysubmit_1", exit_code=3, status="FAILED")[1] == 3
    assert capsys.readouterr().out == "log of raysubmit_1\ndone\n"


def test_logs_without_following_are_what_there_is(cluster, capsys):
    assert cluster("logs", "raysubmit_1", "--no-follow", exit_code=None, status="RUNNING")[1] == 0
    assert capsys.readouterr().out == "so far\n"


def test_stop_waits_until_the_job_is_gone(cluster, capsys):
    client, code = cluster("stop", "raysubmit_1", exit_code=None, status="RUNNING", stops_after=2)
    assert (code, client.stopped) == (0, ["raysubmit_1"])
    assert "raysubmit_1  caption  STOPPED" in capsys.readouterr().out


def test_a_job_that_does_not_stop_is_said_to_be(cluster, capsys, monkeypatch):
    monkeypatch.setattr(submit, "_grace_s", lambda command: 0.1)
    monkeypatch.setattr(submit, "_KILL_S", 0)
    assert cluster("stop", "raysubmit_1", exit_code=None, status="RUNNING", stops_after=10**9)[1] == 4
    assert "raysubmit_1: still RUNNING 0.1 s after it was asked to stop" in capsys.readouterr().err


def test_to_stop_a_finished_job_is_no_error(cluster, capsys):
    client, code = cluster("stop", "raysubmit_1")
    assert (code, client.stopped) == (0, ["raysubmit_1"])
    assert "raysubmit_1  caption  SUCCEEDED" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["status", "logs", "stop"])
def test_an_unknown_job_is_one_line(cluster, capsys, word):
    error = RuntimeError("Request failed with status code 404: Job raysubmit_2 does not exist.")
    assert cluster(word, "raysubmit_2", "--address", "http://head:8265", lose_info=error)[1] == 2
    assert "raysubmit_2: expected a job of the cluster at http://head:8265, found none" in capsys.readouterr().err


@pytest.mark.parametrize("error", lost()[:4], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("word", ["status", "logs", "stop"])
def test_a_cluster_that_does_not_answer_is_one_line(cluster, capsys, word, error):
    assert cluster(word, "raysubmit_1", lose_info=error)[1] == 4
    assert "the cluster does not answer" in capsys.readouterr().err
