"""Errors for programs that do not fit a device's memory, with the settings that help."""

from __future__ import annotations

import re

from moe.config import Config, ConfigError
from moe.planner.chips import GiB


class DoesNotFitError(ConfigError):
    """A program that needs more memory than a device has.

    Attributes:
        least: lower bound of the bytes that it needs on a device; 0: unknown.
    """

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least

    def __reduce__(self) -> tuple[type[DoesNotFitError], tuple[str, float]]:
        return type(self), (str(self), self.least)


def refuse_state_that_does_not_fit(config: Config, state: int, capacity: int) -> None:
    """Check before minutes of compiling that parameters and optimizer fit.

    Args:
        config: of the run.
        state: bytes of parameters and optimizer on a device.
        capacity: bytes of the device.

    Raises:
        DoesNotFitError: they do not fit; the message says by how much.
    """
    if state > capacity:
        raise DoesNotFitError(
            f"does not fit: parameters and optimizer alone take {state / GiB:.1f} GiB a device, "
            f"{(state - capacity) / GiB:.1f} GiB more than its {capacity / GiB:.0f} GiB; use more chips, or split "
            f"them further (mesh.fsdp={config.mesh.fsdp}, mesh.expert={config.mesh.expert}, "
            f"mesh.tensor={config.mesh.tensor})",
            state,
        )


def refuse_program_that_does_not_fit(config: Config, total: int, capacity: int) -> None:
    """Check the memory of a program that was compiled for GPUs, whose compiler does not.

    Args:
        config: of the run.
        total: bytes of the program on a device.
        capacity: bytes of the device.

    Raises:
        DoesNotFitError: it does not fit; the message says by how much and which settings help.
    """
    if total > capacity:
        figures = f"{total / GiB:.2f} GiB a device of {capacity / GiB:.2f}, {(total - capacity) / GiB:.2f} GiB too much"
        helps = "; ".join(_levers(config))
        raise DoesNotFitError(f"does not fit: the program: {figures}; what helps, most first: {helps}", total)


#: A number with B, K, M, G or T (powers of 1024).
_SIZE = r"([\d.]+[BKMGT]?)"

#: Messages of libtpu versions about memory; the groups are the sizes needed, then the size available. In the
#: first, temporaries include the arguments: it states what is alive at the peak, which is less than what is allocated.
_MESSAGES = (
    (rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", "at its peak"),
    (rf"memory space hbm\.?\s+Used {_SIZE} of {_SIZE} hbm", "the program"),
    (
        rf"TensorCore Hbm usage: {_SIZE}, SparseCore Hbm usage:? {_SIZE}, exceeding available bytes: {_SIZE}",
        "TensorCore and SparseCore together",
    ),
    (rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", "the program"),
)


def explained(config: Config, error: Exception) -> Exception:
    """Turn the compiler's error about device memory into a :class:`DoesNotFitError`, and its refusal of a ragged
    all-to-all (on slices whose chips only exchange with neighbours) into a ConfigError; return others unchanged."""
    text = str(error)
    if "Ragged all-to-all is currently not supported" in text:
        return ConfigError(
            f"mesh.expert={config.mesh.expert} with model.moe.dispatch=dropless: libtpu has no ragged all-to-all on "
            "this slice; mesh.expert=1, or dispatch=gather"
        )
    # Running out of another memory (vmem, smem) is a failure of the compiler that no setting of a run prevents.
    if "RESOURCE_EXHAUSTED" not in text or re.search(r"memory space (?!hbm)\w+", text):
        return error
    figures, least = "the compiled program exceeds a device's memory", 0.0
    for pattern, what in _MESSAGES:
        found = re.search(pattern, text)
        if found:
            *needed, available = (_gib(size) for size in found.groups())
            over = sum(needed) - available
            amount = f"{over:.2f} GiB" if over >= 0.01 else f"{over * 1024:.1f} MiB"
            figures = f"{what}: {sum(needed):.2f} GiB a device of {available:.2f}, {amount} too much"
            least = sum(needed) * GiB
            break
    return DoesNotFitError(f"does not fit: {figures}; what helps, most first: {'; '.join(_levers(config))}", least)


def _gib(size: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([BKMGT]?)", size).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number.rstrip(".")) * 1024.0 ** ("BKMGT".index(unit or "B")) / GiB


def _levers(config: Config) -> list[str]:
    model, train = config.model, config.train
    levers = []
    if model.remat != "full":
        levers.append(f"model.remat=full (now {model.remat})")
    if model.attention == "full" and config.data.sequence_length > 1024:
        levers.append(f"model.attention=blocked (now {model.attention}), which never holds T x T")
    gate = model.moe.gate
    if gate is not None and not gate.slots_per_expert and model.moe.dispatch == "einsum":
        levers.append("model.moe.dispatch=gather, which makes no one-hot tensors")
    levers.append(f"train.accumulation_steps above {train.accumulation_steps}, or a smaller train.batch_size")
    optimizer = config.optimizer
    if optimizer.name in ("adamw", "muon") and optimizer.moment_dtype == "float32" and optimizer.b2 <= 0.99:
        levers.append("optimizer.moment_dtype=bfloat16 (now float32), 4 bytes a parameter less with AdamW")
    if optimizer.memory == "device" and not optimizer.ema_decay:
        levers.append("optimizer.memory=host, for two transfers a step (planned for TPUs alone)")
    if model.dtype == "float32":
        levers.append("model.dtype=bfloat16 (now float32)")
    levers.append("more chips, or a larger mesh.fsdp")
    return levers
