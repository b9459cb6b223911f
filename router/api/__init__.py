"""Translators between what clients speak and what the session machine speaks; pure, one module a dialect."""
