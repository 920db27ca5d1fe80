"""Text, infilling, likelihood and choices of a trained run: `python examples/trained.py runs/quickstart`."""

import sys

import diffrwkv

run = diffrwkv.load(sys.argv[1])  # once: it keeps what is compiled for it

done = diffrwkv.generate(run, ["the ", "an "], max_new_tokens=12, num=2, seed=1)
print(len(done.texts), "texts:", done.tokens.shape, done.lengths.shape, done.passes.shape)

filled = diffrwkv.generate(run, infill="if the ____ is", sampler="confidence", num_steps=4)
print(len(filled.texts[0]), "characters, between what was given:", filled.texts[0][:7] == "if the ")

for score in diffrwkv.score(run, ["the first text", "another one"], draws=8):
    print(score.tokens, "tokens, a bound with its error:", score.nats > 0 < score.error)

question = {"query": "the end of a line is", "choices": [" a newline", " a horse"], "gold": 0}
(choice,) = diffrwkv.choose(run, [question], draws=8)
print("picked one of", len(choice.nats), "by their nats:", choice.picked in (0, 1))
