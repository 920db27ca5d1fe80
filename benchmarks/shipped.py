"""What the model in the package writes, how good that is, and how soon its first word stands: for its card.

    DIFFRWKV_DATA=... python -m benchmarks.shipped

Writes benchmarks/results/shipped.json. Prompt i is continued with seed i by the model's own sampler: the texts are not
chosen. A word is a run of letters and apostrophes behind the prompt, the last of a text (it may be cut) left out; it
is known if the training text has it twice or more. The judge and the bound are programs that a user runs; the real
text beside the samples is the validation text. The time to the first word is that of a new process, from its start to
the first character behind the prompt on its standard output, the least and the most of some starts, without a
compilation cache. The text of training is needed, as experiments/books.py has it.

    python -m benchmarks.shipped --tried runs/books-ar runs/books ...

adds what runs on the way to them came to, from their workdirs alone, to benchmarks/results/shipped_tried.jsonl.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

from benchmarks.measure import RESULTS, ROOT, append, commit
from diffrwkv import config, generation, shipped
from diffrwkv.run import load_data
from diffrwkv.timing import cpu_name
from diffrwkv.workdir import read_metrics

PROMPTS = (
    "It was a dark",
    "The old man looked at",
    '"I do not think,"',
    "She had never seen",
    "In the morning",
    "The door opened, and",
    "He was a tall",
    "They went down to the sea",
    "My father used to say",
    "At the end of the street",
)
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)*")
MODEL, JUDGE = "books", "books-ar"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--starts", type=int, default=3, help="of the program, each way, to time the first word")
    p.add_argument("--tokens", type=int, default=96, help="behind each prompt")
    p.add_argument("--num", type=int, default=64, help="samples for the judge")
    p.add_argument("--limit", type=int, default=512, help="sequences of the validation text")
    p.add_argument("--tried", nargs="+", type=pathlib.Path, metavar="WORKDIR", help="runs to tell of, and no more")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS / "shipped.json")
    args = p.parse_args()
    if args.tried:
        for workdir in args.tried:
            append(RESULTS / "shipped_tried.jsonl", tried(workdir))
        return
    run = generation.load(MODEL)
    data = load_data(run.config, tokenizer=run.tokenizer)
    known = vocabulary(data)
    texts, words = [], collections.Counter()
    for seed, prompt in enumerate(PROMPTS):
        (text,) = generation.generate(run, prompt, max_new_tokens=args.tokens, seed=seed).texts
        found = words_of(text, prompt)
        right = sum(word in known for word in found)
        texts.append({"prompt": prompt, "seed": seed, "text": text, "words": len(found), "known": right})
        words.update(all=len(found), known=right)
    real = real_words(data, known, words["all"])
    bound = ("--draws=2", f"--limit={args.limit}")
    bounds = {name: evaluated(f"--model={name}", *bound) for name in (MODEL, JUDGE)}
    bounds[f"{MODEL}, whole texts"] = evaluated(f"--model={MODEL}", *bound, "--block_size=0")
    judged = evaluated("--suite=samples", f"--model={MODEL}", f"--judge={JUDGE}", f"--num={args.num}", "--length=128")
    row = {
        "models": {name: size(name) for name in shipped.MODELS},
        "prompts": texts,
        "tokens": args.tokens,
        "words_known": words["known"] / words["all"],
        "words": words["all"],
        "real_words_known": real,
        "vocabulary": len(known),
        "bounds": {name: told(result) for name, result in bounds.items()},
        "judged": {key: judged[key] for key in ("sampler", "num", "length", "judge", "samples", "text")},
        "infill": infilled(run),
        "first_word_seconds": {
            "sample": first_word(args.starts),
            "sample --stream": first_word(args.starts, "--stream", "--length=128"),
        },
        "device": f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}",
        "commit": commit(),
        "command": "python -m benchmarks.shipped",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(row, indent=2) + "\n")
    print(json.dumps(row, indent=2))


def tried(workdir):
    """A run's curve of validation over steps, and what it was."""
    cfg, lines = config.load(workdir / "config.json"), read_metrics(workdir / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    seen = [[line["step"], line["val/nelbo"], line["val/bpc"]] for line in lines if "val/nelbo" in line]
    return {
        "run": workdir.name,
        "date": time.strftime("%Y-%m-%d", time.gmtime((workdir / "metrics.jsonl").stat().st_mtime)),
        "pattern": cfg.model.pattern,
        "blocks": list(cfg.layouts.blocks.sizes) if cfg.diffusion.layout == "blocks" else [],
        "learning_rate": cfg.optim.learning_rate,
        "adapted": cfg.train.init_from is not None,
        "steps": steps[-1],
        "planned_steps": cfg.train.num_steps,
        "curve": seen,
        "tokens_per_second": statistics.median(x["tokens_per_second"] for x in lines if "tokens_per_second" in x),
        "device": f"1 core of {cpu_name()}",
        "commit": commit(),
        "command": "python -m benchmarks.shipped --tried",
    }


def vocabulary(data):
    """Words of the training text that stand in it twice or more, in lower case."""
    counts = collections.Counter()
    for i in range(len(data.train)):  # a row's first word may be cut too
        counts.update(words_of(data.tokenizer.decode(data.train[i]))[1:])
    return {word for word, count in counts.items() if count > 1}


def words_of(text, prompt=""):
    """In lower case; the last of them may be cut, and is left out."""
    return [word.lower() for word in WORD.findall(text[len(prompt) :])[:-1]]


def real_words(data, known, number):
    """The share of as many words of the validation text that are known."""
    rows, words = data.validation, []
    for i in range(0, len(rows), max(1, len(rows) // 64)):
        words += words_of(data.tokenizer.decode(rows[i]))[1:]
    return sum(word in known for word in words[:number]) / len(words[:number])


def infilled(run):
    """Blanks of templates filled with both sides in view."""
    templates = ("He opened the __ and looked out.", "She was the __ of the old king.", "It was __ o'clock when")
    done = generation.generate(run, infill=templates, block_size=0, seed=0)
    return [{"template": t, "text": text} for t, text in zip(templates, done.texts, strict=True)]


def told(result):
    keys = ("nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "ppl", "tokens", "draws", "sequences", "block_size")
    return {key: result[key] for key in keys if key in result}


def size(name):
    folder = shipped.FOLDER / name
    weights = folder / "model.safetensors"
    return {"bytes": sum(path.stat().st_size for path in folder.iterdir()), "weights_bytes": weights.stat().st_size}


def evaluated(*flags):
    """What python -m diffrwkv.evaluate prints."""
    command = [sys.executable, "-m", "diffrwkv.evaluate", *flags]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def first_word(starts, *flags):
    """[least, most] seconds from a process's start to the first character of its continuation."""
    prompt = PROMPTS[0]
    command = [sys.executable, "-m", "diffrwkv.sample", f"--model={MODEL}", f"--prompt={prompt}", *flags]
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    seconds = []
    for _ in range(starts):
        begun, printed = time.perf_counter(), b""
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while not re.search(re.escape(prompt.encode()) + rb".*\w\W", printed, re.DOTALL):
                piece = os.read(process.stdout.fileno(), 4096)
                assert piece, f"{command} ended before a word: {printed}"
                printed += piece
            seconds.append(time.perf_counter() - begun)
            process.terminate()
    return [min(seconds), max(seconds)]


if __name__ == "__main__":
    main()
