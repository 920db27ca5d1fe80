"""What stands around WKV-7 in RWKV-7's time mix: token shift, the operator's inputs, and what becomes of its output."""

from pallas_kernels.time_mix.api import IMPLEMENTATIONS, channel_shift, finish, operands, token_mixes
from pallas_kernels.time_mix.low_rank import LowRank

__all__ = ["IMPLEMENTATIONS", "LowRank", "channel_shift", "finish", "operands", "token_mixes"]
