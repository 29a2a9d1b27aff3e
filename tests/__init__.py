"""Tests; moe/conformance/reference.py is the per-token oracle."""
