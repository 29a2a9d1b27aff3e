"""Checkpoints: writing, verifying and reading them, and the workdir around them."""
