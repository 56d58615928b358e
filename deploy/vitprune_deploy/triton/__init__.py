"""Model repositories for NVIDIA's Triton Inference Server, made of the folders that builds leave.

Checked against Triton's own schema of a model configuration, and the files that it names against the build's; the
server itself has not been run by us.
"""

from .repository import Written, write_repository

__all__ = ["Written", "write_repository"]
