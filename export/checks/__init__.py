"""`export verify`: a release held to its manifest, its checkpoint and to transformers."""
