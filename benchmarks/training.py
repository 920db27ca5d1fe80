"""`diffrwkv.train` for so many seconds: its metrics as rows, each added when it is measured.

    python -m benchmarks.training --seconds 60 --limit 100 --out train.jsonl --workdir /tmp/w -- --config=X.py:birwkv

The seconds count from the first line of metrics on, so compilation is not among them; the limit counts from the start.
Then the program is killed, and the workdir is the caller's to delete. A row has what metrics.jsonl has (tokens per
second and MFU; the validation NELBO and the tokens seen until then) and where it was measured. Exits 1 where there was
none. Where others use the device too (benchmarks/turns.py), the program stands still behind its first line of metrics
until its turn; the line after it, whose time has the wait in it, gets no row.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time

from benchmarks import turns
from benchmarks.measure import append, origin


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")
    p.add_argument("--workdir", type=pathlib.Path, required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("options", nargs="+", help="of diffrwkv.train")
    args = p.parse_args()
    turns.compiling()
    command = [sys.executable, "-m", "diffrwkv.train", f"--workdir={args.workdir}", *args.options]
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        rows = follow(process, args)
    finally:
        process.kill()
        process.wait()
    return None if rows else "training left no metrics"


def follow(process, args):
    """Adds a row for each line of metrics until the time is over; how many there were."""
    path = args.workdir / "metrics.jsonl"
    limit = time.monotonic() + args.limit

    def lines():
        return path.read_text().split("\n")[:-1] if path.exists() else []

    while not lines() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    with turns.alone() as waited:
        skipped = len(lines()) if waited else None
        process.send_signal(signal.SIGCONT)
        end = min(limit, time.monotonic() + args.seconds)
        rows, where = 0, None
        while True:
            ended = process.poll() is not None
            new = list(enumerate(lines()))[rows:]
            for i, line in new:
                where = where or origin()  # late: nothing else is to be on the card while training starts
                if i != skipped:
                    append(args.out, json.loads(line) | {"options": args.options} | where)
            rows += len(new)
            if ended or time.monotonic() > end:
                return rows
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
