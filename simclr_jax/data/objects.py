"""Data sets of Python objects: arrays, lists of images or of paths, data sets of other libraries."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
import numpy as np

from simclr_jax.data import arrays, values
from simclr_jax.data.dataset import Dataset, natural
from simclr_jax.errors import ConfigError


def is_place(data: Any) -> bool:
  """Whether this is the name of a data set, which `--data` accepts, not images in memory."""
  return isinstance(data, (str, os.PathLike))


def load(
  data: Any, labels: Any, config: ml_collections.ConfigDict | None, split: str = 'train'
) -> Dataset:
  """Images in memory, or a split of a data set that `--data` accepts, of which nothing is held out.

  Args:
    data: the name of a data set, or as for `dataset`.
    labels: for images in memory.
    config: the `data` part of a recipe, for the settings other than the place.
    split: 'train' or 'test'; a data set without a test split is loaded whole.

  Raises:
    ConfigError: the data is missing, corrupt, or of an unknown kind.
  """
  if not is_place(data):
    return dataset(data, labels, config)
  if labels is not None:
    raise ConfigError(
      'labels are for images in memory: those of a folder are its sub-folders, or in data.table'
    )
  if config is None:
    raise ConfigError(f'{data}: pass the images as an array')
  from simclr_jax import data as sources
  from simclr_jax.data import discover

  place = {k.removeprefix('data.'): v for k, v in discover.fields(os.fspath(data)).items()}
  config = ml_collections.ConfigDict({**config.to_dict(), **place, 'holdout': 0.0})
  return sources.load(config, split if place[f'{split}_split'] else 'train')


def dataset(
  images: Any, labels: Any = None, config: ml_collections.ConfigDict | None = None
) -> Dataset:
  """A data set of images that are in memory, or of a list of files.

  Args:
    images: one of
      - an array of N images of one size, or an object with `__array__`, such as a tensor: uint8 `[N, h, w, 3]`, or
        another kind that `arrays.convert` takes, such as gray images or floats in [0, 1];
      - a list of N arrays or Pillow images of one size;
      - a list of N paths of image files, of any size;
      - a tuple (images, labels);
      - a sequence of pairs (image, label), or of dicts with `image` and `label`: data sets of PyTorch or Hugging Face;
      - a `Dataset`, which is returned.
    labels: N integers or strings, which become the classes 0 to C - 1 in natural order; None: no labels.
    config: the `data` part of a recipe.

  Raises:
    ConfigError: the images or labels are of another kind, or their numbers differ.
  """
  if hasattr(images, 'fingerprint') and hasattr(images, 'subset'):
    if labels is not None:
      raise ConfigError('labels: this data set has labels of its own; use its method with_labels')
    return images
  if labels is None and _is_pair(images):
    images, labels = images
  if not (hasattr(images, '__array__') or hasattr(images, '__array_interface__')):
    items = _items(images)
    if isinstance(items[0], (str, os.PathLike)):
      return _files(items, labels, config)
    if _is_labelled(items[0]):
      images, labels = _unzipped(items, labels)
    else:
      images = items
    images = _stacked(images)
  settings = None if config is None else values.settings(config)
  return arrays.convert(np.asarray(images), labels, settings)


def _is_pair(images):
  """Whether this is a tuple (images, labels)."""
  if not (isinstance(images, tuple) and len(images) == 2) or isinstance(
    images[1], (str, os.PathLike)
  ):
    return False
  return (
    np.ndim(images[1]) == 1 and hasattr(images[0], '__len__') and len(images[0]) == len(images[1])
  )


def _items(images) -> list[Any]:
  if isinstance(images, (bytes, dict)) or not isinstance(images, Iterable | Sequence):
    if not (hasattr(images, '__getitem__') and hasattr(images, '__len__')) or isinstance(
      images, (bytes, dict)
    ):
      raise ConfigError(
        f'images of type {type(images).__name__} are not supported: pass an array [N, height, width, 3], a folder, or '
        'a list of images or paths'
      )
    images = [images[i] for i in range(len(images))]
  items = list(images)
  if not items:
    raise ConfigError('there are no images: the list is empty')
  return items


def _is_labelled(item):
  return isinstance(item, dict) or (
    isinstance(item, (tuple, list)) and len(item) == 2 and np.ndim(item[1]) == 0
  )


def _unzipped(items, labels):
  """Images and labels of pairs or dicts."""
  if labels is not None:
    raise ConfigError('labels: the images of this data set come with labels already')
  if not isinstance(items[0], dict):
    return [item[0] for item in items], [_scalar(item[1]) for item in items]
  key = next((k for k in ('image', 'img', 'pixel_values') if k in items[0]), None)
  if key is None:
    raise ConfigError(
      f"the images of this data set have no key 'image', only {', '.join(map(str, items[0]))}"
    )
  labels = [_scalar(item['label']) for item in items] if 'label' in items[0] else None
  return [item[key] for item in items], labels


def _scalar(label):
  return label.item() if hasattr(label, 'item') else label


def _stacked(items) -> np.ndarray:
  """Images of one size, arrays or Pillow images, as one array."""
  if hasattr(items[0], 'getbands'):  # Pillow
    modes = {image.mode for image in items}
    if len(modes) > 1 or not modes <= {'L', 'RGB', 'RGBA', 'I;16', 'F'}:
      items = [image.convert('RGB') for image in items]
  arrays = [np.asarray(item) for item in items]
  for i, array in enumerate(arrays):
    if array.shape != arrays[0].shape or array.dtype != arrays[0].dtype:
      raise ConfigError(
        f'the images have different shapes or types, such as {arrays[0].dtype} {list(arrays[0].shape)} and '
        f'{array.dtype} {list(array.shape)} (image {i}): resize them to one size, or pass a folder or a list of paths'
      )
  return np.stack(arrays)


def _files(paths, labels, config) -> Dataset:
  """The data set of a list of image files."""
  from simclr_jax.data import folder  # needs TensorFlow

  absolute = [os.path.abspath(os.path.expanduser(path)) for path in paths]
  for path in absolute:
    if not os.path.isfile(path):
      raise ConfigError(f'{path} is no file')
  root = os.path.commonpath([os.path.dirname(path) for path in absolute])
  numbers, names = _numbered(labels, len(absolute))
  return folder.Files(
    root, [os.path.relpath(path, root) for path in absolute], numbers, names, config
  )


def _numbered(labels, count):
  """Classes 0 to C - 1, int32 `[N]`, and their names; -1 and no names without labels."""
  if labels is None:
    return np.full(count, -1, np.int32), []
  labels = np.asarray(labels)
  if labels.shape != (count,):
    raise ConfigError(f'{count} images, but labels of shape {list(labels.shape)}')
  names = sorted({str(v) for v in labels.tolist()}, key=natural)
  number = {name: i for i, name in enumerate(names)}
  return np.array([number[str(v)] for v in labels.tolist()], np.int32), names
