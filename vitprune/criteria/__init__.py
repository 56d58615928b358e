"""Importance criteria for heads and MLP units, one a file; a profile names them in ``width.criterion``."""
