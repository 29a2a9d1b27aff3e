"""The register of predictions and its scores, and plans by shapes."""

import json
import math
import threading
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.planner import by_shapes, open_shapes, register
from moe.planner.topology import get_topology

ROOT = Path(__file__).parents[2]


def _entry(seconds=2.0, low=1.5, high=3.0, topology="v5p:4x4x4"):
    figures = {"topology": topology, "tokens": 8, "step_seconds": seconds, "mfu": 0.5, "prices": "p"}
    return register.prediction("m", figures | {"step_interval": [low, high]}, "shapes", "h", "c", {"rows": 1})


def test_a_registered_prediction_cannot_be_changed(tmp_path):
    path = tmp_path / "predictions.jsonl"
    register.add(path, _entry())
    register.add(path, _entry(topology="v6e:16x16"))
    assert [entry["topology"] for entry in register.read(path)] == ["v5p:4x4x4", "v6e:16x16"]
    with pytest.raises(ConfigError, match="this plan was registered on 20"):
        register.add(path, _entry())
    path.write_text(path.read_text().replace('"seconds": 2.0', '"seconds": 2.1', 1))
    with pytest.raises(ConfigError, match="line 1: was changed after it was stamped"):
        register.read(path)
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1: not a prediction"):
        register.read(path)


def test_predictions_of_two_programs_at_once_are_both_kept(tmp_path, monkeypatch):
    """The second begins once the first has read the file, and would read it before the first writes."""
    path, read, others = tmp_path / "predictions.jsonl", register.read, []

    def slowly(given):
        found = read(given)
        if not others:
            others.append(threading.Thread(target=register.add, args=(path, _entry(topology="v6e:16x16"))))
            others[0].start()
            others[0].join(timeout=0.5)
        return found

    monkeypatch.setattr(register, "read", slowly)
    register.add(path, _entry())
    others[0].join()
    assert [entry["topology"] for entry in read(path)] == ["v5p:4x4x4", "v6e:16x16"]


def test_scores_by_hand(tmp_path):
    """A step of 2 s (1.5 to 3) that took 3 s: at the upper end, 1.2816 standard deviations of log(3/2) / 1.2816."""
    entry = _entry()
    (made,) = register.scores([entry], [{"stamp": entry["stamp"], "seconds": 3.0, "source": "s"}])
    widths = [math.log(2 / 1.5) / 1.2816, math.log(1.5) / 1.2816]
    density = 2 / (sum(widths) * math.sqrt(2 * math.pi)) * math.exp(-(1.2816**2) / 2)
    assert (made["inside"], made["error"]) == (True, pytest.approx(math.log(1.5)))
    assert made["score"] == pytest.approx(math.log(density), rel=1e-3)
    with pytest.raises(ConfigError, match="stamp=x: must be that of a prediction"):
        register.scores([entry], [{"stamp": "x", "seconds": 3.0, "source": "s"}])
    path, outcomes = tmp_path / "predictions.jsonl", tmp_path / "outcomes.jsonl"
    register.add(path, entry)
    assert register.report(path, outcomes) == "1 predictions, of which 0 have a published number"
    outcomes.write_text(json.dumps({"stamp": entry["stamp"], "seconds": 3.1, "source": "s"}) + "\n")
    assert "inside 0 of 1, bias +0.44" in register.report(path, outcomes)


def test_the_register_of_this_repository_is_unchanged():
    entries = register.read(ROOT / "docs" / "results" / "predictions.jsonl")
    assert len(entries) >= 12
    assert len({entry["stamp"] for entry in entries}) == len(entries)
    assert all(entry["low"] < entry["seconds"] < entry["high"] for entry in entries)


#: Published sizes, and the billions of parameters, total and active, that their authors state.
MODELS = {
    "Mixtral-8x7B": (
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        },
        46.7, 12.9,
    ),
    "DeepSeek-V3": (
        {
            "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "vocab_size": 129280,
        },
        671, 37,
    ),
    "Qwen3-Next-80B-A3B": (
        {
            "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
            "head_dim": 256, "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 512,
            "num_experts_per_tok": 10, "shared_expert_intermediate_size": 512, "vocab_size": 151936,
            "full_attention_interval": 4, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
            "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        },
        80, 3,
    ),
    "Llama 4 Maverick": (
        {
            "text_config": {
                "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
                "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_local_experts": 128,
                "num_experts_per_tok": 1, "num_shared_experts": 1, "interleave_moe_layer_step": 2,
                "attention_chunk_size": 8192, "vocab_size": 202048,
                "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12,
            }
        },
        400, 17,
    ),
    "Jamba-1.5-Mini": (
        {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2,
            "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16,
            "mamba_expand": 2, "vocab_size": 65536,
        },
        52, 12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_published_models_are_read(name):
    source, total, active = MODELS[name]
    sizes = open_shapes.read(source)
    assert sizes.parameters / 1e9 == pytest.approx(total, rel=0.03)
    assert sizes.active_parameters / 1e9 == pytest.approx(active, rel=0.15)


@pytest.mark.parametrize("slice_name", ["v4:4x4x4", "v5p-128", "v6e:16x16", "tpu7x:4x4x4", "h100:8x8"])
@pytest.mark.parametrize("name", MODELS)
def test_no_interval_by_shapes_is_above_the_peak(name, slice_name):
    where = get_topology(slice_name, compiles=False)
    made = by_shapes.make(open_shapes.read(MODELS[name][0]), where, 2, 4096)
    low, high = made.step_interval
    assert made.floor < low < made.step_seconds < high
    # Recomputation makes the program's FLOPs more than the model's.
    assert made.mfu * made.step_seconds / low < 0.8
    assert "by shapes" in made.render()


def test_places_of_devices_without_a_compiler():
    pod = get_topology("tpu7x:2x2x4", 2, compiles=False)
    assert (len(pod.devices), pod.num_chips, pod.num_slices) == (64, 32, 2)
    assert [place.coords for place in pod.devices[:3]] == [(0, 0, 0), (0, 0, 0), (0, 0, 1)]
    assert {place.slice_index for place in pod.devices} == {0, 1}
    for name in ("v5p:4x4", "v6e:4x4x4", "v5p:0x4x4", "v5p:4x4x4x", "v5p:4xax4"):
        with pytest.raises(ConfigError, match=r"must have [23] sides, as "):
            get_topology(name, compiles=False)


def test_what_a_config_does_not_say_is_refused():
    source = MODELS["Mixtral-8x7B"][0]
    with pytest.raises(ConfigError, match="hidden_size=None: must be a positive number"):
        open_shapes.read({name: value for name, value in source.items() if name != "hidden_size"})
    with pytest.raises(ConfigError, match="layer_types: 'hyena': must be one of attention, "):
        open_shapes.read(source | {"layer_types": ["hyena"] * 32})
    with pytest.raises(ConfigError, match="num_hidden_layers=-1: must be a positive number"):
        open_shapes.read(source | {"num_hidden_layers": -1})
