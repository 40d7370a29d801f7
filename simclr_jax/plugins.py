"""Python files that a user names: recipes, and methods, encoders and ops of their own.

Such a file is executed: name none that you do not trust.
"""

import functools
import hashlib
import importlib.util
import os
import pathlib
import sys
from types import ModuleType

from simclr_jax.errors import ConfigError


def is_file(name: str) -> bool:
  """Whether a field names a Python file and not something that is built in."""
  return name.endswith('.py')


def load(path: str | os.PathLike, what: str, provides: str = '') -> ModuleType:
  """Executes a file, once for each content that it has.

  Args:
    path: of the file.
    what: the kind of file, for error messages: 'recipe', 'method', 'encoder' or 'ops'.
    provides: a name that the file must define, with () if it is a function.

  Raises:
    ConfigError: the file is missing, fails, or does not define `provides`.
  """
  module = _execute(str(path), what, checksum(path, what))
  if provides and not hasattr(module, provides.rstrip('()')):
    kind = 'function ' if provides.endswith('()') else ''
    raise ConfigError(f'{path} has no {kind}{provides}')
  return module


def checksum(path: str | os.PathLike, what: str) -> str:
  """The first 12 hexadecimal digits of the SHA-256 of a file; raises ConfigError without the file."""
  try:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]
  except OSError as error:
    raise ConfigError(f'the {what} file {path} cannot be read: {error.strerror}') from None


@functools.lru_cache(maxsize=64)
def _execute(path, what, digest):
  # One name for each content, so that two files called mine.py do not replace each other; pickling and
  # dataclasses look a module up by its name.
  name = f'simclr_jax_{what}_{digest}'
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None:
    raise ConfigError(f'the {what} {path!r} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'the {what} {path} fails: {type(error).__name__}: {error}') from None
  return module
