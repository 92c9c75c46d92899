"""Whether two checkpoints hold the same: value by value (`values`), by digest, and by what they compute (`forward`)."""

from converters.verify.values import fingerprint

__all__ = ["fingerprint"]
