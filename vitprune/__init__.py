"""Prune Vision Transformers against a latency budget measured on the device. Importing this imports no torch."""

__version__ = "0.1.0"
