"""Allowed values of recipe fields, of arguments of augmentation ops, and of JSON files that may have been edited."""

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


NAMES = {
  str: 'a string',
  int: 'an integer',
  float: 'a finite number',
  bool: 'true or false',
  None: 'null',
}


def check_json(value: Any, shape: Any, where: str) -> None:
  """Checks plain data from a JSON file.

  Args:
    value: the data.
    shape: what it must be: `str` (without NUL characters), `int` (of at most 64 bits), `float` (finite; or an integer),
      `bool` or None; `object`, anything; `[shape]`, a list; `{str: shape}`, a dict with any keys; `{'a': shape, 'b?': shape}`, a dict with
      the key 'a' and perhaps 'b', and others; `(shape, ...)`, one of several.
    where: the place of the value, for the message.

  Raises:
    ConfigError: naming the place, the value and what it must be.
  """
  if shape is object:
    return
  if isinstance(shape, tuple):
    if not any(_matches(value, option) for option in shape):
      options = [
        o for o in shape if type(o) is type(value)
      ]  # name the place inside of a list or dict
      if len(options) == 1:
        check_json(value, options[0], where)
      raise ConfigError(f'{where} is {_short(value)}, not {" or ".join(map(_describe, shape))}')
  elif isinstance(shape, list) and isinstance(value, list):
    for i, item in enumerate(value):
      check_json(item, shape[0], f'{where}[{i}]')
  elif isinstance(shape, dict) and isinstance(value, dict):
    for name, part in shape.items():
      if name is str:
        for key, item in value.items():
          check_json(item, part, f'{where}.{key}')
      elif name.removesuffix('?') in value:
        check_json(value[name.removesuffix('?')], part, f'{where}.{name.removesuffix("?")}')
      elif not name.endswith('?'):
        raise ConfigError(f'{where} has no {name!r}')
  elif isinstance(shape, (list, dict)) or not _is(value, shape):
    raise ConfigError(f'{where} is {_short(value)}, not {_describe(shape)}')


def _matches(value, shape):
  try:
    check_json(value, shape, '')
    return True
  except ConfigError:
    return False


def _is(value, kind):
  """Whether a value is a scalar of a kind of `check_json`."""
  if value is None or isinstance(value, bool):
    return value is None if kind is None else kind is bool and value is not None
  if isinstance(value, int):
    return kind in (int, float) and abs(value) < 2**64
  if isinstance(value, float):
    return kind is float and math.isfinite(value)
  return kind is str and isinstance(value, str) and '\0' not in value


def _describe(shape):
  return (
    'a list' if isinstance(shape, list) else 'a table' if isinstance(shape, dict) else NAMES[shape]
  )


def _short(value):
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
