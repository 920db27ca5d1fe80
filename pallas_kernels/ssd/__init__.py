"""SSD, the recurrence of Mamba-2."""

from pallas_kernels.ssd.api import IMPLEMENTATIONS, ssd

__all__ = ["IMPLEMENTATIONS", "ssd"]
