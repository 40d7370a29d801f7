"""What a value may be, for recipe fields and for arguments of augmentation ops."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from simclr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Range:
  """A number from `low` to `high`, both included; without `high` there is no upper bound."""

  low: float
  high: float | None = None

  def check(self, name: str, value: Any) -> None:
    """Raises ConfigError, naming the value and the range, if `value` is not in it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise ConfigError(f'{name}={value!r} is not a number')
    if not math.isfinite(value):
      raise ConfigError(f'{name}={value} is not a finite number')
    if value < self.low or (self.high is not None and value > self.high):
      raise ConfigError(f'{name}={value} is out of range: {self}')

  def __str__(self) -> str:
    return f'at least {self.low}' if self.high is None else f'from {self.low} to {self.high}'


@dataclasses.dataclass(frozen=True, init=False)
class Choices:
  """One of a few values."""

  values: tuple[Any, ...]

  def __init__(self, *values: Any):
    """`values`: all that are allowed."""
    object.__setattr__(self, 'values', values)

  def check(self, name: str, value: Any) -> None:
    """Raises ConfigError, naming the value and the choices, if `value` is none of them."""
    if value not in self.values:
      raise ConfigError(f'{name}={value!r} is not one of {self}')

  def __str__(self) -> str:
    return ', '.join(map(str, self.values))


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """ ", did you mean 'x'?" with the most similar of `names`, or an empty string."""
  close = difflib.get_close_matches(name, list(names), n=1)
  return f', did you mean {close[0]!r}?' if close else ''
