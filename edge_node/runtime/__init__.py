"""The child process: the only place where a model runs."""
