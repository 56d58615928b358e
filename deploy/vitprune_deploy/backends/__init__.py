"""Runtimes, one a file; the file name is what a profile calls ``runtime.name``."""
