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
        self._draws: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def add(self, nats: ArrayLike, tokens: ArrayLike, *, draw: int = 0, times: ArrayLike | None = None) -> None:
        """Adds a batch to a draw. Sequences without a token (fillers of a last batch) do not count.

        Args:
          nats: [B], nats of each sequence, as in `Loss`.
          tokens: [B], valid tokens of each sequence.
          draw: which draw it belongs to.
          times: [B], where the draw spreads the times evenly over its sequences, in an order that is random: what the
            time alone explains cancels, and is no error. None: they are independent.
        """
        nats, tokens = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
        times = np.full_like(nats, np.nan) if times is None else np.asarray(times, np.float64)
        if nats.ndim != 1 or nats.shape != tokens.shape or nats.shape != times.shape:
            raise ValueError(
                f"Likelihood.add needs nats, tokens and times of one shape [B], got {nats.shape}, {tokens.shape} and "
                f"{times.shape}."
            )
        real = tokens > 0
        batches = self._draws.setdefault(draw, [])
        batches.append((nats[real], tokens[real], times[real]))

    def result(self, characters_per_token: float = 1.0) -> dict[str, Any]:
        """The mean over draws and tokens, with its errors.

        Two different errors, both standard errors of `nelbo`:
          nelbo_se_draws: of the Monte Carlo estimate, the text being fixed: how much the number
            would move with another seed. From the variance of each sequence's nats over the draws,
            without the part that `times` explain. None if there is one draw only, which shows no
            such variance.
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
        if any(c.shape != tokens.shape or (c != tokens).any() for _, c, _ in each):
            raise ValueError("The draws do not cover the same sequences in the same order, so they cannot be averaged.")
        nats, times = np.stack([n for n, *_ in each]), np.stack([t for *_, t in each])
        draws, sequences, total = len(nats), len(tokens), float(tokens.sum())
        if not sequences:
            raise ValueError("Likelihood saw no valid token: the validation set is empty.")
        nelbo = float(nats.sum()) / draws / total
        noise = text = None
        if sequences > 1:
            residual = nats.mean(axis=0) - nelbo * tokens
            text = math.sqrt(sequences / (sequences - 1) * np.square(residual).sum()) / total
        if draws > 1:
            noise = math.sqrt(_variance(nats, times) / draws) / total
        return {
            **metrics(nelbo, characters_per_token),
            "nelbo_se_draws": noise,
            "nelbo_se_text": text,
            "draws": draws,
            "tokens": int(total),
            "sequences": sequences,
        }


MOST_TERMS = 6  # of a polynomial: the loss is a smooth function of the time


def _variance(nats: np.ndarray, times: np.ndarray) -> float:
    """The variance of the sum of one draw's nats: float64 [D, n], and the times [D, n], NaN for independent ones.

    Even times make a draw a Latin hypercube: the nats of a sequence at a time are taken as a part of the sequence, a
    part of the time, and a rest, and the variance is that of the rest alone (Stein, Technometrics 29, 1987). The part
    of the time is a polynomial of which nth of all times it is, fitted beside the sequences' own means: what a time
    does within its nth does not cancel.
    """
    draws, sequences = nats.shape
    freedom = sequences * (draws - 1)
    terms = 0 if np.isnan(times).any() else min(sequences - 1, MOST_TERMS, freedom // 4)
    rest = nats - nats.mean(axis=0)
    if terms:
        nth = (times.argsort(axis=1).argsort(axis=1) + 0.5) / sequences
        powers = np.polynomial.legendre.legvander(2 * nth - 1, terms)[..., 1:]
        powers = (powers - powers.mean(axis=0)).reshape(-1, terms)
        rest = rest.ravel() - powers @ np.linalg.lstsq(powers, rest.ravel())[0]
    return float(np.square(rest).sum()) / (draws - 1) * freedom / (freedom - terms)
