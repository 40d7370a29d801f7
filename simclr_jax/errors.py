"""Errors that a user can fix, and the exit codes of the program. This file imports nothing of the package."""

import enum


class ConfigError(ValueError):
  """A recipe, option, data set or run directory that cannot be used.

  The message is one sentence: what is wrong, where, and how to fix it.
  """


class NotFinite(RuntimeError):
  """The loss or its gradient is NaN or infinite."""


class Stopped(RuntimeError):
  """A signal stopped the work; what was trained is saved. `args[0]` is the exit code."""


class ExitCode(enum.IntEnum):
  """The exit codes of `simclr-jax`; `meaning` is the text of the table in docs/reliability.md."""

  def __new__(cls, value: int, meaning: str):
    """A code with its meaning."""
    code = int.__new__(cls, value)
    code._value_ = value
    code.meaning = meaning
    return code

  SUCCESS = 0, 'success'
  ERROR = 1, 'error, printed on stderr'
  USAGE = 2, 'invalid usage or configuration'
  NOT_FINITE = 3, 'the loss or its gradient is not finite'
  HUNG = 4, 'a step took longer than the watchdog allows'
  PREEMPTED = 75, 'stopped by SIGTERM, state saved; rerun the same command to resume'
  PEER_DIED = 134, 'another process of the run died'
  INTERRUPTED = 130, 'stopped by Ctrl-C; `pretrain` saves its state first'
