"""Run the oracle on the blocks of another library, and say of each check whether it is equal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe.conformance.judge import equations
from moe.conformance.judge.diagnosis import Check, diagnose
from moe.conformance.judge.rule import Layer, Rule, Variant
from moe.conformance.peers.cases import BALANCE_WEIGHT, CASES, Z_WEIGHT, Case, layer_of
from moe.conformance.peers.environments import Environment
from moe.system.atomic_files import write_atomic
from moe.system.npz_files import write_arrays

WORKERS = Path(__file__).parent / "workers"
Status = Literal["equal", "documented", "deviates", "bfloat16", "not applicable", "raises"]
#: Share of choices that a bfloat16 router product changes at least, in the case that shows it.
CHANGED = 0.01
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Cell:
    """One check of one block.

    Attributes:
        library: name of the environment.
        block: name of the block.
        column: one of :data:`COLUMNS`.
        status: equal; documented: equal with the deviations that the library documents; deviates; bfloat16: the
            router's product is rounded to bfloat16 in a bfloat16 block; not applicable; raises: the block raised an
            error.
        text: the deviation's name and size, or the reason.
        error: relative error against the claimed rule.
        case: name of the case.
        quantity: that differs most; empty if none.
    """

    library: str
    block: str
    column: str
    status: Status
    text: str = ""
    error: float = 0.0
    case: str = ""
    quantity: str = ""


#: Column → quantities of the case "main".
MAIN = {
    "choice": ("expert_index",),
    "weights": ("combine_weights",),
    "output": ("y",),
    "grad tokens": ("grad_x",),
    "grad router": ("grad_router", "grad_router_bias"),
    "grad experts": ("grad_gate", "grad_up", "grad_down", "grad_gate_bias", "grad_up_bias", "grad_down_bias"),
}
#: Column → case.
OTHERS = {
    "K = 1": "one",
    "empty expert": "empty",
    "ties": "ties",
    "negative bias": "negative",
    "balance loss": "balance",
    "z-loss": "z",
    "accumulation": "parts",
    "router product": "precision",
}
COLUMNS = (*MAIN, *OTHERS)


@dataclasses.dataclass(frozen=True)
class Library:
    """Description of a library by its worker.

    Attributes:
        name: of the environment.
        version: of the library and of its framework.
        blocks: block → claims (workers/torch_blocks.py, Entry).
    """

    name: str
    version: str
    blocks: dict[str, dict[str, Any]]


def describe(environment: Environment) -> Library:
    """Ask a library's worker for its blocks and their claims."""
    answer = environment.run(WORKERS / environment.worker, "--list")
    described = json.loads(answer.splitlines()[-1])
    return Library(environment.name, described["version"], described["blocks"])


def rule_of(claims: dict[str, Any], case: Case) -> Rule:
    """The rule that a block claims, with the K and the weights of the losses of a case."""
    k = case.k or claims["k"]
    return Rule(**claims["rule"], k=k, balance_weight=BALANCE_WEIGHT * case.balance, z_weight=Z_WEIGHT * case.z)


def reason_to_skip(claims: dict[str, Any], case: Case) -> str:
    """Why a case does not apply to a block; empty if it does."""
    if case.name in claims["skip"]:
        return claims["skip"][case.name]
    if case.balance and not claims["has_balance"]:
        return "the library has no balance loss for this block"
    if case.z and not claims["has_z"]:
        return "the library has no z-loss for this block"
    if case.name == "negative" and not (claims["bias"] and claims["rule"].get("groups", 1) > 1):
        return "needs a selection bias and groups"
    return ""


def measure(environment: Environment, library: Library, out: Path) -> None:
    """Write the cases, and have the worker run every block on them. ``out`` gets jobs.json, cases/ and results/."""
    (out / "cases").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "results", ignore_errors=True)  # an earlier run's would stand for blocks that raise now
    (out / "results").mkdir()
    jobs, written = [], set()
    for block, claims in library.blocks.items():
        for case in CASES:
            if reason_to_skip(claims, case):
                continue
            arrays = out / "cases" / f"{_arrays_name(claims, case)}.npz"
            if arrays not in written:
                write_arrays(arrays, _arrays(layer_of_claims(claims, case)))
                written.add(arrays)
            job = {"block": block, "k": case.k or claims["k"], "arrays": str(arrays), "dtype": case.dtype}
            job |= {
                "out": str(out / "results" / f"{block}.{case.name}"),
                "parts": case.parts,
                "balance": BALANCE_WEIGHT * case.balance,
                "z": Z_WEIGHT * case.z,
            }
            jobs.append(job | {"forward_only": case.forward_only})
    write_atomic(out / "jobs.json", json.dumps(jobs, indent=1))
    environment.run(WORKERS / environment.worker, str(out / "jobs.json"))


def layer_of_claims(claims: dict[str, Any], case: Case) -> Layer:
    """The layer of a case, for the rule of a block."""
    return layer_of(case, rule_of(claims, case), bias=claims["bias"], biases=claims["biases"])


def _arrays_name(claims: dict[str, Any], case: Case) -> str:
    activation = claims["rule"].get("activation", "swiglu")
    return f"{case.name}-{activation}{'-bias' if claims['bias'] else ''}{'-biases' if claims['biases'] else ''}"


def _arrays(layer: Layer) -> dict[str, np.ndarray]:
    """Inputs of a worker, in float32."""
    arrays: dict[str, Any] = {**layer.weights, "cotangent": layer.cotangent, "bias": layer.bias}
    single = {name: array.astype(np.float32) for name, array in arrays.items() if array is not None}
    return single | {"mask": layer.mask}


class Oracle:
    """The oracle, which remembers its results: most blocks of a library have one of few rules."""

    def __init__(self) -> None:
        self._known: dict[tuple[Rule, Variant, str], dict[str, np.ndarray]] = {}

    def __call__(self, rule: Rule, variant: Variant, layer: Layer) -> dict[str, np.ndarray]:
        """:func:`moe.conformance.judge.equations.compute`."""
        key = rule, variant, layer.fingerprint
        if key not in self._known:
            self._known[key] = equations.compute(rule, variant, layer)
        return self._known[key]


def judge(library: Library, out: Path) -> Iterator[Cell]:
    """The verdicts on the results that :func:`measure` wrote."""
    oracle = Oracle()
    for block, claims in library.blocks.items():
        for case in CASES:
            columns = list(MAIN) if case.name == "main" else [key for key, name in OTHERS.items() if name == case.name]
            skipped = reason_to_skip(claims, case)
            path = out / "results" / f"{block}.{case.name}.npz"
            if skipped or not path.exists():
                status: Status = "not applicable" if skipped else "raises"
                failed = path.with_suffix(".txt")
                text = skipped or (failed.read_text().splitlines()[0] if failed.exists() else "no result")
                if not skipped and claims["read"]:
                    text += f": {claims['read']}"
                yield from (Cell(library.name, block, column, status, text, case=case.name) for column in columns)
                continue
            with np.load(path, allow_pickle=False) as archive:
                results = {name: archive[name] for name in archive.files if not name.startswith("state.")}
            yield from _cells(library.name, block, claims, case, results, columns, oracle)


def _cells(
    library: str,
    block: str,
    claims: dict[str, Any],
    case: Case,
    results: dict[str, np.ndarray],
    columns: list[str],
    oracle: Oracle,
) -> Iterator[Cell]:
    rule, layer = rule_of(claims, case), layer_of_claims(claims, case)
    if case.name == "precision":
        yield _precision(library, block, rule, layer, results)
        return
    if case.name == "ties" and _repeated(results):
        yield Cell(library, block, "ties", "deviates", "an expert is chosen twice", case=case.name, quantity="y")
        return
    if case.quantities:
        results = {name: array for name, array in results.items() if name in case.quantities}
    settings: dict[str, Any] = {"tolerance": TOLERANCE, "devices": (2, 4), "compute": oracle}
    documented = diagnosis = diagnose(rule, layer, results, **settings)
    if claims["documented"] and not diagnosis.conforms:
        documented = diagnose(rule, layer, results, documented=Variant(**claims["documented"]), **settings)
    for column in columns:
        names = MAIN.get(column, tuple(check.quantity for check in diagnosis.checks))
        beside = [check for check in documented.checks if check.quantity in names and not check.passes]
        checks = [check for check in diagnosis.checks if check.quantity in names]
        if not checks:
            yield Cell(library, block, column, "not applicable", "not recorded by the library", case=case.name)
            continue
        failing = [check for check in checks if not check.passes]
        status: Status = "equal" if not failing else "deviates" if beside else "documented"
        worst = max(beside or failing or checks, key=lambda check: check.error)
        text = claims["source"] if status == "documented" else ""
        if status == "deviates":
            text = claims["read"] or _named(documented, worst)
        if status == "equal" and column == "K = 1" and rule.renormalise and rule.k == 1:
            text = "every weight is the scale, as claimed: the output gives the router no gradient"
        yield Cell(library, block, column, status, text, worst.error, case.name, worst.quantity if failing else "")


def _named(diagnosis: Any, worst: Check) -> str:
    """Name of a deviation: what explains it, or where it is."""
    names = [" or ".join(deviation.sentence for deviation in group[:2]) for group in diagnosis.explanations]
    if names and not diagnosis.unexplained:
        return "; ".join(names)
    return "; ".join([*names, f"{worst.quantity}: {worst.text or 'differs'}"])


def _repeated(results: dict[str, np.ndarray]) -> bool:
    """Whether a token names an expert more than once."""
    index = np.sort(results.get("expert_index", np.arange(2)[None, None]), axis=-1)
    return bool((np.diff(index, axis=-1) == 0).any())


def _precision(library: str, block: str, rule: Rule, layer: Layer, results: dict[str, np.ndarray]) -> Cell:
    """Choices of a block in bfloat16 whose inputs and router are exact in bfloat16, against float64."""
    if "expert_index" not in results:
        return Cell(library, block, "router product", "not applicable", "choices are not recorded", case="precision")
    exact = np.sort(equations.decide(rule, Variant(), layer).expert_index, -1)
    changed = int((np.sort(results["expert_index"], -1) != exact).any(-1).sum())
    text = f"{changed} of {exact.shape[0] * exact.shape[1]} choices changed"
    status: Status = "equal" if changed < CHANGED * exact[..., 0].size else "bfloat16"
    return Cell(library, block, "router product", status, text, changed / exact[..., 0].size, "precision")
