"""The machine: caches, and what a measurement was made with."""
