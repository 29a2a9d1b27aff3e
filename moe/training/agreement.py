"""Checks, in a run of several processes, that all have the same config, data and workdir.

Each check is a collective, and raises the same error in all processes.
"""

from __future__ import annotations

import hashlib
import json
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from moe.checkpoints.manager import complete_steps
from moe.checkpoints.workdir import REPORT
from moe.config import Config, ConfigError, to_dict
from moe.config.user_code import user_code, user_modules
from moe.data import pipeline
from moe.system.reading import read_small_file
from moe.system.sealed_folder import CONFIG

#: Seconds between two looks at the workdir: a network file system may show another host's files after a minute.
_PAUSES = (1, 2, 4, 8, 16, 32, 64, 0)


def _differing_process(text: str) -> int | None:
    """Number of the first process whose text is not that of process 0; None if all are the same."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    digests = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((digests != digests[0]).any(axis=1))
    return int(others[0]) if len(others) else None


def refuse_other_inputs(config: Config, prepared: pipeline.Prepared) -> None:
    """Raise ConfigError unless the processes have the same config, documents and tokenizer.

    Paths of caches may differ.
    """
    if jax.process_count() == 1:
        return
    settings = to_dict(config)
    del settings["data"]["directory"], settings["train"]["compilation_cache"]
    if (other := _differing_process(json.dumps(settings, sort_keys=True))) is not None:
        raise ConfigError(f"--config: process {other} has another config than process 0; start both by one command")
    if (other := _differing_process(pipeline.digest(prepared))) is not None:
        raise ConfigError(
            f"data.dataset={config.data.dataset!r}: process {other} has other documents, or another tokenizer, than "
            "process 0; copy them to all hosts"
        )


def refuse_other_code(config: Config, computed: dict[str, str]) -> None:
    """Raise ConfigError unless the user's modules compute the same in all processes.

    Args:
        config: names the modules.
        computed: of :meth:`moe.training.own_code.PureCode.computed`.
    """
    if jax.process_count() == 1 or not computed:
        return
    if (other := _differing_process(json.dumps([user_code(config), computed]))) is not None:
        raise ConfigError(
            f"{', '.join(sorted(user_modules(config)))}: the code computes something else in process {other} than in "
            "process 0: copy it to all hosts, and let it read neither the process, its environment nor the order of a "
            "set"
        )


def refuse_other_workdir(workdir: epath.Path) -> None:
    """Wait until all processes see the same config, checkpoints and report in the workdir, or raise ConfigError."""
    if jax.process_count() == 1:
        return
    path, other = workdir / CONFIG, None
    for pause in _PAUSES:
        config = read_small_file(path).decode(errors="replace") if path.exists() else ""
        held = [config, complete_steps(workdir), (workdir / REPORT).exists()]
        if (other := _differing_process(json.dumps(held))) is None:
            return
        time.sleep(pause)
    raise ConfigError(
        f"--workdir={workdir}: process {other} finds other files there than process 0; all need the same shared folder"
    )
