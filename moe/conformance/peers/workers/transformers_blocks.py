"""MoE blocks of transformers, and what each claims."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from torch_blocks import NUM_EXPERTS, Block, D, F, main

#: Names that configs have for E, D and F, for K, for the routing scale, for the activation.
SIZES = {
    NUM_EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    D: ("hidden_size",),
    F: ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"),
}
K = ("num_experts_per_tok", "moe_topk", "moe_top_k")
SCALE = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
SCALE = (*SCALE, "moe_routed_scaling_factor", "moe_router_scaling_factor")
ACTIVATION = ("hidden_act", "activation_function", "mlp_hidden_act")


@dataclasses.dataclass
class Transformers(Block):
    """A block with a router and stacked experts.

    Attributes:
        model: folder of transformers.models.
        name: class.
        router: name of the router's matrix.
        layout: of the experts: "stacked" [E,2F,D]; "transposed" [E,D,2F]; "interleaved", the same with gate and up in
            turn; "plain", without a gate.
        config: class of the config; default: of the longest name that the block's name begins with.
        settings: fields of the config besides sizes and what the rule says.
        arguments: further arguments of the class.
        after: the routing scale multiplies the sum of the experts' outputs instead of the weights.
        then: line of code after the block is made.
    """

    model: str
    name: str
    _: dataclasses.KW_ONLY
    router: str = "gate.weight"
    layout: str = "stacked"
    config: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: str = ""
    after: bool = False
    then: str = ""

    def __post_init__(self) -> None:
        self.has_balance = hasattr(self._module("modeling"), "load_balancing_loss_func")

    def _module(self, kind: str) -> Any:
        return importlib.import_module(f"transformers.models.{self.model}.{kind}_{self.model}")

    def code(self, k: int) -> str:
        """Config with this project's sizes, then the block."""
        classes = dict(inspect.getmembers(self._module("configuration"), inspect.isclass))
        names = [name for name in classes if name.endswith("Config") and self.name.startswith(name[:-6])]
        config = self.config or max(names, key=len)
        values = {name: size for size, names in SIZES.items() for name in names} | dict.fromkeys(K, k)
        values |= dict.fromkeys(SCALE, self.rule.get("scale", 1.0)) | dict.fromkeys(ACTIVATION, "silu")
        values |= {"norm_topk_prob": self.rule.get("renormalise", False)}
        values |= {"n_group": self.rule.get("groups", 1), "topk_group": self.rule.get("kept_groups", 1)}
        made = classes[config]()
        values = {name: value for name, value in values.items() if hasattr(made, name)} | self.settings
        lines = [
            f"from transformers.models.{self.model} import configuration_{self.model}, modeling_{self.model}",
            f"config = configuration_{self.model}.{config}()",
            f"for name, value in {values}.items():",
            "    setattr(config, name, value)",
            "config._experts_implementation = 'eager'",
            f"block = modeling_{self.model}.{self.name}(config{self.arguments})",
        ]
        return "\n".join([*lines, self.then] if self.then else lines)

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Shared experts get zeros, so that y is the routed experts' sum."""
        for name, value in block.named_parameters():
            if "shared" in name:
                value.zero_()
        dict(block.named_parameters())[self.router].copy_(arrays["router"].T)
        experts, turned = block.experts, self.layout in ("transposed", "interleaved")
        if self.layout == "plain":
            experts.up_proj.copy_(arrays["up"].mT)
        else:
            both = self._joined(arrays["gate"], arrays["up"])
            experts.gate_up_proj.copy_(both if turned else both.mT)
        experts.down_proj.copy_(arrays["down"] if turned else arrays["down"].mT)
        if self.biases:
            experts.gate_up_proj_bias.copy_(self._joined(arrays["gate_bias"], arrays["up_bias"]))
            experts.down_proj_bias.copy_(arrays["down_bias"])
            block.router.bias.copy_(arrays["router_bias"])
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            if self.bias and "bias" in name and value.numel() == NUM_EXPERTS:
                value.copy_(arrays["bias"].reshape(value.shape))

    def _joined(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.stack((gate, up), -1).flatten(-2) if self.layout == "interleaved" else torch.cat((gate, up), -1)

    def gradients(self) -> dict[str, str]:
        """Gradients of the router and of the experts."""
        turn = ".mT" if self.layout in ("stacked", "plain") else ""
        down = f"block.experts.down_proj.grad{turn}"
        found = {"grad_router": f"block.{self.router}.grad.mT", "grad_down": down}
        if self.layout == "plain":
            return found | {"grad_up": f"block.experts.up_proj.grad{turn}"}
        for number, name in enumerate(("gate", "up")):
            half = f"[..., {number}::2]" if self.layout == "interleaved" else f".chunk(2, -1)[{number}]"
            found[f"grad_{name}"] = f"block.experts.gate_up_proj.grad{turn}{half}"
            if self.biases:
                found[f"grad_{name}_bias"] = f"block.experts.gate_up_proj_bias.grad{half}"
        if self.biases:
            found |= {"grad_router_bias": "block.router.bias.grad"}
            found |= {"grad_down_bias": "block.experts.down_proj_bias.grad"}
        return found

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Record what the router returns and what the experts receive."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            logits = result[0] if isinstance(result, tuple) else result
            seen["router_logits"] = logits.reshape(-1, logits.shape[-1])

        def applied(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            _, index, weights = (*arguments, *keywords.values())[:3]
            scale = self.rule.get("scale", index.shape[-1]) if self.after else 1
            seen["expert_index"], seen["combine_weights"] = index, weights * scale

        block.get_submodule(self.router.split(".")[0]).register_forward_hook(routed)
        block.experts.register_forward_pre_hook(applied, with_kwargs=True)

    def balance(self, router_logits: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
        """load_balancing_loss_func, which is K at perfect balance, over K."""
        function = self._module("modeling").load_balancing_loss_func
        return function((router_logits,), NUM_EXPERTS, k, mask.to(router_logits.dtype)) / k


class Llama4(Transformers):
    """Llama 4's router returns scores of all experts, 0 where an expert is not chosen."""

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The scores that are not 0."""

        def routed(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            seen["combine_weights"], seen["expert_index"] = result[0].topk(module.top_k)

        block.router.register_forward_hook(routed)


class Jet(Transformers):
    """JetMoE's two stacks of linear layers."""

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Its output bias gets zeros."""
        block.bias.zero_()
        block.router.layer.weight.copy_(arrays["router"].T)
        block.input_linear.weight.copy_(torch.cat((arrays["gate"], arrays["up"]), -1).mT)
        block.output_linear.weight.copy_(arrays["down"].mT)

    def gradients(self) -> dict[str, str]:
        """Gradients of both stacks."""
        both = "block.input_linear.weight.grad.mT.chunk(2, -1)"
        found = {"grad_gate": f"{both}[0]", "grad_up": f"{both}[1]", "grad_down": "block.output_linear.weight.grad.mT"}
        return found | {"grad_router": "block.router.layer.weight.grad.mT"}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """The logits alone: choices are sorted by expert inside the block."""
        block.router.register_forward_hook(lambda module, arguments, result: seen.update(router_logits=result[-1]))


class Separate(Transformers):
    """A block with one module for each expert, without a gate: Switch and NLLB."""

    def __post_init__(self) -> None:
        """Their balance losses are computed by the model, from what the router keeps."""

    def load(self, block: nn.Module, arrays: dict[str, torch.Tensor]) -> None:
        """Biases get zeros."""
        block.router.classifier.weight.copy_(arrays["router"].T)
        for number in range(NUM_EXPERTS):
            first, second = self._pair(block, number)
            first.weight.copy_(arrays["up"][number].T)
            second.weight.copy_(arrays["down"][number].T)
            for linear in (first, second):
                if linear.bias is not None:
                    linear.bias.zero_()

    def _pair(self, block: nn.Module, number: int) -> tuple[nn.Linear, nn.Linear]:
        found = [module for module in block.experts[f"expert_{number}"].modules() if isinstance(module, nn.Linear)]
        return found[0], found[1]

    def gradients(self) -> dict[str, str]:
        """0 for an expert that no token reached."""
        first, second = ("wi", "wo") if self.model == "switch_transformers" else ("fc1", "fc2")
        layers = "(e.{}.weight for name, e in block.experts.items() if name.startswith('expert'))"
        stack = f"torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in {layers}]).mT"
        found = {"grad_up": stack.format(first), "grad_down": stack.format(second)}
        return found | {"grad_router": "block.router.classifier.weight.grad.mT"}

    def watch(self, block: nn.Module, seen: dict[str, torch.Tensor]) -> None:
        """Nothing: drops are inside the router."""


#: Rules by the configs' documentation: norm_topk_prob, routed_scaling_factor, n_group, topk_group, scoring_func.
MIXTRAL = {"rule": {"renormalise": True}}
GROUPS = {"groups": 4, "kept_groups": 3}
V2 = {"rule": {"scale": 2.5, **GROUPS}, "settings": {"topk_method": "group_limited_greedy"}}
V3_RULE = {"score": "sigmoid", "renormalise": True, "scale": 2.5, "scores_per_group": 2, **GROUPS}
V3 = {"rule": V3_RULE, "bias": True}
MISTRAL = {"rule": {"renormalise": True, "scale": 2.5, "scores_per_group": 2, **GROUPS}}
PLAIN_SIGMOID = {"score": "sigmoid", "renormalise": True}
SIGMOID = {"rule": PLAIN_SIGMOID, "bias": True}
SCALED = {"rule": {**PLAIN_SIGMOID, "scale": 2.5}, "bias": True}
GPT_OSS = {"rule": {"renormalise": True, "activation": "gpt_oss"}, "biases": True}
#: Limits of the experts' activations that these inputs do not reach.
WIDE = {"settings": {"swiglu_limit": 1e9}}
SWITCH_LOSS = {
    "documented": {"balance_softmax": 1},
    "source": "load_balancing_loss_func takes Switch's softmax of logits",
}
WEIGHS_INPUT = {"documented": {"weighs_input": True}, "source": "an expert's input is multiplied by its score"}
CLAMPED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "shared_intermediate_size": 24}


def adapters() -> dict[str, Block]:
    """Every block, by its model type."""
    return {
        "mixtral": Transformers("mixtral", "MixtralSparseMoeBlock", **MIXTRAL),
        "minimax": Transformers("minimax", "MiniMaxSparseMoeBlock", **MIXTRAL),
        "aria": Transformers("aria", "AriaTextMoELayer", router="router.weight", layout="transposed", **MIXTRAL),
        "granitemoe": Transformers("granitemoe", "GraniteMoeMoE", router="router.weight", **MIXTRAL),
        "granitemoe_swa": Transformers("granitemoe_swa", "GraniteMoeSWAMoE", router="router.weight", **MIXTRAL),
        "granitemoehybrid": Transformers("granitemoehybrid", "GraniteMoeHybridMoE", router="router.weight", **MIXTRAL),
        "granitemoeshared": Transformers("granitemoeshared", "GraniteMoeSharedMoE", router="router.weight", **MIXTRAL),
        "hunyuan_v1_moe": Transformers("hunyuan_v1_moe", "HunYuanMoEV1Moe", router="gate.wg.weight", **MIXTRAL),
        "jetmoe": Jet("jetmoe", "JetMoeMoE", router="router.layer.weight", **MIXTRAL),
        "qwen2_moe": Transformers("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
        "qwen3_moe": Transformers("qwen3_moe", "Qwen3MoeSparseMoeBlock", **MIXTRAL),
        "qwen3_next": Transformers("qwen3_next", "Qwen3NextSparseMoeBlock", **MIXTRAL),
        "qwen3_vl_moe": Transformers("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", **MIXTRAL),
        "qwen3_5_moe": Transformers(
            "qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", config="Qwen3_5MoeTextConfig", **MIXTRAL
        ),
        "qwen3_omni_moe (thinker)": Transformers(
            "qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock", config="Qwen3OmniMoeTextConfig", **MIXTRAL
        ),
        "qwen3_omni_moe (talker)": Transformers(
            "qwen3_omni_moe",
            "Qwen3OmniMoeTalkerTextSparseMoeBlock",
            settings={"shared_expert_intermediate_size": 24},
            **MIXTRAL,
        ),
        "qwen4_exp": Transformers("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", **MIXTRAL),
        "olmoe": Transformers("olmoe", "OlmoeSparseMoeBlock"),
        "flex_olmo": Transformers("flex_olmo", "FlexOlmoSparseMoeBlock"),
        "mellum": Transformers("mellum", "MellumSparseMoeBlock", **MIXTRAL),
        "lara_mini": Transformers("lara_mini", "LaraMiniSparseMoeBlock", **MIXTRAL),
        "jamba": Transformers("jamba", "JambaSparseMoeBlock", router="router.weight"),
        "deepseek_v2": Transformers("deepseek_v2", "DeepseekV2Moe", **V2),
        "deepseek_ocr2": Transformers("deepseek_ocr2", "DeepseekOcr2TextMoe", **V2),
        "unlimited_ocr": Transformers("unlimited_ocr", "UnlimitedOcrTextMoe", **V2),
        "deepseek_v3": Transformers("deepseek_v3", "DeepseekV3MoE", **V3),
        "deepseek_v32": Transformers("deepseek_v32", "DeepseekV32MoE", **V3),
        "deepseek_v4": Transformers(
            "deepseek_v4",
            "DeepseekV4SparseMoeBlock",
            rule={"score": "sqrt_softplus", "renormalise": True, "scale": 2.5},
            bias=True,
            settings={"mlp_layer_types": ["moe"], "swiglu_limit": 1e9},
            arguments=", 0",
            **SWITCH_LOSS,
        ),
        "axk1": Transformers(
            "axk1", "AXK1MoE", then="import torch; block.post_mlp_layernorm = torch.nn.Identity()", **V3
        ),
        "axk2": Transformers("axk2", "AXK2MoE", **V3),
        "bailing_hybrid": Transformers("bailing_hybrid", "BailingHybridMoE", **V3),
        "beam": Transformers("beam", "BeamMoE", after=True, **V3),
        "dots1": Transformers("dots1", "Dots1MoE", settings={"n_shared_experts": 1}, **V3),
        "dots3_note": Transformers("dots3_note", "Dots3NoteTextMoE", **V3),
        "exaone_moe": Transformers("exaone_moe", "ExaoneMoeSparseMoEBlock", **V3),
        "glm4_moe": Transformers("glm4_moe", "Glm4MoeMoE", **V3),
        "glm4_moe_lite": Transformers("glm4_moe_lite", "Glm4MoeLiteMoE", **V3),
        "glm4v_moe": Transformers("glm4v_moe", "Glm4vMoeTextMoE", **V3, **SWITCH_LOSS),
        "glm5_next": Transformers("glm5_next", "Glm5NextTextMoE", **V3, **WIDE, **SWITCH_LOSS),
        "glm_moe_dsa": Transformers("glm_moe_dsa", "GlmMoeDsaMoE", **V3),
        "hy_v4": Transformers("hy_v4", "HYV4MoE", **V3, **WIDE),
        "hy_v4_vl": Transformers("hy_v4_vl", "HYV4VLMoE", config="HYV4VLTextConfig", **V3, **WIDE),
        "kimi_linear": Transformers("kimi_linear", "KimiLinearMoE", **V3),
        "mimo_v2_flash": Transformers("mimo_v2_flash", "MiMoV2FlashMoE", **V3),
        "solar_open": Transformers("solar_open", "SolarOpenMoE", **V3),
        "nemotron_h": Transformers(
            "nemotron_h",
            "NemotronHMoE",
            layout="plain",
            settings={"moe_latent_size": None, "mlp_hidden_act": "relu2", "moe_shared_expert_intermediate_size": 24},
            rule={**V3_RULE, "activation": "relu2"},
            bias=True,
        ),
        "mistral4": Transformers("mistral4", "Mistral4MoE", **MISTRAL),
        "mistral_large4": Transformers("mistral_large4", "MistralLarge4TextMoE", **MISTRAL),
        "afmoe": Transformers("afmoe", "AfmoeSparseMoeBlock", router="router.gate.weight", **SCALED),
        "hy_v3": Transformers("hy_v3", "HYV3MoE", **SCALED),
        "laguna": Transformers(
            "laguna",
            "LagunaSparseMoeBlock",
            after=True,
            settings={"moe_router_logit_softcapping": 0.0},
            **SCALED,
            **SWITCH_LOSS,
        ),
        "step3p7": Transformers(
            "step3p7",
            "Step3p7SparseMoeBlock",
            config="Step3p7TextConfig",
            after=True,
            arguments=", 0",
            settings={"swiglu_limits": None, "swiglu_limits_shared": None, "share_expert_dim": 24},
            **SCALED,
        ),
        "lfm2_moe": Transformers("lfm2_moe", "Lfm2MoeSparseMoeBlock", settings={"use_expert_bias": True}, **SCALED),
        "minimax_m2": Transformers("minimax_m2", "MiniMaxM2SparseMoeBlock", **SIGMOID, **SWITCH_LOSS),
        "minimax_m3_vl": Transformers(
            "minimax_m3_vl",
            "MiniMaxM3VLSparseMoeBlock",
            config="MiniMaxM3VLTextConfig",
            after=True,
            settings=CLAMPED,
            rule={**PLAIN_SIGMOID, "scale": 2.5, "activation": "gpt_oss"},
            bias=True,
            **SWITCH_LOSS,
        ),
        "kolibri1": Transformers(
            "kolibri1",
            "Kolibri1SparseMoeBlock",
            documented={"bias_on_logits": True},
            source="its router adds the selection bias to the logits; no paper states the rule",
            **SIGMOID,
        ),
        "flint": Transformers("flint", "FlintSparseMoeBlock", rule=PLAIN_SIGMOID, **SWITCH_LOSS),
        "cohere2_moe": Transformers(
            "cohere2_moe",
            "Cohere2MoeSparseMoeBlock",
            settings={"expert_selection_fn": "sigmoid", "num_shared_experts": 0},
            rule=PLAIN_SIGMOID,
        ),
        "ernie4_5_moe": Transformers(
            "ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", rule={"renormalise": True}, bias=True, **SWITCH_LOSS
        ),
        "longcat_flash": Transformers(
            "longcat_flash",
            "LongcatFlashMoE",
            router="router.classifier.weight",
            settings={"zero_expert_num": 0},
            rule={"scale": 2.5},
            bias=True,
        ),
        "gpt_oss": Transformers("gpt_oss", "GptOssMLP", router="router.weight", layout="interleaved", **GPT_OSS),
        "openai_privacy_filter": Transformers(
            "openai_privacy_filter",
            "OpenAIPrivacyFilterMLP",
            router="router.weight",
            layout="transposed",
            after=True,
            **GPT_OSS,
        ),
        "llama4": Llama4(
            "llama4",
            "Llama4TextMoe",
            router="router.weight",
            layout="transposed",
            rule={"score": "sigmoid"},
            **WEIGHS_INPUT,
        ),
        "switch_transformers": Separate(
            "switch_transformers",
            "SwitchTransformersSparseMLP",
            router="router.classifier.weight",
            settings={"d_ff": 24, "expert_capacity": 2},
            rule={"activation": "relu", "capacity_factor": 1.0},
            k=1,
        ),
        "nllb_moe": Separate(
            "nllb_moe",
            "NllbMoeSparseMLP",
            router="router.classifier.weight",
            arguments=", 24",
            settings={"d_model": 16, "expert_capacity": 64, "second_expert_policy": "all", "moe_token_dropout": 0.0},
            rule={"renormalise": True, "activation": "relu"},
            skip={"one": "the router takes two experts"},
        ),
    }


if __name__ == "__main__":
    main(f"transformers {transformers.__version__}", adapters())
