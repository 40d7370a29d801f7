"""Loads Python files that users name: recipes, and their own methods, encoders and augmentation ops.

These files are executed: name only files that you trust.
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
  """Whether the value of a field is the path of a Python file instead of a built-in name."""
  return name.endswith('.py')


def load(path: str | os.PathLike, kind: str, provides: str = '') -> ModuleType:
  """Executes a file and returns it as a module. A file whose content has not changed is executed only once.

  Args:
    path: path of the file.
    kind: kind of the file, for error messages: 'recipe', 'method', 'encoder' or 'ops'.
    provides: a name that the file must define, followed by () if it is a function.

  Raises:
    ConfigError: the file is missing, fails, or does not define `provides`.
  """
  module = _execute(str(path), kind, checksum(path, kind))
  if provides and not hasattr(module, provides.rstrip('()')):
    noun = 'function ' if provides.endswith('()') else ''
    raise ConfigError(f'{path} has no {noun}{provides}')
  return module


def checksum(path: str | os.PathLike, kind: str) -> str:
  """The first 12 hexadecimal digits of the SHA-256 of a file. Arguments as for `load`.

  Raises:
    ConfigError: the file cannot be read.
  """
  try:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]
  except OSError as error:
    raise ConfigError(f'the {kind} file {path} cannot be read: {error.strerror}') from None


@functools.lru_cache(maxsize=64)
def _execute(path, kind, digest):
  # The name depends on the content, because pickling and dataclasses look modules up by name, and several files may
  # be called mine.py.
  name = f'simclr_jax_{kind}_{digest}'
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'the {kind} {path!r} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'the {kind} {path} fails: {type(error).__name__}: {error}') from None
  return module
