"""Ahead-of-time compilation of the train step for absent accelerators, and estimates from the compiled program."""
