"""Masked diffusion language models with a linear-cost denoiser."""

__version__ = "0.1.0"
