"""Weights: found on disk or on the hub, read, and changed by LoRAs."""
