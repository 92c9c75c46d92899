"""Model families: what is a family's own, as data and small functions."""
