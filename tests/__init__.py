"""Tests; tests/reference.py is the per-token oracle."""
