"""The ablation lab: suites, plans, records, expressions and the report."""

import dataclasses
import itertools
import json
import math
import shutil
import sys
import types
from pathlib import Path

import pandas as pd
import pytest

from moe.config import Config, ConfigError, DataConfig, Losses, MoEConfig
from moe.config.parse import from_config_dict
from moe.configs import base as defaults
from moe.configs.ablations import common
from moe.interop import import_checkpoint
from moe.lab import costs, identity, records, results
from moe.lab.claims import decide
from moe.lab.claims.registration import Claim, Part, read_claims
from moe.lab.expressions import Term, parse
from moe.lab.loading import check, load_suite, load_suites, with_gate, with_seeds
from moe.lab.records import DIVERGED, PRIMARY, Key
from moe.lab.report import answer, figures, page, sections
from moe.lab.report.missing import missing
from moe.lab.schedule import PlannedRuns
from moe.lab.suite import Comparison, Suite, Sweep, Variant
from moe.lab.table import MissingError, Table
from moe.models import flops
from moe.routing.interface import Gate
from tests.helpers import slow_case, tiny_encoder_decoder, tiny_model
from tests.lab_helpers import (
    CLAIMS,
    DENSE,
    SWITCH,
    keyed,
    record,
    shipped_suite,
    suite_of,
    table,
    tiny_base,
    tiny_suite,
    write_page,
)

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("__init__", "common", "own_text", "sizes")
SUITES = sorted(path for path in (ROOT / "configs/ablations").glob("*.py") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", slow_case("pod")])
def test_arms_of_every_suite_are_equal_in_what_it_declares(path, size):
    suite = load_suite(str(path), size)
    assert suite.name == path.stem
    assert set(suite.primary_domains) <= set(suite.base.data.domains) | {suite.base.data.dataset}
    # The runs of the replication, and those at the papers' scale, are part of no other suite's results.
    kept = {
        "replication": common.REPLICATION_SEEDS,
        "paper_scale": common.PAPER_SCALE_SEEDS,
        "paper_scale_interaction": common.INTERACTION_SEEDS,
    }
    counted = {*suite.seeds, *itertools.chain(*kept.values())} - suite.reserved_seeds
    assert counted == set(suite.seeds)
    assert counted & set(itertools.chain(*kept.values())) == set(kept.get(suite.name, ()))


def test_arms_at_the_papers_scale_are_those_of_the_replication_at_another_scale():
    """No field but the initial scale differs, and the notes say what the arms are."""
    first, at_scale, fewer = (
        load_suite(str(ROOT / f"configs/ablations/{name}.py"), "laptop")
        for name in ("replication", "paper_scale", "paper_scale_interaction")
    )
    assert [*at_scale.variants] == ["dense", "switch", "mixtral", "top1_drop", "top1_free", "top2_drop", "top2_free"]
    for name, arm in at_scale.variants.items():
        config, before = at_scale.config(name), first.config(name)
        assert (before.model.init_scale, config.model.init_scale) == (1.0, 0.1)
        again = dataclasses.replace(config.model, init_scale=1.0)
        assert dataclasses.replace(config, model=again) == before
        assert arm.note.endswith("initial scale 0.1")
        moe = config.model.moe
        if name != "dense":
            assert f"top-{moe.experts_per_token} of {moe.num_experts}" in arm.note
            assert ("dropless" in arm.note) == (moe.dispatch == "dropless")
            assert (f"capacity factor {moe.capacity.train:g}" in arm.note) == (moe.dispatch != "dropless")
    switch, mixtral = (at_scale.config(name).model.moe for name in ("switch", "mixtral"))
    assert (switch.jitter, switch.losses.balance) == (0.01, 0.01)
    assert (mixtral.d_ff, mixtral.losses.balance, mixtral.gate.renormalise) == (switch.d_ff // 2, 0.02, True)
    shared = {name: at_scale.variants[name] for name in fewer.variants}
    assert dict(fewer.variants) == shared
    assert set(at_scale.seeds) < set(fewer.seeds)


def test_a_suite_on_own_text_takes_the_folder_and_names_the_settings_it_replaces():
    path = str(ROOT / "configs/ablations/own_text.py")
    suite = load_suite(f"{path}:/tmp/text", "laptop")
    assert suite.base.data.dataset == "/tmp/text"
    assert suite.replaced() == {}
    suite.base.data.heldout_rows, suite.base.train.eval_every = 32, 77
    assert suite.replaced() == {"data.heldout_rows": (32, 256), "train.eval_every": (77, 125)}
    with pytest.raises(ConfigError, match=r"own_text.py:FOLDER: name the folder of text"):
        load_suite(path, "laptop")


def test_a_suite_that_is_already_loaded_is_not_loaded_again():
    """Its file may need an argument, or have another name."""
    folder = ROOT / "configs/ablations"
    own = dataclasses.replace(load_suite(f"{folder}/own_text.py:/tmp/text", "laptop"), name="mine")
    found = load_suites(folder, ["controls", "mine"], "laptop", own)
    assert list(found) == ["controls", "mine"]
    assert found["mine"] is own
    with pytest.raises(ConfigError, match=r"own_text.py:FOLDER: name the folder of text"):
        load_suites(folder, ["own_text"], "laptop", own)


@pytest.mark.parametrize("named", ["GATE", "LAYER", "Sharp"])
def test_fields_of_a_users_gate_are_part_of_the_identity_of_a_run(monkeypatch, named):
    """Edit what is behind the name between two starts."""

    def run(power, counts="assignments"):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Sharp(Gate):
            k: int = 2
            power: float

            def route(self, router_logits, inputs):
                raise NotImplementedError

        Sharp.__dataclass_fields__["power"].default = power
        Sharp.__init__.__kwdefaults__["power"] = power
        module = types.ModuleType("edited_gates")
        module.Sharp, module.GATE = Sharp, Sharp(power=power)
        module.LAYER = MoEConfig(gate=module.GATE, losses=Losses(balance=0.01, counts=counts))
        monkeypatch.setitem(sys.modules, "edited_gates", module)
        arm = Variant(common.moe("laptop", f"edited_gates:{named}", 8, 2))
        suite = common.suite("laptop", name="own", question="?", comparisons={}, variants={"a": arm})
        return suite.run("a", 0, steps=10, learning_rate=4e-3, parents={})

    assert run(4.0) == run(4.0) != run(9.0)
    assert (run(4.0) != run(4.0, "first_choice")) == (named == "LAYER")


def test_a_gate_of_ones_own_is_an_arm_beside_the_suites_with_the_same_experts():
    """Its recorded pairs stay: no other arm's run has another hash, and the new arm has its baseline's rate."""
    suite = shipped_suite("paper_scale")
    added, pair = with_gate(suite, "moe.routing.gates:TopK")
    assert pair == ("top1_drop", "moe.routing.gates.TopK")
    arm = added.config(pair[1])
    assert (arm.model.moe.num_experts, arm.model.moe.gate.k, arm.model.init_scale) == (8, 1, 0.1)
    assert added.variants[pair[1]].rate_from == "top1_free"
    assert added.comparisons["equal active and total parameters"].variants[-1] == pair[1]
    point = {"steps": 8000, "learning_rate": 4e-3, "parents": {}}
    assert all(suite.run(name, 25, **point) == added.run(name, 25, **point) for name in suite.variants)
    with pytest.raises(ConfigError, match="'own' compares no MoE layers at equal total parameters"):
        with_gate(common.suite("laptop", name="own", question="?", variants={}, comparisons={}), "switch")


def test_the_page_of_the_question_is_only_for_its_suite():
    """Its text on sizes and factors is true of no other suite."""
    primary = read_claims(ROOT / "configs/ablations/claims.toml")
    assert answer.is_asked(primary)
    own = dataclasses.replace(primary.claims[0], suite="mine", family="primary")
    assert not answer.is_asked(dataclasses.replace(primary, claims=(own,)))
    assert not answer.is_asked(dataclasses.replace(primary, claims=(*primary.claims, own)))
    assert not answer.is_asked(dataclasses.replace(primary, claims=()))


def test_the_width_of_an_arm_follows_the_base_config_that_it_is_given():
    base = common.base("laptop")
    base.model.d_ff = 96
    assert common.moe(base, "mixtral", 8, 2)["model.moe.d_ff"] == 48
    assert common.moe("laptop", "mixtral", 8, 2)["model.moe.d_ff"] == 128


def test_a_report_says_that_learning_rates_are_not_tuned(tmp_path):
    suite = suite_of({"a": DENSE, "b": SWITCH}, {"c": Comparison("a", ("b",), ("steps",))}, horizons=(20,))
    runs = [record(name, seed, loss) for name, loss in (("a", 5.0), ("b", 4.0)) for seed in suite.seeds]
    write_page(tmp_path, suite, runs)
    text = (tmp_path / "report.md").read_text()
    assert "**The learning rate is not tuned for any arm** at 20 steps" in text.partition("\n## ")[0]
    assert "**Not tuned:** the suite has no sweep. All arms use the base config's rate, 0.003." in text
    half = dataclasses.replace(SWITCH, rate_from="a")
    suite = suite_of({"a": DENSE, "b": half}, suite.comparisons, horizons=(20,), sweep=Sweep((3e-3, 6e-3), (9,)))
    swept = [record("a", 9, loss, rate=rate) for rate, loss in ((3e-3, 5.0), (6e-3, 6.0))]
    write_page(tmp_path, suite, runs + swept)
    assert "not tuned" not in (tmp_path / "report.md").read_text()


def test_every_claim_names_arms_of_its_suite():
    assert [claim.number for claim in CLAIMS] == [*range(1, 21), *range(23, CLAIMS[-1].number + 1)]
    suites = {path.stem: shipped_suite(path.stem) for path in SUITES}
    for claim in CLAIMS:
        assert set(decide.arms_of(claim)) <= set(suites[claim.suite].variants), claim.number
        assert claim.min_steps <= suites[claim.suite].longest


TWO = {"a": DENSE, "b": DENSE}


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (suite_of({"a": DENSE}, seeds=(0,)), "at least two"),
        (suite_of({"a": DENSE}, seeds=(0, 1, 1)), "at least two different"),
        (suite_of({"a": DENSE}, horizons=(10, 10)), "different positive numbers"),
        (suite_of({"a": Variant({"model.moe.gat": "none"})}), "variant 'a'.*gat"),
        (suite_of({"a": Variant({"model.moe.gate": "swich"})}), "variant 'a'.*swich"),
        (suite_of({"a": dataclasses.replace(DENSE, starts_from="b")}), "no variant 'b'"),
        (suite_of({"a": DENSE}, headline=("b",)), "headline: no variant 'b'"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", ("b",), ("steps",))}), "no variant 'b'"),
        (suite_of(TWO, {"c": Comparison("a", ("b",), ("luck",))}), "'luck' is not one of"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", (), ("steps",))}), r"variants=\(\): must be at least one"),
        (suite_of({"a": DENSE}, {"c": Comparison("a", ("a",), ("steps",))}), "not the baseline 'a'"),
        (suite_of(TWO, {"c": Comparison("a", ("b", "b"), ("steps",))}), "all different"),
        (suite_of(TWO), "variants 'a' and 'b': differ in nothing"),
        (suite_of({"a": DENSE, "b": Variant({**DENSE.overrides, "model.remat": "full"})}), "more than rounding"),
        (suite_of({"a": DENSE, "b": dataclasses.replace(DENSE, rate_from="a")}), "would be one run"),
        (
            suite_of(
                {
                    "a": Variant({"model.moe.gate": "switch", "model.moe.jitter": 0.0}),
                    "b": Variant(
                        {"model.moe.gate": "deepseek_moe", "model.moe.gate.k": 1, "model.moe.losses.balance": 0.01}
                    ),
                }
            ),
            "variants 'a' and 'b': are the same rule under two names of a gate",
        ),
        (
            suite_of({"p": DENSE, **dict.fromkeys("ab", dataclasses.replace(DENSE, starts_from="p"))}),
            "'a' and 'b'",
        ),
        *(
            (suite_of({"a": Variant({name: 1})}), f"variant 'a': {name} is set by the suite")
            for name in ("seed", "train.num_steps", "optimizer.learning_rate", "start.checkpoint")
        ),
        (suite_of({"a": DENSE}, sweep=Sweep((1e-3, 2e-3), (9,))), "must contain the base config's 0.003"),
        (suite_of({"a": DENSE}, sweep=Sweep((0.0, 3e-3), (9,))), "must be positive"),
        (suite_of({"a": DENSE}, sweep=Sweep((3e-3, 6e-3), (1,))), "none of the reserved"),
        (suite_of({"a": DENSE}, reserved=(1,)), "none of the reserved"),
        (suite_of({"a": DENSE}, sweep=Sweep((3e-3, 6e-3), (9,), (7,))), "must be among the suite's"),
        (suite_of({"../a": DENSE}), "variant '../a': must be at most 60 letters"),
        (suite_of({"a": dataclasses.replace(DENSE, rate_from="b")}), "no variant 'b'"),
        (
            suite_of({"a": DENSE, "b": SWITCH}, {"c": Comparison("a", ("b",), ("total_parameters",))}),
            r"'b' has 3\.\d+ times the total_parameters of 'a'",
        ),
        *(
            (
                suite_of({"a": DENSE, "b": Variant({name: value})}, {"c": Comparison("a", ("b",), ("steps",))}),
                f"'b' has {name}={value} and 'a' .*; compared arms must read",
            )
            for name, value in (("train.batch_size", 16), ("data.sequence_length", 64), ("model.vocab_size", 5000))
        ),
    ],
)
def test_a_suite_that_cannot_be_compared_is_refused(suite, message):
    with pytest.raises(ConfigError, match=message):
        check(suite)


def test_arms_of_equal_settings_may_take_their_rates_from_different_sweeps():
    arms = {"a": DENSE, "b": SWITCH, "b_shared": dataclasses.replace(SWITCH, rate_from="a")}
    check(suite_of(arms, sweep=Sweep((3e-3, 6e-3), (9,))))
    with pytest.raises(ConfigError, match="variants 'b' and 'b_shared'"):
        check(suite_of(arms))  # without a sweep, all have the base config's rate


SUITE_FILE = """
from moe.configs import base
from moe.lab.suite import Comparison, Suite, Sweep, Variant
def get_suite(size):
    return {returned}
"""
FIELDS = 'name="s", question="?", base=base.get_config(), variants={"a": Variant({})}, seeds=(0, 1), comparisons={}'


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("7", "must return a moe.lab.suite.Suite"),
        ("1 / 0", "ZeroDivisionError"),
        (f"Suite({FIELDS}, horizons='long')", "horizons"),
        (f"Suite({FIELDS}, horizon=(3,))", "horizon"),
        (f"Suite({FIELDS}, sweep=0.1)", "sweep"),
        (f"Suite({FIELDS}, sweep=Sweep('fast', (9,)))", "Sweep: 0='fast': must be a tuple"),
        (f"Suite({FIELDS}, heldout_rows=None)", "heldout_rows"),
        (f"Suite({FIELDS}, heldout_rows=0)", "heldout_rows=0"),
        (f"Suite({FIELDS.replace('(0, 1)', '(0, -1)')})", r"seeds\.1=-1"),
        (f"Suite({FIELDS.replace('(0, 1)', '(0, 2**31)')})", r"seeds\.1=2147483648"),
        (f"Suite({FIELDS.replace('(0, 1)', '(0, True)')})", r"seeds\.1=True"),
        (f"Suite({FIELDS}, unseen=('python',))", "only held-out text"),
        (f"Suite({FIELDS.replace('Variant({})', 'Variant(3)')})", "Variant: 0=3: must be a JSON object"),
        (f"Suite({FIELDS.replace('Variant({})', '{}')})", "variants"),
        (f"Suite({FIELDS.replace('seeds=(0, 1)', 'seeds=3')})", "seeds"),
        (f"Suite({FIELDS.replace('comparisons={}', 'comparisons=[]')})", "comparisons"),
        (f"Suite({FIELDS.replace('name=', 'named=')})", "Suite: has no name"),
        (f"Suite({FIELDS.replace(chr(34) + 's' + chr(34), chr(34) + '../s' + chr(34))})", "suite '../s'"),
    ],
)
def test_a_suite_file_of_wrong_types_is_refused_in_a_sentence(tmp_path, returned, message):
    path = tmp_path / "s.py"
    path.write_text(SUITE_FILE.format(returned=returned))
    with pytest.raises(ConfigError, match=message):
        load_suite(str(path), "laptop")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "x"}, {"seed": 0.5}, {"learning_rate": None}, {"status": 3}, {"rows": [[1, 2]]}, {"rows": {}},
        {"row_losses": ["a"]}, {"row_losses": [1.0]}, {"probes": []}, {"claims": {"1": 2}}, {"data": None},
        {"costs": {"flops": "many"}}, {"form": []}, {"run": 5}, {"last_losses": 1}, {"rows": []}, {"variant": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_wrong_types_is_refused_in_a_sentence(tmp_path, change):
    suite = suite_of({"a": DENSE}, horizons=(20,))
    keyed(suite, [record("a", 0, 4.5)])[0].write(tmp_path)
    (path,) = (tmp_path / "records").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=r"\.json: not a record of this version"):
        records.read_all(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_not_a_record_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json: not a record"):
        records.read_all(tmp_path)


def test_records_are_kept_as_one_table(tmp_path):
    suite = suite_of({"a": DENSE}, horizons=(20,), seeds=(0, 1))
    runs = keyed(suite, [record("a", 0, 4.5, probes={"p@1": 0.5}), record("a", 1, 4.25, last_losses=[1.0, 2.0])])
    path = tmp_path / "s" / records.TABLE
    path.parent.mkdir()
    records.write_table(path, runs)
    assert records.read_all(tmp_path) == records.read_all(path.parent) == runs
    # A run that is in both is read once, from its own file.
    dataclasses.replace(runs[0], seconds=7.0).write(tmp_path)
    assert [run.seconds for run in records.read_all(tmp_path)] == [7.0, 1.0]
    for content in (b"no table", path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a table of records"):
            records.read_all(tmp_path)


def test_a_run_recorded_under_two_names_has_the_probes_of_both(tmp_path):
    suite = suite_of({"a": DENSE, "b": DENSE}, horizons=(20,), seeds=(0, 1))
    first, second = keyed(suite, [record("a", 0, 4.5, probes={"p": 0.5, "q": 0.5}), record("b", 0, 4.5)])
    assert first.run == second.run
    second = dataclasses.replace(second, probes={"q": 0.25, "r": 0.25})
    both = {"p": 0.5, "q": 0.25, "r": 0.25}
    for name, run in (("s", first), ("t", second)):
        run.write(tmp_path / "json")
        (tmp_path / "tables" / name).mkdir(parents=True)
        records.write_table(tmp_path / "tables" / name / records.TABLE, [run])
    for folder in ("json", "tables"):
        assert [run.probes for run in records.read_all(tmp_path / folder)] == [both]


def test_chosen_seeds_must_differ_from_each_other_and_from_those_of_the_sweep():
    suite = suite_of({"a": DENSE}, sweep=Sweep((3e-3, 6e-3), (9,)))
    assert with_seeds(suite, [4]).seeds == (4,)
    for seeds in ([9], [1, 1]):
        with pytest.raises(ConfigError, match="--seeds"):
            with_seeds(suite, seeds)


def test_each_horizon_has_its_own_schedule():
    suite = suite_of({"a": dataclasses.replace(DENSE, rate_scale=0.5)}, horizons=(2000, 200))
    assert suite.steps == (200, 2000)
    for steps, warmup, evaluate in ((200, 20, 25), (2000, 200, 250)):
        config = suite.config("a", steps=steps, learning_rate=0.01)
        assert (config.train.num_steps, config.optimizer.warmup_steps) == (steps, warmup)
        assert (config.train.eval_every, config.optimizer.learning_rate) == (evaluate, 0.005)


def test_routing_groups_follow_the_batch_size():
    arms = {
        "whole": Variant({"model.moe.gate": "switch", "train.batch_size": 6}),
        "own": Variant({"model.moe.gate": "switch", "model.moe.group_size": 64}),
    }
    suite = suite_of(arms)
    length = suite.base.data.sequence_length
    assert suite.config("whole").model.moe.group_size == 6 * length
    assert suite.config("own").model.moe.group_size == 64


def test_the_plan_goes_seed_by_seed_with_the_headline_arms_first():
    suite = suite_of({"a": DENSE, "other": SWITCH, "b": SWITCH}, seeds=(0, 1), horizons=(20, 10), headline=("a", "b"))
    order = [(key.seed, key.steps, key.variant) for key in PlannedRuns(suite, []).runs()]
    assert order[:4] == [(0, 10, "a"), (0, 10, "b"), (0, 20, "a"), (0, 20, "b")]
    assert order[4:6] == [(1, 10, "a"), (1, 10, "b")]
    assert order[8:] == [(0, 10, "other"), (0, 20, "other"), (1, 10, "other"), (1, 20, "other")]


def test_parents_are_trained_before_their_children():
    child = dataclasses.replace(SWITCH, starts_from="parent", seed_offset=7)
    suite = suite_of({"child": child, "parent": DENSE}, seeds=(0, 1))
    order = [(key.variant, key.seed) for key in PlannedRuns(suite, []).runs()]
    assert order == [("parent", 0), ("child", 0), ("parent", 1), ("child", 1)]
    found = PlannedRuns(suite, [])
    key = found.runs()[1]
    assert found.parents(key) == {"starts_from": Key("parent", 320, 3e-3, 0)}
    assert suite.config("child", 1).seed == 8
    # A different parent makes the child a different run.
    edited = dataclasses.replace(DENSE, overrides={**DENSE.overrides, "model.d_ff": 64})
    other = PlannedRuns(dataclasses.replace(suite, variants={"child": child, "parent": edited}), [])
    assert found.run(key) != other.run(key)


def test_what_is_inherited_from_parents_is_part_of_the_identity_of_a_run():
    both = {"starts_from": "parent", "teacher": "parent"}
    arms = {
        "parent": SWITCH,
        "quarter": Variant({"distill.soft_share": 0.25}, **both),
        "half": Variant({"distill.soft_share": 0.5}, **both),
        "reset": Variant({}, starts_from="parent"),
        "carry": Variant({"start.optimizer": "carry"}, starts_from="parent"),
    }
    found = PlannedRuns(suite_of(arms, horizons=(20,)), [])
    assert len({found.run(found.key(name, 20, 0)) for name in arms}) == len(arms)


def test_the_capacity_under_expert_choice_is_part_of_the_identity_of_a_run():
    """It sets how many tokens of a group each expert takes, with dropless dispatch too."""
    own = {"model.moe.gate": "expert_choice", "model.moe.dispatch": "dropless", "model.moe.accept_future_leak": True}
    changes = ({}, {"model.moe.capacity.train": 2.0}, {"model.moe.group_size": 256})
    arms = {f"arm_{i}": Variant(own | change) for i, change in enumerate(changes)}
    found = PlannedRuns(suite_of(arms, horizons=(20,)), [])
    assert len({found.run(found.key(name, 20, 0)) for name in arms}) == len(arms)


#: Settings that the canonical form names by hand, each with a value other than its default.
NAMED = {
    "model.moe.losses.z": 1e-3, "model.moe.losses.balance": 0.1, "model.moe.losses.scope": "sequence",
    "model.moe.router_dtype": "bfloat16", "model.moe.expert_dropout": 0.1, "model.moe.jitter": 0.1,
    "model.moe.d_ff": 96, "model.moe.shared_d_ff": 64, "model.moe.latent_dim": 64, "model.moe.zero_experts": 1,
    "model.moe.num_experts": 16, "model.moe.route_padding": True, "model.moe.capacity.eval": 3.0,
    "model.moe.drop_policy": "probability", "model.moe.overflow_to_next": True, "model.moe.every": 2,
    "model.moe.gate.k": 3, "model.moe.gate.scale": 2.0, "model.moe.gate.renormalise": False,
    "optimizer.name": "muon", "optimizer.final_learning_rate_fraction": 0.2,
}  # fmt: skip


def test_every_setting_is_part_of_the_identity_of_a_run():
    own = {"model.moe.gate": "mixtral", "model.moe.accept_future_leak": True}
    arms = {"plain": Variant(own)} | {name: Variant(own | {name: value}) for name, value in NAMED.items()}
    # Every second layer is dense, so that the width of dense layers counts.
    arms["dense width"] = Variant(own | {"model.moe.every": 2, "model.d_ff": 64})
    found = PlannedRuns(suite_of(arms, horizons=(20,)), [])
    runs = {}
    for name in arms:
        runs.setdefault(found.run(found.key(name, 20, 0)), []).append(name)
    assert [names for names in runs.values() if len(names) > 1] == []


def test_a_sweep_goes_from_the_base_rate_to_its_neighbours_at_each_horizon():
    sweep = Sweep((1e-3, 3e-3, 9e-3, 27e-3), (7,), (10, 20))
    arms = {"a": DENSE, "b": dataclasses.replace(SWITCH, rate_from="a")}
    suite = suite_of(arms, seeds=(0, 1), horizons=(10, 20), sweep=sweep)

    def after(*runs):
        return PlannedRuns(suite, keyed(suite, runs))

    assert after().runs() == [Key("a", 10, 3e-3, 7), Key("a", 20, 3e-3, 7)]
    # At each of two horizons: two neighbours of the rate, and two seeds of each of two arms.
    assert len(after().unnamed()) == 2 * (2 + 2 * 2)
    first = record("a", 7, 4.9, 10)
    assert [key for key in after(first).runs() if key.steps == 10] == [Key("a", 10, r, 7) for r in (3e-3, 1e-3, 9e-3)]
    # The higher neighbour is the best so far: the one beyond it is next, and no run of the comparisons is named yet.
    middle = [first, record("a", 7, 5.0, 10, 1e-3), record("a", 7, 4.8, 10, 9e-3)]
    choice = after(*middle).choices["a", 10]
    assert (choice.rate, choice.tuned, choice.to_try) == (9e-3, False, (27e-3,))
    assert {key.seed for key in after(*middle).runs()} == {7}
    # That one diverges: here the arm is tuned, and so is the arm that takes its rate; at the other horizon neither is.
    full = [*middle, record("a", 7, 4.0, 10, 27e-3, DIVERGED)]
    found = after(*full)
    assert found.choices["a", 10] == found.choices["b", 10]
    choice = found.choices["a", 10]
    assert (choice.rate, choice.tuned, choice.at_edge) == (9e-3, True, False)
    assert not found.choices["a", 20].tuned
    assert len(found.unnamed()) == 2 + 2 * 2
    assert {key for key in found.runs() if key.seed == 0} == {Key(arm, 10, 9e-3, 0) for arm in arms}
    # Without the sweep every arm takes the best rate tried.
    assert {key.learning_rate for key in found.runs(sweep=False) if key.steps == 20} == {3e-3}
    # Reserved seeds are in no comparison.
    assert Table(suite, keyed(suite, full)).used == []
    edge = after(first, record("a", 7, 4.8, 10, 1e-3), record("a", 7, 5.0, 10, 9e-3)).choices["a", 10]
    assert (edge.rate, edge.tuned, edge.at_edge) == (1e-3, True, True)


def test_a_rate_counts_once_every_seed_of_the_sweep_has_tried_it_and_its_neighbours_follow():
    suite = suite_of({"a": DENSE}, horizons=(20,), sweep=Sweep((3e-4, 1e-3, 3e-3, 9e-3, 27e-3), (7, 8), (20,)))
    runs = keyed(suite, [record("a", 7, 4.0), record("a", 8, 5.0)])
    one, both = (PlannedRuns(suite, runs[:count]).choices["a", 20] for count in (1, 2))
    assert (one.tried, one.to_try) == ({}, (3e-3,))
    assert (both.tried, both.to_try) == ({3e-3: 4.5}, (1e-3, 9e-3))


@pytest.mark.parametrize("role", ["starts_from", "teacher"])
def test_a_sweep_trains_the_parents_that_take_the_rate_of_another_arm(role):
    """With each finished run recorded, the sweep of an arm whose parent has no sweep of its own completes."""
    arms = {
        "c": dataclasses.replace(SWITCH, **{role: "b"}),
        "a": DENSE,
        "b": dataclasses.replace(SWITCH, rate_from="a"),
    }
    suite = suite_of(arms, seeds=(0, 1), horizons=(20,), sweep=Sweep((1e-3, 3e-3, 9e-3), (7,)))
    runs, trained, rates = [], [], {1e-3: 5.0, 3e-3: 4.9, 9e-3: 4.8}
    while missing := list(itertools.filterfalse((found := PlannedRuns(suite, runs)).record, found.runs())):
        key = next(key for key in missing if all(map(found.record, found.parents(key).values())))
        form = suite.form(
            key.variant, key.seed, steps=key.steps, learning_rate=key.learning_rate,
            parents={name: found.run(parent) for name, parent in found.parents(key).items()},
        )  # fmt: skip
        runs.append(record(key.variant, key.seed, rates[key.learning_rate], 20, key.learning_rate, form=form))
        runs[-1] = dataclasses.replace(runs[-1], run=identity.digest(form))
        trained.append(key)
    assert trained.count(Key("b", 20, 9e-3, 7)) == 1
    assert {(key.variant, key.seed) for key in trained} == set(itertools.product(arms, (0, 1, 7)))
    assert found.choices["c", 20].tuned
    assert len(Table(suite, runs).records) == len(trained) == 3 + 1 + 3 + 3 * 2


def test_a_rate_of_many_digits_finds_its_record():
    sweep = Sweep((1 / 300, 1 / 150), (7,))
    base = defaults.get_config()
    base.optimizer.learning_rate = 1 / 300
    suite = suite_of({"a": DENSE}, seeds=(0, 1), horizons=(20,), sweep=sweep, base=base)
    runs = keyed(suite, [record("a", 7, 5.0, rate=1 / 300), record("a", 7, 5.1, rate=1 / 150)])
    found = PlannedRuns(suite, runs)
    assert found.choices["a", 20].tried == {1 / 300: 5.0, 1 / 150: 5.1}
    # Rounded to seven digits it is another rate.
    assert PlannedRuns(suite, keyed(suite, [record("a", 7, 5.0, rate=0.003333333)])).choices["a", 20].tried == {}


def test_an_edited_arm_is_a_different_run(tmp_path):
    suite = suite_of({"a": DENSE, "b": SWITCH}, seeds=(0, 1), horizons=(20,))
    for run in keyed(suite, [record("b", 0, 5.0), record("b", 1, 5.0)]):
        run.write(tmp_path)
    runs = records.read_all(tmp_path)
    assert Table(suite, runs).seeds(20, "b") == [0, 1]
    for fields in ({"model.moe.gate": "mixtral"}, {"model.moe.gate": "switch", "model.d_ff": 64}):
        edited = dataclasses.replace(suite, variants={"a": DENSE, "b": Variant(fields)})
        assert Table(edited, runs).used == []
        assert len(PlannedRuns(edited, runs).runs()) == 4
    # Another suite finds the same runs under another name.
    renamed = dataclasses.replace(suite, name="other", variants={"c": SWITCH})
    (first, second) = Table(renamed, runs).used
    assert (first.variant, second.variant) == ("c", "c")
    # So does one with other seeds, unless they are fixed.
    for fixed, seeds in ((False, [0, 1]), (True, [1])):
        found = Table(dataclasses.replace(renamed, seeds=(1, 2), fixed_seeds=fixed), runs)
        assert found.seeds(20, "c") == seeds
    # A reserved seed is counted by no comparison.
    assert Table(dataclasses.replace(renamed, seeds=(1, 2), reserved=(0,)), runs).seeds(20, "c") == [1]


def test_settings_without_effect_are_not_in_the_canonical_form():
    """All others are, also those that are added to the config; these have another name there, or change no result."""
    config = from_config_dict(defaults.get_config())
    names = {
        "model": identity._MODEL, "data": identity._DATA, "optimizer": identity._OPTIMIZER, "train": identity._TRAIN,
        "start": identity._START,
    }  # fmt: skip
    left_out = {
        f"{section}.{field.name}"
        for section in ("data", "train", "model", "optimizer", "start")
        for field in dataclasses.fields(getattr(config, section))
        if field.name not in names[section]
        and not dataclasses.is_dataclass(getattr(getattr(config, section), field.name))
    }
    assert left_out == {
        "data.directory", "data.heldout_rows", "start.checkpoint", "start.optimizer",
        "train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints", "train.keep_every",
        "train.max_skipped_steps", "train.on_skipped_steps", "train.pipeline_rounds", "train.spike_sigmas",
        "train.sample_tokens", "train.compilation_cache", "train.host_timeout", "train.writers",
        "model.attention", "model.scan_layers", "model.scan_unroll", "model.remat", "model.d_ff", "model.pattern",
        "optimizer.name", "optimizer.final_learning_rate_fraction", "optimizer.memory",
    }  # fmt: skip


def test_neutral_values_are_fixed():
    """With another neutral value, the records of older runs would belong to other settings."""
    always = {"vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
    sections = {"rope_scaling", "delta_net", "memory", "mixer"}  # left out while they are off
    assert {name for name, value in identity._MODEL.items() if value is None} == always | {"mixer"}
    assert {name: value for name, value in identity._MODEL.items() if name not in always | sections} == {
        "encoder_layers": 0, "encoder_vocab_size": 0, "activation": "swiglu", "norm_eps": 1e-5, "relative_buckets": 0,
        "relative_max_distance": 128, "rope_theta": 10_000.0, "rope_dim": 0,
        "rope_interleaved": False, "kv_lora_rank": 0, "q_lora_rank": 0, "value_dim": 0, "sliding_window": 0,
        "sliding_window_layers": (), "qk_norm": "none", "attention_bias": "none", "attention_sinks": False,
        "clip_qkv": 0.0, "tie_embeddings": False, "scale_logits": False, "dropout": 0.0, "init_scale": 1.0,
        "dtype": "float32", "low_precision": "none", "low_precision_in": "ffn", "norms": "before",
        "fake_quantize": "none", "rotated_layers": "all", "window_rope_theta": 0.0,
        "embedding_scale": 1.0, "residual_scale": 1.0, "attention_scale": 0.0, "logit_scale": 1.0,
        "prediction_layers": 0, "prediction_weight": 0.3, "gated_attention": False, "zero_centred_norms": False,
        "layer_norm": False, "logit_bias": False, "base_d_model": 0, "base_num_layers": 0, "base_head_dim": 0,
        "base_expert_d_ff": 0, "mixer_layers": (),
    }  # fmt: skip
    forms = identity._DATA, identity._OPTIMIZER, identity._TRAIN, identity._START
    others = {name: value for form in forms for name, value in form.items() if value is not None}
    assert others == {
        "weights": (), "text_suffixes": (), "tokenizer": "", "chat_template": "", "objective": "causal",
        "input_length": 0, "pack": True, "corruption_rate": 0.15, "mean_span": 3.0, "streams": 0,
        "shuffle_window": 512, "schedule": "cosine", "decay_steps": 0, "b1": 0.9, "b2": 0.95, "eps": 1e-8,
        "weight_decay": 0.1, "gradient_clip": 1.0, "moment_dtype": "float32", "frozen": (), "ema_decay": 0.0,
        "skip_sigmas": 0.0, "qk_clip": 0.0, "muon_heads": False, "accumulation_steps": 1, "rampup_rows": (),
        "rampup_steps": (), "expert_noise": 0.0,
        "virtual_groups": False, "expert_scale": 1.0, "drop_share": 0.0, "fresh": (),
    }  # fmt: skip
    assert identity._MOE == {
        "expert_rank": 0, "bias": "none", "latent_dim": 0, "latent_norm": False, "shortcut": False, "zero_experts": 0,
        "copy_experts": 0,
        "constant_experts": 0,
        "novice_experts": 0, "shared_gate": False, "route_padding": False, "jitter": 0.0, "router_dtype": "float32",
        "expert_dropout": 0.0, "router_softcap": 0.0,
    }  # fmt: skip


def test_files_and_workdirs_count_by_their_content(tmp_path):
    """An edited tokenizer, template, start or teacher makes another run; a moved one does not."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat.jinja").write_text("a")
    import_checkpoint(Path(__file__).parents[1] / "data" / "checkpoints" / "mixtral", tmp_path / "model")
    config = from_config_dict(defaults.get_config())

    def form(folder):
        data = dataclasses.replace(
            config.data,
            objective="chat",
            tokenizer=str(folder / "tokenizer.json"),
            chat_template=str(folder / "chat.jinja"),
        )
        model = str(folder / "model")
        teacher = dataclasses.replace(config.distill, teacher=model)
        start = dataclasses.replace(config.start, checkpoint=model)
        return identity.canonical(dataclasses.replace(config, data=data, start=start, distill=teacher))

    before = form(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert form(tmp_path / "moved") == before
    for path, names in (
        ("tokenizer.json", {"tokenizer"}),
        ("tokenizer_config.json", {"tokenizer"}),
        ("chat.jinja", {"chat_template"}),
        ("model/tokenizer.json", {"start", "teacher"}),
        ("model/config.json", {"start", "teacher"}),
    ):
        file = tmp_path / "moved" / path
        text = file.read_text() if file.exists() else "{}"
        file.write_text(text + " ")
        after = form(tmp_path / "moved")
        assert {name for name in before if before[name] != after[name]} == names
        before = after
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="mixtral"))
    assert identity.canonical(named)["tokenizer"] == "mixtral"


def test_the_canonical_form_is_fixed():
    """Records stay valid as long as these stay the same, however the config is written."""
    suite = suite_of({"a": SWITCH}, horizons=(20,), base=defaults.get_config())
    form = suite.form("a", 3, steps=20, learning_rate=1e-3, parents={})
    text = {"literature": "1.2.0", "python": "1.2.0"}
    assert form == {
        "balance_weight": 0.01, "batch_size": 8, "capacity_factor": 1.25, "d_model": 256, "dataset": "embedded",
        "domains": ["literature", "python"], "drops": True, "eval_capacity_factor": 2.0, "evaluation": {"rows": 256,
        "unseen": {}}, "expert_dim": 512, "experts": 8, "gates": "switch", "group_tokens": 2048, "head_dim": 32,
        "jitter": 0.01, "k": 1, "learning_rate": 1e-3, "num_heads": 8, "num_kv_heads": 4, "num_layers": 4,
        "num_steps": 20, "seed": 3, "sequence_length": 256, "text": text, "vocab_size": 4096, "warmup_steps": 2,
    }  # fmt: skip
    assert identity.digest(form) == "e023200334733291"
    free = suite_of({"a": Variant({"model.moe.gate": "switch", "model.moe.dispatch": "dropless"})}, horizons=(20,))
    removed = {"capacity_factor", "eval_capacity_factor", "group_tokens"}
    assert free.form("a", 3, steps=20, learning_rate=1e-3, parents={}) == {
        **{name: value for name, value in form.items() if name not in removed}, "drops": False,
    }  # fmt: skip


def test_curves_are_compared_at_the_steps_that_all_runs_have():
    def run(variant, seed, points):
        rows = [(step, "loss", PRIMARY, "", loss) for step, loss in points.items()]
        return record(variant, seed, 0.0, rows=rows)

    runs = [run("a", 0, {5: 6.0, 10: 5.0, 20: 4.0}), run("b", 0, {5: 5.5, 10: 4.8, 20: 3.5})]
    runs += [run("a", 1, {8: 5.0, 10: 4.9, 20: 4.2}), run("b", 1, {5: 5.6, 10: 4.8, 20: 4.0})]  # "a" lost step 5
    found = table(suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,)), runs)
    expected = {10: pytest.approx([-0.2, -0.1]), 20: pytest.approx([-0.5, -0.2])}
    assert found.over_training(20, "loss[b] - loss[a]") == expected
    halves = {step: pytest.approx([v / 2 + 1 for v in values.expected]) for step, values in expected.items()}
    assert found.over_training(20, "0.5 loss[b] - 0.5 loss[a] + 1") == halves
    with pytest.raises(ValueError, match="only losses"):
        found.over_training(20, "load[b] - loss[a]")


def test_a_record_is_read_back(tmp_path):
    suite = suite_of({"a": DENSE}, horizons=(20,))
    (written,) = keyed(suite, [record("a", 0, 4.56789012, rate=1 / 300)])
    written.write(tmp_path)
    (read,) = records.read_all(tmp_path)
    assert (read.key, read.form) == (written.key, written.form)
    path = tmp_path / "records" / f"a.steps_20.seed_0.{written.run}.json"
    whole = path.read_text()
    path.write_text(whole.replace('"d_model":256', '"d_model":64'))
    with pytest.raises(ConfigError, match=r"not a record.*its form was edited"):
        records.read_all(tmp_path)
    path.write_text(whole.replace("4.56789", "3.56789"))
    with pytest.raises(ConfigError, match=r"not a record.*its checksum does not match"):
        records.read_all(tmp_path)
    path.write_text(whole)
    assert read.primary_loss == 4.56789  # seven digits
    records.write_table(tmp_path / "records.parquet", [written])
    assert records.read_table(tmp_path / "records.parquet") == [read]
    columns = pd.read_parquet(tmp_path / "records.parquet")
    columns["row_value"] = [[value - 1 for value in values] for values in columns["row_value"]]
    columns.to_parquet(tmp_path / "records.parquet")
    with pytest.raises(ConfigError, match=r"not a table of records.*its checksum does not match"):
        records.read_table(tmp_path / "records.parquet")
    (tmp_path / "records.parquet").unlink()
    path.write_text(json.dumps({name: value for name, value in json.loads(whole).items() if name != "crc32"}))
    assert records.read_all(tmp_path) == [read]  # of an earlier version
    (tmp_path / "records" / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken.json: not a record"):
        records.read_all(tmp_path)


def test_a_table_keeps_probes_that_a_later_record_lacks(tmp_path):
    suite = suite_of({"a": DENSE, "b": SWITCH}, horizons=(20,))
    measured, other = keyed(suite, [record("a", 0, 4.5, probes={"p/x@1": 0.5}), record("b", 0, 4.25)])
    records.write_table(tmp_path / "records.parquet", [measured, other])
    records.update_table(tmp_path / "records.parquet", [dataclasses.replace(measured, probes={"p/y": 1.0})])
    found = {record.variant: record.probes for record in records.read_table(tmp_path / "records.parquet")}
    assert found == {"a": {"p/x@1": 0.5, "p/y": 1.0}, "b": {}}
    twice = [measured, dataclasses.replace(measured, variant="c")]  # one run by two names
    records.update_table(tmp_path / "records.parquet", twice)
    assert len(records.read_table(tmp_path / "records.parquet")) == 3


def test_a_loss_over_other_domains_is_a_different_evaluation():
    own = suite_of({"a": DENSE}, horizons=(20,))
    assert len(Table(own, keyed(own, [record("a", 0, 5.0)])).used) == 1
    other = dataclasses.replace(own, primary=("python",))
    assert Table(other, keyed(own, [record("a", 0, 5.0)])).used == []


def test_the_last_evaluation_of_a_run_does_not_count_as_its_first():
    suite = suite_of({"a": DENSE}, horizons=(20,))
    found = table(suite, [record("a", 0, 5.0, rows=[(20, "loss", PRIMARY, "", 5.0)])])
    assert found.values(20, "loss[a]") == {0: 5.0}
    with pytest.raises(MissingError, match="no loss of a"):
        found.values(20, "loss[a, step=first]")


def test_results_load_with_one_line_of_pandas(tmp_path):
    runs = [record("a", 0, 4.5, run="1"), record("b", 0, 4.25, probes={"p/x@1": 0.5}, run="2")]
    runs.append(record("a", 0, 4.4, rate=1e-3, run="3"))
    results.write(tmp_path, runs, ["1", "2"])
    found = pd.read_csv(tmp_path / "results.csv")
    last = found.query("compared and quantity == 'loss' and domain == 'primary' and step == steps")
    last = last.set_index("variant").value
    assert (last["a"], last["b"]) == (4.5, 4.25)
    assert found.query("quantity == 'p/x'").layer.item() == 1


def test_executed_flops_leave_out_dropped_assignments():
    suite = suite_of({"dense": DENSE, "moe": Variant({"model.moe.gate": "switch", "model.moe.num_experts": 4})})
    dense, moe = suite.config("dense"), suite.config("moe")
    assert costs.executed_flops(dense, 0.0) == suite.costs("dense")["flops"]
    assert costs.executed_flops(moe, 0.0) == suite.costs("moe")["flops"]
    # Three matrices of a gated FFN in every layer, 2 FLOPs a weight, three passes; a quarter of the assignments.
    matrices = 3 * moe.model.d_model * (moe.model.moe.d_ff or moe.model.d_ff) * moe.model.num_layers
    tokens = moe.train.num_steps * moe.train.batch_size * moe.data.sequence_length
    saved = suite.costs("moe")["flops"] - costs.executed_flops(moe, 0.25)
    assert saved == pytest.approx(0.25 * 6 * matrices * tokens)


def test_executed_flops_of_an_encoder_follow_its_own_length():
    """One encoder layer on rows of 24 tokens, two decoder layers on rows of 8: 3·1 + 2 layers per decoder token."""
    model = tiny_encoder_decoder(encoder_layers=1, num_layers=2, every=1, dispatch="gather", capacity_factor=1.0)
    config = Config(model=model, data=DataConfig(sequence_length=8, input_length=24))
    tokens = config.train.num_steps * config.train.batch_size * 8
    saved = costs.executed_flops(config, 0.0) - costs.executed_flops(config, 0.25)
    assert saved == pytest.approx(0.25 * 6 * 2 * model.d_model * 20 * 5 * tokens)  # two matrices of 20 hidden units
    # Two one-hot matmuls of E·C rows, 2 FLOPs a number, three passes; E·C is 24 in the encoder's groups, 8 in others.
    moe = dataclasses.replace(model.moe, dispatch="einsum")
    einsum = dataclasses.replace(config, model=dataclasses.replace(model, moe=moe))
    one_hot = costs.executed_flops(einsum, 0.0) - costs.executed_flops(config, 0.0)
    assert one_hot == pytest.approx(12 * model.d_model * (24 * 3 + 2 * 8) * tokens)


def test_executed_flops_have_one_hot_matmuls_where_assignments_are_dispatched():
    """Soft MoE mixes tokens into its slots instead, which model FLOPs count; a prediction layer has two, C is 4."""
    data = DataConfig(sequence_length=8)
    soft = Config(model=tiny_model(gate="soft_moe", dispatch="einsum", accept_future_leak=True), data=data)
    assert costs.executed_flops(soft, 0.0) == flops.train_flops(soft, soft.train.num_steps)
    settings = {"gate": "mixtral", "dispatch": "einsum", "capacity_factor": 1.0, "prediction_layers": 1}
    config = Config(model=tiny_model(**settings), data=data)
    one_hot = costs.executed_flops(config, 0.0) - flops.train_flops(config, config.train.num_steps)
    assert one_hot == pytest.approx(12 * 3 * (4 * 4) * 16 * config.train.num_steps * config.tokens_per_step)


def test_the_flops_of_parents_are_counted():
    suite = suite_of({"parent": DENSE, "child": dataclasses.replace(DENSE, starts_from="parent")}, horizons=(20,))
    runs = [record(name, seed, 5.0) for name in ("parent", "child") for seed in (0, 1)]
    text = sections.costs_section(table(suite, runs))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if "|" in line
    }
    executed, before = 7, 8
    assert rows["child"][before] == rows["parent"][executed] == f"{suite.costs('parent')['flops']:.3g}"
    assert rows["parent"][before] == "–"


def test_expressions_by_hand():
    assert parse("loss[a] - 2 max_violation[b, layer=1-] - 0.5 + x/y_1.0[c, step=first]") == [
        Term(1.0, "loss", "a"),
        Term(-2.0, "max_violation", "b", layers="1-"),
        Term(-0.5),
        Term(1.0, "x/y_1.0", "c", first=True),
    ]
    for text in ("", "0.5", "loss", "loss[a] loss[b]", "loss[a, when=now]", "loss[a] * 2"):
        with pytest.raises(ValueError, match="value="):
            parse(text)


def test_values_of_layers_and_first_evaluations():
    rows = [(10, "loss", PRIMARY, "", 6.0), (20, "loss", PRIMARY, "", 5.0)]
    rows += [(20, "load", "", str(layer), value) for layer, value in enumerate((1.0, 2.0, 6.0))]
    suite = suite_of({"a": DENSE}, horizons=(20,))
    found = table(suite, [record("a", 0, 5.0, rows=rows, probes={"p/q@0": 0.25, "p/q@1": 0.75})])
    expressions = ("load[a]", "load[a, layer=0]", "load[a, layer=1-]", "loss[a, step=first] - loss[a]", "p/q[a] - 1")
    assert [found.values(20, text)[0] for text in expressions] == [3.0, 1.0, 4.0, 1.0, -0.5]
    with pytest.raises(MissingError, match="no nothing of a"):
        found.values(20, "nothing[a]")


def test_differences_of_rows_are_of_the_arm_less_the_baseline_in_the_primary_domains():
    suite = suite_of({"a": DENSE, "b": SWITCH}, seeds=(0,), horizons=(20,), primary=("x",))
    domains, losses = ["x", "y", "x"], {"a": [5.0, 6.0, 7.0], "b": [4.5, 9.0, 7.5]}
    runs = [record(name, 0, 5.0, row_domains=domains, row_losses=values) for name, values in losses.items()]
    differences, of = table(suite, runs).row_differences("b", "a", 20)
    assert (differences.tolist(), of) == ([[-0.5, 0.5]], ["x", "x"])


def test_horizons_and_dropped_shares_of_a_table_by_hand():
    """Two layers at two steps: 0.1 and 0.3 of layer 2, 0.2 and 0.6 of layer 10, which comes after it."""
    shares = {(10, "2"): 0.1, (20, "2"): 0.3, (10, "10"): 0.2, (20, "10"): 0.6}
    rows = [(step, "train_fraction_tokens_dropped", "", layer, share) for (step, layer), share in shares.items()]
    suite = suite_of({"a": SWITCH}, seeds=(0, 1), horizons=(10, 20, 40))
    runs = [record("a", seed, 5.0, steps, rows=rows) for seed, steps in ((0, 10), (1, 10), (0, 20), (1, 20), (0, 40))]
    found = table(suite, runs)
    assert found.layers("a", "train_fraction_tokens_dropped") == ["2", "10"]
    assert found.dropped("a", 20) == pytest.approx(0.3)
    assert found.dropped("a", 20, "10") == pytest.approx(0.4)
    # Two horizons have both seeds: the longer one counts, and not the longest, which has one seed.
    assert (found.fullest("a"), found.longest("a")) == (20, 40)


def test_a_probe_measured_on_some_runs_has_values_only_for_those():
    """Runs without the measurement are left out, and a claim on it states on how many seeds it was measured."""
    suite = suite_of({"a": DENSE}, seeds=(0, 1, 2), horizons=(20,))
    found = table(suite, [record("a", seed, 5.0, probes={"p": 0.5 * seed} if seed else {}) for seed in range(3)])
    assert found.values(20, "p[a]") == {1: 0.5, 2: 1.0}
    assert found.values(20, "loss[a]").keys() == {0, 1, 2}
    claim = Claim(1, suite.name, "text", "source", (Part("p", "above", "p[a]"),))
    (finding,) = decide.assess([claim], {suite.name: found}, None)
    assert finding.outcomes[0].effect.n == 2
    assert finding.lacks == ("measured on 2 of 3 seeds", "2 seeds; a finding needs at least 5")


def test_a_report_on_fewer_seeds_keeps_the_other_runs(tmp_path):
    """A folder may hold only tables, so that a report on some runs must leave the others in them."""
    suite = suite_of({"a": DENSE, "b": SWITCH}, {"c": Comparison("a", ("b",), ("steps",))}, (0, 1, 2), horizons=(20,))
    runs = [record(name, seed, 5.0) for name in suite.variants for seed in suite.seeds]
    folder = tmp_path / suite.name
    write_page(folder, suite, runs)
    whole = records.read_all(tmp_path)
    assert len(whole) == 6
    fewer = with_seeds(dataclasses.replace(suite, fixed_seeds=True), [1])
    write_page(folder, fewer, [dataclasses.replace(run, seconds=7.0) for run in runs])
    assert [run.run for run in records.read_all(tmp_path)] == [run.run for run in whole]
    assert [run.seconds for run in records.read_all(tmp_path)] == [1.0, 7.0, 1.0] * 2
    assert "- Runs: 2 in `records.parquet`, of which 2 are compared" in (folder / "report.md").read_text()


def test_a_report_on_two_seeds_is_marked_as_a_trial(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), seeds=(0, 1))
    check(suite)
    found = [record(name, seed, 5.0 + seed, 4) for name in ("dense", "mixtral") for seed in (0, 1)]
    write_page(tmp_path, suite, found)
    assert "**A trial:**" in (tmp_path / "report.md").read_text()


def test_report_of_horizons_states_the_crossing(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), horizons=(4, 400))
    found = []
    for seed in (0, 1, 2):
        for steps, difference in ((4, 0.1), (400, -0.1)):
            found += [record("dense", seed, 5.0, steps), record("mixtral", seed, 5.0 + difference, steps)]
    write_page(tmp_path, suite, found)
    text = (tmp_path / "report.md").read_text()
    tokens = 40 * suite.tokens_per_step / 1e6  # halfway between 4 and 400 in log steps
    assert f"Its mean loss is the lower one from about {tokens:.2f} million tokens on" in text
    assert "![horizons](horizons.png)" in text


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ((-0.3, -0.1, -0.2), "the lower one at every horizon"),
        ((0.3, 0.1, 0.2), "the higher one at every horizon"),
        ((0.3, -0.1, -0.2), "the lower one from about"),
        ((-0.3, -0.1, 0.05), "the lower one at some horizons and the higher one at others"),
        ((0.3, -0.1, 0.05), "the lower one at some horizons and the higher one at others"),
    ],
)
def test_a_crossing_is_stated_only_where_the_arm_stays_ahead(tmp_path, differences, sentence):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), horizons=(4, 40, 400))
    pairs = zip(suite.steps, differences, strict=True)
    found = [
        record(name, seed, 5.0 + difference * (name == "mixtral"), steps)
        for (steps, difference), seed, name in itertools.product(pairs, suite.seeds, suite.variants)
    ]
    assert f"Its mean loss is {sentence}" in page._crossing(table(suite, found), "mixtral", "dense")


def test_report_below_the_longest_horizon_says_so(tmp_path):
    suite = dataclasses.replace(tiny_suite(tiny_base(tmp_path)), horizons=(4, 400))
    found = [record(name, seed, loss, 4) for name, loss in (("dense", 5.0), ("mixtral", 5.1)) for seed in (0, 1, 2)]
    found.append(record("dense", 0, 4.0, 400))  # a first run of the next horizon, without a partner
    write_page(tmp_path, suite, found)
    text = (tmp_path / "report.md").read_text()
    assert "The longest horizon, 400 steps, has no comparison yet" in text
    assert "no evidence against a claim about longer training" in text
    assert "| dense | 4 | 5.0000 ± 0.0000 |" in text  # the table of domains stays with the three seeds


def test_the_picture_of_a_sweep_names_arms_that_only_one_panel_has(tmp_path, monkeypatch):
    suite = suite_of({"a": DENSE, "b": DENSE}, seeds=(0, 1), horizons=(10, 20), sweep=Sweep((1e-3, 3e-3), (7,)))
    found = [record(name, 7, 5.0, 10, rate) for name in ("a", "b") for rate in (1e-3, 3e-3)]
    found.append(record("b", 7, 4.0, 20, 3e-3))
    pictures = []
    monkeypatch.setattr(figures, "save", lambda figure, path: pictures.append(figure) or path.name)
    assert figures.sweep(tmp_path / "sweep.png", table(suite, found)) == "sweep.png"
    (picture,) = pictures
    assert [text.get_text() for text in picture.axes[-1].get_legend().get_texts()] == ["a", "b"]


def test_effects_of_the_report_follow_from_results_csv(tmp_path):
    suite = tiny_suite(tiny_base(tmp_path))
    ours, base = (4.91, 4.87, 4.95), (5.02, 4.99, 5.01)
    found = [record("dense", seed, loss, 4) for seed, loss in enumerate(base)]
    found += [record("mixtral", seed, loss, 4) for seed, loss in enumerate(ours)]
    write_page(tmp_path, suite, found)
    results_csv = pd.read_csv(tmp_path / "results.csv")
    final = results_csv.query("compared and quantity == 'loss' and domain == 'primary' and step == steps")
    by_seed = final.pivot_table("value", "seed", "variant")
    difference = by_seed["mixtral"] - by_seed["dense"]
    half = 4.30265 * difference.std() / math.sqrt(3)
    low, high = difference.mean() - half, difference.mean() + half
    assert f"{difference.mean():+.4f} nats [{low:+.4f}, {high:+.4f}], n = 3" in (tmp_path / "report.md").read_text()


def test_the_law_of_a_suite_of_widths_is_in_parameters():
    wide = {"model.d_ff": 2048}  # two arms of one config would share their runs
    arms = {"a": DENSE, "b": SWITCH, "c": Variant(DENSE.overrides | wide), "d": Variant(SWITCH.overrides | wide)}
    experts, sizes = {"a": 1, "b": 4, "c": 1, "d": 4}, {"a": 10**5, "b": 10**5, "c": 10**6, "d": 10**6}
    suite = suite_of(arms, seeds=(0, 1, 2), experts=experts, sizes=sizes)
    losses = {"a": 4.0, "b": 3.8, "c": 3.5, "d": 3.4}
    steps = suite.longest
    runs = [record(arm, seed, losses[arm] + 0.01 * seed, steps=steps) for arm in arms for seed in range(3)]
    text = sections.law_section(table(suite, runs))
    assert "a·log N + b·log E + c·log N·log E" in text
    assert "95 % intervals over 3 seeds" in text
    assert "| 4 | 1M | 3.4100 |" in text


def test_a_report_needs_only_a_run_of_the_baseline(tmp_path):
    """The page of a suite that was interrupted early is written from what there is."""
    arms = {"dense": DENSE, "switch": SWITCH}
    suite = suite_of(arms, {"all": Comparison("dense", ("switch",), ("steps",))}, seeds=(0, 1), horizons=(20,))
    write_page(tmp_path, suite, [record("dense", 0, 5.0)])
    assert "is not tuned for any arm** at 20 steps" in (tmp_path / "report.md").read_text()


def test_missing_runs_by_hand(monkeypatch):
    """Finished runs took 30 minutes, and each of the three missing ones of that arm needs as long; the other arm, of
    half the FLOPs, a quarter of an hour."""
    suite = suite_of({"a": DENSE, "b": SWITCH}, seeds=(0, 1, 2, 4, 9), horizons=(20,))
    assert missing(suite, [], lambda key: key.variant == "a").splitlines()[2:] == [
        "| a | 20 | 0.003 | 0 to 2, 4, 9 | – |",
        "",
        "test: 5 of 5 runs are missing, – hours of one process; their pace is known once a run is finished",
    ]
    runs = keyed(suite, [record("a", 0, 5.0), record("a", 9, 5.0)])
    done = [dataclasses.replace(run, seconds=1800.0, costs=suite.costs("a")) for run in runs]
    assert missing(suite, done, lambda key: key.variant == "a").splitlines()[2:] == [
        "| a | 20 | 0.003 | 1 to 2, 4 | 1.5 |",
        "",
        "test: 3 of 5 runs are missing, 1.5 hours of one process",
    ]
    costs = {"a": suite.costs("a"), "b": {"flops": suite.costs("a")["flops"] / 2}}
    monkeypatch.setattr(Suite, "costs", lambda self, arm, steps: costs[arm])
    assert "| b | 20 | 0.003 | 0 to 2, 4, 9 | 1.2 |" in missing(suite, done, lambda key: True)  # 5 · 0.25
    swept = dataclasses.replace(suite, sweep=Sweep((1e-3, 3e-3, 9e-3), (7,)))
    lines = missing(swept, done, lambda key: key.variant == "a").splitlines()
    # The rate 0.003 on seed 7; then two neighbours, and the arm's five seeds, two of which are finished.
    assert lines[2:4] == ["| a | 20 | 0.003 | 7 | 0.5 |", ""]
    assert lines[-1] == "The sweep will name about 7 more."
    finished = missing(with_seeds(suite, [0, 9]), done, lambda key: key.variant == "a")
    assert finished == "test: 0 of 2 runs are missing"
