"""torchtitan's MoE layer under tensor parallelism with the fix of its pull request 2416, which must not deviate."""

from __future__ import annotations

import importlib.metadata

from torch_blocks import Block, main
from torchtitan_blocks import SHARES, TENSOR, V3, Titan

#: Gradients of scores are sums over the processes.
FIX = """
import torchtitan.distributed
def leave(layout, use_local_output, module, y, mesh):
    return y.to_local(grad_placements=(torch.distributed.tensor.Partial(),))
torchtitan.distributed.NoParallel._prepare_output_fn = staticmethod(leave)
"""
FIXED = SHARES | {"spread_code": FIX + TENSOR}
ADAPTERS: dict[str, Block] = {
    "softmax, tensor parallel over 4 processes, fixed": Titan(rule={"renormalise": True}, **FIXED),
    "deepseek_v3, tensor parallel over 4 processes, fixed": Titan(rule=V3, bias=True, **FIXED),
}

if __name__ == "__main__":
    main(f"torchtitan {importlib.metadata.version('torchtitan')}", ADAPTERS)
