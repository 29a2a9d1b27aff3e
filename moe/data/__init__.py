"""Text: `corpora`, `datasets` and `folders` of it, token ids (`tokenizer`), and rows of a batch (`pipeline`)."""
