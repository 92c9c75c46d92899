"""``sega-jax generate`` from its requests to the files."""
