"""The score of any weights: the validation NELBO, always on the same text and under the same noise."""

from collections.abc import Callable, Mapping
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh

from diffrwkv import bars, config, data, sharding
from diffrwkv.config import UserError
from diffrwkv.data import Dataset
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion.likelihood import Likelihood
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.networks import network_fn


class Evaluator:
    """The NELBO of any weights on the same text under the same noise, so that two results compare.

    Times are low-discrepancy over all sequences of a draw, in an order of their own in each draw (a sequence's place in
    the text says nothing about its time). The noise depends on `seed`, the draw and the batch size, on nothing else.

    Args:
      batch_size: sequences at a time, over all devices.
      draws: independent (t, mask) per sequence.
      limit: only the first so many sequences; None or 0: all.
      padded: pass `valid` to the network.

    Attributes:
      num_sequences, num_draws: what a result is over.

    Raises ValueError for a split that the data set lacks, UserError for a part of one without a single character.
    """

    def __init__(
        self,
        model: Denoiser,
        objective: Objective,
        dataset: Dataset,
        mesh: Mesh,
        *,
        batch_size: int,
        draws: int = 1,
        limit: int | None = None,
        split: str = "validation",
        seed: int = 0,
        padded: bool = False,
    ):
        trained, objective = objective, objective.validation
        self._objective, self._dataset, self._mesh = objective, dataset, mesh
        self._batch_size, self.num_draws, self._key = batch_size, draws, jax.random.key(config.seed(seed))
        if objective.causal:  # no noise: every draw would be the same
            self.num_draws = 1
        self._batches = data.validation_batches(
            dataset,
            batch_size=batch_size,
            limit=limit or None,
            split=split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.num_sequences = self._batches.num_chunks
        first = objective.layout.keep_first
        self._characters, tokens = count_scored(dataset, split, self.num_sequences, keep_first=first)
        if not self._characters:
            raise UserError(
                f"The {self.num_sequences} sequences of the {split} split that are to be scored hold no character: "
                "score more of them (--limit, config.train.eval_limit)."
            )
        self._characters_per_token = self._characters / tokens

        def score(params, state, tokens, valid, scored, t, key):
            denoise = network_fn(model, params, valid=valid if padded else None)
            loss = objective.loss(denoise, key, tokens, t, scored, state=state)
            return loss.nats, loss.tokens, trained.observed(loss, t, scored)

        self._compiled = False
        self._score = jax.jit(sharding.over(mesh, score), out_shardings=sharding.replicated(mesh))

    @overload
    def __call__(self, params: Any, state: Any = None, *, progress: bool = False) -> dict[str, Any]: ...

    @overload
    def __call__(
        self, params: Any, state: Any = None, *, progress: bool = False, stop: Callable[[], bool]
    ) -> dict[str, Any] | None: ...

    def __call__(
        self,
        params: Any,
        state: Any = None,
        *,
        progress: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """`Likelihood.result` of the weights, with the "characters" that were scored and "characters_per_token".

        Of prompts and answers also {"counted": "answers"}: the bound is of these, given their prompts.
        Also "observed", where `Objective.validated` wants to know something. None as soon as `stop`, asked before each
        batch, says so.

        Args:
          params: the weights.
          state: of the objective, or None.
          progress: show a bar on stderr.
        """
        scores = []
        bar = bars.bar(self.num_draws * len(self._batches), "evaluate", show=progress, compiles=not self._compiled)
        self._compiled = True
        for draw in range(self.num_draws):
            key = jax.random.fold_in(self._key, draw)
            times = self._times(jax.random.fold_in(key, 2**31))
            for i, batch in enumerate(self._batches):
                if stop():
                    bar.close()
                    return None
                arrays = sharding.global_batch(batch, self._mesh)
                drawn = times[i * self._batch_size : (i + 1) * self._batch_size]
                t, own = sharding.split_rows(drawn, self._mesh), jax.random.fold_in(key, i)
                counted = arrays.get("scored", arrays["valid"])
                score = self._score(params, state, arrays["tokens"], arrays["valid"], counted, t, own)
                scores.append((draw, drawn, score))
                if progress:
                    jax.block_until_ready(score)
                bar.update()
        bar.close()
        likelihood = Likelihood()
        even = getattr(self._objective, "low_discrepancy", False)
        for draw, drawn, (nats, tokens, _) in scores:
            mean = drawn.reshape(len(drawn), -1).mean(axis=1)  # the times of a sequence's blocks are neighbours
            likelihood.add(np.asarray(nats), np.asarray(tokens), draw=draw, times=mean if even else None)
        result = likelihood.result(self._characters_per_token)
        result |= {"characters": self._characters, "characters_per_token": self._characters_per_token}
        if self._dataset.prompted:
            result["counted"] = "answers"
        observed = [jax.device_get(observed) for *_, (*_, observed) in scores]
        if observed[0] is not None:
            result["observed"] = jax.tree.map(lambda *parts: np.concatenate(parts), *observed)
        return result

    def _times(self, key: jax.Array) -> np.ndarray:
        """float32 [batches * batch_size, ...]: the times of each sequence; 1 for the filling rows."""
        k_times, k_order = jax.random.split(key)
        t = np.asarray(self._objective.times(k_times, self.num_sequences, self._dataset.length))
        t = t[np.asarray(jax.random.permutation(k_order, self.num_sequences))]
        filled = len(self._batches) * self._batch_size - len(t)
        return np.concatenate([t, np.ones((filled, *t.shape[1:]), np.float32)])


def count_scored(dataset: Dataset, split: str, number: int, *, keep_first: bool = False) -> tuple[int, int]:
    """(characters, tokens) of what is scored in the first `number` sequences of a split.

    Of a whole split they are what `data.load` counted. Of a part of one the tokens are decoded: BOS, EOS and padding
    are no characters, the blank lines between documents are, and a character whose bytes stand in two sequences counts
    where it begins.

    Args:
      keep_first: the first token of a sequence is not scored (block diffusion's `keep_first`).
    """
    source = getattr(dataset, split)
    if number == len(source) and not keep_first:
        return dataset.info[split]["chunk_characters"], dataset.info[split]["tokens"]
    characters = tokens = 0
    for i in range(number):
        scored = source.scored(i) & (np.arange(source.length) >= keep_first)
        encoded = np.frombuffer(dataset.tokenizer.decode_bytes(source[i][scored]), np.uint8)
        characters += int(np.count_nonzero(encoded & 0xC0 != 0x80))  # bytes that begin a character
        tokens += int(np.count_nonzero(scored))
    return characters, tokens


def over(sequences: int, draws: int, exact: bool) -> str:
    """What a number is over, for people: "over 435 sequences, 8 draws of each"; without noise there are no draws."""
    return f"over {sequences:,} sequences" + ("" if exact else f", {draws:,} draw{'s' * (draws > 1)} of each")


def line_of(result: Mapping[str, Any], exact: bool) -> str:
    """A result in a line, for people: "nelbo 1.9490 ± 0.0012 of the draws  bpc 2.8120  over 435 sequences, ..."."""
    number = f"nelbo {result['nelbo']:.4f} {errors(result)}".rstrip()
    return f"{number}  bpc {result['bpc']:.4f}  {over(result['sequences'], result['draws'], exact)}"


def errors(result: Mapping[str, Any]) -> str:
    """The two standard errors of a NELBO, for people: "± 0.0012 of the draws, ± 0.0200 of the text"; "" for neither."""
    kinds = {"draws": result["nelbo_se_draws"], "text": result["nelbo_se_text"]}
    return ", ".join(f"± {error:.4f} of the {kind}" for kind, error in kinds.items() if error is not None)
