"""Checkpoints: every kind of file that weights and tokenizers come in, as one `Checkpoint`."""
