"""Grouped matmul: rows sorted by expert, one file per backend."""
