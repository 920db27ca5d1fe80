"""WKV-7, the recurrence of RWKV-7."""

from pallas_kernels.wkv7.api import IMPLEMENTATIONS, wkv7, wkv7_bidirectional, wkv7_blocks

__all__ = ["IMPLEMENTATIONS", "wkv7", "wkv7_bidirectional", "wkv7_blocks"]
