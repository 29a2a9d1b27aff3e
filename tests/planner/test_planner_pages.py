"""Pages and differences of plans, kept plans, and what may be changed."""

import dataclasses
import functools
import html.parser
import json
import math
import os
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from moe.config import ConfigError, load_python_file, to_dict
from moe.config.parse import from_config_dict
from moe.configs import base, mixtral_8x7b
from moe.parallel.mesh import make_mesh
from moe.planner import (
    arithmetic,
    calibration,
    candidates,
    compiled,
    counts,
    differences,
    excess,
    exchanges,
    kept_plans,
    layer,
    make_plan,
    pages,
    roofline,
)
from moe.planner.gpus import GPUS
from moe.planner.scenario import Scenario
from moe.planner.topology import Topology
from tests.browser import needs_browser, run
from tests.helpers import set_moe
from tests.planner.test_planner_details import PROGRAM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made():
    """The plan of a small program for one H100, whose text is given."""
    return _plan()


def _plan(scenario=None, **moe):
    return make_plan.read_step(*_step(**moe), scenario)


def _step(**moe):
    config = mixtral_8x7b.get_config()
    config.model.update(num_layers=2, d_model=64, d_ff=128, vocab_size=512)
    set_moe(config, **{"dispatch": "dropless", **moe})
    config.mesh.update(data=1, fsdp=1, expert=1)
    config.train.batch_size = 1
    topology = Topology("h100:1x1", 1, GPUS["h100"], tuple(jax.devices()[:1]))
    memory = compiled.Memory(2**30, 2 * 2**30, 0, 3 * 2**30, 0, 5 * 2**30, 79 * 2**30)
    step = compiled.CompiledStep(PROGRAM, memory, arithmetic.Flops(2e12, 0.0, 1e12), 1.0, "abc1234")
    return from_config_dict(config), topology, step


def test_a_cached_program_is_not_compiled_again(tmp_path, monkeypatch):
    config, topology, step = _step()
    asked = []
    monkeypatch.setattr(compiled, "compile_step", lambda *arguments: asked.append(arguments) or step)
    for _ in range(2):
        assert compiled.read_or_compile(config, topology, tmp_path) == step
    assert asked == [(config, topology)]
    # Other configs, slices, versions and gates' code are compiled, and nothing is kept without a folder.
    compiled.read_or_compile(_step(dispatch="gather")[0], topology, tmp_path)
    compiled.read_or_compile(config, dataclasses.replace(topology, name="h100:1x2"), tmp_path)
    monkeypatch.setattr(compiled, "versions", lambda: ["jax 1"])
    compiled.read_or_compile(config, topology, tmp_path)
    monkeypatch.setattr(compiled, "user_code", lambda _: "other")
    compiled.read_or_compile(config, topology, tmp_path)
    assert len(asked) == len(list(tmp_path.iterdir())) == 5
    compiled.read_or_compile(config, topology)
    assert len(asked) == 6


class _Killed:
    """Object that ends the process which unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_compilation_is_explained(monkeypatch):
    config, topology, _ = _step()
    monkeypatch.setattr(compiled, "_compile_named", _Killed())
    with pytest.raises(ConfigError, match="h100:1x1: the process that compiled for it was killed"):
        compiled.read_or_compile(config, topology, apart=True)


def test_every_time_has_an_interval(made):
    low, high = made.step_interval
    assert 0 < low < made.step_seconds < high
    text = pages.text(made.to_json())
    assert re.search(r"step [\d.e-]+ s \([\d.e-]+ to [\d.e-]+\)\n  MFU [\d.]+ % \([\d.]+ to [\d.]+\)", text)
    days = 1e12 / made.tokens * made.step_seconds / 86400
    assert f"1 trillion tokens: {days:,.1f} days ({1e12 / made.tokens * low / 86400:,.1f} to " in text
    assert f"{days * 24:,.0f} GPU-hours" in text
    # The parts add up to what is counted.
    assert sum(row["seconds"] for row in made.where) == pytest.approx(made.compute_seconds)
    assert sum(made.basis.values()) == pytest.approx(made.compute_seconds)


def test_a_plan_names_the_bubble_of_a_pipeline(made):
    """4 stages, 8 microbatches in 2 rounds: 3 of 8·2 + 3 turns are idle."""
    train = made.config["train"] | {"accumulation_steps": 8, "pipeline_rounds": 2}
    split = dataclasses.replace(made, mesh=made.mesh | {"pipeline": 4}, config=made.config | {"train": train})
    assert (made.bubble, split.bubble) == (0, pytest.approx(3 / 19))
    assert "bubble 15.8 %, counted above: each of the 4 stages has no microbatch in 3 of its 19 turns" in pages.text(
        split.to_json()
    )
    assert "bubble" not in pages.text(made.to_json())


def test_scenarios_change_only_what_they_name(monkeypatch):
    with pytest.raises(ConfigError, match=r"--skew=2.0: must be at most mesh.expert=1, where one device has all rows"):
        _plan(Scenario(skew=2.0))
    with monkeypatch.context() as patch:  # the same program, as if for two devices
        patch.setattr(make_plan, "make_mesh", _mesh_of_two)
        even, skewed = (_plan(Scenario(skew=skew)) for skew in (1.0, 2.0))
    assert skewed.kernel_seconds > even.kernel_seconds
    gathers = [[each for each in made.exchanges if each.kind == "all-gather"] for made in (even, skewed)]
    assert gathers[0] == gathers[1]  # these go to every device, whatever the load
    half = _plan(Scenario(matmul_share=0.001))
    assert half.kernel_low == half.kernel_high
    assert "what if: matmuls at 0.001 of the peak" in pages.text(half.to_json())
    with pytest.raises(ConfigError, match=r"--skew=2.0: must be 1 unless model.moe.dispatch=dropless"):
        _plan(Scenario(skew=2.0), dispatch="gather")


class _Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.tags = [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_a_page_is_self_contained_and_holds_the_numbers(made, tmp_path):
    figures = json.loads(json.dumps(made.to_json()))
    change = {"label": "twice the rows a device", "plan": figures | {"tokens_per_second_per_chip": 1e9}}
    refused = {"label": "model.remat=none", "plan": {"error": "does not fit: 3 GiB too much; what helps"}}
    text = pages.page(figures, [change, refused])
    links = _Links()
    links.feed(text)
    assert links.outside == []
    assert not links.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in text
    assert "url(" not in text
    assert f"step {made.step_seconds:.3g} s" in text
    assert figures["cost"] in text
    assert "does not fit: 3 GiB too much<" in text
    for row in figures["items"]:
        assert f"{1e3 * row['seconds']:,.1f}" in text
    for array in figures["arrays"]:
        assert array["type"].partition("{")[0] in text
    roofline.figure(tmp_path / "roofline.png", figures, GPUS["h100"])
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@needs_browser
def test_pages_open_in_a_browser_as_wide_as_a_phone(made, tmp_path):
    plain, dearest = json.loads(json.dumps(made.to_json())), [row["seconds"] for row in made.items]
    other = json.loads(json.dumps(_plan(capacity_factor=2.0).to_json()))
    shown = _shown_in_a_browser(pages.page(plain), tmp_path)
    assert {
        "Time of a step (estimate)",
        "The 30 most expensive instructions",
        "Timeline",
        "Memory per GPU (fact)",
    } <= set(shown["headings"])
    assert f"step {made.step_seconds:.3g} s" in shown["text"]
    # The most expensive instructions, in order.
    assert dearest == sorted(dearest, reverse=True)
    places = [
        shown["text"].index(f"{1e3 * seconds:,.1f}", shown["text"].index("30 most expensive"))
        for seconds in dearest[:3]
    ]
    assert places == sorted(places)
    difference = _shown_in_a_browser(pages.difference(plain, other, ("a.json", "b.json")), tmp_path)
    assert difference["headings"] == ["Settings that differ", "Time by part", "a.json", "b.json"]
    assert "model.moe.capacity.train" in difference["text"]
    for answer in (shown, difference):
        assert answer["width"] <= answer["window"]  # only tables scroll sideways


def _shown_in_a_browser(text, folder):
    """Contents of a page in a window of 500 pixels, the least that Chromium opens."""
    script = """return {
        headings: [...document.querySelectorAll("h2")].map(each => each.textContent), text: document.body.innerText,
        width: document.documentElement.scrollWidth, window: document.documentElement.clientWidth}"""
    return run(text, folder, script, width=500)


def test_the_page_says_where_all_gathers_of_tokens_were_asked_for(made):
    asked = exchanges.Exchange("all-gather", ("expert",), exchanges.ROUTED, 12, 12, 2**30, 0.1, 0.05)
    for found, words in (((), "no all-gather of tokens"), ((asked,), "as model.moe.exchange=all_gather asks")):
        text = pages.text(dataclasses.replace(made, exchanges=found).to_json())
        assert words in text
        assert ("no all-gather" in text) == (not found)


def test_differences_name_settings_and_add_up(made, tmp_path):
    a = made.to_json()
    b = _plan(capacity_factor=2.0).to_json()
    b["where"] = [row | {"seconds": row["seconds"] + 0.5 * (row["part"] == "experts")} for row in b["where"]]
    b["step_seconds"] += 0.5
    b["counted_seconds"] += 0.5
    assert differences.settings(a, b) == [("model.moe.capacity.train", 1.25, 2.0)]
    assert differences.settings(a, a | {"num_slices": 2}) == [("topology", "h100:1x1", "2 x h100:1x1")]
    rows = differences.by_part(a, b)
    assert rows[0]["part"] == "experts"
    assert sum(row["seconds"] for row in rows) == pytest.approx(b["step_seconds"] - a["step_seconds"])
    sentence = differences.sentence(a, b)
    assert sentence.startswith("model.moe.capacity.train 1.25 → 2.0: +500 ms in experts")
    assert sentence in pages.difference_text(a, b)
    assert sentence in pages.difference(a, b, ("a", "b"))
    (tmp_path / "b.json").write_text(json.dumps(b))
    assert differences.read(tmp_path / "b.json") == json.loads(json.dumps(b))
    nested = json.dumps(b | {"config": {}}).replace('"config": {}', '"config": ' + '{"a":' * 3000 + "1" + "}" * 3000)
    (tmp_path / "nested.json").write_text(nested)
    with pytest.raises(ConfigError, match=r"nested\.json: (config is nested too deeply|not JSON)"):
        differences.read(tmp_path / "nested.json")


def test_a_difference_by_hand():
    """Experts have two rows; the correction to published steps is the step less what is counted."""
    a = {
        "config": {"model": {"d": 1}}, "topology": "v5p:2x2x1", "scenario": "", "exposed_seconds": 0.25,
        "where": [
            {"part": "experts", "seconds": 1.0}, {"part": "attention", "seconds": 1.0},
            {"part": "experts", "seconds": 0.5},
        ],
        "counted_seconds": 2.75, "step_seconds": 3.0,
    }  # fmt: skip
    where = [{"part": "experts", "seconds": 1.0}, {"part": "attention", "seconds": 1.25}]
    b = a | {"config": {"model": {"d": 2}}, "where": where, "counted_seconds": 2.5, "step_seconds": 2.5}
    assert [(row["part"], row["a"], row["b"], row["seconds"]) for row in differences.by_part(a, b)] == [
        ("experts", 1.5, 1.0, -0.5), ("attention", 1.0, 1.25, 0.25),
        ("correction to published steps", 0.25, 0.0, -0.25), ("exposed exchange", 0.25, 0.25, 0.0),
    ]  # fmt: skip
    changes = "-500 ms in experts, +250 ms in attention, -250 ms in correction to published steps; -500 ms per step"
    assert differences.sentence(a, b) == f"model.d 1 → 2: {changes}"
    other = {"d": 2, "e": 1, "f": 1, "g": 1}
    assert differences.sentence(a, b | {"config": {"model": other}}) == f"4 settings: {changes}"


def test_each_change_is_valid_and_changes_one_setting():
    devices = make_mesh(from_config_dict(base.get_config()).mesh, jax.devices()[:1]).devices.flat
    topology = types.SimpleNamespace(devices=tuple(devices), chip=GPUS["h100"])
    config = mixtral_8x7b.get_config()
    config.mesh.expert = 1
    config = from_config_dict(config)
    found = candidates.changes(config, topology, 100)
    assert {label for label, _ in found} == {
        "twice the rows a device", "model.remat=hidden", "model.remat=outputs", "model.remat=attention",
        "model.remat=offload",
        "model.moe.dispatch=dropless",
    }  # fmt: skip
    for _, changed in found:
        before = to_dict(dataclasses.replace(config, mesh=changed.mesh))
        after = to_dict(changed)
        assert len([name for name in before if before[name] != after[name]]) == 1


def test_more_exchange_chunks_are_tried_where_there_is_an_exchange():
    topology = types.SimpleNamespace(devices=tuple(jax.devices()[:2]), chip=GPUS["h100"])
    config = mixtral_8x7b.get_config()
    config.mesh.update(data=1, fsdp=1, expert=2)
    labels = []
    for mode in ("gather", "dropless"):
        config.model.moe.dispatch = mode
        labels.append({label for label, _ in candidates.changes(from_config_dict(config), topology, 100)})
    assert "model.moe.exchange_chunks=2" in labels[1] - labels[0]
    assert not [label for label in labels[1] if "exchange_hosts" in label]  # both devices are on one host


def test_an_exchange_by_host_is_tried_where_experts_span_hosts():
    """Eight GPUs in hosts of four: expert axes of 8, and of 4 with tensor=2, span both; of 4 with fsdp=2, one."""
    topology = types.SimpleNamespace(devices=tuple(jax.devices()), chip=dataclasses.replace(GPUS["h100"], domain=4))
    config = mixtral_8x7b.get_config()
    config.model.moe.dispatch = "dropless"
    for sizes, hosts in (((1, 8, 1), 2), ((1, 4, 2), 2), ((2, 4, 1), 1)):
        config.mesh.update(data=1, **dict(zip(("fsdp", "expert", "tensor"), sizes, strict=True)))
        labels = [label for label, _ in candidates.changes(from_config_dict(config), topology, 100)]
        assert ("model.moe.exchange_hosts=2" in labels) == (hosts == 2)
        assert "model.moe.exchange=all_gather" in labels
    config.model.moe.exchange = "all_gather"
    for sizes, label in (((1, 8, 1), ", model.moe.exchange_hosts=2"), ((2, 4, 1), "")):
        config.mesh.update(data=1, **dict(zip(("fsdp", "expert", "tensor"), sizes, strict=True)))
        labels = [label for label, _ in candidates.changes(from_config_dict(config), topology, 100)]
        assert [each for each in labels if "exchange" in each and "chunks" not in each] == [
            f"model.moe.exchange=all_to_all{label}"
        ]


def test_kept_plans_replace_those_of_the_same_settings(made, tmp_path):
    path = tmp_path / "plans.json"
    slow = kept_plans.row(made, "mixtral_8x7b", {"mesh.fsdp": 1}) | {"tokens_per_second_per_chip": 1.0}
    fast = kept_plans.row(made, "mixtral_8x7b", {"mesh.fsdp": 2}) | {"tokens_per_second_per_chip": 2.0}
    for row in (slow, fast, slow):
        kept_plans.keep(path, row)
    rows = kept_plans.read(path)
    assert [row["flags"] for row in rows] == [{"mesh.fsdp": 2}, {"mesh.fsdp": 1}]
    assert kept_plans.best(rows, "mixtral_8x7b", "h100:1x1") == rows[0]
    assert kept_plans.best(rows, "mixtral_8x7b", "v5p-128") is None
    assert kept_plans.words(rows[0]) == "--config.mesh.fsdp=2"


def test_a_kept_plan_in_8_bits_has_a_name_of_its_own(made):
    plain = kept_plans.row(made, "mixtral_8x7b", {}) | {"tokens_per_second_per_chip": 1.0}
    low = kept_plans.row(made, "mixtral_8x7b", {"model.low_precision": "float8"}) | {"tokens_per_second_per_chip": 2.0}
    assert (plain["slices"], low["slices"]) == (["h100:1x1"], ["h100:1x1-float8"])
    again = kept_plans.row(made, "mixtral_8x7b", {"model.low_precision": "float8"}, "h100:1x1-float8")
    assert again["slices"] == low["slices"]
    assert kept_plans.best([plain, low], "mixtral_8x7b", "h100:1x1") == plain
    assert kept_plans.best([plain, low], "mixtral_8x7b", "h100:1x1-float8") == low
    assert kept_plans.best_of_precisions([low, plain], "mixtral_8x7b", "h100:1x1") == {"": plain, "-float8": low}
    assert kept_plans.best_of_precisions([low, plain], "mixtral_8x7b", "h100:2x1") == {}


def test_the_mfu_of_a_chip_is_that_of_its_plans_in_bfloat16():
    """0.4 at 10 s (8 to 16) is 0.25 to 0.5, 0.6 at 3 s (2 to 4) is 0.45 to 0.9; 8 bits and other chips do not count."""
    plans = [
        {
            "config": config,
            "topology": topology,
            "flags": flags,
            "mfu": mfu,
            "step_seconds": step,
            "step_interval": ends,
        }
        for config, topology, flags, mfu, step, ends in (
            ("a", "v5p:4x4x4", {}, 0.4, 10.0, [8.0, 16.0]),
            ("a", "v5p:8x8x8", {"model.low_precision": "none"}, 0.6, 3.0, [2.0, 4.0]),
            ("a", "v5p:4x4x4", {"model.low_precision": "int8"}, 0.9, 1.0, [0.5, 2.0]),
            ("b", "v5e:16x16", {}, 0.1, 1.0, [0.5, 2.0]),
        )
    ]
    names, shares = kept_plans.mfu_of_chip(plans, "v5p")
    assert (names, shares) == (["a"], pytest.approx((0.25, 0.5, 0.9)))
    with pytest.raises(ConfigError, match="--topology=v6e: no plan without 8-bit matmuls is kept; give --mfu"):
        kept_plans.mfu_of_chip(plans, "v6e")


def test_the_best_kept_plan_is_a_named_setting():
    rows = kept_plans.read(ROOT / "configs" / "plans.json")
    for name in sorted({row["config"] for row in rows}):
        module = load_python_file(ROOT / "configs" / f"{name}.py")
        for hardware in sorted({each for row in rows if row["config"] == name for each in row["slices"]}):
            best = kept_plans.best(rows, name, hardware)
            config = module.get_config(hardware)
            for field, value in best["flags"].items():
                assert functools.reduce(lambda tree, part: tree[part], field.split("."), config) == value
            from_config_dict(config)
    with pytest.raises(ConfigError, match=r"configs/mixtral_8x7b.py:v9: must be one of "):
        mixtral_8x7b.get_config("v9")


def test_kept_plans_and_steps_are_counted_by_todays_prices():
    """A change of prices, or another published step, changes them; scripts/calibration.py then writes all again."""
    rows = kept_plans.read(ROOT / "configs" / "plans.json")
    assert kept_plans.stale(rows, calibration.rows()) == calibration.stale(calibration.rows()) == []
    slower = rows[0] | {"step_seconds": 1.001 * rows[0]["step_seconds"]}
    assert kept_plans.stale([slower], calibration.rows()) == [f"{slower['config']} on {slower['topology']}"]
    for kept in rows:
        peaks = 2 if "model.low_precision" in kept["flags"] else 1
        assert kept["mfu"] * kept["step_seconds"] / kept["step_interval"][0] < peaks, (kept["config"], kept["topology"])


def test_counts_of_a_program_have_its_time(made):
    assert made.kernel_seconds > 0
    priced = counts.price(counts.Counts(**made.counts), "h100")
    assert (priced.kernels, priced.kernels_low, priced.kernels_high) == pytest.approx(
        (made.kernel_seconds, made.kernel_low, made.kernel_high)
    )
    assert (priced.counted, priced.floor) == pytest.approx((made.counted_seconds, made.floor_seconds))
    assert set(made.limits) >= {"peak", "memory"}
    assert f"of its floor {counts.share_words(made.limits, made.step_seconds)}" in pages.text(made.to_json())


def test_counts_by_hand():
    """Causal attention at 4096 tokens: 1e15 FLOPs of all scores are half as many that count, on v5p at 459e12."""
    (where, tokens, dims) = "forward", 4096, 256
    found = counts.Counts(
        matmuls={}, attention={f"{where} {tokens} {dims} 0": 1e15}, rows=0.0, rest=6.0, rest_least=2.0, waited=3.6
    )
    priced = counts.price(found, "v5p")
    at_peak = 4097 / 8192 * 1e15 / 459e12
    assert priced.peak == pytest.approx(2 + at_peak)
    assert priced.exposed == pytest.approx(4.0)  # 0.9 of the links are usable
    assert priced.work == pytest.approx(6 + priced.kernels)
    assert at_peak < priced.kernels_low < priced.kernels < priced.kernels_high
    assert priced.floor == pytest.approx(2 + at_peak + 3.6)
    limits = counts.limits(found, priced)
    assert limits == {"peak": priced.peak}
    assert counts.share_words(limits, 10 * priced.peak) == "at least 10 % (peak)"
    assert counts.share_words({"peak": 1.0, "memory": 3.0, "links": 2.0}, 4.0) == "75 % (memory)"


def test_what_keeps_a_step_from_its_floor():
    """A step of 10 s, 2 at peak: 3.6 s of links at nine tenths are 4 s of waiting, and norms take 4 s more than their
    bytes; a kernel that is as fast as its limit is not named."""
    norms = {"name": "attention, forward, rms/mul (fusion.1)", "seconds": 5.0, "least": 1.0}
    gather = {"all-gather over fsdp, weights": 3.6}
    step = counts.Counts.model_validate(
        {"matmuls": {}, "attention": {}, "rows": 0.0, "rest": 6.0, "rest_least": 2.0, "waited": 3.6}
        | {"work": [norms, norms | {"name": "fast", "least": 5.0}], "waits": gather}
    )
    found = [
        "5 s in attention, forward, rms/mul (fusion.1), 5.0 times its limit",
        "4 s waiting for all-gather over fsdp, weights",
    ]
    assert excess.reasons(step, "v5p", 10.0, {"peak": 2.0}) in (found, found[::-1])
    assert excess.reasons(step, "v5p", 10.0, {"peak": 7.6}) == []
    alone = counts.Counts(matmuls={}, attention={}, rows=0.0, rest=6.0, rest_least=2.0, waited=3.6)
    assert [each.beyond for each in excess.of_step(alone, "v5p")] == pytest.approx([4.0, 4.0])
    kernels = {"rows tpu 8192 4096 1024 8 2": 3.0}
    kernel = alone.model_copy(update={"matmuls": kernels, "rest": 0.0, "rest_least": 0.0, "waited": 0.0})
    (price, *_) = excess.of_step(kernel, "v5p")
    assert "8192 rows and 8 matrices of 4096 x 1024" in price.words()
    assert price.least == pytest.approx(3 * 2 * 8192 * 4096 * 1024 / 459e12)
    assert price.beyond == pytest.approx(counts.price(kernel, "v5p").kernels - price.least)


def test_a_kept_plan_is_recounted_by_hand(made, tmp_path):
    """6 s of work, 1 of it at peak, and 4 of exchange are 10 s. Without published steps the spread is the one assumed
    before any is known, and the chip is new."""
    own = {"matmuls": {}, "attention": {}, "rows": 0.0, "rest": 6.0, "rest_least": 1.0, "waited": 3.6}
    kept = kept_plans.row(made, "mixtral_8x7b", {}) | {
        "counts": own, "step_seconds": 5.0, "tokens": 400, "chips": 2, "tokens_per_second_per_chip": 40.0, "mfu": 0.5,
    }  # fmt: skip
    new = kept_plans.recounted(kept, [])
    width = math.hypot(1.638 * 0.26, 0.25)
    step, rate = new["step_seconds"], new["tokens_per_second_per_chip"]
    assert (step, rate, new["mfu"], new["chip_steps"]) == (pytest.approx(10), pytest.approx(20), pytest.approx(0.25), 0)
    # At least 1 s at peak and 3.6 s of exchange.
    low = 4.6 + 5.4 * math.exp(-width * 10 / 5.4)
    assert new["step_interval"] == pytest.approx([low, 10 * math.exp(width)])
    assert new["bound"] == "the rest of the chip's work (memory, padding, vector units), 50 % of the step"
    days = 1e12 / 400 * 10 / 86400
    assert new["cost"].startswith(f"1 trillion tokens: {days:,.1f} days")
    text = kept_plans.page(new)
    assert "no step of this chip was ever compared; kernels counted by their shapes" in text
    assert "at least 10 % (peak) of the step" in text
    path, page = tmp_path / "plans.json", tmp_path / "pods.md"
    kept_plans.keep(path, kept)
    page.write_text("a\n<!-- plans: made by moe plan --record -->\nold\n<!-- end of plans -->\nb\n")
    kept_plans.recount(path, page)
    (row,) = kept_plans.read(path)
    assert f"{row['step_seconds']:.3g} (" in page.read_text()
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="has no marks around the table of plans"):
        kept_plans.write_table(path, page)


def test_the_table_of_plans_matches_the_kept_plans():
    rows = kept_plans.read(ROOT / "configs" / "plans.json")
    assert kept_plans.table(rows) in (ROOT / "docs" / "results" / "plans.md").read_text()


def _mesh_of_two(*_):
    shape = {"data": 1, "fsdp": 1, "expert": 2, "tensor": 1}
    return types.SimpleNamespace(shape=shape, devices=np.asarray(jax.devices()[:1]), size=1)


def test_a_layer_is_read_on_a_mesh_without_a_split_row(monkeypatch):
    config, topology, step = _step()
    memory = types.SimpleNamespace(temp_size_in_bytes=1)
    compiled_layer = types.SimpleNamespace(as_text=lambda: PROGRAM, memory_analysis=lambda: memory)
    monkeypatch.setattr(layer, "_compile", lambda *_, **__: compiled_layer)
    reading = layer.read_layer(config, topology, 64, backward=True)
    # 3 matrices forward and twice backward, 2 of 8 experts a token
    peak = GPUS["h100"].peak
    assert reading.active_floor == pytest.approx(2 * 3 * 64 * config.model.moe.d_ff * 3 * 64 * 2 / peak)
    assert step.text == PROGRAM
