"""Text data: datasets and folders, tokenizers, and batches of packed rows."""
