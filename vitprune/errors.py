"""What can go wrong, and whose turn it is.

VitpruneError
├── InputError             what the user gave cannot be used: the message says where, what, and what would be right
│   └── NotSupported       the model or method asked for has a part that this package does not handle
├── MissingError           the machine lacks something: the message names the command that brings it
├── DamagedFile            a file is cut off or is not the one its manifest names
└── BudgetUnreachable      no plan within what may be pruned meets the budget
"""

from __future__ import annotations


class VitpruneError(Exception):
    """Root of all errors that a caller may want to catch; the text is one or two sentences for its reader."""


class InputError(VitpruneError):
    """What the user gave cannot be used."""


class NotSupported(InputError):
    """A model or method with a part that this package does not handle."""


class MissingError(VitpruneError):
    """The machine lacks a package, a device or disk space."""


class DamagedFile(VitpruneError):
    """A file is cut off, or is not the one that its manifest names."""


class BudgetUnreachable(VitpruneError):
    """No plan within what may be pruned meets the budget.

    Attributes:
        fastest_ms: the least latency that any plan is predicted to reach, in milliseconds.
    """

    def __init__(self, message: str, fastest_ms: float) -> None:
        super().__init__(message)
        self.fastest_ms = fastest_ms
