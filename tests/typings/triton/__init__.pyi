"""Triton's top level without types: its own has a call of a jit function return never, so that what follows the call
was not checked. triton.language keeps its types."""

from typing import Any

def __getattr__(name: str) -> Any: ...
