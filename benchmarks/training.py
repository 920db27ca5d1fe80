"""`diffrwkv.train` for so many seconds: its metrics as rows, each added when it is measured.

    python -m benchmarks.training --seconds 60 --limit 100 --out train.jsonl --workdir /tmp/w -- --config=X.py:birwkv

The seconds count from the first line of metrics on, so compilation is not among them; the limit counts from the start.
Then the program is killed, and the workdir is the caller's to delete. A row has what metrics.jsonl has (tokens per
second and MFU; the validation NELBO and the tokens seen until then) and where it was measured. Exits 1 where there was
none.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time

from benchmarks.measure import append, origin


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")
    p.add_argument("--workdir", type=pathlib.Path, required=True)
    p.add_argument("--out", type=pathlib.Path, required=True)
    p.add_argument("options", nargs="+", help="of diffrwkv.train")
    args = p.parse_args()
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
    path, rows, where = args.workdir / "metrics.jsonl", 0, None
    limit, end = time.monotonic() + args.limit, float("inf")
    while True:
        ended = process.poll() is not None
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        for line in lines[rows:]:
            where = where or origin()  # late: nothing else is to be on the card while training starts
            append(args.out, json.loads(line) | {"options": args.options} | where)
        rows = len(lines)
        if rows and end == float("inf"):
            end = time.monotonic() + args.seconds
        if ended or time.monotonic() > min(end, limit):
            return rows
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
