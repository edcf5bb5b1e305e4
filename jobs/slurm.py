"""`pixart submit --on slurm`: a batch script that starts Ray on the nodes of its allocation and runs the command.

The script is complete: the job file is in it, so that it can be kept, read, edited and handed to `sbatch` again.
`train` does without Ray: `torchrun` starts it on every node, once for each GPU. It is asked to stop by a file in the
run's directory, for `torchrun` passes a signal on and kills half a minute later, which can be too soon to save.
"""

import shlex
from collections.abc import Mapping

from jobs.shape import Parcel, Shape

_GRACE_S = 15  # leaves time to clean up within the 30 s (KillWait) after which Slurm kills everything
_NOTICE_S = 120
_SAVE_S = 300  # what a checkpoint of `train` may take to be written; the notice is given this early and a minute more

_HEAD = """\
#!/bin/bash
# A preempted job, or one at its time limit, queues again and goes on where it was. So does: sbatch THIS_FILE
{directives}
set -euo pipefail
{umask}
export PATH={bin}:$PATH  # where pixart is, on every node
export PYTHONUNBUFFERED=1
folder=${{SLURM_SUBMIT_DIR:-$PWD}}/.{name}-$SLURM_JOB_ID  # on storage that all nodes share
mkdir -p "$folder"
cat > "$folder/job.toml" <<'END_OF_JOB_FILE'
{job_toml}END_OF_JOB_FILE

child=
code=0
again=
caught=
stopping=
watch=
steps=()
stop() {{  # the command {ends} and exits
  caught=1
  stopping=1
  if [[ -z $child ]]; then return; fi
{ask}  {{ {patience}; kill -KILL "$child" 2>/dev/null || true; }} &
  watch=$!
}}
trap 'stop {grace_s}' TERM INT
trap 'again=1; stop {notice_s}' USR1  # Slurm's notice that the time is nearly over
run() {{  # in the background, so that a signal is handled at once
  if [[ -n $stopping ]]; then exit 143; fi
  caught=
  "$@" &
  child=$!
  while true; do
    code=0
    wait "$child" || code=$?
    if [[ -z $caught ]]; then break; fi
    caught=  # it was the signal that ended the wait
  done
  child=
  if [[ -n $watch ]]; then kill "$watch" 2>/dev/null || true; fi
}}
finish() {{
  local status=$?
  trap - EXIT
  trap '' TERM INT USR1  # let what follows be
  if [[ $code -eq 0 ]]; then code=$status; fi  # a line of this script failed, not the command
  for step in ${{steps[@]+"${{steps[@]}}"}}; do kill -TERM "$step" 2>/dev/null || true; done
  rm -rf "$folder"
  wait{clean}
  if [[ -n $again{unfinished} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
}}
trap finish EXIT
# scancel and preemption send TERM to the steps of a job, not to this script: a step of its own passes it on.
# shellcheck disable=SC2016
srun --quiet --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --overlap \\
  bash -c 'trap "kill -TERM $1; exit" TERM; sleep infinity & wait' relay "$$" &
steps+=($!)
"""

_RAY = """
export RAY_TMPDIR=/tmp/pixart-$SLURM_JOB_ID  # short: sockets live in it
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # it is stopped after the command: nothing is left to drain
od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH"
port=$((20000 + SLURM_JOB_ID % 2000 * 4))  # jobs that share a node have ports of their own
head=$SLURMD_NODENAME  # this script runs on the first node
export RAY_ADDRESS=$head:$port
# $SLURM_CPUS_ON_NODE is each node's own, and so is for the shell of the step to read.
# shellcheck disable=SC2016
start='exec ray start "$@" --block --disable-usage-stats --num-cpus="$SLURM_CPUS_ON_NODE" {gpus}'
srun --quiet --nodes=1 --ntasks=1 --nodelist="$head" --cpu-bind=none --overlap bash -c "$start" ray \\
  --head --port="$port" --ray-client-server-port=$((port + 1)) --dashboard-port=$((port + 2)) \\
  --dashboard-agent-listen-port=$((port + 3)) --temp-dir="$RAY_TMPDIR" &
steps+=($!)
{workers}
run python -m jobs.nodes {num_nodes} --gpus-per-node {gpus_per_node} --timeout-s 600
if [[ $code -ne 0 ]]; then exit "$code"; fi
"""

_WORKERS = """\
srun --quiet --nodes={count} --ntasks={count} --exclude="$head" --cpu-bind=none --overlap bash -c "$start" ray \\
  --address="$RAY_ADDRESS" --dashboard-agent-listen-port=$((port + 3)) &
steps+=($!)
"""

_ASK = """\
  kill -TERM "$child" 2>/dev/null || true
  # Ray may go at the same moment and leave the command waiting; a kill loses no more than the units in flight.
"""
_PATIENCE = 'sleep "$1"'

# Again and again: a run that is just starting takes the file for one that an earlier run has left.
_PATIENCE_OF_TRAINING = """\
for ((s = 0; s < $1; s += 3)); do touch {stop_file} || true; sleep 3; done"""

# Only the file asks to stop: the TERM that Slurm sends to the steps is passed on to the script, and not for `torchrun`.
_TORCHRUN = """
port=$((20000 + SLURM_JOB_ID % 2000 * 4))  # jobs that share a node have ports of their own
# What stands in single quotes is each node's own, and so is for the shell of the step to read.
# shellcheck disable=SC2016
start='trap "" TERM; export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > {per_node} ? SLURM_CPUS_ON_NODE / {per_node} : 1))
  exec torchrun --signals-to-handle=SIGINT --local-addr="$SLURMD_NODENAME" "$@"'
run srun --quiet --nodes={num_nodes} --ntasks={num_nodes} --ntasks-per-node=1 --cpu-bind=none --overlap \\
  --kill-on-bad-exit=1 bash -c "$start" torchrun --nnodes={num_nodes} --nproc-per-node={per_node} \\
  --rdzv-backend=c10d --rdzv-endpoint="$SLURMD_NODENAME:$port" --rdzv-id="$SLURM_JOB_ID" \\
  --no-python pixart {words}
"""

_CLEAN = """
  rm -rf "$RAY_TMPDIR"
  srun --quiet --overlap --ntasks-per-node=1 rm -rf "$RAY_TMPDIR" 2>/dev/null || true  # a cancelled job gets no more"""


def script(parcel: Parcel, shape: Shape, time_limit: str, bin_folder: str, extra: Mapping[str, str]) -> str:
    """Return the batch script.

    Args:
        time_limit: In Slurm's form, e.g. `1-00:00:00`.
        bin_folder: Where `pixart` is on the nodes.
        extra: Further `#SBATCH --KEY=VALUE`; they replace ours.
    """
    save = parcel.run_dir is not None
    head = _HEAD.format(
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(shape, time_limit, extra, save)),
        umask="umask 077  # the token opens the cluster\n" if parcel.uses_ray else "",
        bin=shlex.quote(bin_folder),
        name=shape.name,
        ends="saves" if save else "finishes or drops its units",
        ask="" if save else _ASK,
        patience=_PATIENCE_OF_TRAINING.format(stop_file=shlex.quote(f"{parcel.run_dir}/stop")) if save else _PATIENCE,
        grace_s=_SAVE_S if save else _GRACE_S,
        notice_s=_SAVE_S if save else _NOTICE_S // 2,
        unfinished="" if save else " && $code -ne 0",
        job_toml=parcel.job_toml,
        clean=_CLEAN if parcel.uses_ray else "",
    )
    return head + _command(parcel, shape)


def _command(parcel: Parcel, shape: Shape) -> str:
    words = parcel.words('"$folder/job.toml"')
    if parcel.run_dir is not None:
        per_node = max(shape.gpus_per_node, 1)
        return _TORCHRUN.format(per_node=per_node, num_nodes=shape.num_nodes, words=words)
    ray = ""
    if parcel.uses_ray:
        workers = _WORKERS.format(count=shape.num_nodes - 1) if shape.num_nodes > 1 else ""
        ray = _RAY.format(
            gpus=f"--num-gpus={shape.gpus_per_node}",
            workers=workers,
            num_nodes=shape.num_nodes,
            gpus_per_node=shape.gpus_per_node,
        )
    return f"{ray}\nrun pixart {words}\n"


def _directives(shape: Shape, time_limit: str, extra: Mapping[str, str], save: bool) -> list[str]:
    wanted = {
        "job-name": shape.name,
        "nodes": str(shape.num_nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(shape.gpus_per_node) if shape.gpus_per_node else None,
        "exclusive": "",
        "mem": "0",
        "time": time_limit,
        "signal": f"B:USR1@{_SAVE_S + 60 if save else _NOTICE_S}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{shape.name}-%j.log",
        **extra,
    }
    return [f"{key}={value}" if value else key for key, value in wanted.items() if value is not None]
