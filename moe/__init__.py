"""Mixture-of-Experts language models in JAX and Flax NNX, sharded by annotation."""
