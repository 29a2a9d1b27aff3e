"""Open checkpoints in and out: folders of ``config.json`` and safetensors files, as Hugging Face hubs keep them.

:func:`load_huggingface` builds a model from a folder, :func:`save_huggingface` writes a model to a folder;
:func:`import_checkpoint` and :func:`export_checkpoint` convert between folders and workdirs.
"""

from moe.interop.balance import load_balancing_loss
from moe.interop.load import load_huggingface
from moe.interop.save import save_huggingface
from moe.interop.workdirs import export_checkpoint, import_checkpoint

__all__ = ["export_checkpoint", "import_checkpoint", "load_balancing_loss", "load_huggingface", "save_huggingface"]
