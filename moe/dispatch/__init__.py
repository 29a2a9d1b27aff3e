"""Dispatch of tokens to expert buffers and back."""
