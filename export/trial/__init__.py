"""A written release is run on this machine: invariance, golden prompts, quality."""
