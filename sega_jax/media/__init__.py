"""Pictures and latents on disk."""
