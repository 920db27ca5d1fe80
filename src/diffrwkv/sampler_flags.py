"""The sampler that flags ask for: those of `cli.sampler_flags`, for every program that generates."""

import argparse
from typing import Any

from diffrwkv import generation
from diffrwkv.cli.sampler_flags import OPTIONS
from diffrwkv.diffusion import samplers
from diffrwkv.run import Run


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, for `generation.build_sampler`."""
    return {k: v for k in OPTIONS if (v := getattr(args, k)) is not None} | args.set


def build(args: argparse.Namespace, run: Run, **more: Any) -> samplers.Sampler:
    """The sampler that the flags ask for.

    Args:
      more: other arguments of `generation.build_sampler`.

    Raises UserError for one that does not fit the run.
    """
    return generation.build_sampler(
        run.config,
        run.objective,
        name=args.sampler,
        block_size=args.block_size,
        frozen_cache=args.frozen_cache,
        stop_id=run.tokenizer.eos_id if args.stop_at_eos else None,
        **changes(args),
        **more,
    )
