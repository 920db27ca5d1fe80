"""How likely a run finds texts.

Prints the NELBO in nats per token of the run's own validation text, bits per character of what was scored and the bound
on perplexity, with what was counted and two standard errors, of the draws and of the text, and writes the same to
<workdir>/eval.json. With --data it does so for other texts, sets that others report or files, one after another, with
a line of JSON each. Each is kept in <workdir>/evaluations/, and the same command again goes on behind those that are
there. docs/evaluation.md says what the numbers mean.
"""

import argparse
import functools

from diffrwkv import cli, config
from diffrwkv.cli import runs
from diffrwkv.cli.suites.names import check_names, check_texts, with_names
from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.data import evaluation as texts
from diffrwkv.data.detokenizers import DETOKENIZERS


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(
        prog=cli.called("evaluate"),
        description=__doc__.split("\n\n")[1],
        epilog="--suite=NAME does something else, with flags of its own: see --suite=NAME --help.",
    )
    runs.add(p)
    p.add_argument("--draws", type=int, help="draws of (t, mask) per sequence (8)")
    p.add_argument("--split", choices=("validation", "test", "train"), help="of the data (validation, or the peers')")
    p.add_argument("--limit", type=int, help="only the first so many sequences")
    seed = functools.partial(config.seed, name="--seed")
    p.add_argument("--seed", type=seed, help="of the noise (0)")
    p.add_argument("--batch_size", type=int, help="sequences at a time (config.train.eval_batch_size)")
    p.add_argument("--block_size", type=int, help="block diffusion: tokens in a block; 0: all")
    p.add_argument("--data_root", help="folder of the data, if not the one of training")
    other = p.add_argument_group("other texts")
    other.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="NAME|PATH",
        help=f"{', '.join(texts.SETS)}; or a file, folder, pattern, hf:NAME",
    )
    other.add_argument(
        "--detokenizer", choices=tuple(DETOKENIZERS), help="of the text (the peers' for a named set, else none)"
    )
    wrapping = other.add_mutually_exclusive_group()
    wrapping.add_argument(
        "--wrap", action="store_true", default=None, help="rows between BOS and EOS (config.data.wrap)"
    )
    wrapping.add_argument("--no_wrap", dest="wrap", action="store_false", default=None, help="rows without")
    other.add_argument("--packing", choices=("concat", "document"), help="of documents into rows (config.data.packing)")
    other.add_argument("--length", type=int, help="tokens in a row (config.data.length)")
    other.add_argument("--group", type=int, help="drop the remainder of every so many documents (of all; peers: 1000)")
    other.add_argument("--no_eos", action="store_true", help="nothing stands between documents that are joined")
    other.add_argument("--each_line", action="store_true", help="each line of a text is a document")
    other.add_argument("--text_key", help="key or column of the text in JSON, csv and parquet (config.data.text_key)")
    args = p.parse_args(with_names(arguments))
    counts = ("draws", "limit", "batch_size", "length", "group")
    check_at_least_one(**{f"--{name}": getattr(args, name) for name in counts})
    if args.block_size is not None and args.block_size < 0:
        raise UserError(f"--block_size must be at least 0, got {args.block_size}.")
    if args.draws is not None and args.draws >= 2**31:
        raise UserError(f"--draws must be below {2**31}, got {args.draws}.")
    if args.data is None:
        alone = ("detokenizer", "wrap", "packing", "length", "group", "no_eos", "each_line", "text_key")
        if useless := [name for name in alone if getattr(args, name) not in (None, False)]:
            raise UserError(f"--{useless[0]} is of a text that --data names: name one.")
        if args.wrap is not None:
            raise UserError("--no_wrap is of a text that --data names: name one.")
    else:
        check_names(args.data)
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen without JAX. Raises UserError."""
    cfg = runs.check(args)
    check_texts(args.data or [], args.data_root or (None if cfg is None else cfg.data.root))
