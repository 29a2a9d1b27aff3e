"""Text: where it comes from (`corpora`), how it becomes token ids (`tokenizer`) and rows of a batch (`pipeline`)."""
