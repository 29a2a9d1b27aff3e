"""Whole models, their caches and their arithmetic."""
