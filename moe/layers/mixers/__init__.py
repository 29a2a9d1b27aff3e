"""Layers of token mixers, one file per mixer (:mod:`moe.config.mixers` has their values)."""
