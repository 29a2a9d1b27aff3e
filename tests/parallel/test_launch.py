"""Exit codes and signals of the launchers, with stand-ins for the runs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import kubernetes_validate
import pytest
import yaml
from jax._src import clusters

from moe.parallel import mesh

ROOT = Path(__file__).parents[2]

# A stand-in for a run: each start exits with the next code of a file; on "wait" it waits for SIGTERM, counts the
# signals and exits with 75.
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


# Two nodes with one task and 8 GPUs each, as SLURM describes them to the process of the second node.
SLURM_NODE = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip


@pytest.fixture
def initialized(monkeypatch):
    """Record the arguments that JAX's distributed client would get from its own cluster detection, without
    connecting."""
    found = {}

    def record(address=None, count=None, index=None, local_device_ids=None, **_):
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
def test_one_process_per_node_gets_all_gpus_of_the_node(initialized, monkeypatch, changes, gpus):
    for name, value in (SLURM_NODE | changes).items():
        monkeypatch.setenv(name, value)
    mesh.join_processes()
    assert initialized["gpus"] == gpus
    assert initialized["address"].startswith("node07:")
    assert (initialized["count"], initialized["index"]) == tuple(
        int((SLURM_NODE | changes)[name]) for name in ("SLURM_NTASKS", "SLURM_PROCID")
    )


def test_with_a_given_coordinator_a_process_gets_all_gpus_of_its_node(initialized, monkeypatch):
    given = {"JAX_COORDINATOR_ADDRESS": "node07:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in (SLURM_NODE | given).items():
        monkeypatch.setenv(name, value)
    mesh.join_processes()
    assert initialized == {"address": "node07:1234", "count": 2, "index": 1, "gpus": list(range(8))}


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_slurm_job_starts_one_task_per_node_and_requeues_after_75(tmp_path, code, requeued):
    # A minimal srun: it runs one task per node and exits with the last nonzero code.
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


def test_launchers_pass_shellcheck():
    scripts = [*ROOT.glob("scripts/launch/*.sh"), ROOT / "scripts/launch/slurm.sbatch", ROOT / "scripts/install.sh"]
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run(
        [checker, "--severity=warning", *scripts], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert found.stdout == ""
    assert found.returncode == 0


def test_slurm_options_describe_whole_nodes():
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", (ROOT / "scripts/launch/slurm.sbatch").read_text(), re.M)
    )
    assert options["ntasks-per-node"] == "1"
    assert {"nodes", "gpus-per-node", "cpus-per-task", "time", "requeue", "signal"} <= set(options)


def _queued_resource(folder, *words):
    """Run the script with a gcloud that records its arguments and runs commands for workers here, once."""
    _script(
        folder / "bin/gcloud",
        'printf "%s\\n" "$*" >> asked\n'
        'for word; do case $word in --command=*) sh -c "${word#--command=}";; esac; done\n',
    )
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "scripts/launch/queued_resource.sh"), *words]
    return subprocess.run(command, cwd=folder, env=environment, timeout=60, capture_output=True, text=True)


def test_queued_resource_starts_runs_that_outlive_the_connection(tmp_path):
    # The stand-in for a run prints its arguments and waits for SIGTERM; SIGHUP must not end it.
    run = "printf '<%s>' \"$@\"; trap 'echo stopped; exit 75' TERM; touch ready; while :; do sleep 0.05; done\n"
    _script(tmp_path / "moe/scripts/launch/tpu_vm.sh", run)
    arguments = ("--config=configs/mixtral.py", "--workdir=a b", "--config.data.dataset=it's $HOME")
    assert _queued_resource(tmp_path, "start", "pod", *arguments).returncode == 0
    pid = int((tmp_path / "moe/moe.pid").read_text())
    try:
        while not (tmp_path / "moe/ready").exists():
            os.kill(pid, 0)  # fails if the run has ended
            time.sleep(0.02)
        os.kill(pid, signal.SIGHUP)
        log = tmp_path / "moe/moe.log"
        assert log.read_text().endswith("".join(f"<{argument}>" for argument in arguments))
        assert _queued_resource(tmp_path, "stop", "pod").returncode == 0
        while "stopped" not in log.read_text():
            time.sleep(0.02)
    finally:
        subprocess.run(["kill", "-KILL", str(pid)], check=False, capture_output=True)
    assert all("tpu-vm ssh pod --worker=all" in line for line in (tmp_path / "asked").read_text().splitlines()[:1])


def test_queued_resource_asks_for_the_slice(tmp_path):
    assert _queued_resource(tmp_path, "create", "pod", "v5p-128", "v2-alpha-tpuv5", "--spot").returncode == 0
    assert (tmp_path / "asked").read_text() == (
        "compute tpus queued-resources create pod --node-id=pod --accelerator-type=v5p-128 "
        "--runtime-version=v2-alpha-tpuv5 --spot\n"
    )
    refused = _queued_resource(tmp_path, "create", "pod")
    assert refused.returncode == 2
    assert "queued_resource.sh create NAME v5p-128" in refused.stderr


def test_queued_resource_makes_a_deleted_slice_again(tmp_path):
    """The states that gcloud reports in turn: none, waiting, at work, suspended by a preemption, none, at work."""
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "", "ACTIVE", "ACTIVE", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    _script(
        tmp_path / "bin/gcloud",
        """printf '%s %s\\n' "$4" "$5" >> asked
case $4 in
describe)
    state=$(head -n 1 states)
    sed -i 1d states
    [ -n "$state" ] || exit 1
    echo "$state"
    ;;
delete) rm -rf moe ;;
ssh)
    for word; do case $word in --command=*) command=${word#--command=} ;; esac; done
    case $command in
    *tail*) cat moe/moe.log ;;
    *clone*) mkdir moe ;;
    *nohup*) echo started >> starts && echo $$ > moe/moe.pid && echo done > moe/moe.log ;;
    *) [ "$(wc -l < starts 2>/dev/null || echo 0)" -lt 2 ] || { echo ended && exit; } && echo new ;;
    esac
    ;;
esac
""",
    )
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "POLL_SECONDS": "0"}
    words = ("keep", "pod", "v5p-8", "v2-alpha-tpuv5", "https://host/moe.git", "--spot", "--", "--workdir=run")
    command = ["sh", str(ROOT / "scripts/launch/queued_resource.sh"), *words]
    kept = subprocess.run(command, cwd=tmp_path, env=environment, timeout=60, capture_output=True, text=True)
    assert (kept.returncode, kept.stdout) == (0, "done\n")
    asked = [line for line in (tmp_path / "asked").read_text().splitlines() if not line.startswith(("describe", "ssh"))]
    assert asked == ["create pod", "delete pod", "create pod"]
    assert (tmp_path / "starts").read_text() == "started\n" * 2


@pytest.mark.parametrize(("name", "resource"), [("gpu", "nvidia.com/gpu"), ("tpu", "google.com/tpu")])
def test_job_sets_start_a_launcher_on_every_host(name, resource):
    job_set = yaml.safe_load((ROOT / f"scripts/launch/jobset_{name}.yaml").read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job}
    kubernetes_validate.validate(as_job, kubernetes_validate.latest_version(), strict=True)
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    (rule,) = job["podFailurePolicy"]["rules"]  # a refused config ends the job set; exit code 75 starts it again
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert 1 in rule["onExitCodes"]["values"]
    assert 75 not in rule["onExitCodes"]["values"]
    (ending,) = job_set["spec"]["failurePolicy"]["rules"]
    assert ending == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    (container,) = job["template"]["spec"]["containers"]
    assert (ROOT / container["args"][0]).exists()
    assert container["resources"]["limits"][resource] > 0
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    variables = {variable["name"]: variable for variable in container.get("env", [])}
    if name == "gpu":
        host = f"{job_set['metadata']['name']}-{replicated['name']}-0-0.{job_set['metadata']['name']}"
        assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == f"{host}:12321"
        assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["parallelism"])
        assert "job-completion-index" in variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_dockerfile_copies_files_that_exist():
    lines = (ROOT / "scripts/launch/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert "pyproject.toml" in copied
    assert all((ROOT / word).exists() for word in copied)
    assert ".venv" in (ROOT / ".dockerignore").read_text().split()  # the image has its own environment
    assert lines[-2:] == ['ENTRYPOINT ["sh"]', 'CMD ["scripts/launch/gpu_host.sh", "--help"]']


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ended", [False, True])
def test_a_signal_reaches_all_processes_of_a_rehearsal(tmp_path, number, ended):
    """Even if one of them has already ended."""
    for file in ("again.sh", "processes.sh"):
        (tmp_path / "scripts/launch").mkdir(parents=True, exist_ok=True)
        (tmp_path / "scripts/launch" / file).write_text((ROOT / "scripts/launch" / file).read_text())
    first = '[ "$JAX_PROCESS_ID" != 0 ] || exit 1\n' if ended else ""
    save = "trap 'echo $JAX_PROCESS_ID >> saved; exit 0' TERM\necho x >> started\n"
    _script(tmp_path / ".venv/bin/python", first + save + "while [ ! -e over ]; do sleep 0.05; done\n")
    # A shell cannot trap a signal that was ignored when it started, as SIGHUP is below nohup.
    command = ["env", "--default-signal=HUP", "sh", "scripts/launch/processes.sh", "2", "1"]
    launcher = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while _lines(tmp_path / "started") < 2 - ended:
            assert launcher.poll() is None
            time.sleep(0.05)
        time.sleep(0.5 * ended)
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) == ended
        assert sorted((tmp_path / "saved").read_text().split()) == ["0", "1"][ended:]
    finally:
        launcher.kill()
        (tmp_path / "over").touch()  # ends processes that were not stopped


def test_gpu_hosts_join_only_with_a_coordinator_address(tmp_path):
    for file in ("again.sh", "gpu_host.sh"):
        (tmp_path / "scripts/launch").mkdir(parents=True, exist_ok=True)
        (tmp_path / "scripts/launch" / file).write_text((ROOT / "scripts/launch" / file).read_text())
    _script(tmp_path / ".venv/bin/python", 'echo "$@" >> started\n')
    for variables in ({}, {"JAX_COORDINATOR_ADDRESS": "host0:12321"}):
        command = ["sh", "scripts/launch/gpu_host.sh", "--workdir=run"]
        subprocess.run(command, cwd=tmp_path, env=dict(os.environ) | variables, check=True, timeout=60)
    assert (tmp_path / "started").read_text() == "main.py --workdir=run\nmain.py --distributed --workdir=run\n"
