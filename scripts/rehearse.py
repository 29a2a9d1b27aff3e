"""Rehearse a pod's run on this computer: its mesh axes, stages and exchange at toy width, with hosts that are lost.

python scripts/rehearse.py --config=configs/mixtral_8x7b.py:h100:8x8 --topology=h100:8x8 --kill=3 --shrink=6

Trains the config at toy width on fake devices of several processes, which join as hosts do. One run is left alone. The
other loses a process at --kill random steps, with SIGKILL; the rest must end with exit code 75, and all start again.
With --shrink it then goes on with the share of the pod that so many hosts are. With --skew the router sends the first
device of the expert axis so many times the mean rows, or as many as in a recorded run. Prints the largest difference
of the losses; the exit code is 1 where they differ: by a bit on the same mesh, by more than 1e-6 on a smaller one.
--compile then compiles the real widths for the topology, at that skew; the exit code is 1 too if that does not fit.
docs/pods.md is the guide.
"""

from moe.system import process

if __name__ == "__main__":
    process.use_tpu_compiler()  # before JAX is imported

import contextlib
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from moe.programs import cli
from moe.system import shipped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe.planner.rehearsal import Rehearsal
    from moe.planner.topology import Topology

_CONFIG = cli.define_config(shipped.CONFIGS / "mixtral_8x7b.py")
_TOPOLOGY = flags.DEFINE_string("topology", None, "The pod: v5p-128, v5p:4x4x8, h100:16x8 (hosts x GPUs).")
_DEVICES = flags.DEFINE_integer("devices", 16, "Largest number of fake devices.", lower_bound=2)
_PROCESSES = flags.DEFINE_integer("processes", 4, "Processes of the rehearsal.", lower_bound=2)
_KILL = flags.DEFINE_integer("kill", 3, "Processes that are killed, one after another.", lower_bound=0)
_SHRINK = flags.DEFINE_integer("shrink", 0, "Hosts (or chips / 4) that are left at the end; 0: all.", lower_bound=0)
_SKEW = flags.DEFINE_string(
    "skew", "", "Rows of the busiest device over the mean, or the workdir of a run that had it."
)
_COMPILE = flags.DEFINE_bool("compile", False, "Compile the real widths too: memory at that skew, and the step.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments of the kills.")
_FOLDER = cli.define_path("folder", "Folder that keeps the runs; default: a temporary one.")

_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT = 900  # seconds in which a step must come, or processes end


class Hosts:
    """The processes of a run.

    Args:
        rehearsal: what they train.
        workdir: of the run.
        mesh: sizes of the mesh, all on fake devices of these processes.
        count: number of processes.
    """

    def __init__(self, rehearsal: "Rehearsal", workdir: Path, mesh: "Mapping[str, int]", count: int) -> None:
        from moe.planner import rehearsal as rehearsals

        devices = math.prod(mesh.values())
        self._workdir = workdir
        self._log = workdir.with_suffix(".log")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
        }
        sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        command = [
            sys.executable,
            "main.py",
            "--distributed",
            f"--config={workdir}.json",
            f"--workdir={workdir}",
            *sizes,
        ]
        modules = [*(flags.FLAGS["allow_module"].value or ())]
        if (workdir.parent / f"{rehearsals.SKEWED_MODULE}.py").exists():
            modules.append(rehearsals.SKEWED_MODULE)
            environment["PYTHONPATH"] = os.pathsep.join([str(workdir.parent), *filter(None, [os.getenv("PYTHONPATH")])])
        if modules:
            command.append(f"--allow_module={','.join(modules)}")
        with self._log.open("a") as log:
            self._processes = [
                subprocess.Popen(
                    command, cwd=_ROOT, env=environment | {"JAX_PROCESS_ID": str(index)}, stdout=log, stderr=log
                )
                for index in range(count)
            ]

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged this step."""
        from moe.planner.rehearsal import losses

        deadline = time.monotonic() + _TIMEOUT
        while len(losses(self._workdir)) < step:
            codes = [each.poll() for each in self._processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                raise SystemExit(f"error: the run ended before step {step}, with {codes}; see {self._log}")
            time.sleep(0.02)

    def lose(self, number: int) -> None:
        """Kill one process, and check that the others end with exit code 75."""
        self._processes[number].kill()
        self.wait({number: -9}, 75)

    def stop(self) -> None:
        """Stop all with SIGTERM, as before a smaller pod takes over."""
        self._processes[0].terminate()
        self.wait({}, 75)

    def wait(self, codes: dict[int, int], others: int) -> None:
        """Wait for the end of all processes; these exit codes are expected, and ``others`` of the rest."""
        expected = [codes.get(number, others) for number in range(len(self._processes))]
        try:
            ended = [each.wait(timeout=_TIMEOUT) for each in self._processes]
        finally:
            for each in self._processes:
                each.kill()
        if ended != expected:
            raise SystemExit(f"error: exit codes {ended}, expected {expected}; see {self._log}")


def rehearse(rehearsal: "Rehearsal", folder: Path, shrink: float, skew: float) -> int:
    """Run both runs; return the exit code.

    Args:
        rehearsal: what is trained.
        folder: receives the two workdirs and their logs.
        shrink: share of the devices that is left at the end; 1: all.
        skew: rows of the busiest device over the mean; 1: as the router sends them.
    """
    from moe.config import to_dict
    from moe.planner import rehearsal as rehearsals
    from moe.system.atomic_files import write_atomic

    alone, disturbed = folder / "alone", folder / "disturbed"
    tree = to_dict(rehearsal.config)
    if skew > 1:
        write_atomic(folder / f"{rehearsals.SKEWED_MODULE}.py", rehearsals.skewed_gate(rehearsal, skew))
        tree["model"]["moe"]["gate"]["name"] = f"{rehearsals.SKEWED_MODULE}:Skewed"
    for workdir in (alone, disturbed):
        write_atomic(Path(f"{workdir}.json"), json.dumps(tree))
    count = _PROCESSES.value
    Hosts(rehearsal, alone, rehearsal.mesh, count).wait({}, 0)
    print(f"undisturbed: {rehearsals.STEPS} steps", flush=True)
    if skew > 1:
        found = rehearsals.recorded_skew(alone, rehearsal.mesh["expert"])
        print(f"the busiest device of the expert axis had {found:.2f} times the mean rows", flush=True)
    draw = random.Random(_SEED.value)
    last = rehearsals.STEPS * 2 // 3 if shrink < 1 else rehearsals.STEPS - 1
    for step in sorted(draw.sample(range(2, last), _KILL.value)):
        hosts, number = Hosts(rehearsal, disturbed, rehearsal.mesh, count), draw.randrange(count)
        hosts.wait_for_step(step)
        hosts.lose(number)
        print(f"killed process {number} at step {step}: the others ended with 75", flush=True)
    if shrink < 1:
        hosts = Hosts(rehearsal, disturbed, rehearsal.mesh, count)
        hosts.wait_for_step(last)
        hosts.stop()
        mesh = rehearsal.shrunk(shrink)
        print(f"goes on with {_described(mesh)} after step {len(rehearsals.losses(disturbed))}", flush=True)
        Hosts(rehearsal, disturbed, mesh, max(2, count // 2)).wait({}, 0)
    else:
        Hosts(rehearsal, disturbed, rehearsal.mesh, count).wait({}, 0)
    found = rehearsals.compare(disturbed, alone)
    print(f"losses: {found.equal} of {found.steps} steps equal to the last bit, largest difference {found.largest:.1e}")
    fits = found.steps == rehearsals.STEPS and found.equal >= last and found.largest <= 1e-6
    print("the disturbed run is the undisturbed one" if fits else "DIFFERENT: a restart changed what is learnt")
    return 0 if fits else 1


def _described(mesh: "Mapping[str, int]") -> str:
    """Sizes of the axes that are split."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def _hosts(pod: "Topology") -> int:
    """Hosts of a pod: HOSTSxGPUS in the name of GPUs, four chips each of TPUs."""
    from moe.planner.gpus import Gpu

    found = re.fullmatch(r"\w+:(\d+)x\d+", pod.name)
    return int(found[1]) if found and isinstance(pod.chip, Gpu) else max(1, pod.num_chips // 4)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """``--folder``, or a temporary one, which stays with its logs where a run did not end as expected."""
    folder = Path(_FOLDER.value or tempfile.mkdtemp(prefix="rehearsal-"))
    try:
        yield folder
    except SystemExit:
        raise
    except BaseException:
        _remove(folder)
        raise
    _remove(folder)


def _remove(folder: Path) -> None:
    if not _FOLDER.value:
        shutil.rmtree(folder)


def main() -> None:
    """Parse flags and run."""
    from moe.config import ConfigError
    from moe.planner import real_width, rehearsal, topology
    from moe.system.atomic_files import write_atomic

    pod = topology.get_topology(str(_TOPOLOGY.value), compiles=_COMPILE.value)
    share = _SHRINK.value / _hosts(pod) if _SHRINK.value else 1.0
    if share > 1:
        raise ConfigError(f"--shrink={_SHRINK.value}: {_TOPOLOGY.value} has {_hosts(pod)} hosts")
    with _folder() as folder:
        (folder / "text").mkdir(parents=True, exist_ok=True)
        for path in (*_ROOT.glob("docs/*.md"), _ROOT / "README.md"):
            write_atomic(folder / "text" / f"{path.stem}.txt", path.read_text())
        config = cli.load_config(_CONFIG)
        made = rehearsal.make(config, pod.num_chips, _DEVICES.value, folder / "text")
        if made.devices % _PROCESSES.value:
            raise ConfigError(f"--processes={_PROCESSES.value}: must divide the {made.devices} fake devices")
        print(f"{_TOPOLOGY.value}: {_described(made.pod_mesh)}; here {_described(made.mesh)}", flush=True)
        skew = _skew(made.mesh["expert"])
        code = rehearse(made, folder, share, skew)
        print(f"At its real width: {_command(config.model.moe.dispatch, skew)}")
        for line in (_kept_plan(), real_width.rounds(config, skew)):
            if line:
                print(f"  {line}")
        if _COMPILE.value:
            line, fits = real_width.compiled(config, pod, skew)
            print(f"  {line}")
            code = code or int(not fits)
        if code:
            sys.exit(code)


def _skew(devices: int) -> float:
    """The skew that --skew asks for, on so many devices of the expert axis."""
    from moe.config import ConfigError
    from moe.planner import rehearsal

    if not _SKEW.value:
        return 1.0
    try:
        return float(_SKEW.value)
    except ValueError:
        if not Path(_SKEW.value).is_dir():
            raise ConfigError(f"--skew={_SKEW.value}: must be a number or the workdir of a run") from None
        return rehearsal.recorded_skew(Path(_SKEW.value), devices)


def _command(dispatch: str, skew: float) -> str:
    """The command that plans the pod's own program at that skew."""
    path, _, _ = str(_CONFIG.value).partition(":")
    config = Path(path).stem if Path(path).parent == shipped.CONFIGS else _CONFIG.value
    words = ["moe", "plan", f"--config={config}", f"--topology={_TOPOLOGY.value}"]
    if dispatch == "dropless" and skew > 1:
        words += ["--compile", f"--skew={skew:g}"]
    return shlex.join(words)


def _kept_plan() -> str:
    """Memory of the kept plan of this config and pod; "" without one."""
    from moe.planner import kept_plans, real_width

    path, _, argument = str(_CONFIG.value).partition(":")
    plan = kept_plans.best(kept_plans.read(shipped.PLANS), Path(path).stem, argument or str(_TOPOLOGY.value))
    return real_width.kept(plan) if plan is not None else ""


if __name__ == "__main__":
    cli.run(
        main,
        required=("topology",),
        examples=(
            "python scripts/rehearse.py --topology=h100:16x8 --kill=3 --skew=2 --shrink=14",
            "python scripts/rehearse.py --config=configs/mixtral_8x7b.py:v5p-128 --topology=v5p-128",
            "python scripts/rehearse.py --config=configs/olmoe_1b_7b.py --topology=h100:2x8 --kill=1 --shrink=1",
            "python scripts/rehearse.py --config=configs/olmoe_1b_7b.py --topology=v6e:2x4 --kill=1 --compile",
        ),
    )
