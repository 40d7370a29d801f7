"""Allowed values of recipe fields and of arguments of augmentation ops."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from simclr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Range:
  """A finite number from `low` to `high`, both included; if `high` is None, there is no upper bound."""

  low: float
  high: float | None = None

  def check(self, name: str, value: Any) -> None:
    """Raises ConfigError, naming the value and the range, if `value` is not in the range."""
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
  """One of several values."""

  values: tuple[Any, ...]

  def __init__(self, *values: Any):
    """`values`: the allowed values."""
    object.__setattr__(self, 'values', values)

  def check(self, name: str, value: Any) -> None:
    """Raises ConfigError, naming the value and the choices, if `value` is not one of the choices."""
    if value not in self.values:
      raise ConfigError(f'{name}={value!r} is not one of {self}')

  def __str__(self) -> str:
    return ', '.join(map(str, self.values))


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """The text ", did you mean 'x'?", where x is the most similar of `names`; empty if no name is similar."""
  close = difflib.get_close_matches(name, list(names), n=1)
  return f', did you mean {close[0]!r}?' if close else ''
