"""The command line: which programs there are, how one starts, and how it ends.

`diffrwkv NAME ...` and `python -m diffrwkv.NAME ...` are one program, in two modules. `cli/NAME.py` reads its flags
(`parse_arguments`), looks for what else can be wrong (`check`) and imports no JAX: a slip is told at once, and so is
--help. `diffrwkv/NAME.py` then does the work (`work`). This package knows no program but by name.
"""

import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import diffrwkv
from diffrwkv import signals

PROGRAMS = {
    "prepare": "text to tokenised shards, for data that are used often",
    "train": "trains a denoiser: an experiment into a workdir",
    "plan": "what an experiment needs: parameters, memory, operations, without running it",
    "evaluate": "how likely a run finds texts, how good its samples are, what it answers",
    "sample": "text from a run",
    "compare": "several runs in one table and one plot",
    "profile": "how fast each denoiser is on this device",
    "convert": "weights of the original authors' models, into a workdir and back",
    "lm_eval": "a run in EleutherAI's lm-evaluation-harness",
}
USAGE = "usage: diffrwkv PROGRAM [flags], or python -m diffrwkv.PROGRAM [flags]"


def main() -> NoReturn:
    """`diffrwkv PROGRAM ...` and `python -m diffrwkv PROGRAM ...`."""
    signals.end_at_once()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        width = max(map(len, PROGRAMS))
        print(f"{USAGE}\n\n{diffrwkv.__doc__.split(chr(10))[0]}\n")
        print("\n".join(f"  {program:{width}}  {what}" for program, what in PROGRAMS.items()))
        print("\nEach tells its flags by --help; train --list names the experiments.")
        sys.exit()
    if name == "--version":
        print(f"diffrwkv {diffrwkv.__version__}")
        sys.exit()
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), PROGRAMS, n=2)
        told = f"Did you mean: {', '.join(near)}?" if near else f"There are {', '.join(PROGRAMS)}."
        print(f"error: No program is called {name!r}. {told}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"diffrwkv {name}", *rest]
    start(name)


def start(name: str) -> NoReturn:
    """Runs the program on the command line: its flags are read, and only then its module is imported, JAX with it."""

    def work(arguments: list[str] | None) -> None:
        signals.end_at_once()  # while modules are imported
        flags = importlib.import_module(f"diffrwkv.cli.{name}")
        args = flags.parse_arguments(arguments)
        flags.check(args)
        program = importlib.import_module(f"diffrwkv.{name}")
        signals.interrupt()
        program.work(args)

    run_program(work)
    sys.exit()


def called(name: str) -> str:
    """How the program was started, or would be: "diffrwkv train", "python -m diffrwkv.train"."""
    ours = f"diffrwkv {name}"
    return ours if sys.argv[0] == ours else f"python -m diffrwkv.{name}"


def use_huge_pages() -> None:
    """Starts this program anew with glibc's allocator on huge pages (Linux, once; does nothing elsewhere).

    XLA's CPU client allocates a step's buffers and gives them back, so every step touches fresh memory: with pages of
    4 KiB a training step of experiments/peer_shakespeare.py spent a third of its time in page faults
    (benchmarks/results/train_step_cpu.jsonl). glibc reads the setting at start only, hence the exec: same process id,
    same arguments. A GLIBC_TUNABLES that already speaks of hugetlb is left alone.

    XLA is asked as well to schedule for little memory: by itself it orders a program for more threads than it then
    gives it, and a training step of the peers' size holds a third more. (As an option of a single jit, jax 0.10.2 takes
    the flag and does not heed it.) An XLA_FLAGS that speaks of this scheduler is left alone.
    """
    tunables, flags = os.environ.get("GLIBC_TUNABLES", ""), os.environ.get("XLA_FLAGS", "")
    if not sys.platform.startswith("linux") or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    if "xla_cpu_enable_concurrency_optimized_scheduler" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_enable_concurrency_optimized_scheduler=false".strip()
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# What the place that files are written to lacks: the user's to mend, in any program.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def run_program(main: Callable[[list[str] | None], None]) -> None:
    """Runs `main(None)` on huge pages and exits: status 2 after a UserError, or when a file cannot be read or written
    for want of room or permission, with one line on stderr; 143 after SIGTERM and 130 after SIGINT, where `main` does
    not take them, with a word.
    """
    use_huge_pages()
    signals.interrupt()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not all of Unicode
    try:
        from diffrwkv.config import UserError  # here, behind the new start
    except KeyboardInterrupt as e:
        _end(e)
    try:
        main(None)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in _NO_ROOM:
            raise
        print(f"error: {e.strerror}: {e.filename or 'a file could not be written'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        _end(e)


def _end(error: KeyboardInterrupt) -> NoReturn:
    text, status = signals.told(error)
    print(text, file=sys.stderr)
    sys.exit(status)
