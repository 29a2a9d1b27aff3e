"""Adapters written in PEFT's layout, added by hand to an exported base."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

from moe.checkpoints.pinned import pinned_steps
from moe.config import Config, ConfigError, ModelConfig
from moe.interop import export_checkpoint, import_checkpoint, peft
from moe.interop.peft import export_adapters
from moe.models.factory import abstract_parameters, abstract_trained
from tests.helpers import slow_case
from tests.run_helpers import tiny, write_run


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), tree)


def workdirs(tmp_path, **changes):
    """Workdirs of a random base and of random adapters over it."""
    settings = {"model.moe.gate": "mixtral", "model.moe.num_experts": 4, "model.num_layers": 1}
    base = tiny(tmp_path, **settings)
    lora = {"start.checkpoint": str(tmp_path / "base"), "lora.rank": 2, "lora.alpha": 6.0}
    config = tiny(tmp_path, **settings | lora | changes)
    shapes = abstract_parameters(base.model), abstract_trained(config.model, config.lora)
    for name, written, tree in zip(("base", "lora"), (base, config), map(nnx.to_pure_dict, shapes), strict=True):
        write_run(tmp_path / name, written, random_like(tree, len(name)))
    pinned_steps(config, None).note(epath.Path(tmp_path / "lora"))
    return tmp_path / "base", tmp_path / "lora"


def read(folder):
    return {
        name: array
        for path in folder.glob("*.safetensors")
        for name, array in safetensors.numpy.load_file(path).items()
    }


def test_a_cast_export_is_the_cast_of_the_merged_weights(tmp_path):
    """Adding adapters after the cast would lose those that are small compared with the base."""
    _, lora = workdirs(tmp_path)
    for name, options in (("whole", {}), ("cast", {"dtype": "bfloat16"})):
        export_checkpoint(lora, tmp_path / name, **options)
    whole = read(tmp_path / "whole")
    for name, array in read(tmp_path / "cast").items():
        np.testing.assert_array_equal(array, whole[name].astype(array.dtype), err_msg=name)


@pytest.mark.parametrize("common_a", [slow_case(False), True])
def test_adapters_added_by_hand_equal_the_merged_export(tmp_path, common_a):
    base, lora = workdirs(tmp_path, **{"lora.common_a": common_a})
    export_checkpoint(base, tmp_path / "out_base")
    export_checkpoint(lora, tmp_path / "out_merged")
    export_adapters(lora, tmp_path / "out_adapters")
    about = json.loads((tmp_path / "out_adapters" / "adapter_config.json").read_text())
    found, merged = (read(tmp_path / name) for name in ("out_base", "out_merged"))
    adapters = read(tmp_path / "out_adapters")
    for module in about["target_modules"]:
        a, b = (adapters[f"base_model.model.{module}.lora_{name}.weight"] for name in "AB")
        assert a.shape[0] == b.shape[1] == about["r"] == 2
        found[f"{module}.weight"] = found[f"{module}.weight"] + about["lora_alpha"] / about["r"] * b @ a
    assert len(adapters) == 2 * len(about["target_modules"])
    # 4 projections of attention and 3 matrices of each of 4 experts
    assert len(about["target_modules"]) == 4 + 3 * 4
    assert found.keys() == merged.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, found[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.transformers
@pytest.mark.parametrize("changes", [{"lora.parts": ("attention",)}, {}, {"lora.common_a": True}])
def test_peft_loads_exported_adapters(tmp_path, changes):
    """The base with adapters loaded by PEFT has the logits of the merged export."""
    import peft
    import torch
    import transformers

    base, lora = workdirs(tmp_path, **changes)
    export_checkpoint(base, tmp_path / "out_base")
    export_checkpoint(lora, tmp_path / "out_merged")
    export_adapters(lora, tmp_path / "out_adapters")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("out_base", "out_merged")
    ]
    token_ids = torch.arange(12)[None]
    with torch.no_grad():
        without, merged = (model(token_ids).logits.numpy() for model in models)
        adapted = peft.PeftModel.from_pretrained(models[0], tmp_path / "out_adapters")(token_ids).logits.numpy()
    assert np.abs(without - merged).max() > 1
    np.testing.assert_allclose(adapted, merged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_model", [True, False])
def test_an_import_refuses_a_folder_of_adapters(tmp_path, with_model):
    source = tmp_path / "source"
    shutil.copytree(Path(__file__).parents[1] / "data" / "checkpoints" / "mixtral", source)
    if not with_model:
        (source / "config.json").unlink()
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"source: holds adapters \(adapter_config.json\), which are not read: merge"):
        import_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(("layers", "task"), [(0, "CAUSAL_LM"), (2, "SEQ_2_SEQ_LM")])
def test_task_type_of_adapters_follows_the_model(layers, task):
    model = ModelConfig(encoder_layers=layers, relative_buckets=8 if layers else 0)
    assert peft._config(Config(model=model), {}, None)["task_type"] == task


def test_what_the_adapter_layout_cannot_hold_is_refused(tmp_path):
    base, lora = workdirs(tmp_path, **{"lora.trained": ("router",)})
    with pytest.raises(ConfigError, match="trains no adapters"):
        export_adapters(base, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lora\.trained=\('router',\): cannot be part of an adapter"):
        export_adapters(lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()
