"""Fields that Qwen's families share: windows of the upper layers, which layers are MoE, and their experts."""

from moe.config import ModelConfig
from moe.interop.families.family import dense_layers, read_gate, read_sparse_layers, read_windows, selection_rule
from moe.interop.schema import (
    Context,
    Count,
    Json,
    LayerNumbers,
    OpenConfig,
    OptionalCount,
    OptionalNumExperts,
    Size,
    Window,
)


class UpperWindowsConfig(OpenConfig):
    """Fields of ``config.json`` by which layers from ``max_window_layers`` on have a window."""

    max_position_embeddings: Context = 32768
    num_key_value_heads: Count | None = 32
    use_sliding_window: bool = False
    sliding_window: Window = 4096
    max_window_layers: OptionalCount = 28


def read_upper_windows(source: UpperWindowsConfig) -> Json:
    """Changes of ModelConfig: the layers that ``layer_types`` lists; in older files, those from the bound on."""
    numbers = range(source.num_hidden_layers)
    older = ["sliding_attention" if n >= source.max_window_layers else "full_attention" for n in numbers]
    window = (source.sliding_window or 0) if source.use_sliding_window else 0
    return read_windows(window, source.layer_types or older)


class QwenConfig(OpenConfig):
    """Fields of ``config.json``; ``num_local_experts`` is the newer name of ``num_experts``."""

    num_experts: OptionalNumExperts = 0
    moe_intermediate_size: Size
    decoder_sparse_step: Count = 1
    mlp_only_layers: LayerNumbers | None = None
    use_sliding_window: bool = False
    sliding_window: Window = 4096


def read_experts(source: QwenConfig) -> Json:
    """Changes of MoEConfig; a layer is MoE at every ``decoder_sparse_step`` unless ``mlp_only_layers`` lists it."""
    if not source.num_experts:
        return {"gate": "none"}
    num_layers, step = source.num_hidden_layers, source.decoder_sparse_step
    dense = source.mlp_only_layers or ()
    chosen = [n for n in range(num_layers) if n not in dense and (n + 1) % step == 0]
    moe = {"gate": read_gate(source), "num_experts": source.num_experts, "d_ff": source.moe_intermediate_size}
    return moe | read_sparse_layers(chosen, num_layers)


def write_experts(model: ModelConfig) -> Json:
    """The reverse of :func:`read_experts`."""
    return {
        "num_experts": model.moe.num_experts,
        "moe_intermediate_size": model.moe.d_ff,
        "norm_topk_prob": selection_rule(model.moe) is True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(model),
    }
