"""What a number may be, and the sentence that refuses another one. Knows nothing of the package: every part may ask."""

import dataclasses
import math
import numbers
import struct
from typing import Any

INT32_MOST = 2**31 - 1
FLOAT32_LEAST, FLOAT32_MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers: XLA takes smaller ones for 0


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`.

    All arithmetic is float32, so a number that float32 takes for 0, for infinity, or for an end that does not belong to
    the range, is refused too: 1 - 1e-12 is no decay below 1.

    Attributes:
      low, high: the ends; they belong to the range unless `open` names them.
      integer: integers alone.
      open: "", "low", "high" or "both".
      also: a value besides.
    """

    low: float
    high: float
    integer: bool = False
    open: str = ""
    also: float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError, naming the option, unless `value` is a number of this range. A bool is none."""
        kind: Any = numbers.Integral if self.integer else numbers.Real  # not what typeshed's int and float are
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{name} must be {'an integer' if self.integer else 'a number'}, got {value!r}.")
        if value == self.also or self._holds(value):
            return
        besides = "" if self.also is None else f"{self.also} or "
        huge = isinstance(value, int) and value.bit_length() > 128
        got = f"an integer of {value.bit_length()} bits" if huge else f"{value}{self._rounded_note(value)}"
        raise ValueError(f"{name} must be {besides}{self._ends(value)}, got {got}.")

    def _holds(self, value: Any) -> bool:
        if self.integer:
            return self.low <= value <= self.high
        rounded = _float32(value)
        if not math.isfinite(rounded) or (value != 0 and abs(rounded) < FLOAT32_LEAST):
            return False
        low = self.low < rounded if self.open in ("low", "both") else self.low <= value
        high = rounded < self.high if self.open in ("high", "both") else value <= self.high
        return low and high

    def _ends(self, value: Any) -> str:
        if self.integer:
            return f"at least {self.low}" if value < self.low else f"at most {self.high}"
        if self.high == FLOAT32_MOST:
            return f"a finite number {'above' if self.open == 'low' else 'of at least'} {self.low:g}"
        left, right = "(" if self.open in ("low", "both") else "[", ")" if self.open in ("high", "both") else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"

    def _rounded_note(self, value: Any) -> str:
        if self.integer or not math.isfinite(value):
            return ""
        rounded = _float32(value)
        rounded = 0.0 if abs(rounded) < FLOAT32_LEAST else rounded
        return f" ({rounded:g} in float32)" if rounded != value and self.low <= value <= self.high else ""


def _float32(value: Any) -> float:
    try:
        return struct.unpack("f", struct.pack("f", float(value)))[0]
    except OverflowError:
        return math.inf if value > 0 else -math.inf


COUNT = Range(1, INT32_MOST, integer=True)
COUNT_OR_NONE = Range(0, INT32_MOST, integer=True)
WIDTH = Range(1, 2**16, integer=True)  # of a layer, a head, a state
FRACTION = Range(0, 1)
POSITIVE_FRACTION = Range(0, 1, open="low")
BELOW_ONE = Range(0, 1, open="high")
INSIDE = Range(0, 1, open="both")
AT_LEAST_0 = Range(0, FLOAT32_MOST)
POSITIVE = Range(0, FLOAT32_MOST, open="low")
DROPOUT = Range(0, 0.999)
EXPANSION = Range(0, 1024, open="low")  # hidden width / dim
A_SCALE = Range(0, 2)  # beyond it the state of RWKV-7 grows without bound: 1 - a has modulus above 1
ROTARY_BASE = Range(1, 1e12)
CONV_WIDTH = Range(1, 256, integer=True)
NUM_LAYERS = Range(1, 1024, integer=True)
VOCABULARY = Range(1, 2**24, integer=True)
SEED = Range(0, 2**32 - 1, integer=True)  # a random key has 32 bits for it: more would be cut off
TOKEN = COUNT_OR_NONE
GRID = Range(1, 2**20, integer=True)  # steps of a sampler, which lie in arrays
BYTES = Range(1, 2**48, integer=True)
LENGTH = Range(1, 2**24, integer=True)  # tokens
SEQUENCES = Range(1, 2**20, integer=True)
BLOCK = Range(1, 2**20, integer=True)  # positions
BLOCK_OR_ALL = Range(0, 2**20, integer=True)
TEMPERATURE = Range(1e-6, 1e6, also=0)  # 0: the most probable token
TOP_P = Range(1e-6, 1)


def check_seed(seed: Any, name: str = "seed") -> None:
    """Raises ValueError unless `seed` is an integer from 0 to 2**32 - 1: beyond them two seeds would be one."""
    try:
        SEED.check(name, seed)
    except ValueError:
        raise ValueError(f"{name} must be an integer from 0 to {SEED.high}, got {seed!r}.") from None


def as_tuple(name: str, value: Any) -> tuple:
    """A number as a tuple of one, a list as a tuple: a config has both. Raises ValueError for what is neither."""
    if isinstance(value, numbers.Number):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of numbers, got {value!r}.")
    return tuple(value)


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless the option `name` is True or False: any other value would be taken for one of them."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError, with the choices, unless the option `name` is one of them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
