"""Places where runs live: folders of this machine, or of a bucket (`gs://BUCKET/...`)."""

import os
import pathlib

from simclr_jax.errors import ConfigError


def path(text: str | os.PathLike) -> pathlib.Path:
  """A place; one with `://` has the same methods, by etils' epath.

  Raises:
    ConfigError: epath does not know that kind of place.
  """
  if '://' not in str(text):
    return pathlib.Path(text).expanduser()
  from etils import epath

  try:
    return epath.Path(text)
  except (KeyError, ValueError, TypeError, NotImplementedError):
    raise ConfigError(f'{text}: only local folders and gs:// are known') from None


def remote(place: os.PathLike) -> bool:
  """Whether it is in a bucket."""
  return '://' in str(place)


def absolute(place: pathlib.Path) -> pathlib.Path:
  """The place from the root, whatever the working directory is."""
  return place if remote(place) else place.resolve()
