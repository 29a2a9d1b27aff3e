"""The judge of an MoE layer and of a training step: rules, equations, known deviations, diagnosis.

Also the distribution ``moe-conform``, where this folder is the package ``moe_conform``: it imports its own modules,
NumPy and JAX only.
"""
