"""SSD, the recurrence of Mamba-2."""

from pallas_kernels.ssd.api import IMPLEMENTATIONS, ssd, ssd_blocks

__all__ = ["IMPLEMENTATIONS", "ssd", "ssd_blocks"]
