"""Work on several devices, or on one that is too small: meshes and the exact decode."""

from sega_jax.sharding.mesh import make_mesh, resolve_mesh

__all__ = ["make_mesh", "resolve_mesh"]
