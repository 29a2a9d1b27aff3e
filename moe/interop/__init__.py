"""Open checkpoints in and out: folders of ``config.json`` and safetensors files, as model hubs keep them.

:func:`load_huggingface` makes a model of a folder, :func:`save_huggingface` a folder of a model;
:func:`import_checkpoint` and :func:`export_checkpoint` do it between folders and workdirs. ``families`` knows
what each architecture calls things, ``tensors`` where each tensor belongs.
"""

from moe.interop.convert import (
    export_checkpoint,
    import_checkpoint,
    load_balancing_loss,
    load_huggingface,
    save_huggingface,
)

__all__ = ["export_checkpoint", "import_checkpoint", "load_balancing_loss", "load_huggingface", "save_huggingface"]
