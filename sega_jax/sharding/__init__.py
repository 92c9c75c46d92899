"""Work on several devices, or on one that is too small: meshes and the exact decode."""
