"""Causal attention on packed qkv: forward.py and backward.py hold its device code, decode.py that of generation, op.py
what people call."""

from .op import attention, cached_attention, qkv_attention

__all__ = ["attention", "cached_attention", "qkv_attention"]
