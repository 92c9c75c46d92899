"""Output files appear whole or not at all (shared with `converters`)."""

from converters.files import atomic_path

__all__ = ["atomic_path"]
