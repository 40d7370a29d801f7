"""Paths of runs: local folders, or folders in a bucket (`gs://BUCKET/...`)."""

import os
import pathlib

from simclr_jax.errors import ConfigError


def path(text: str | os.PathLike) -> pathlib.Path:
  """A local path; for `gs://`, an `etils.epath.Path`, which has the same methods.

  Raises:
    ConfigError: the text is another kind of URL.
  """
  if '://' not in str(text):
    return pathlib.Path(text).expanduser()
  from etils import epath

  try:
    return epath.Path(text)
  except (KeyError, ValueError, TypeError, NotImplementedError):
    raise ConfigError(f'{text}: only local folders and gs:// are supported') from None


def is_remote(path: os.PathLike) -> bool:
  """Whether the path is in a bucket."""
  return '://' in str(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
  """The absolute path, independent of the working directory."""
  return path if is_remote(path) else path.resolve()


def absolute_list(text: str) -> str:
  """A path, or several joined by commas, as absolute paths; '' and paths in buckets are unchanged."""
  if not text or '://' in text:
    return text
  single = pathlib.Path(text).expanduser().exists()
  parts = [text] if single else text.split(',')
  return ','.join(str(pathlib.Path(p).expanduser().resolve()) for p in parts)
