"""Latents to pixels and back: in one piece, by exact rows and strips, or in tiles."""
