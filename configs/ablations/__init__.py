"""Suites for scripts/ablate.py: each file has get_suite(size)."""
