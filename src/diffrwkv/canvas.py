"""Canvases: what is given of a text and what is blank, from prompts and templates; and where a filled one ends."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.data import Tokenizer
from diffrwkv.diffusion import objectives

# What is refused before any memory is taken, beside `run.MOST_LOGITS`: texts of a call, tokens of a text.
MOST_TEXTS, MOST_TOKENS = 2**24, 2**26

BLANK = "_"  # of templates


def canvases(
    cfg: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | None = None,
    *,
    infill: str | Sequence[str] | None = None,
    num: int = 1,
    length: int | None = None,
    max_new_tokens: int | None = None,
    blank: str = BLANK,
) -> list[np.ndarray]:
    """The canvases that `generate` fills for a run of the config `cfg`, each int32 [its length]; arguments as there.

    Raises UserError.
    """
    check_at_least_one(num=num, length=length, max_new_tokens=max_new_tokens)
    if infill is None and blank != BLANK:
        raise UserError("blank is the character of a template: it does nothing without infill.")
    if prompts is not None and infill is not None:
        raise UserError("Prompts and infill exclude each other: put the prompt into the template.")
    if max_new_tokens is not None and (length is not None or infill is not None):
        raise UserError("max_new_tokens excludes length and infill: a canvas has one length.")
    if infill is not None and objectives.OBJECTIVES[cfg.diffusion.name].process.causal:
        raise UserError("infill needs a diffusion model: this one goes from left to right; use a prompt.")
    what, given = ("prompt", prompts) if infill is None else ("infill", infill)
    texts = [given] if given is None or isinstance(given, str) else list(given)
    if not texts:
        raise UserError(f"There is no {what} in the list: give one, or None to generate from nothing.")
    check_most(MOST_TEXTS // len(texts), num=num)
    rows = []
    for i, text in enumerate(texts):
        row = canvas_row(
            tokenizer,
            length=length,
            default_length=cfg.data.length,
            max_new_tokens=max_new_tokens,
            **{what: text},
            blank=blank,
            bos=cfg.data.wrap,
            eos=cfg.data.wrap and cfg.data.packing == "concat",
            number=None if len(texts) == 1 else i + 1,
        )
        rows += [row] * num
    return rows


def canvas_row(
    tokenizer: Tokenizer,
    *,
    length: int | None,
    default_length: int,
    max_new_tokens: int | None = None,
    prompt: str | None = None,
    infill: str | None = None,
    blank: str = BLANK,
    bos: bool = False,
    eos: bool = False,
    number: int | None = None,
) -> np.ndarray:
    """What is given and what is to be generated, int32 [length]: tokens, and the mask id at blanks.

    Args:
      length: tokens in the row, BOS and EOS counted; None: as many as `max_new_tokens` needs, or the template's length,
        or else `default_length`.
      max_new_tokens: blanks behind the prompt.
      prompt: text at the beginning.
      infill: template; each `blank` character is one blank token.
      bos, eos: the first token is BOS, the last EOS, as in training with wrapping.
      number: of several prompts or templates, for the errors.

    Raises UserError for an empty or too long prompt or template, one without blanks, characters that the tokenizer does
    not have, or no room to generate.
    """
    given, what = (prompt, "prompt") if infill is None else (infill, "infill")
    what = what if number is None else f"{what} {number}"
    body = np.zeros(0, np.int32)
    if given is not None:
        if not isinstance(given, str):
            raise UserError(f"{what} must be a string, got {type(given).__name__}.")
        if not given:
            raise UserError(f"{what} is empty: give some text, or leave it out.")
        if len(blank) != 1:
            raise UserError(f"blank must be one character, got {blank!r}.")
        if infill is not None and blank not in infill:
            raise UserError(f"{what} has no blanks: write {blank!r} for each token to fill in.")
        parts = [given] if infill is None else re.split(f"({re.escape(blank)}+)", infill)
        try:
            body = np.concatenate(
                [
                    np.full(len(part), tokenizer.mask_id, np.int32)
                    if infill is not None and part.startswith(blank)
                    else tokenizer.encode(part)
                    for part in parts
                    if part
                ]
            )
        except ValueError as e:
            raise UserError(f"{what}: {e}.") from None
    extra = int(bos) + int(eos)
    if max_new_tokens is not None:
        length = len(body) + max_new_tokens + extra
    elif length is None:
        length = len(body) + extra if infill is not None else default_length
    check_most(MOST_TOKENS, length=length)
    room = length - extra - len(body)
    if room < 0 or (infill is None and room == 0):
        if given is None:
            raise UserError(f"length = {length} leaves nothing to generate: it needs at least {extra + 1}.")
        raise UserError(
            f"{what} has {len(body)} tokens, too many for length = {length}"
            f"{f' with {extra} for begin and end' if extra else ''}: shorten it or raise length."
        )
    ends = tokenizer.wrapping() if bos or eos else ()
    rest = np.full(room, tokenizer.mask_id, np.int32)
    return np.concatenate([ends[:1] if bos else [], body, rest, ends[1:] if eos else []]).astype(np.int32)


def check_most(most: int, **counts: int | None) -> None:
    """Raises UserError for a count above `most`; None is none."""
    for name, count in counts.items():
        if count is not None and count > most:
            raise UserError(f"{name} = {count} is too many: at most {most:,} here.")


def blank_note(infill: Sequence[str] | None) -> str | None:
    """What to say when the default blank stands in words of a template, where underscores are often meant as text."""
    inside = re.compile(rf"[^\W_]{{2}}{BLANK}[^\W_]{{2}}")
    words = [word for text in infill or () for word in text.split() if inside.search(word)]
    if not words:
        return None
    return f"each {BLANK} of a template is a blank, in {words[0]!r} too: --blank names another character for blanks."


def text_length(tokens: np.ndarray, canvas: np.ndarray, tokenizer: Tokenizer) -> int:
    """Tokens of a filled canvas up to the first EOS that was generated behind all given text, that EOS counted.

    Args:
      tokens: int32, at least as long as the canvas.
      canvas: int32 [length].
    """
    blank = canvas == tokenizer.mask_id
    given = np.flatnonzero(~blank & (canvas != tokenizer.eos_id))
    ends = blank & (tokens[: len(canvas)] == tokenizer.eos_id)
    ends[: given[-1] + 1 if len(given) else 0] = False
    return int(np.argmax(ends)) + 1 if ends.any() else len(canvas)
