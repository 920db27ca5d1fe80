"""From draws of the NELBO to the numbers in a table. Host side, float64."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def metrics(nats_per_token: float, characters_per_token: float = 1.0) -> dict[str, float]:
    """The one place where nats become other units.

    Args:
      nats_per_token: the NELBO.
      characters_per_token: of the text that was scored, under the tokenizer that scored it.

    Returns:
      {"nelbo": nats per token, "bpc": bits per character, "ppl": exp(nelbo), a bound on the
      perplexity per token}.
    """
    if not characters_per_token > 0:
        raise ValueError(f"characters_per_token must be positive, got {characters_per_token}.")
    nats = float(nats_per_token)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(nats))
    return {
        "nelbo": nats,
        "bpc": nats / math.log(2) / float(characters_per_token),
        "ppl": perplexity,
    }


class Likelihood:
    """Gathers the nats of every sequence, in one or more draws over the same sequences.

    likelihood = Likelihood()
    for draw in range(8):
        for batch in batches:  # the same batches in the same order for each draw
            loss = objective.loss(...)
            likelihood.add(loss.nats, loss.tokens, draw=draw)
    json.dump(likelihood.result(characters_per_token), file)
    """

    def __init__(self):
        self._draws: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, nats: ArrayLike, tokens: ArrayLike, *, draw: int = 0) -> None:
        """Adds a batch to a draw. Sequences without a token (fillers of a last batch) do not count.

        Args:
          nats: [B], nats of each sequence, as in `Loss`.
          tokens: [B], valid tokens of each sequence.
          draw: which draw it belongs to.
        """
        nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
        if nats.ndim != 1 or nats.shape != tokens.shape:
            raise ValueError(
                f"Likelihood.add needs nats and tokens of one shape [B], got {nats.shape} and {tokens.shape}."
            )
        real = tokens > 0
        batches = self._draws.setdefault(draw, [])
        batches.append((nats[real], tokens[real]))

    def result(self, characters_per_token: float = 1.0) -> dict[str, Any]:
        """The mean over draws and tokens, with its errors.

        Two different errors, both standard errors of `nelbo`:
          nelbo_se_draws: of the Monte Carlo estimate, the text being fixed: how much the number
            would move with another seed. From the variance of each sequence's nats over the draws.
            It takes sequences as independent, so with low-discrepancy times it errs on the large
            side. None if there is one draw only, which shows no such variance.
          nelbo_se_text: of the text, its sequences being a sample of a longer one: how much the
            number would move with other validation text (and noise). From the spread of the
            sequences' means about the total. None if there is one sequence only.

        Returns:
          {"nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "ppl", "draws", "tokens", "sequences"};
          "tokens" counts each validation token once.
        """
        if not self._draws:
            raise ValueError("Likelihood has no draw yet: call add first.")
        each = [[np.concatenate(x) for x in zip(*self._draws[draw], strict=True)] for draw in sorted(self._draws)]
        tokens = each[0][1]
        if any(c.shape != tokens.shape or (c != tokens).any() for _, c in each):
            raise ValueError("The draws do not cover the same sequences in the same order, so they cannot be averaged.")
        nats = np.stack([n for n, _ in each])
        draws, sequences, total = len(nats), len(tokens), float(tokens.sum())
        if not sequences:
            raise ValueError("Likelihood saw no valid token: the validation set is empty.")
        nelbo = float(nats.sum()) / draws / total
        noise = text = None
        if sequences > 1:
            residual = nats.mean(axis=0) - nelbo * tokens
            text = math.sqrt(sequences / (sequences - 1) * np.square(residual).sum()) / total
        if draws > 1:
            noise = math.sqrt(nats.var(axis=0, ddof=1).sum() / draws) / total
        return {
            **metrics(nelbo, characters_per_token),
            "nelbo_se_draws": noise,
            "nelbo_se_text": text,
            "draws": draws,
            "tokens": int(total),
            "sequences": sequences,
        }
