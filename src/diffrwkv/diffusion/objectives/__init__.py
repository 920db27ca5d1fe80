"""Training objectives: bounds on the likelihood, for a network that is only a function here.

An objective is a process, a layout and options of its own. One file and one line in `OBJECTIVES` for each.

    objective = OBJECTIVES["udlm"](mask_id=49)
    objective = MDLM(mask_id=49, layout=Blocks((16,)))
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffrwkv.checks import TOKEN
from diffrwkv.diffusion.layouts import LAYOUTS, Blocks, Layout, Whole
from diffrwkv.diffusion.objectives.base import Diffusion, Loss, Objective, Timed, least_variance
from diffrwkv.diffusion.objectives.duo import Duo
from diffrwkv.diffusion.objectives.flm import FLM
from diffrwkv.diffusion.objectives.genmd4 import GenMD4
from diffrwkv.diffusion.objectives.gidd import GIDD
from diffrwkv.diffusion.processes import Flow, Hybrid, Masked, NextToken, Process, TokenMasked, Uniform, Vocabulary
from diffrwkv.diffusion.schedules import SCHEDULES, Schedule


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the name of an objective stands for; called, it makes the objective.

    Attributes:
      process: called with the vocabulary, a schedule if it has one, `fixed`, and those of the options that it has.
      objective: called with (process, layout) and the other options.
      schedule: the name of the one that is taken where none is named; None: the process has none.
      fixed: fields of the process that the name decides.
    """

    process: type[Process]
    objective: type[Objective] = Diffusion
    schedule: str | None = "loglinear"
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """{name: default} of what a config may set."""
        given = {"vocabulary", "schedule", "process", "layout", *self.fixed}
        fields = [field for cls in (self.process, self.objective) for field in _fields(cls)]
        return {f.name: f.default for f in fields if f.name not in given}

    def __call__(
        self,
        mask_id: int,
        vocab_size: int | None = None,
        *,
        schedule: Schedule | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> Objective:
        """The objective.

        Args:
          mask_id: of the vocabulary.
          vocab_size: how many ids there are, the mask among them; None: the mask is the last, as in our tokenizers.
          schedule: one of `schedules`; None: the objective's own.
          layout: one of `layouts`; None: `Whole()`.
          options: of the process and of the objective, by name.

        Raises ValueError for an unknown option, and for a layout or schedule that does not fit.
        """
        name = next((name for name, entry in OBJECTIVES.items() if entry is self), self.objective.__name__)
        options = _options("objective", name, self.options(), {name: options})
        own = {f.name for f in _fields(self.process)}
        TOKEN.check("mask_id", mask_id)
        vocabulary = Vocabulary(mask_id + 1 if vocab_size is None else vocab_size, mask_id)
        process = {"vocabulary": vocabulary, **self.fixed, **{k: v for k, v in options.items() if k in own}}
        if self.schedule is not None:
            process["schedule"] = SCHEDULES[self.schedule]() if schedule is None else schedule
        elif schedule is not None:
            raise ValueError(f"The objective {name!r} has no schedule: leave it out (None), got {schedule}.")
        layout = Whole() if layout is None else layout
        if self.process.causal and not isinstance(layout, Whole):
            raise ValueError(f"The objective {name!r} goes from left to right: its layout is 'whole', not {layout}.")
        rest = {k: v for k, v in options.items() if k not in own}
        return self.objective(self.process(**process), layout, **rest)


OBJECTIVES: dict[str, Entry] = {
    "autoregressive": Entry(NextToken, Objective, schedule=None),
    "duo": Entry(Uniform, Duo, fixed={"output": "leave_one_out"}),  # arXiv 2506.10892
    "flm": Entry(Flow, FLM, schedule=None),  # arXiv 2602.16813
    "genmd4": Entry(TokenMasked, GenMD4, schedule=None, fixed={"powers": None}),  # arXiv 2406.04329
    "gidd": Entry(Hybrid, GIDD, schedule="linear"),  # arXiv 2503.04482
    "mdlm": Entry(Masked, fixed={"output": "mean"}),  # arXiv 2406.07524
    "sedd_absorb": Entry(Masked, fixed={"output": "score", "clock": "sigma"}),  # arXiv 2310.16834
    "sedd_uniform": Entry(Uniform, schedule="geometric", fixed={"output": "score", "clock": "sigma"}),  # the same
    "udlm": Entry(Uniform, fixed={"output": "leave_one_out"}),  # arXiv 2412.10193
}

MDLM = OBJECTIVES["mdlm"]  # MDLM(mask_id=49) is masked diffusion of 49 tokens


def from_config(
    vocabulary: Vocabulary,
    *,
    name: str = "mdlm",
    schedule: str | None = None,
    layout: str = "whole",
    sections: Mapping[str, Any] | None = None,
) -> Objective:
    """The objective `name` of `OBJECTIVES`.

    Args:
      vocabulary: of the tokenizer.
      schedule: a name in `SCHEDULES`; None: the objective's own.
      layout: a name in `LAYOUTS`.
      sections: {"objectives": {name: options}, "schedules": {name: options}, "layouts": {name: options}}; what is
        missing has its defaults.

    Raises ValueError for an unknown name or option, and for a layout or schedule that does not fit.
    """
    sections = sections or {}
    entry = _named(OBJECTIVES, "objective", name)
    chosen = schedule or entry.schedule
    return entry(
        vocabulary.mask_id,
        vocabulary.size,
        schedule=None if chosen is None else _build(SCHEDULES, "schedule", chosen, sections.get("schedules", {})),
        layout=_build(LAYOUTS, "layout", layout, sections.get("layouts", {})),
        **_options("objective", name, entry.options(), sections.get("objectives", {})),
    )


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    """Of a dataclass; a process is one, if not by its base."""
    return dataclasses.fields(cls)


def _named(table, what, name):
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"No {what} is called {name!r}; choose one of {', '.join(sorted(table))}.")
    return table[name]


def _options(what, name, known, section):
    given = section.get(name, {})
    if not isinstance(given, Mapping):
        raise ValueError(f"The options of the {what} {name!r} must be a section, got {given!r}.")
    if unknown := sorted(set(given) - set(known)):
        has = ", ".join(known) or "none"
        raise ValueError(f"The {what} {name!r} has no option {', '.join(map(str, unknown))}; it has {has}.")
    return dict(given)


def _build(table, what, name, section):
    cls = _named(table, what, name)
    known = [f.name for f in dataclasses.fields(cls)]
    return cls(**_options(what, name, known, section))


__all__ = [
    "FLM",
    "GIDD",
    "MDLM",
    "OBJECTIVES",
    "Blocks",
    "Diffusion",
    "Duo",
    "Entry",
    "GenMD4",
    "Layout",
    "Loss",
    "Objective",
    "Timed",
    "Whole",
    "from_config",
    "least_variance",
]
