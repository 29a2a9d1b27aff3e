"""Checks of a user's gates, mixers, layers, objective and optimizer in the programs of a run.

JAX calls Python once for each program and keeps what it traced: a rule that counts its calls, draws from NumPy or reads
a file that changes is compiled as another rule in training, in evaluation and after a resume. What a layer, a mixer or
an objective computes from the mesh itself is not compared, since it may split the same function otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import traceback

import jax
import jax.core
import numpy as np

from moe.checkpoints.workdir import FREE_FIELDS, flatten
from moe.config import Config, ConfigError, MeshConfig, to_dict
from moe.config.user_code import user_code, user_modules
from moe.parallel.mesh import make_mesh
from moe.system.fields import exits_as_errors
from moe.training.step import Program

_CALLBACKS = ("io_callback", "pure_callback")  # debug callbacks return nothing
_ADDRESS = re.compile(r"0x[0-9a-f]+")


class PureCode:
    """Operations of the train step and the evaluation, to be compared with those when both are traced again."""

    def __init__(self, program: Program, config: Config):
        """Trace both; nothing is compiled.

        Raises:
            ConfigError: an exception in the user's code, or a program that calls back into Python.
        """
        self._program, self._config = program, config
        self._text = _traced(program, config) if user_code(config) else ""

    def computed(self, examples: str = "") -> dict[str, str]:
        """Trace both for one device, so that runs on different meshes can be compared.

        Args:
            examples: digest of the first examples of a user's objective.

        Returns:
            Digests of what the programs and the objective compute, and of all else that decides it: settings and
            versions. Empty without own code.
        """
        if not self._text:
            return {}
        with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.local_devices()[:1])):
            text = _traced(self._program, self._config)
        settings = flatten(to_dict(self._config))
        for name in FREE_FIELDS:
            if not name.startswith(("model.", "optimizer.")):
                del settings[name]
        versions = (jax.__version__, importlib.metadata.version("moe-jax"), jax.default_backend())
        under = json.dumps([settings, versions], sort_keys=True, default=str)
        return {"computed": _digest(text + examples), "under": _digest(under)}

    def check(self) -> None:
        """Trace both again, after the programs of the run were.

        Raises:
            ConfigError: they compute something else now.
        """
        if self._text and _traced(self._program, self._config) != self._text:
            raise ConfigError(
                f"{_modules(self._config)}: the model computes something else when its code is called again: it "
                "must be pure functions, without counts, draws other than from the given keys, and files that change"
            )


def _traced(program: Program, config: Config) -> str:
    """The programs' operations and constants."""
    try:
        with exits_as_errors():
            traced = program.traced()
    except ConfigError:
        raise
    except Exception as error:
        modules = user_modules(config)
        frames = [
            f"{frame.f_code.co_filename}, line {line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__") in modules
        ]
        where = frames[-1] if frames else f"{_modules(config)}: tracing the model with its code"
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    text = "\n".join(_ADDRESS.sub("", str(jaxpr)) for jaxpr in traced)
    for name in _CALLBACKS:
        if f"{name}[" in text:
            raise ConfigError(
                f"{_modules(config)}: the model calls back into Python ({name}), whose answers JAX may keep or ask "
                "for any number of times: compute them with jax.numpy"
            )
    constants = [constant for jaxpr in traced for constant in jaxpr.consts]
    if any(isinstance(constant, jax.core.Tracer) for constant in constants):
        raise ConfigError(
            f"{_modules(config)}: the model computes with an array that it kept of an earlier call: keep none"
        )
    arrays = map(np.asarray, constants)
    return "\n".join([text, *(f"{array.dtype}{array.shape}{array.tobytes().hex()}" for array in arrays)])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _modules(config: Config) -> str:
    return ", ".join(sorted(user_modules(config)))
