"""Arrays on disk: `<dir>/<split>.npz` with `images` and, if there are any, `labels`."""

import pathlib
import zipfile
import zlib

import ml_collections
import numpy as np

from simclr_jax.data import Dataset
from simclr_jax.errors import ConfigError


def load(config: ml_collections.ConfigDict, split: str) -> Dataset:
  """Reads images uint8 `[N, h, w, 3]` and labels `[N]`, whole numbers from 0 (-1: unknown)."""
  if not config.dir:
    raise ConfigError(f'data.dir is empty: set it to the folder that holds {split}.npz')
  path = pathlib.Path(config.dir).expanduser() / f'{split}.npz'
  if not path.is_file():
    raise ConfigError(
      f'{path} does not exist: data.dir must hold {split}.npz, '
      'or data.train_split and data.test_split other names'
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      if 'images' not in file:
        raise ConfigError(f'{path} has no array "images", only {sorted(file)}')
      images = file['images']
      labels = file['labels'] if 'labels' in file else np.full(len(images), -1)
      if labels.dtype.kind not in 'iu':
        raise ConfigError(f'{path}: labels must be whole numbers, these are {labels.dtype}')
  except ConfigError:
    raise
  except (OSError, EOFError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
    raise ConfigError(f'{path} cannot be read as an npz of plain arrays: {error}') from None
  return Dataset(images, labels.astype(np.int32))
