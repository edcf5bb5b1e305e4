"""What `pixart submit --print` renders: valid in the eyes of shells and schemas, and true to the job file."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import cli

BIN = Path(sys.executable).parent
IMAGE = ["--image", "registry.example.com/pixart:1"]
MOUNT = ["--mount", "claim:/data"]
JOB = """
output = "/data/captions"
[source]
paths = ["/data/pictures/*.tar"]
[captioner]
model = "llava-hf/llava-1.5-7b-hf"
prompt = "What's in \\"it\\"? $HOME `id`\\nTell."
"""


@pytest.fixture
def submit(monkeypatch, tmp_path, capsys):
    """Run `pixart submit caption job.toml ...`; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(JOB)

    def run(*words, command=("caption", "job.toml")):
        code = cli.main(["submit", *command, *words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def kubernetes(submit):
    def render(*words, **options):
        code, out, err = submit("--on", "k8s", "--print", *IMAGE, *MOUNT, *words, **options)
        assert code == 0, err
        return list(yaml.safe_load_all(out))

    return render


@pytest.fixture
def cluster(submit):
    def render(*words, **options):
        code, out, err = submit("--on", "ray", "--print", *IMAGE, *words, **options)
        assert code == 0, err
        return yaml.safe_load(out)

    return render


def script(submit, *words, **options):
    code, out, err = submit("--on", "slurm", "--print", *words, **options)
    assert code == 0, err
    return out


def directives(text):
    return re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "words", [[], ["--nodes", "8"], ["--gpus-per-node", "0"], ["--bin", "/opt/it's here/bin"]], ids=str
)
def test_shells_and_shellcheck_accept_the_slurm_script(submit, tmp_path, words):
    path = tmp_path / "job.sbatch"
    path.write_text(script(submit, *words))
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    checked = subprocess.run([BIN / "shellcheck", "--shell=bash", path], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_shellcheck_would_have_complained(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -rf $folder\n")
    assert subprocess.run([BIN / "shellcheck", tmp_path / "bad.sh"], capture_output=True).returncode == 1


def test_the_slurm_script_carries_the_resolved_job_file_unchanged(submit):
    text = script(submit, "--set", "captioner.batch_size=3")
    job = tomllib.loads(text.partition("<<'END_OF_JOB_FILE'\n")[2].partition("END_OF_JOB_FILE\n")[0])
    assert job["captioner"]["prompt"] == 'What\'s in "it"? $HOME `id`\nTell.'
    assert job["captioner"]["batch_size"] == 3
    assert job["cluster"]["address"] == "auto"


def test_slurm_is_asked_for_the_nodes_and_for_another_turn(submit):
    asked = directives(script(submit, "--nodes", "8", "--gpus-per-node", "4", "--time", "2:00:00"))
    assert {"nodes=8", "gpus-per-node=4", "ntasks-per-node=1", "exclusive", "time=2:00:00", "requeue"} <= set(asked)
    assert any(re.fullmatch(r"signal=B:USR1@\d+", line) for line in asked)
    assert not any("gpus" in line for line in directives(script(submit, "--gpus-per-node", "0")))


def test_what_a_site_wants_is_added_or_replaces_ours(submit):
    asked = directives(script(submit, "--sbatch", "partition=gpu", "--sbatch", "time=1:00:00"))
    assert "partition=gpu" in asked
    assert [line for line in asked if line.startswith("time=")] == ["time=1:00:00"]


def test_only_commands_on_ray_start_one_on_slurm(submit, tmp_path):
    (tmp_path / "train.toml").write_text('output = "/data/run"\n[data]\nfeatures = "/data/features"\n')
    text = script(submit, command=("verify", "/data/features"))
    assert "ray start" not in text
    assert 'run pixart verify "$folder/job.toml"' in text
    code, _, err = submit("--on", "slurm", "--nodes", "2", command=("verify", "/data/features"))
    assert code == 2
    assert "verify runs in one process, on one node; leave --nodes out" in err


TRAIN = """
[data]
features = "/data/features"
batches_per_step = 64
[run]
output = "/data/it's a run"
num_steps = 10
"""


@pytest.fixture
def train(tmp_path):
    (tmp_path / "train.toml").write_text(TRAIN)
    return ("train", "train.toml")


@pytest.mark.parametrize("words", [[], ["--nodes", "8"], ["--gpus-per-node", "0"]], ids=str)
def test_training_on_slurm_is_torchrun_on_every_node(submit, train, tmp_path, words):
    text = script(submit, *words, command=train)
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    checked = subprocess.run([BIN / "shellcheck", "--shell=bash", path], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
    nodes, per_node = ("8", "8") if "--nodes" in words else ("1", "8") if not words else ("1", "1")
    assert f"srun --quiet --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1" in text
    assert f"torchrun --nnodes={nodes} --nproc-per-node={per_node}" in text
    assert '--no-python pixart train "$folder/job.toml"' in text
    assert "ray start" not in text
    assert "umask" not in text, "checkpoints are not secret"
    [notice_s] = [int(line.partition("@")[2]) for line in directives(text) if line.startswith("signal=B:USR1@")]
    [save_s] = map(int, re.findall(r"again=1; stop (\d+)'", text))
    assert 120 < save_s < notice_s


def test_training_on_slurm_has_no_workers_of_ray(submit, train):
    text = script(submit, "--nodes", "2", "--set", "run.num_workers=16", command=train)
    job = tomllib.loads(text.partition("<<'END_OF_JOB_FILE'\n")[2].partition("END_OF_JOB_FILE\n")[0])
    assert job["run"]["num_workers"] == 0


@pytest.mark.parametrize("words", [[], ["--set", "run.num_workers=16"]], ids=str)
def test_training_on_kubernetes_is_a_worker_for_each_gpu(submit, kubernetes, train, words):
    config_map, job = kubernetes("--nodes", "2", *words, command=train)
    assert tomllib.loads(config_map["data"]["job.toml"])["run"]["num_workers"] == 16
    assert "python -m jobs.nodes 2 --gpus-per-node 8\nexec pixart train" in config_map["data"]["run.sh"]
    assert "entrypointNumGpus" not in job["spec"]
    environment = json.loads(job["spec"]["runtimeEnvYAML"])["env_vars"]
    pods = job["spec"]["rayClusterSpec"]
    for template in (pods["headGroupSpec"]["template"], pods["workerGroupSpecs"][0]["template"]):
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert 270 < int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < grace_s, "a checkpoint is large"
    shown = submit("--on", "k8s", "--print", *IMAGE, *MOUNT, command=train)[1]
    assert "stop     touch /data/it's a run/stop" in shown


def test_training_on_one_gpu_of_kubernetes_is_the_command_itself(kubernetes, train):
    config_map, job = kubernetes("--gpus", "1", "--gpus-per-node", "1", command=train)
    assert tomllib.loads(config_map["data"]["job.toml"])["run"]["num_workers"] == 0
    assert job["spec"]["entrypointNumGpus"] == 1
    assert "jobs.nodes" not in config_map["data"]["run.sh"]


def test_a_cluster_on_aws_for_training_is_asked_for_its_nodes(submit, train):
    words = ["--on", "ray", "--print", "--nodes", "4", *IMAGE, *MOUNT]
    assert "pixart submit train JOB_FILE --nodes 4 --gpus-per-node 8" in submit(*words, command=train)[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--nodes", "3"],
            "data.batches_per_step: expected a multiple of the 24 GPUs that train runs on, found 64; give --set "
            "data.batches_per_step=72, which makes a step of 2,304 samples in place of 2,048 (data.batch_size sets it",
        ),
        (["--nodes", "2", "--set", "run.num_workers=8"], "run.num_workers: expected 16, one for each GPU of 2 nodes"),
        (["--on", "k8s", "--gpus", "4"], "--gpus 4: expected --gpus 1 for train in one process, found more"),
        (
            ["--on", "k8s", "--gpus", "1", "--set", "run.num_workers=8"],
            "--gpus 1: expected --gpus 1 for train in one process, found run.num_workers = 8",
        ),
        (["--on", "k8s", "--gpus", "1", "--nodes", "2"], "train runs in one process, on one node"),
    ],
)
def test_numbers_of_gpus_that_do_not_fit_are_one_line(submit, train, words, said):
    code, out, err = submit("--on", "slurm", "--print", *IMAGE, *MOUNT, *words, command=train)
    assert (code, out) == (2, "")
    assert said in err


def test_every_pod_and_the_config_map_of_kubernetes_are_valid(kubernetes):
    config_map, job = kubernetes("--nodes", "8", "--spot", "--node-label", "pool=gpu", "--gpus-per-node", "8")
    spec = job["spec"]["rayClusterSpec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(config_map, version, strict=True)
    assert len(templates) == 2
    for template in templates:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, version, strict=True)
    templates[0]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **templates[0]}, version, strict=True
        )


def test_the_ray_job_runs_the_command_with_its_job_file(kubernetes):
    config_map, job = kubernetes("--nodes", "3", "--gpus-per-node", "4")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {3}
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    worker = group["template"]["spec"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    [folder] = [m["mountPath"] for m in head["containers"][0]["volumeMounts"] if m["name"] == "job"]
    assert job["spec"]["entrypoint"] == f"bash {folder}/run.sh"
    assert f"exec pixart caption {folder}/job.toml" in config_map["data"]["run.sh"]
    assert "python -m jobs.nodes 3 --gpus-per-node 4" in config_map["data"]["run.sh"]
    assert tomllib.loads(config_map["data"]["job.toml"])["output"] == "/data/captions"
    volumes = {volume["name"]: volume for volume in worker["volumes"]}
    assert volumes["job"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert volumes["data-0"]["persistentVolumeClaim"]["claimName"] == "claim"
    assert all(mount["name"] in volumes for mount in worker["containers"][0]["volumeMounts"])
    environment = json.loads(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert 0 < int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < worker["terminationGracePeriodSeconds"]


def test_spot_machines_are_tolerated_on_kubernetes_only_when_asked_for(kubernetes):
    def tolerated(*words):
        pod = kubernetes(*words)[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
        return {toleration["key"] for toleration in pod.get("tolerations", [])}

    assert tolerated() == {"nvidia.com/gpu"}
    assert tolerated("--spot") > {"nvidia.com/gpu"}
    assert tolerated("--gpus-per-node", "0") == set()


@pytest.mark.parametrize("words", [[], ["--nodes", "8", "--spot"], ["--gpus-per-node", "0"]], ids=str)
def test_ray_accepts_the_autoscaling_cluster(cluster, words):
    config = cluster(*MOUNT, *words)
    validate_config(prepare_config(config))
    assert config["max_workers"] == config["available_node_types"]["worker"]["max_workers"]


def test_ray_would_have_complained(cluster):
    config = cluster(*MOUNT)
    config["available_node_typs"] = config.pop("available_node_types")
    with pytest.raises(Exception, match="available_node_typs"):
        validate_config(prepare_config(config))


def test_the_autoscaling_cluster_has_a_lasting_head_and_workers_on_spot(cluster):
    config = cluster("--nodes", "8", "--spot", "--mount", "fs-1.example.com@tcp:/abc:/data", "--mount", "efs:/:/models")
    head, worker = (config["available_node_types"][name] for name in ("head", "worker"))
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (worker["min_workers"], worker["max_workers"], worker["resources"]["GPU"]) == (0, 8, 8)
    mounting = "\n".join(config["initialization_commands"])
    assert "mount -t lustre -o relatime,flock fs-1.example.com@tcp:/abc /data" in mounting
    assert "mount -t nfs4 efs:/ /models" in mounting
    assert "-v /data:/data" in config["docker"]["run_options"]
    starts = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "IamInstanceProfile" not in worker["node_config"]


def test_workers_may_write_to_s3_when_the_job_does(cluster):
    config = cluster("--set", "output=s3://bucket/captions", *MOUNT)
    assert config["available_node_types"]["worker"]["node_config"]["IamInstanceProfile"]


@pytest.mark.parametrize("target", ["k8s", "ray"])
def test_a_path_that_the_containers_do_not_see_is_named(submit, target):
    code, out, err = submit("--on", target, "--print", *IMAGE, "--mount", "claim:/elsewhere")
    assert (code, out) == (2, "")
    assert "/data/captions: expected a path on storage that the nodes mount, found /elsewhere; pass --mount" in err


@pytest.mark.parametrize("target", ["k8s", "ray"])
def test_an_image_is_asked_for(submit, target):
    code, out, err = submit("--on", target, "--print", *MOUNT)
    assert (code, out) == (2, "")
    assert "--image: expected a container image with the toolkit and Ray in it, found none" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "Not_a_name"], "--name Not_a_name: expected up to 40 lower-case letters"),
        (["--sbatch", "partition"], "--sbatch partition: expected KEY=VALUE"),
        (["--mount", "claim"], "--mount claim: expected SOURCE:/PATH"),
        (["--set", "cluster.address=head:6379"], "cluster.address: expected auto, found 'head:6379'"),
    ],
)
def test_what_cannot_be_rendered_is_one_line(submit, words, said):
    code, out, err = submit("--on", "slurm", "--print", *words)
    assert (code, out) == (2, "")
    assert said in err


def shim(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("target", "tool"), [("slurm", "sbatch"), ("k8s", "kubectl")])
def test_the_scheduler_s_own_tool_gets_the_manifest(submit, tmp_path, monkeypatch, target, tool):
    shim(tmp_path, tool, f'echo "$@" > {tmp_path}/words; cat > {tmp_path}/taken; echo Submitted 7')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["--on", target, *IMAGE, *MOUNT]
    assert submit(*words)[:2] == (0, "Submitted 7\n")
    assert (tmp_path / "taken").read_text() == submit(*words, "--print")[1]
    assert (tmp_path / "words").read_text().strip() == {"sbatch": "", "kubectl": "create -f -"}[tool]
    (tmp_path / "taken").unlink()
    assert submit(*words, "--dry-run")[0] == 0
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize(("target", "tool"), [("slurm", "sbatch"), ("k8s", "kubectl")])
def test_a_tool_that_is_missing_or_refuses_is_one_line(submit, tmp_path, monkeypatch, target, tool):
    words = ["--on", target, *IMAGE, *MOUNT]
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = submit(*words)
    assert code == 4
    assert f"pixart submit: {tool}: expected it on the PATH, found none; run this where {tool} works" in err
    shim(tmp_path, tool, "echo no such partition >&2; exit 3")
    code, _, err = submit(*words)
    assert code == 4
    assert "exited with 3: no such partition" in err
