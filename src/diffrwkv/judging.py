"""What a causal model makes of texts, and how varied they are: `judge`, from Python.

    found = diffrwkv.judge(texts, by="runs/ar")  # or by="hf:gpt2-large"
    print(found["ppl"], found["entropy"], found["distinct_4"], found["self_bleu"])

The program is `python -m diffrwkv.evaluate --suite=samples`.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv import config, sharding, shipped
from diffrwkv.causal_lm import CausalLM, Judged
from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.diffusion.objectives import OBJECTIVES
from diffrwkv.diffusion.sample_quality import NGRAMS, sample_quality
from diffrwkv.evaluations import finite
from diffrwkv.generation import LENGTH_STEP
from diffrwkv.run import Run, opened
from diffrwkv.scoring import check_logits, score

HUB = "hf:"


class Judge(Protocol):
    """A causal model with a tokenizer of its own.

    Attributes:
      name: a workdir's, or "hf:NAME".
      weights: a hash of them; None where they are not known any more.
      length: tokens of a window, unless another is asked for.
      longest: the most that it can read; None: there is no most.
      given: how many tokens of a window are never counted: what it puts around a text.
      features_are: what `features` gives, in words.
    """

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> str | None: ...

    @property
    def length(self) -> int: ...

    @property
    def longest(self) -> int | None: ...

    @property
    def given(self) -> int: ...

    @property
    def features_are(self) -> str: ...

    def encode(self, text: str) -> np.ndarray:
        """The text's own tokens, int32 [n]. Raises UserError for a character that the tokenizer lacks."""

    def judged(
        self, texts: Sequence[str], *, window: int, stride: int, batch_size: int, progress: bool = False
    ) -> list[Judged]:
        """-log p of each text, by tokens that the judge makes of it, each counted once; EOS is not among them.

        The first window is of `window` tokens, the next ones have `stride` new ones each, behind as many as fit.
        """

    def features(self, texts: Sequence[str], *, window: int, batch_size: int) -> np.ndarray:
        """float32 [N, D], from the first window of each text."""


@dataclasses.dataclass(frozen=True)
class RunJudge:
    """A run from left to right as a judge; see `Judge`. Rows are as it was trained: between BOS and EOS or not."""

    run: Run
    name: str
    weights: str | None = None
    longest: None = None

    @property
    def length(self) -> int:
        return self.run.config.data.length

    @property
    def given(self) -> int:
        return 2 if self.run.config.data.wrap else 0

    @property
    def features_are(self) -> str:
        return f"the mean over a text's first window of what the head of {self.name} reads"

    def encode(self, text: str) -> np.ndarray:
        try:
            return self.run.tokenizer.encode(text)
        except ValueError as e:
            raise UserError(f"{self.name} cannot read this text: {e}.") from None

    def judged(
        self, texts: Sequence[str], *, window: int, stride: int, batch_size: int, progress: bool = False
    ) -> list[Judged]:
        context = window - self.given - stride
        found = score(self.run, texts, length=window, context=context, batch_size=batch_size, progress=progress)
        return [Judged(s.nats, s.tokens, s.characters) for s in found]

    def features(self, texts: Sequence[str], *, window: int, batch_size: int) -> np.ndarray:
        run = self.run
        begin = run.tokenizer.wrapping()[0] if self.given else run.tokenizer.mask_id
        rows = [np.concatenate([[begin], self.encode(text)])[:window] for text in texts]
        width = max(map(len, rows))
        width += -width % LENGTH_STEP
        check_logits(run, 1, width)

        def mean(params, tokens, valid):
            t = jnp.zeros(len(tokens))
            features, _ = run.model.apply({"params": params}, tokens, t, valid=valid, method="before_head")
            valid = valid[..., None]
            return jnp.where(valid, features.astype(jnp.float32), 0.0).sum(axis=1) / valid.sum(axis=1)

        if "features" not in run.generators:
            run.generators["features"] = jax.jit(
                sharding.over(run.mesh, mean), out_shardings=sharding.replicated(run.mesh)
            )
        batch_size = min(batch_size, len(rows))
        batch_size += -batch_size % run.mesh.size
        out = []
        for first in range(0, len(rows), batch_size):
            tokens = np.full((batch_size, width), run.tokenizer.pad_id, np.int32)
            valid = np.zeros(tokens.shape, bool)
            valid[:, 0] = True  # rows that fill the batch have one
            part = rows[first : first + batch_size]
            for i, row in enumerate(part):
                tokens[i, : len(row)], valid[i, : len(row)] = row, True
            arrays = (sharding.split_rows(x, run.mesh) for x in (tokens, valid))
            out.append(np.asarray(run.generators["features"](run.params, *arrays))[: len(part)])
        return np.concatenate(out)


def load_judge(name: str | os.PathLike, mesh: Any = None) -> Judge:
    """The judge of a name: a workdir, "hf:NAME", or a model that comes with the package.

    Raises UserError where it is not there, or is not causal.
    """
    if isinstance(name, str) and name.startswith(HUB):
        if name == HUB:
            raise UserError("A judge of Hugging Face has a name: hf:gpt2-large, for one.")
        return CausalLM(name.removeprefix(HUB))
    model = opened(None, str(name)) if name in shipped.MODELS else opened(str(config.at_home(name, "--judge=")))
    if not OBJECTIVES[model.config.diffusion.name].process.causal:
        raise _not_causal(str(name), model.config)
    run = model.load(mesh or sharding.make_mesh())
    return RunJudge(run, str(name), model.weights_hash(run.step))


def _not_causal(name: str, cfg: Any) -> UserError:
    return UserError(
        f"{name} is a diffusion model (config.diffusion.name = {cfg.diffusion.name!r}), whose bound depends on "
        "noise: a judge must be autoregressive."
    )


def judge(
    texts: Sequence[str],
    *,
    by: Run | str | os.PathLike,
    real: Sequence[str] | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Every statistic of some texts, as a causal model reads them; docs/evaluation.md says which means what.

    No one of them tells: read all beside those of as much real text.

    Args:
      texts: at least two that are not empty; empty ones are counted and left out.
      by: what `load` returns, a workdir, or "hf:NAME", a causal language model of Hugging Face.
      real: texts that MAUVE compares these with, where the package mauve-text is there.
      window: tokens that the judge reads at a time; None: as many as it was trained on.
      stride: new tokens of a window that is not the first; None: half a window.
      batch_size: windows at a time.

    Returns:
      the dict of `sample_quality`, of the judge's tokens; "mauve", a number in (0, 1] or None; "counted": {"texts",
      "empty", "tokens", "judge_tokens", "characters"}.

    Raises UserError for what cannot be done, before any compute.
    """
    if isinstance(by, Run):
        if not by.objective.causal:
            raise _not_causal("the run", by.config)
        judged_by: Judge = RunJudge(by, "the run")
    else:
        judged_by = load_judge(by)
    check_at_least_one(batch_size=batch_size)
    window, stride = windowing(judged_by, window, stride)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UserError(f"A text must be a string, got {type(wrong[0]).__name__}.")
    how: dict[str, Any] = {"window": window, "batch_size": batch_size}
    found = figures(judged_by, texts, stride=stride, progress=progress, **how)
    return found | {"mauve": None if real is None else mauve(judged_by, texts, real, **how)}


def windowing(judge: Judge, window: int | None, stride: int | None) -> tuple[int, int]:
    """(window, stride), the judge's own where they are None. Raises UserError for those that it cannot have."""
    check_at_least_one(window=window, stride=stride)
    window = judge.length if window is None else window
    room = window - judge.given
    if room < 2:
        raise UserError(f"window = {window} leaves no room for a text and what stands before it: take a larger one.")
    if judge.longest is not None and window > judge.longest:
        raise UserError(f"window = {window} is too large: {judge.name} reads {judge.longest} tokens at most.")
    stride = min(room, max(1, window // 2)) if stride is None else stride
    if stride > room:
        raise UserError(f"stride = {stride} is too large: at most {room} tokens of a window of {window} are new.")
    return window, stride


def figures(
    judge: Judge,
    texts: Sequence[str],
    samples: Sequence[np.ndarray] | None = None,
    *,
    window: int,
    stride: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, Any]:
    """`sample_quality` of texts, and "counted".

    Args:
      samples: the tokens that the statistics other than the perplexity are of, int [n] for each text; None: those that
        the judge makes of them.

    Raises UserError where fewer than two texts are not empty, and where none has an n-gram of each size.
    """
    rows, number = [judge.encode(text) for text in texts] if samples is None else samples, len(texts)
    chosen = [i for i, (text, row) in enumerate(zip(texts, rows, strict=True)) if text and len(row)]
    if len(chosen) < 2:
        raise UserError(f"{len(chosen)} of {number} texts have any text: the statistics need at least 2.")
    texts, rows = [texts[i] for i in chosen], [rows[i] for i in chosen]
    check_long_enough(rows)
    judged = judge.judged(texts, window=window, stride=stride, batch_size=batch_size, progress=progress)
    nats, tokens, characters = (np.array(column) for column in zip(*judged, strict=True))
    if tokens.sum() == 0 or characters.sum() == 0:
        raise UserError(f"{judge.name} makes no token of the texts that it could judge: take longer ones.")
    found = sample_quality(rows, nats, tokens, characters)
    counted = {
        "texts": len(texts),
        "empty": number - len(texts),
        "tokens": sum(map(len, rows)),
        "judge_tokens": int(tokens.sum()),
        "characters": int(characters.sum()),
    }
    return {key: None if x is None else finite(x) for key, x in found.items()} | {"counted": counted}


def check_long_enough(rows: Sequence[np.ndarray]) -> None:
    """Raises UserError where no text has an n-gram of each size."""
    if (longest := max(map(len, rows))) < max(NGRAMS):
        raise UserError(
            f"The texts have {longest} tokens at most, and distinct-{max(NGRAMS)} is of runs of {max(NGRAMS)}: take "
            "longer ones."
        )


# --- MAUVE ------------------------------------------------------------------------------------------


def mauve_version() -> str | None:
    """Of the package mauve-text; None where it, or what it needs, is not installed."""
    try:
        import mauve  # noqa: F401

        return importlib.metadata.version("mauve-text")
    except ImportError:  # what metadata raises, too
        return None


def mauve(judge: Judge, texts: Sequence[str], real: Sequence[str], *, window: int, batch_size: int) -> float | None:
    """MAUVE of texts and real ones (Pillutla et al., arXiv 2102.01454), from the judge's features of both.

    The package's own settings. None where it is not installed; empty texts are left out.
    """
    if mauve_version() is None:
        return None
    from mauve import compute_mauve

    p, q = (
        judge.features([text for text in some if len(judge.encode(text))], window=window, batch_size=batch_size)
        for some in (texts, real)
    )
    return float(compute_mauve(p_features=p, q_features=q, verbose=False).mauve)
