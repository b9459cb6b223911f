"""The files of a release: written once, continued after a kill, published whole or not at all."""
