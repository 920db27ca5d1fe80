"""Processes: what noise is, and what a network's output means. One file and one line here for each."""

from diffrwkv.diffusion.processes.base import Process, Reversible, Scheduled, Scored, Vocabulary
from diffrwkv.diffusion.processes.flow import Flow
from diffrwkv.diffusion.processes.hybrid import Hybrid
from diffrwkv.diffusion.processes.masked import Masked
from diffrwkv.diffusion.processes.next_token import NextToken
from diffrwkv.diffusion.processes.token_masked import TokenMasked
from diffrwkv.diffusion.processes.uniform import Uniform

PROCESSES = {
    "flow": Flow,
    "hybrid": Hybrid,
    "masked": Masked,
    "next_token": NextToken,
    "token_masked": TokenMasked,
    "uniform": Uniform,
}

__all__ = [
    "PROCESSES",
    "Flow",
    "Hybrid",
    "Masked",
    "NextToken",
    "Process",
    "Reversible",
    "Scheduled",
    "Scored",
    "TokenMasked",
    "Uniform",
    "Vocabulary",
]
