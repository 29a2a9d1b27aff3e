"""MoE blocks of transformers, and what each claims."""

from __future__ import annotations

import transformers
from torch_blocks import Block, main
from transformers_adapters import MIXTRAL, Jet, Llama4, Separate, Transformers

#: Rules by the configs' documentation: norm_topk_prob, routed_scaling_factor, n_group, topk_group, scoring_func.
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
        "jetmoe": Jet("jetmoe", "JetMoeMoE", router="router.layer.weight", logits="result[-1]", **MIXTRAL),
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
            read="LongcatFlashExperts squeezes the axis of K out of its mask",
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
            read="NllbMoeExperts takes the one-hot of a one-hot mask: experts 0 and 1 alone are applied",
        ),
    }


if __name__ == "__main__":
    main(f"transformers {transformers.__version__}", adapters())
