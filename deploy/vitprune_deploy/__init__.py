"""Measure, prune, export, build, validate and run Vision Transformers on a device. Importing this imports no torch."""
