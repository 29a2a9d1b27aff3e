"""Where two runs of a model first choose other experts, and whether rounding explains it: moe diverge --one=A
--other=B.

A and B are workdirs, each with settings that replace its own, such as /tmp/run,model.dtype=bfloat16 or
/tmp/run,mesh.expert=4; B may also be an npz file of a trace or of experts that a serving engine recorded. Both read the
same held-out text under the same experts. docs/diverge.md explains the page.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from moe.programs import cli
from moe.system.fields import ConfigError

_ONE = flags.DEFINE_string("one", None, "WORKDIR[,SETTING=VALUE,...], the run whose rounding is followed.")
_OTHER = flags.DEFINE_string("other", None, "WORKDIR[,SETTING=VALUE,...], or an npz file of a trace or of experts.")
_SAVE = cli.define_path("save", "Write the trace of --one to this npz file instead of comparing.")
_OUTPUT = cli.define_path("output", "Folder for diverge.md and diverge.json; without it the page is only printed.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoints; default: the newest.")
_TOKENS = flags.DEFINE_integer("tokens", 2048, "Held-out tokens of each domain.", lower_bound=1, upper_bound=1 << 20)
_DRAWS = flags.DEFINE_integer("draws", 16, "Random roundings of the model.", lower_bound=2, upper_bound=1024)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One run.

    Attributes:
        name: as given.
        model: its config.
        routed: its forward pass.
        alone: the same on one device, whose rounding is followed.
        variables: of its checkpoint.
        batches: held-out text.
    """

    name: str
    model: Any
    routed: Any
    alone: Any
    variables: Any
    batches: Any

    @property
    def dtype(self) -> str:
        """Dtype of activations."""
        return self.model.dtype


def _open(given: str) -> _Side:
    """Open a workdir with settings that replace its own.

    Raises:
        ConfigError: an unknown setting, a dense model, or a gate that does not take the K highest scores.
    """
    import jax

    from moe.analysis.analyse import heldout_rows
    from moe.analysis.record import Recorder
    from moe.checkpoints.parameters import read_variables
    from moe.config import Config, MeshConfig, to_dict
    from moe.config.parse import from_config_dict
    from moe.conformance.divergence.trace import Routed, ranking, without_loops
    from moe.parallel.mesh import make_mesh
    from moe.training.open_workdir import open_workdir
    from moe.training.step import build

    path, *settings = given.split(",")
    opened = open_workdir(path, {})
    tree = to_dict(opened.program.config)
    tree["model"]["scan_layers"] = False  # each router is a part of its own
    tree["mesh"] = dataclasses.asdict(MeshConfig(data=1))
    for setting in settings:
        name, equals, value = setting.partition("=")
        *sections, field = name.split(".")
        section = tree
        for part in sections:
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if not equals or field not in section:
            raise ConfigError(f"{setting}: no setting of a run; for example model.dtype=bfloat16")
        section[field] = type(section[field])(value) if isinstance(section[field], int | float) else value
    config = from_config_dict(tree)
    ranking(config.model)

    def program(config: Config, mesh_config: MeshConfig) -> Any:
        count = 1
        for size in dataclasses.astuple(mesh_config):
            count *= size
        if count > jax.device_count():
            raise ConfigError(f"{given}: needs {count} devices, there are {jax.device_count()}")
        mesh = make_mesh(mesh_config, jax.devices()[:count])
        with jax.set_mesh(mesh):
            return build(dataclasses.replace(config, mesh=mesh_config), mesh)

    spread = program(config, config.mesh)
    single = program(dataclasses.replace(config, model=without_loops(config.model)), MeshConfig(data=1))
    variables = read_variables(path, config.model, mesh=spread.mesh, step=_STEP.value)
    batches = [
        batch for rows in heldout_rows(Recorder(spread), opened.prepared, _TOKENS.value).values() for batch in rows
    ]
    return _Side(given, config.model, Routed(spread), Routed(single), variables, batches)


def main() -> None:
    """Trace both sides under the same experts, bound their rounding, compare, print and write the page."""
    import jax
    from etils import epath

    from moe.conformance.divergence import bounds, compare, trace
    from moe.system.atomic_files import write_atomic

    one = _open(str(_ONE.value))
    mark = trace.fingerprint(one.variables)
    if _SAVE.value is not None:
        traces = [one.routed(one.variables, batch) for batch in one.batches]
        trace.joined(traces, mark).write(Path(str(_SAVE.value)))
        print(_SAVE.value)
        return
    if _OTHER.value is None:
        raise ConfigError("give --other, or --save to write the trace of --one")
    given = str(_OTHER.value)
    recorded = trace.read(given) if given.endswith(".npz") else None
    other = None if recorded is not None else _open(given)
    rounds = other  # the side whose rounding bounds the second run's
    if recorded is not None and recorded.dtype not in (None, one.dtype):
        rounds = _open(f"{_ONE.value},model.dtype={recorded.dtype}")
    alike = rounds is None or trace.round_alike(one.model, rounds.model)
    found: dict[str, list[Any]] = {"one": [], "other": [], "rounding of one": [], "rounding of other": []}
    start = 0
    for batch in one.batches:
        replay, start = trace.replayed(recorded, batch, start, one.routed, one.variables)
        found["one"].append(one.routed(one.variables, batch, replay))
        if other is not None:
            found["other"].append(other.routed(other.variables, batch, replay))
        sides = [("rounding of one", one)]
        sides += [] if rounds is None or alike else [("rounding of other", rounds)]
        for name, side in sides:
            rounding = bounds.rounding(side.alone, jax.device_get(side.variables), batch, replay, draws=_DRAWS.value)
            found[name].append(rounding)
    first = trace.joined(found["one"], mark)
    second = recorded or trace.joined(found["other"], trace.fingerprint(other.variables) if other else None)
    rounding = bounds.joined(found["rounding of one"])
    again = bounds.joined(found["rounding of other"]) if found["rounding of other"] else rounding
    result = compare.compare(first, second, (rounding, again), trace.ranking(one.alone.program.config.model))
    names, dtypes = (one.name, given), (one.dtype, rounds.dtype if rounds else one.dtype)
    page = compare.page(names, result, dtypes)
    if _OUTPUT.value:
        folder = epath.Path(_OUTPUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "diverge.md", page)
        write_atomic(folder / "diverge.json", json.dumps(compare.summary(names, result, dtypes), indent=1))
    print(page)
    if not result.is_rounding:
        sys.exit(1)


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=("one",),
        examples=(
            "moe diverge --one=/tmp/run --other=/tmp/run,model.dtype=bfloat16",
            "moe diverge --one=/tmp/run --other=served.npz --output=/tmp/diverge",
        ),
    )
