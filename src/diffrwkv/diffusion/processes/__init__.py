"""Processes: what noise is, and what a network's output means. One file and one line here for each."""

from diffrwkv.diffusion.processes.base import Process, Reversible, Scored, Vocabulary
from diffrwkv.diffusion.processes.flow import Flow
from diffrwkv.diffusion.processes.masked import Masked
from diffrwkv.diffusion.processes.next_token import NextToken
from diffrwkv.diffusion.processes.token_masked import TokenMasked
from diffrwkv.diffusion.processes.uniform import Uniform

PROCESSES = {
    "flow": Flow,
    "masked": Masked,
    "next_token": NextToken,
    "uniform": Uniform,
}

__all__ = [
    "PROCESSES",
    "Flow",
    "Masked",
    "NextToken",
    "Process",
    "Reversible",
    "Scored",
    "TokenMasked",
    "Uniform",
    "Vocabulary",
]
