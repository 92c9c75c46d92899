"""Checkpoint conversion: formats, key maps as data, streaming.  Imports neither sega_jax nor jax."""
