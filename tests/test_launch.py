"""Exit codes and signals of the launchers, with stand-ins for the runs."""

import os
import re
import signal
import subprocess
from pathlib import Path

import jax
import pytest
from jax._src import clusters

from moe.parallel import processes

ROOT = Path(__file__).parents[1]

# A stand-in for a run: exits with the next code of a file each time; for "wait" exits with 75 on SIGTERM, and counts
# the signals.
RUN = """
stop=
trap 'echo term >> terms; stop=yes' TERM
echo start >> starts
code=$(head -n 1 codes); sed -i 1d codes
if [ "$code" = wait ]; then
    while [ -z "$stop" ] && [ ! -e over ]; do sleep 0.05; done
    sleep 0.2
    exit 75
fi
exit "$code"
"""


def _again(folder, codes):
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "run.sh").write_text(RUN)
    return subprocess.Popen(
        # Background processes start with SIGINT ignored, which a shell cannot undo by itself.
        ["env", "--default-signal=INT", "sh", "-euc", f". {ROOT}/scripts/launch/again.sh; again sh run.sh"],
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )


def _lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("codes", "last"), [([0], 0), ([75, 75, 0], 0), ([75, 1, 0], 1), ([130], 130)])
def test_only_exit_code_75_restarts(tmp_path, codes, last):
    assert _again(tmp_path, codes).wait(timeout=60) == last
    assert _lines(tmp_path / "starts") == codes.index(last) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_stops_its_run_once(tmp_path, number):
    launcher = _again(tmp_path, ["wait", 0])
    try:
        while _lines(tmp_path / "codes") == 2:
            assert launcher.poll() is None
        launcher.send_signal(number)
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == 75  # once the run has ended, not before
    finally:
        launcher.kill()
        (tmp_path / "over").touch()  # ends a run that was not stopped
    assert _lines(tmp_path / "starts") == 1
    assert _lines(tmp_path / "terms") == 1


# Two nodes, one task on each with 8 GPUs, as SLURM describes them to the second node's process.
SLURM_NODE = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip


@pytest.fixture
def initialized(monkeypatch):
    """Arguments that JAX's distributed client gets, from its own detection of the cluster, instead of connecting."""
    found = {}

    def record(address=None, count=None, index=None, local_device_ids=None):
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        names = ("address", "count", "index", "gpus")
        found.update(zip(names, detect(address, count, index, local_device_ids, None, 300), strict=True))

    monkeypatch.setattr(jax.distributed, "initialize", record)
    for name in list(os.environ):
        if name.startswith(
            ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS", "JAX_LOCAL", "CUDA_VISIBLE")
        ):
            monkeypatch.delenv(name)
    return found


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({}, list(range(8))),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}, [3]),  # a process per GPU
        ({"SLURM_GPUS_ON_NODE": "0"}, [0]),  # no GPUs: JAX's own choice, without effect
    ],
)
def test_one_process_a_node_gets_all_its_gpus(initialized, monkeypatch, changes, gpus):
    for name, value in (SLURM_NODE | changes).items():
        monkeypatch.setenv(name, value)
    processes.join_processes()
    assert initialized["gpus"] == gpus
    assert initialized["address"].startswith("node07:")
    assert (initialized["count"], initialized["index"]) == tuple(
        int((SLURM_NODE | changes)[name]) for name in ("SLURM_NTASKS", "SLURM_PROCID")
    )


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_job_starts_one_task_a_node_and_requeues_after_75(tmp_path, code, requeued):
    # srun in short: one task a node, each told how many CPUs it has; the worst exit code is srun's own.
    _script(
        tmp_path / "bin/srun",
        'shift; for node in 0 1; do SLURM_PROCID=$node "$@" || worst=$?; done; exit ${worst:-0}\n',
    )
    _script(tmp_path / "bin/scontrol", 'echo "$@" >> requeued\n')
    _script(tmp_path / ".venv/bin/python", f'echo "$SLURM_PROCID $SRUN_CPUS_PER_TASK $@" >> started; exit {code}\n')
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "64"}
    job = ["sh", str(ROOT / "scripts/launch/slurm.sbatch"), "--config=configs/mixtral.py", "--workdir=a b"]
    assert subprocess.run(job, cwd=tmp_path, env=environment, timeout=60).returncode == code
    run = "main.py --distributed --config=configs/mixtral.py --workdir=a b"
    assert (tmp_path / "started").read_text().splitlines() == [f"{node} 64 {run}" for node in (0, 1)]
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_options_describe_whole_nodes():
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (ROOT / "scripts/launch/slurm.sbatch").read_text(), re.M)
    )
    assert options["ntasks-per-node"] == "1"
    assert {"nodes", "gpus-per-node", "cpus-per-task", "time", "requeue", "signal"} <= set(options)
