"""The exceptions and exit codes of the program. This file imports nothing of the package."""

import enum
from typing import Self

LONGEST = 1500  # characters of a message


class ConfigError(ValueError):
  """An error that the user can fix: an invalid recipe, argument, data set or run directory.

  The message is one sentence: what is wrong, where, and how to fix it. What a damaged file makes long is left out.
  """

  def __str__(self) -> str:
    text = super().__str__()
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f'{text[:half]} [...] {text[-half:]}'


class NotFinite(RuntimeError):
  """The loss or its gradient is NaN or infinite."""


class Stopped(RuntimeError):
  """A signal stopped the command; a training saves its state before it ends. `args[0]` is the exit code."""


class ExitCode(enum.IntEnum):
  """The exit codes of `simclr-jax`.

  Attributes:
    meaning: a description, as in the table in docs/reliability.md.
  """

  meaning: str

  def __new__(cls, value: int, meaning: str) -> Self:
    """An exit code with its description."""
    code = int.__new__(cls, value)
    code._value_ = value
    code.meaning = meaning
    return code

  SUCCESS = 0, 'success'
  ERROR = 1, 'error, printed on stderr'
  USAGE = 2, 'invalid usage or configuration'
  NOT_FINITE = 3, 'the loss or its gradient is not finite'
  HUNG = 4, 'a step took longer than the watchdog allows'
  PREEMPTED = 75, 'stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2; trainings save their state first'
  PEER_DIED = 134, 'another process of the run died'
  INTERRUPTED = 130, 'stopped by Ctrl-C; trainings save their state first'
