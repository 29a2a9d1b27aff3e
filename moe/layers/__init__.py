"""Layers of a Transformer block."""
