"""Which token, weight, drop, loss or gradient of an MoE layer is off, and by what: moe conform --npz=FILE

--layer=package.module:function runs a JAX layer on random weights and inputs, alone and on meshes; --npz reads what any
library recorded. Without both, the example of moe/conformance/example.py, a layer to replace by yours, is checked. The
oracle computes the rule that the flags state, in float64; where results differ, it searches known deviations and
factors for the one that gives the same numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from absl import flags

from moe.programs import cli
from moe.system.fields import ConfigError, whole_number

if TYPE_CHECKING:
    from moe.conformance.judge.rule import Rule

_NPZ = cli.define_path("npz", "File of weights, inputs and results (docs/conform.md).")
_STEP = cli.define_path("step", "File of steps that a trainer recorded (docs/conform.md), of AdamW.")
_RATE = flags.DEFINE_float("learning_rate", 1e-2, "With --step: of AdamW.", lower_bound=0.0)
_BETAS = flags.DEFINE_list("betas", ["0.9", "0.95"], "With --step: of AdamW.")
_EPS = flags.DEFINE_float("eps", 1e-8, "With --step: of AdamW.", lower_bound=0.0)
_DECAY = flags.DEFINE_float("weight_decay", 0.1, "With --step: decoupled.", lower_bound=0.0)
_CLIP = flags.DEFINE_float("clip", 1.0, "With --step: largest gradient norm; 0: no clipping.", lower_bound=0.0)
_SCOPE = flags.DEFINE_enum("balance_scope", "microbatch", ["microbatch", "step"], "With --step: of f and P.")
_BIAS_RATE = flags.DEFINE_float("bias_rate", 0.0, "With --step: u of the selection bias.", lower_bound=0.0)
_ADAPTER = flags.DEFINE_float("adapter_scale", 1.0, "With --step: alpha / rank.")
_LAYER = flags.DEFINE_string("layer", None, "JAX layer as package.module:function.")
_K = flags.DEFINE_integer("k", 2, "Experts per token.", lower_bound=1)
_SCORE = flags.DEFINE_enum("score", "softmax", ["softmax", "sigmoid", "sqrt_softplus"], "Scores of the router logits.")
_RENORMALISE = flags.DEFINE_bool("renormalise", False, "Divide the chosen scores by their sum (Mixtral, DeepSeek-V3).")
_SCALE = flags.DEFINE_float("scale", 1.0, "Factor of the weights.", lower_bound=0.0, upper_bound=1e6)
_GROUPS = flags.DEFINE_integer("groups", 1, "Groups of experts.", lower_bound=1)
_KEPT = flags.DEFINE_integer("kept_groups", 1, "Groups that a token may choose from.", lower_bound=1)
_SCORES = flags.DEFINE_integer("scores_per_group", 1, "Number of top scores whose sum ranks a group.", lower_bound=1)
_CAPACITY = flags.DEFINE_float("capacity_factor", 0.0, "C = ceil(factor * K * S / E); 0: no capacity.", lower_bound=0.0)
_ACTIVATION = flags.DEFINE_enum(
    "activation",
    "swiglu",
    ["swiglu", "geglu", "geglu_exact", "gpt_oss", "relu", "relu2", "gelu", "gelu_exact"],
    "Activation of the experts; GELU by tanh, or exact, by erf.",
)
_BALANCE = flags.DEFINE_float("balance_weight", 0.0, "Weight of balance_loss in the loss that was differentiated.")
_Z = flags.DEFINE_float("z_weight", 0.0, "Weight of z_loss in the loss that was differentiated.")
_EXPERTS = flags.DEFINE_integer("num_experts", 8, "E of the random layer.", lower_bound=1)
_DEVICES = flags.DEFINE_list("devices", ["2", "4", "8"], "Numbers of devices to try as factors of an error.")
_MESH = flags.DEFINE_multi_string("mesh", [], "Mesh to also run --layer on, such as data=2,expert=4; may be repeated.")
_SUITE = flags.DEFINE_enum("suite", None, ["peers"], "Compare the MoE blocks of other libraries (docs/conform.md).")
_OUT = cli.define_path("out", "Folder for the scoreboard of --suite.")
_LIBRARIES = flags.DEFINE_list("libraries", [], "Tables of environments.toml; default: all.")
_ENVIRONMENTS = cli.define_path("environments", "Folder of the libraries' environments; default: OUT/environments.")
_REPRODUCE = flags.DEFINE_bool("reproduce", False, "Also run the script of each deviating or failing cell of --suite.")
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-4, "Relative error within which values are equal.", lower_bound=0.0)

_EXAMPLE = "moe.conformance.example:layer"


def main() -> None:
    """Parse flags, compare and print; exit with 1 where the layer does not conform."""
    from moe.conformance.judge.errors import InputError

    try:
        _judge()
    except InputError as error:
        raise ConfigError(str(error)) from error


def _judge() -> None:
    from moe.config.references import import_object
    from moe.conformance import recorded
    from moe.conformance.judge import evidence
    from moe.conformance.judge.diagnosis import diagnose, page
    from moe.conformance.judge.rule import Activation, Rule, Score

    cli.only_with(_SUITE.value is not None, "is read only with --suite", _OUT, _LIBRARIES, _ENVIRONMENTS, _REPRODUCE)
    if _SUITE.value is not None:
        _peers()
        return
    rule = Rule(
        k=_K.value,
        score=cast(Score, _SCORE.value),
        renormalise=bool(_RENORMALISE.value),
        scale=_SCALE.value,
        groups=_GROUPS.value,
        kept_groups=_KEPT.value,
        scores_per_group=_SCORES.value,
        capacity_factor=_CAPACITY.value,
        activation=cast(Activation, _ACTIVATION.value),
        balance_weight=_BALANCE.value,
        z_weight=_Z.value,
    )
    if not all(map(whole_number, _DEVICES.value)):
        raise ConfigError(f"--devices={','.join(_DEVICES.value)}: positive whole numbers, such as 2,4,8")
    devices = tuple(int(count) for count in _DEVICES.value)
    if sum(flag.value is not None for flag in (_NPZ, _LAYER, _STEP)) > 1:
        raise ConfigError("give one of --npz=FILE, --step=FILE and --layer=package.module:function")
    of_steps = (_RATE, _BETAS, _EPS, _DECAY, _CLIP, _SCOPE, _BIAS_RATE, _ADAPTER)
    cli.only_with(_STEP.value is not None, "is read only with --step", *of_steps)
    cli.only_with(_STEP.value is None, "is not read with --step", _EXPERTS, _MESH)
    cli.only_with(_NPZ.value is None, "is not read with --npz", _EXPERTS, _MESH)
    cli.only_with(_GROUPS.value > 1, "is read only with --groups above 1", _KEPT, _SCORES)
    if _STEP.value is not None:
        _judge_steps(rule, devices)
        return
    conforms = True
    if _NPZ.value is not None:
        runs = [("", *recorded.read(str(_NPZ.value)))]
    else:
        if _LAYER.value is None:
            print(f"--layer={_EXAMPLE}, a layer to replace by yours\n")
        function = import_object("layer", str(_LAYER.value or _EXAMPLE))
        layer = evidence.random_layer(rule, num_experts=_EXPERTS.value)
        runs = [("", layer, evidence.run(function, rule, layer))]
        for sizes in _MESH.value:
            runs.append((f"\nmesh {sizes}", layer, evidence.run(function, rule, layer, recorded.parse_mesh(sizes))))
    for name, layer, results in runs:
        diagnosis = diagnose(rule, layer, results, devices=devices, tolerance=_TOLERANCE.value)
        if name:
            print(name)
        print(page(rule, diagnosis))
        conforms &= diagnosis.conforms
    if not conforms:
        sys.exit(1)


def _judge_steps(rule: Rule, devices: tuple[int, ...]) -> None:
    """Compare recorded steps and print; exit with 1 where they do not conform."""
    from moe.conformance.judge.step import StepRule
    from moe.conformance.judge.step_diagnosis import diagnose_steps, step_page, steps_from_arrays
    from moe.system.npz_files import read_arrays

    try:
        b1, b2 = map(float, _BETAS.value)
    except ValueError as error:
        raise ConfigError(f"--betas={','.join(_BETAS.value)}: two numbers, such as 0.9,0.95") from error
    whole = StepRule(
        layer=rule,
        balance_scope=cast(Literal["step", "microbatch"], _SCOPE.value),
        clip=_CLIP.value,
        learning_rate=_RATE.value,
        b1=b1,
        b2=b2,
        eps=_EPS.value,
        weight_decay=_DECAY.value,
        bias_rate=_BIAS_RATE.value,
        adapter_scale=_ADAPTER.value,
    )
    path = str(_STEP.value)
    steps, results = steps_from_arrays(read_arrays(path, f"--step={path}"), path)
    found = diagnose_steps(whole, steps, results, devices=devices, tolerance=_TOLERANCE.value)
    print(f"rule: {rule}\n\n{step_page(found)}")
    if not found.conforms:
        sys.exit(1)


def _peers() -> None:
    """Run the suite, print each library's counts and write the scoreboard."""
    import collections
    import time

    from moe.conformance.peers import environments, reproduction, scoreboard, suite

    if _OUT.value is None:
        raise ConfigError("--suite=peers needs --out=DIR")
    if _NPZ.value is not None or _LAYER.value is not None:
        raise ConfigError("give one of --suite, --npz and --layer")
    out = Path(str(_OUT.value))
    known = environments.read(Path(str(_ENVIRONMENTS.value)) if _ENVIRONMENTS.value else out / "environments")
    for name in _LIBRARIES.value:
        if name not in known:
            raise ConfigError(f"--libraries={name}: known are {', '.join(known)}")
    for name in _LIBRARIES.value or known:
        known[name].make()
        start = time.perf_counter()
        library = suite.describe(known[name])
        print(f"{library.version}: {len(library.blocks)} blocks", flush=True)
        suite.measure(known[name], library, out / name)
        cells = list(suite.judge(library, out / name))
        counts = collections.Counter(cell.status for cell in cells)
        print("  " + ", ".join(f"{count} {status}" for status, count in counts.items()), flush=True)
        command = f"moe conform --suite=peers --out=DIR --libraries={name}"
        reproduction.write_all(out, library, cells)
        reproduced = reproduction.run(out, known[name], cells) if _REPRODUCE.value else {}
        if reproduced:
            print(f"  {reproduction.sentence(reproduced)}", flush=True)
        command += " --reproduce" if _REPRODUCE.value else ""
        taken = {"seconds": time.perf_counter() - start, "reproduced": reproduced, "control": known[name].control}
        scoreboard.write(out, library, cells, command, list(known), **taken)
    print(out / "scoreboard.md")


def run() -> None:
    """The program."""
    cli.run(
        main,
        required=(),
        examples=(
            "moe conform --npz=layer.npz --k=2 --renormalise",
            "moe conform --layer=my_layers:moe --k=1 --capacity_factor=1.25 --balance_weight=10",
            "moe conform --suite=peers --out=/tmp/peers --libraries=transformers",
        ),
    )
