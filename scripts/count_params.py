"""python scripts/count_params.py: total and active parameters of the models in configs/, beside the published.

No array is allocated. "exact" compares with the count that follows from the published sizes, digit by digit, where
that was computed elsewhere; other rows show how far they are from the published, rounded number, at most 7 %.
Switch's table 9 and its released checkpoints differ, hence two rows of some sizes; GShard's counts leave out parts.
"""

from moe.system import process

if __name__ == "__main__":
    process.use_tpu_compiler()  # before JAX: counting needs no accelerator

import sys

from moe.programs import cli
from moe.system import shipped

#: Largest deviation from a published number for which no exact count is known: GShard's, Switch-Large's.
MOST = 0.07
#: Embedding table of gpt-oss, which its published active counts leave out and ours do not.
_GPT_OSS_TABLE = 201_088 * 2_880

#: config: (published total, published active, exact total, exact active; None where not published to the last digit)
PUBLISHED = {
    "mistral_7b": ("7.2B", "7.2B", 7_241_732_096, 7_241_732_096),
    "mixtral_8x7b": ("47B", "13B", 46_702_792_704, 12_879_925_248),
    "mixtral_8x22b": ("141B", "39B", 140_620_634_112, 39_152_031_744),
    "deepseek_moe_16b": ("16.4B", "2.8B", 16_375_728_128, 2_828_650_496),
    "deepseek_v2_lite": ("15.7B", "2.4B", 15_706_484_224, None),
    "deepseek_v2": ("236B", "21B", 235_741_434_880, None),
    "deepseek_v3": ("671B", "37B", 671_026_419_200, None),
    "kimi_k2": ("1040B", "32.6B", None, None),
    "olmoe_1b_7b": ("6.9B", "1.3B", 6_919_161_856, 1_282_017_280),
    "qwen3_30b_a3b": ("30.5B", "3.3B", 30_532_122_624, None),
    "qwen1_5_moe_a2_7b": ("14.3B", "2.7B", 14_315_784_192, None),
    "gpt_oss_20b": ("20.91B", "3.61B", 20_914_757_184, 3_608_307_264 + _GPT_OSS_TABLE),
    "gpt_oss_120b": ("116.83B", "5.13B", 116_829_156_672, 5_132_849_472 + _GPT_OSS_TABLE),
    "t5:base": ("223M", "223M", 222_903_552, 222_903_552),
    "t5:large": ("739M", "739M", 737_668_096, 737_668_096),
    "t5:v1_1-small": ("77M", "77M", 76_961_152, 76_961_152),
    "t5:v1_1-base": ("248M", "248M", 247_577_856, 247_577_856),
    "t5:v1_1-large": ("783M", "783M", 783_150_080, 783_150_080),
    "t5:v1_1-xl": ("2.8B", "2.8B", 2_849_757_184, 2_849_757_184),
    "t5:v1_1-xxl": ("11B", "11B", 11_135_332_352, 11_135_332_352),
    "switch_transformers:base-8": ("-", "223-225M", 619_339_008, None),
    "switch_transformers:base-16": ("1.1B", "223-225M", 1_072_397_568, None),
    "switch_transformers:base-32": ("2.0B", "223-225M", 1_978_514_688, None),
    "switch_transformers:base-64": ("3.8B", "223-225M", 3_790_748_928, None),
    "switch_transformers:base-128": ("7.4B", "223-225M", 7_415_217_408, None),
    "switch_transformers:base-256": ("14.7B", "223-225M", 14_664_154_368, None),
    "switch_transformers:large": ("26B", "-", None, None),
    "switch_transformers:large-released": ("26B", "-", None, None),
    "switch_transformers:xxl": ("395B", "-", None, None),
    "switch_transformers:xxl-released": ("395B", "-", None, None),
    "switch_transformers:c": ("1571B", "1.7B", 1_571_308_972_448, 1_728_326_048),
    "switch_transformers:c-released": ("1571B", "1.7B", None, None),
    "st_moe:l": ("4.1B", "-", None, None),
    "st_moe:32b": ("269B", "-", None, None),
    **{
        f"gshard_translation:{size}": (total, "-", None, None)
        for size, total in (
            *(("128e12l", "12.5B"), ("512e12l", "50B"), ("2048e12l", "200B")),
            *(("128e36l", "37B"), ("512e36l", "150B"), ("2048e36l", "600B")),
        )
    },
}


def main() -> None:
    """Print the table; exit code 1 if a count that must be exact is not."""
    from moe.config import load_python_file
    from moe.config.parse import from_config_dict
    from moe.models.flops import count_parameters

    print(f"{'config':34} {'total':>19} {'active':>16} {'published':>16}  exact")
    wrong = False
    for name, (total_text, active_text, exact_total, exact_active) in PUBLISHED.items():
        module, _, size = name.partition(":")
        get_config = load_python_file(shipped.CONFIGS / f"{module}.py").get_config
        total, active = count_parameters(from_config_dict(get_config(size) if size else get_config()).model)
        checks = [ours == theirs for ours, theirs in ((total, exact_total), (active, exact_active)) if theirs]
        if checks:
            verdict = "yes" if all(checks) else f"NO: {exact_total:,} / {exact_active or 0:,}"
        else:
            deviation = total / (float(total_text.rstrip("B")) * 1e9) - 1
            checks = [abs(deviation) < MOST]
            verdict = f"{'' if all(checks) else 'NO: '}{deviation:+.1%}"
        wrong |= not all(checks)
        print(f"{name:34} {total:>19,} {active:>16,} {total_text + ' / ' + active_text:>16}  {verdict}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    cli.run(
        main,
        examples=(
            "python scripts/count_params.py",
            "python scripts/count_params.py | grep mixtral",
        ),
    )
