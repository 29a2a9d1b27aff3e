"""Suites for moe ablate: each file has get_suite(size)."""
