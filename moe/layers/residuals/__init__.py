"""Residual streams: how the parts of a block read and write what passes from layer to layer."""
