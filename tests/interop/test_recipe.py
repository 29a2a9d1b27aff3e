"""The path of docs/open_models.md by its commands: import, fine-tune by adapters on conversations, evaluate, export."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from moe.interop import export_checkpoint, load_huggingface
from moe.models.factory import abstract_parameters
from tests.data.test_chat import EXPECTED, HERE
from tests.interop.test_peft import random_like
from tests.run_helpers import tiny, write_run

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def moe(folder, *words):
    environment = os.environ | {"HOME": str(folder), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "moe", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"moe {' '.join(words)}: {done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_the_recipe_of_an_open_model(tmp_path):
    source = tmp_path / "source"
    settings = {"model.moe.gate": "mixtral", "model.moe.num_experts": 4, "model.moe.dispatch": "dropless"}
    base = tiny(tmp_path, **settings)
    write_run(tmp_path / "base", base, random_like(nnx.to_pure_dict(abstract_parameters(base.model)), 0))
    export_checkpoint(tmp_path / "base", source)
    (source / "tokenizer.json").write_bytes((HERE / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps(EXPECTED["llama3"]["tokenizer_config"]))
    talks = tmp_path / "talks"
    talks.mkdir()
    turns = [
        [{"role": "user", "content": f"p{i % 9}"}, {"role": "assistant", "content": "ab " * 3}] for i in range(120)
    ]
    (talks / "a.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    assert "parameters" in moe(tmp_path, "import", f"--source={source}", f"--out={tmp_path / 'imported'}")
    said = moe(
        tmp_path, "train", "--config=chat", f"--workdir={tmp_path / 'tuned'}",
        f"--config.start.checkpoint={tmp_path / 'imported'}", f"--config.data.dataset={talks}",
        f"--config.data.directory={tmp_path / 'cache'}", "--config.data.sequence_length=64",
        "--config.lora.rank=2", "--config.optimizer.learning_rate=2e-2", "--config.train.num_steps=8",
        "--config.train.batch_size=4", "--config.train.eval_every=8", "--config.train.sample_tokens=0",
    )  # fmt: skip
    assert "optimizer.warmup_steps=0 instead of the config's 20" in said
    assert "perplexity" in moe(tmp_path, "evaluate", f"--workdir={tmp_path / 'tuned'}")
    moe(tmp_path, "export", f"--workdir={tmp_path / 'tuned'}", f"--out={tmp_path / 'out'}")
    before, config = load_huggingface(str(source))
    after, again = load_huggingface(str(tmp_path / "out"))
    assert config.model == again.model
    ids = np.arange(1, 9)[None]
    assert np.abs(np.asarray(after(ids).logits - before(ids).logits)).max() > 1e-3  # the adapters are merged
    assert {"tokenizer.json", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        import torch
        import transformers

        with torch.no_grad():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))(torch.tensor(ids)).logits
        np.testing.assert_allclose(np.asarray(after(ids).logits), theirs.numpy(), rtol=1e-4, atol=1e-4)
