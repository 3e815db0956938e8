"""The errors that nsk raises on purpose."""

from __future__ import annotations


class UnsupportedInput(ValueError):
    """An argument that no backend takes. The message names it, says what was given and what is taken."""


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot serve the call.

    Attributes:
        reasons: why, one sentence each.
    """

    def __init__(self, backend: str, reasons: list[str]):
        self.backend = backend
        self.reasons = list(reasons)
        super().__init__(f"backend {backend!r} cannot serve this call: " + "; ".join(reasons))
