"""Losses on answers instead of texts: preferences (DPO), and rewards of sampled answers (GRPO).

The trainer takes them as the objective of a program.
"""

from moe.posttraining.programs import make_program

__all__ = ["make_program"]
