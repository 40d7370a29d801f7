"""Arrays on disk: `<dir>/<split>.npz`, or `<split>_images.npy` and `<split>_labels.npy`, or `<split>.npy`.

An npz file is read into memory; npy files are memory-mapped, so they may be larger than the memory.
"""

import pathlib
import zipfile
import zlib

import ml_collections
import numpy as np

from simclr_jax.data.dataset import Arrays
from simclr_jax.errors import ConfigError


def load(config: ml_collections.ConfigDict, split: str) -> Arrays:
  """Reads images, uint8 `[N, h, w, 3]`, and labels `[N]`, if the files have them; -1: unknown.

  Raises:
    ConfigError: the files are missing, corrupt, or have other shapes or types.
  """
  names = (f'{split}.npz', f'{split}_images.npy', f'{split}.npy')
  if not config.dir:
    raise ConfigError(
      f'data.dir is empty: name the folder of {" or ".join(names)} with --data or --config.data.dir'
    )
  folder = pathlib.Path(config.dir).expanduser()
  for name in names:
    if (folder / name).is_file():
      return read(folder / name)
  raise ConfigError(
    f'{folder} holds neither {names[0]} nor {names[1]}: set data.train_split and data.test_split to the names '
    'of your files'
  )


def read(path: pathlib.Path) -> Arrays:
  """Reads one file: npz with `images` and optional `labels`; or npy, whose labels are in `..._labels.npy`."""
  arrays = _read(path)
  labels_path = path.with_name(path.name.replace('_images.npy', '_labels.npy'))
  if path.suffix == '.npy' and labels_path != path and labels_path.is_file():
    arrays |= {'labels': _read(labels_path)['images']}
  if 'images' not in arrays:
    raise ConfigError(f'{path} has no array "images", only {sorted(arrays)}')
  images = arrays['images']
  labels = arrays.get('labels', np.full(images.shape[:1], -1))
  if labels.dtype.kind not in 'iu':
    raise ConfigError(f'{path}: labels must be integers, these are {labels.dtype}')
  try:
    return Arrays(images, np.asarray(labels, np.int32))
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from None


def _read(path):
  """The arrays in a file by name; the array of an npy file is called `images`."""
  try:
    if path.suffix == '.npy':
      return {'images': np.load(path, mmap_mode='r', allow_pickle=False)}
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in ('images', 'labels') if name in file} or dict.fromkeys(
        file
      )
  except (OSError, EOFError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
    raise ConfigError(f'{path} cannot be read as plain arrays: {error}') from None
