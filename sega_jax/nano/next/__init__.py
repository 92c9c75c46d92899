"""The world of nano's coming weights: its grammar, renderer and checker, beside those of the weights that ship.

A canvas is filled: one to three objects on a textured ground.  `sega_jax.training` trains on it; when weights are at
least as good as the shipped ones, these modules take the place of their namesakes in `sega_jax.nano`.
"""
