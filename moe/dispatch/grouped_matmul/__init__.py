"""Matmuls of rows sorted by expert, one file per backend."""
