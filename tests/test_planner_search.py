"""The search for a mesh, remat policy and dispatch mode."""

import dataclasses
import itertools

import pytest

from moe.config import ConfigError, MoEConfig
from moe.config.resolve import from_config_dict
from moe.planner import candidates, search
from moe.planner.chips import CHIPS


def tiny_config(**model):
    moe = {"num_experts": 4}
    sizes = {"num_layers": 2, "d_model": 128, "d_ff": 128, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 256}
    return from_config_dict(
        {"model": sizes | model | {"moe": moe}, "data": {"sequence_length": 128}, "train": {"batch_size": 8}}
    )


def test_candidates_cover_every_mesh_and_count_the_others_by_reason():
    assert len(list(candidates.meshes(64))) == 84  # 2^6 over four axes: 9 choose 3
    assert {mesh.data for mesh in candidates.meshes(8, num_slices=2)} == {2, 4, 8}
    found, pruned = candidates.candidates(tiny_config(), 8, CHIPS["v5p"])
    # 20 meshes of 8 devices; tensor divides 2 key/value heads (4 and 8 do not: 3 + 1 meshes), expert 4 (8 does not: 1),
    # rows 8: 15 meshes, with 6 policies and 3 modes
    assert len(found) == 15 * 18
    assert pruned == {
        "model.num_kv_heads=2: must be divisible by mesh.tensor": 3 * 18,
        "model.num_heads=4: must be divisible by mesh.tensor": 18,
        "model.moe.num_experts=4: must be divisible by mesh.expert": 18,
    }
    # The best guess of each pair of policy and mode comes before any second best.
    assert len({(c.config.model.remat, c.config.model.moe.dispatch) for c in found[:18]}) == 18
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(found[:18]))
    sparse = tiny_config()
    dense = dataclasses.replace(sparse, model=dataclasses.replace(sparse.model, moe=MoEConfig(gate="none")))
    assert {c.config.mesh.expert for c in candidates.candidates(dense, 8, CHIPS["v5p"])[0]} == {1}
    small = dataclasses.replace(CHIPS["v5p"], memory=2**20)
    found, pruned = candidates.candidates(tiny_config(), 8, small)
    assert not found
    assert (
        pruned["parameters and optimizer alone do not fit"]
        + pruned["with gradients and the least of activations it does not fit"]
        == 15 * 18
    )


def _fake_plan(config):
    if config.mesh.tensor > 1:
        raise ConfigError("does not fit: by 1 GiB; use more chips")
    return {
        "step_seconds": 0.1 * config.mesh.expert, "step_interval": [0.05, 0.2],
        "mfu": 0.5, "tokens_per_second_per_chip": 1.0, "compile_seconds": 1.0,
        "memory_total": 2**30, "bound": "matrix products",
    }  # fmt: skip


def test_search_ranks_caches_and_shares_work(tmp_path, monkeypatch):
    found, pruned = candidates.candidates(tiny_config(), 8, CHIPS["v5p"])
    chosen, compiled = found[:2] + found[120:138], []
    best = min(c.config.mesh.expert for c in chosen if c.config.mesh.tensor == 1)

    def counting(config):
        if len(compiled) == 7 and interrupt:
            raise KeyboardInterrupt
        compiled.append(config)
        return _fake_plan(config)

    cache, interrupt = search.Cache(tmp_path, "v5p:2x2x2", 1), True
    with pytest.raises(KeyboardInterrupt):
        search.run(chosen, cache, counting)
    interrupt = False
    results = search.run(chosen, cache, counting)
    assert len(compiled) == 20  # plans of the interrupted run were reused
    assert len(set(compiled)) == 20
    steps = [plan.get("step_seconds", 9.0) for _, plan in results]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(0.1 * best)
    assert steps[-1] == 9.0  # candidates that do not fit come last, with the reason
    page = search.render(results, pruned, len(found) - 20)
    assert "model.moe.num_experts=4: must be divisible by mesh.expert" in page
    assert "does not fit: by 1 GiB" in page
    assert "360 combinations" in page
    flags = search.overrides(results[0][0].config)
    assert f"--config.mesh.expert={best} --config.mesh.tensor=1 --config.mesh.context=1 --config.model.remat=" in flags

    # Plans are not shared with another topology, another JAX or another source.
    config = chosen[0].config
    assert cache.get(config) is not None
    assert search.Cache(tmp_path, "v5p:2x2x2", 2).get(config) is None
    monkeypatch.setattr(search, "source_hash", lambda: "other")
    other = search.Cache(tmp_path, "v5p:2x2x2", 1)
    assert other.get(config) is None

    # A candidate that another process is compiling is waited for, and its plan used.
    with other.mine(config) as mine, other.mine(config) as also_mine:
        assert (mine, also_mine) == (True, False)
        naps = []
        monkeypatch.setattr(search.time, "sleep", lambda _: naps.append(other.put(config, {"step_seconds": 5.0})))
        assert search.run(chosen[:1], other, counting)[0][1] == {"step_seconds": 5.0}
        assert len(naps) == 1
    assert len(compiled) == 20
