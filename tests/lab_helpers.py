"""Suites, records and tables for tests of the ablation lab."""

import dataclasses
import functools
import math
import re
from pathlib import Path

from moe.configs import base as defaults
from moe.lab import identity
from moe.lab.claims import registration
from moe.lab.claims.registration import Claim, Part
from moe.lab.loading import load_suite
from moe.lab.records import DIVERGED, FINISHED, PRIMARY, Record
from moe.lab.report import page
from moe.lab.schedule import PlannedRuns
from moe.lab.suite import Comparison, Suite, Variant
from moe.lab.table import Table

REGISTERED = registration.read_claims(Path(__file__).resolve().parents[1] / "configs/ablations/claims.toml")
CLAIMS = REGISTERED.claims


@functools.cache
def shipped_suite(name: str) -> Suite:
    """A suite of configs/ablations at the size that its records have; checking one takes a second."""
    return load_suite(str(Path(__file__).resolve().parents[1] / f"configs/ablations/{name}.py"), "laptop")


def suite_of(variants, comparisons=None, seeds=(0, 1, 2), base=None, **fields):
    base = defaults.get_config() if base is None else base
    return Suite("test", "?", base, variants, seeds, comparisons or {}, **fields)


DENSE = Variant({"model.moe.gate": "none"})
SWITCH = Variant({"model.moe.gate": "switch"})


def record(variant, seed, loss, steps=20, rate=3e-3, status=FINISHED, **fields):
    """A run with one domain of two rows and two evaluations."""
    rows = [
        (step, "loss", domain, "", value)
        for step, value in ((steps // 2, loss + 1.0), (steps, loss))
        for domain in ("a", PRIMARY)
    ]
    own = {"rows": rows, "row_domains": ["a", "a"], "row_losses": [loss - 0.1, loss + 0.1], "claims": {}, **fields}
    own = {"run": "", "form": {}, "evaluated": "dropless", "last_losses": [loss], **own}
    return Record(
        variant, steps, rate, seed, status, "", commit="c", data={}, hardware="h", seconds=1.0, costs={}, **own
    )


def keyed(suite, runs):
    """Records as the suite's own runs would write them, with parents at the base config's learning rate."""
    found, keyed_runs = PlannedRuns(suite, []), []
    for run in runs:
        parents = {role: found.run(key) for role, key in found.parents(run.key).items()}
        form = suite.form(run.variant, run.seed, steps=run.steps, learning_rate=run.learning_rate, parents=parents)
        keyed_runs.append(dataclasses.replace(run, form=form, run=identity.digest(form)))
    return keyed_runs


def table(suite, runs):
    return Table(suite, keyed(suite, runs))


def claim_of(rule="below", value="loss[b] - loss[a]", **fields):
    part = {"margin": fields.pop("margin", 0.0), "published": fields.pop("published", None)}
    return Claim(1, "test", "b beats a", "paper", (Part("loss", rule, value, **part),), **fields)


def table_of(b, a=(5.0,) * 5, claim=None, steps=20, **fields):
    hashes = {"1": (claim or claim_of()).hash}
    runs = [
        record(name, seed, loss, steps, status=DIVERGED if math.isinf(loss) else FINISHED, claims=hashes)
        for name, losses in (("a", a), ("b", b))
        for seed, loss in enumerate(losses)
    ]
    return table(suite_of({"a": DENSE, "b": SWITCH}, horizons=(steps,), **fields), runs)


def tiny_base(directory):
    base = defaults.get_config()
    base.model.update(vocab_size=400, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=16)
    base.model.moe.gate = "none"
    base.data.update(dataset="tiny_text/split", directory=str(directory), sequence_length=16, heldout_rows=8)
    base.data.shuffle_window = 4
    base.train.update(num_steps=4, sample_tokens=0)
    return base


def tiny_suite(base, **fields):
    moe = {"model.moe.gate": "mixtral", "model.moe.num_experts": 4, "model.moe.d_ff": 8}
    return suite_of(
        {"dense": Variant({}), "mixtral": Variant(moe)},
        {"equal FLOPs": Comparison("dense", ("mixtral",), ("steps", "flops"), tolerance=0.2)},
        base=base,
        heldout_rows=8,
        whole_batch_groups=False,  # the tests have a mesh of eight devices
        **fields,
    )


def write_page(directory, suite, runs, claims=()):
    """Write the report of records that still lack their hashes directly into a folder."""
    registered = registration.Registered(tuple(claims))
    page.write(directory, {suite.name: table(suite, runs)}, suite, registered, "COMMAND")


def tables(text):
    """Header and rows of each Markdown table, as lists of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.strip().splitlines()]
        rows = [[cell.strip() for cell in line] for line in lines]
        found.append((rows[0], rows[2:]))
    return found
