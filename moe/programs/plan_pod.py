"""moe plan --config=mixtral_8x7b --topology=v5p-128 [--config.x.y=value ...]

Compiles the train step of moe train for absent TPUs or GPUs and prints its memory, exchanges and predicted time, and
the best known settings for that slice. Where a plan of a shipped config is kept for the slice and no setting is given,
that plan is read instead, in seconds and without a compiler; --compile makes one here. --config.model.remat=fit chooses
the remat policy that recomputes least among those that fit. With --search it tries meshes, remat policies, dispatch
modes and rows, and prints a ranked table and the command of the best. --page=plan.html writes a page that opens
offline; --diff A.json B.json compares two plans that --json printed. --hf=config.json prices any published model by its
shapes, without compiling it. --register=NAME writes a plan down in docs/results/predictions.jsonl, before a number is
known. To compile it needs the compiler: pip install "moe-jax[tpu]" or "moe-jax[cuda]". docs/pods.md is the guide.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections import ChainMap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from moe.programs import cli
from moe.system import shipped
from moe.system.atomic_files import write_atomic
from moe.system.fields import ConfigError

if TYPE_CHECKING:
    from moe.config import Config

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPUs as v5p:4x4x4 or v5p-128; GPUs as h100:8x8 (hosts x devices per host) or a3-megagpu-8g:8 (machines).",
)
_SLICES = flags.DEFINE_integer(
    "num_slices", 1, "TPU slices of that shape, joined by the data-center network.", lower_bound=1
)
_COMPILE = flags.DEFINE_bool("compile", False, "Compile the step also where a plan is kept for the config and slice.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text.")
_PAGE = cli.define_path("page", "HTML file to write: of the plan, or of the difference with --diff.")
_ROOFLINE = cli.define_path("roofline", "PNG file to write: the most expensive instructions under the chip's roofline.")
_CHANGES = flags.DEFINE_integer(
    "changes", 0, "Number of changes to try; each is compiled, and the page shows its gain.", lower_bound=0
)
_DIFF = flags.DEFINE_list("diff", [], "Two plans printed by --json to compare; nothing is compiled.")
_HF = cli.define_path("hf", "config.json of a published model, instead of --config: a plan by shapes, not compiled.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of the batch on each device, with --hf.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens of a row, with --hf.", lower_bound=128)
_RECOMPUTE = flags.DEFINE_bool("recompute", True, "Recompute layers in the backward pass, with --hf.")
_REGISTER = flags.DEFINE_string("register", "", "Name of the model: stamp the plan in docs/results/predictions.jsonl.")
_RECORD = flags.DEFINE_bool("record", False, "Keep the plan in configs/plans.json and docs/results/plans.md.")
_REMAKE = flags.DEFINE_bool("remake", False, "Make all kept plans and their table again with the current cost model.")
_PROGRAMS = cli.define_path("programs", "Folder in which compiled programs are kept for reuse.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", 1.0, "What if: factor on the network's bandwidths.")
_MATMUL_SHARE = flags.DEFINE_float("matmul_share", 0.0, "What if: share of the peak that all matmuls reach.")
_SKEW = flags.DEFINE_float("skew", 1.0, "What if: rows on the experts of the busiest device, over the mean.")
_ALL_PROGRAMS = flags.DEFINE_bool(
    "all_programs", False, "Compile evaluation and initialisation too: which program of the run needs most memory."
)
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and dispatch modes; run again to continue.")
_LIMIT = flags.DEFINE_integer(
    "limit", 12, "Largest number of programs that --search compiles, each chosen by the results so far.", lower_bound=1
)
_FIXED_BATCH = flags.DEFINE_bool("fixed_batch", False, "--search keeps train.batch_size instead of trying other rows.")
_CACHE = flags.DEFINE_string(
    "cache", "~/.cache/moe-plans", "Folder of plans that --search and --changes compiled; processes may share it."
)

_TABLE = shipped.RESULTS / "plans.md"
_PREDICTIONS = shipped.RESULTS / "predictions.jsonl"


def main() -> None:
    """Print one plan, the table of a search, or the difference of two plans."""
    _refuse_unread_flags()
    if _DIFF.present:
        _print_difference()
        return
    if _REMAKE.value:
        _remake()
        return
    if _HF.value:
        _plan_by_shapes()
        return
    from moe.config import command_line

    layers = cli.config_layers(_CONFIG)
    if not layers[-1] and (kept := _kept_plans()):
        _print_kept(kept)
        return
    choose_remat = ChainMap(*map(dict, reversed(layers))).get("model.remat") == "fit"
    config = command_line.build_layers(*layers, {"model.remat": "full"} if choose_remat else {})
    from moe.planner import make_plan, other_programs, pages, topology
    from moe.planner.scenario import Scenario

    scenario = Scenario(_BANDWIDTH.value, _MATMUL_SHARE.value, _SKEW.value)
    where = topology.get_topology(str(_TOPOLOGY.value), _SLICES.value)
    if _RECORD.value and not _TABLE.exists():
        raise ConfigError("--record: keeps plans in a checkout of the repository, not in an installed package")
    if _RECORD.value and where.has_own_network:
        raise ConfigError(f"--record: keeps plans of {where.name}, whose network differs; give --topology={where.name}")
    if _SEARCH.value:
        _search(config, where)
        return
    made = (make_plan.make_fitting_plan if choose_remat else make_plan.make_plan)(config, where, scenario, _programs())
    if _RECORD.value:
        overrides = dict(layers[-1])
        if choose_remat:  # keep the policy that was chosen, not fit
            overrides["model.remat"] = made.remat
        _record(made, _name(), dict(sorted(overrides.items())), str(_TOPOLOGY.value))
    if _REGISTER.value:
        settings = {"config": _name(), "flags": dict(layers[-1]) | {"model.remat": made.remat}}
        _register(made.to_json(), "compiled program", made.program, made.commit, settings)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=made.remat))
    programs = other_programs.memory(config, where) if _ALL_PROGRAMS.value else {}
    changes = _try_changes(config, where, scenario) if _CHANGES.value else []
    _write_files(made.to_json(), where.chip, changes)
    if _JSON.value:
        print(json.dumps(made.to_json() | {"changes": changes, "programs": programs}, indent=2))
        return
    print(pages.text(made.to_json(), changes))
    if programs:
        print(other_programs.words(programs, made.memory.total))
    if where.has_own_network:
        print(f"Kept plans of {where.name} are for another network: --search looks for settings")
        return
    _print_best(topology.of_slices(where.name, where.num_slices))


def _refuse_unread_flags() -> None:
    """Refuse flags that were given but have no effect beside the others."""
    compiles = not (_DIFF.present or _REMAKE.value or _HF.value)
    searches = compiles and _SEARCH.value
    tries = searches or (compiles and _CHANGES.value > 0)
    what_if = _BANDWIDTH, _MATMUL_SHARE, _SKEW
    unread = _PAGE, _ROOFLINE, _CHANGES, _RECORD, _PROGRAMS, _ALL_PROGRAMS, *what_if
    cli.only_with(not searches, "is not read with --search", *unread)
    cli.only_with(searches, "is read only with --search", _LIMIT, _FIXED_BATCH)
    cli.only_with(not _RECORD.value, "is not read with --record, whose plans have no what-if", *what_if)
    cli.only_with(tries, "is read only with --search or --changes", _CACHE)
    unread = _ROOFLINE, _CHANGES, _SEARCH, _RECORD, _ALL_PROGRAMS, *what_if
    cli.only_with(compiles, "is not read with --diff, --remake or --hf", *unread)
    unread = _JSON, _REGISTER, _SLICES, _TOPOLOGY
    cli.only_with(compiles or bool(_HF.value), "is not read with --diff or --remake", *unread)
    cli.only_with(bool(_HF.value), "is read only with --hf", _ROWS, _LENGTH, _RECOMPUTE)
    cli.only_with(not _HF.value, "is not read with --hf", _PAGE, _PROGRAMS)
    cli.only_with(not searches, "is not read with --search", _REGISTER)
    unchanged = all(flag.value == flag.default for flag in what_if)
    cli.only_with(unchanged, "is not read with what-ifs, of which no number will be published", _REGISTER)
    cli.only_with(not _REMAKE.value, "is not read with --remake", _PAGE)
    cli.only_with(not _DIFF.present, "is not read with --diff", _PROGRAMS, _REMAKE)


def _print_difference() -> None:
    from moe.planner import differences, pages

    if len(_DIFF.value) != 2:
        raise ConfigError(f"--diff={','.join(_DIFF.value)}: must be two files that --json printed")
    a, b = (differences.read(Path(path)) for path in _DIFF.value)
    if _PAGE.value:
        write_atomic(Path(_PAGE.value), pages.difference(a, b, (_DIFF.value[0], _DIFF.value[1])))
    print(pages.difference_text(a, b))


def _plan_by_shapes() -> None:
    """Print, and register if asked to, the plan of a config.json."""
    from moe.planner import by_shapes, open_shapes, topology
    from moe.system.checkout import short_commit
    from moe.system.foreign_files import read_object

    source = read_object(Path(_HF.value))
    where = topology.get_topology(str(_TOPOLOGY.value), _SLICES.value, compiles=False)
    made = by_shapes.make(open_shapes.read(source), where, _ROWS.value, _LENGTH.value, remat=_RECOMPUTE.value)
    if _REGISTER.value:
        settings = {"rows": _ROWS.value, "length": _LENGTH.value, "recompute": _RECOMPUTE.value}
        shapes = hashlib.sha256(json.dumps([source, settings], sort_keys=True).encode()).hexdigest()[:16]
        _register(made.to_json(), "shapes", shapes, short_commit(), settings | {"config.json": source})
    print(json.dumps(made.to_json(), indent=2) if _JSON.value else made.render())


def _register(figures: dict[str, Any], made_from: str, program: str, commit: str, settings: dict[str, Any]) -> None:
    from moe.planner import register

    if not _TABLE.exists():
        raise ConfigError("--register: keeps predictions in a checkout of the repository, not in an installed package")
    entry = register.prediction(_REGISTER.value, figures, made_from, program, commit, settings)
    register.add(_PREDICTIONS, entry)
    print(f"registered as {entry['stamp']}", file=sys.stderr)


def _write_files(figures, chip, changes) -> None:
    from moe.planner import pages, roofline

    if _PAGE.value:
        write_atomic(Path(_PAGE.value), pages.page(figures, changes))
    if _ROOFLINE.value:
        roofline.figure(Path(_ROOFLINE.value), figures, chip)


def _try_changes(config: Config, where, scenario) -> list:
    """Compile the first changes that may help, in the same scenario; plans of earlier calls are reused."""
    from tqdm import tqdm

    from moe.planner import candidates, make_plan, search

    cache = search.Cache(str(_CACHE.value), where, scenario.words())
    tried = []
    for label, changed in tqdm(candidates.changes(config, where, _CHANGES.value), unit="program", dynamic_ncols=True):
        alone = [candidates.Candidate(changed, 1.0)]
        made = search.run(alone, cache, lambda config: make_plan.make_plan(config, where, scenario).to_json(), limit=1)
        tried.append({"label": label, "plan": made[0][1]})
    return tried


def _name() -> str:
    """Name of the config's file, and its argument."""
    path, _, argument = str(_CONFIG.value).partition(":")
    return Path(path).stem + (f":{argument}" if argument else "")


def _programs() -> Path | None:
    return Path(_PROGRAMS.value) if _PROGRAMS.value else None


def _remake() -> None:
    """Make the kept plans again; programs that --programs holds are not compiled."""
    from moe.planner import compiled, kept_plans, make_plan, topology

    for kept in kept_plans.read(shipped.PLANS):
        slices, _, shape = kept["topology"].rpartition(" x ")
        where = topology.get_topology(shape, int(slices or 1))
        config = kept_plans.config_of(kept)
        made = make_plan.read_step(config, where, compiled.read_or_compile(config, where, _programs(), apart=True))
        cloud_name = next((each for each in kept["slices"] if each != kept["topology"]), kept["topology"])
        _record(made, kept["config"], kept["flags"], cloud_name)
        print(f"{kept['config']} on {kept['topology']}: {kept['step_seconds']:.3g} → {made.step_seconds:.3g} s")


def _record(made, config: str, overrides: dict, hardware: str) -> None:
    from moe.planner import kept_plans

    kept_plans.keep(shipped.PLANS, kept_plans.row(made, config, overrides, hardware))
    kept_plans.write_table(shipped.PLANS, _TABLE)


def _kept_plans() -> dict[str, Any]:
    """Kept plans of a shipped config that answer this command line, by the suffix of the slice's name.

    Empty where another flag needs a program, or the config names settings of another slice.
    """
    from moe.planner import kept_plans, topology

    needs_program = _COMPILE, _ALL_PROGRAMS, _JSON, _PAGE, _ROOFLINE, _CHANGES, _SEARCH, _RECORD, _REGISTER, _PROGRAMS
    what_if = _BANDWIDTH, _MATMUL_SHARE, _SKEW
    path, _, argument = str(_CONFIG.value).partition(":")
    if any(flag.present for flag in (*needs_program, *what_if, _SLICES)) or not shipped.is_config(path):
        return {}
    rows = kept_plans.read(shipped.PLANS)
    name = Path(path).stem
    where = topology.tpu_name(str(_TOPOLOGY.value))
    known = kept_plans.best_of_precisions(rows, name, where)
    if not argument:
        return known
    return {suffix: kept for suffix, kept in known.items() if topology.tpu_name(argument) in kept["slices"]}


def _print_kept(known: dict[str, Any]) -> None:
    """Print kept plans, the commands that train with their settings, and the one that compiles a plan here."""
    from moe.planner import kept_plans

    name = _name().partition(":")[0]
    for suffix, kept in known.items():
        print(kept_plans.page(kept))
        print(f"  train     moe train {shlex.quote(f'--config={name}:{_TOPOLOGY.value}{suffix}')} --workdir=DIR\n")
    again = shlex.join(
        ["moe", "plan", f"--config={shipped.short(str(_CONFIG.value))}", f"--topology={_TOPOLOGY.value}"]
    )
    print(f"Exchanges, and where the time goes: {again} --compile, in minutes; any --config.x.y=value compiles too.")


def _print_best(topology: str) -> None:
    """Print the best settings that are known for the slice, in each precision that has kept plans."""
    from moe.planner import kept_plans

    name = _name().partition(":")[0]
    known = kept_plans.best_of_precisions(kept_plans.read(shipped.PLANS), name, topology)
    if not known:
        print(f"No plan of {name} is kept for {topology}: --search looks for settings, --record keeps the plan")
    for suffix, kept in known.items():
        print(f"Best known settings for {topology}{suffix}: {kept_plans.sentence(kept)}")
        own = f"{_TOPOLOGY.value}{suffix}"
        config = f"{name}:{own if own in kept['slices'] else topology + suffix}"
        print(f"  moe train {shlex.quote(f'--config={config}')} --workdir=DIR, which sets")
        print(f"  {kept_plans.words(kept) or 'nothing'}")


def _search(config: Config, where) -> None:
    """Print the table of candidates and the command that runs the first."""
    from tqdm import tqdm

    from moe.planner import candidates, make_plan, search

    rows = () if _FIXED_BATCH.value else candidates.ROWS
    found, pruned = candidates.candidates(config, len(where.devices), where.chip, where.num_slices, rows)
    cache = search.Cache(str(_CACHE.value), where)
    capacity = where.capacity
    with tqdm(total=min(_LIMIT.value, len(found)), unit="program", dynamic_ncols=True) as bar:
        results = search.run(
            found,
            cache,
            lambda tried: make_plan.make_plan(tried, where).to_json(),
            _LIMIT.value,
            capacity,
            progress=lambda _: bar.update(),
        )
    if _JSON.value:
        rows = [{"flags": search.overrides(candidate.config), **made} for candidate, made in results]
        print(json.dumps({"results": rows, "pruned": dict(pruned), "skipped": len(found) - len(results)}, indent=2))
        return
    print(search.render(results, pruned, len(found) - len(results)))
    if results and "error" not in results[0][1]:
        own, best = _own_flags(search.SEARCHED), search.overrides(results[0][0].config)
        print(f"\nCommand of the best:\nmoe train {own} --workdir=DIR {best}")


def _own_flags(searched: tuple[str, ...]) -> str:
    """Config flags of this command without the mesh and the fields that the search sets."""
    fields = cli.config_layers(_CONFIG)[-1]
    own = {name: value for name, value in fields.items() if not name.startswith("mesh.") and name not in searched}
    given = f"--config={shipped.short(str(_CONFIG.value))}"
    return shlex.join([given, *(f"--config.{name}={value}" for name, value in own.items())])


def _joined(argv: list[str]) -> list[str]:
    """``--diff A B`` as ``--diff=A,B``."""
    if "--diff" not in argv:
        return argv
    at = argv.index("--diff")
    return [*argv[:at], f"--diff={','.join(argv[at + 1 : at + 3])}", *argv[at + 3 :]]


def _required() -> tuple[str, ...]:
    """Flags that the command line must have."""
    if any(each.startswith(("--diff=", "--remake")) for each in sys.argv):
        return ()
    by_shapes = any(each.startswith("--hf") for each in sys.argv)
    return ("hf", "topology") if by_shapes else ("config", "topology")


def run() -> None:
    """The program."""
    sys.argv = _joined(sys.argv)
    cli.run(
        main,
        required=_required(),
        examples=(
            "moe plan --config=mixtral_8x7b --topology=v5p-128 --page=plan.html",
            "moe plan --config=mixtral_8x7b --topology=h100:8x8 --search --limit=20",
            "moe plan --hf=config.json --topology=tpu7x:4x4x4 --rows=4",
            "moe plan --diff a.json b.json",
        ),
    )
