"""Data sets, batches on the devices, and augmented views.

A source is a module with `load(config, split) -> Dataset`, where `config` is the `data` part of a recipe;
`config.source` is the name of the module.
"""

import dataclasses
import importlib
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np

from simclr_jax.data import labels
from simclr_jax.data.dataset import Arrays, Dataset, channels, fits_on_device, value_range
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed
from simclr_jax.runtime.text import printable

__all__ = [
  'Arrays',
  'Dataset',
  'channels',
  'check_same',
  'hold_out',
  'in_memory',
  'load',
  'load_splits',
  'summary',
  'value_range',
]

SHOWN = 10  # classes in a summary


def load(config: ml_collections.ConfigDict, split: str) -> Dataset:
  """Loads a split of the data set of a recipe.

  Args:
    config: the `data` part of a recipe.
    split: 'train' or 'test'; `data.train_split` and `data.test_split` are their names in the source. Without a test
      split, or if its images have no labels, the test images are `data.holdout` of each class of the training split,
      and the training images are the others.

  Raises:
    ConfigError: the data is missing, corrupt, or not what the recipe says.
  """
  if config.test_split and not _test_lacks_labels(config):
    images = _source(config).load(config, config[f'{split}_split'])
    return _training(images, config) if split == 'train' else _resident(images, config)
  train, test = load_splits(config)
  if split == 'train':
    return train
  if test is None:
    raise ConfigError(
      'no test split: put images into the sub-folders train/ and test/, or two or more into one sub-folder per class, '
      'or name the split with --config.data.test_split'
    )
  return test


def load_splits(config: ml_collections.ConfigDict) -> tuple[Dataset, Dataset | None]:
  """The training images and the test images of a recipe, see `load`; None without test images.

  Raises:
    ConfigError: as for `load`.
  """
  source = _source(config)
  train = source.load(config, config.train_split)
  test = source.load(config, config.test_split) if config.test_split else None
  if test is None or (config.source == 'folder' and train.labelled and not test.labelled):
    train, held_out = hold_out(config, train)
    test = test if held_out is None else held_out
  return _training(train, config), test and _resident(test, config)


def hold_out(config: ml_collections.ConfigDict, images: Dataset) -> tuple[Dataset, Dataset | None]:
  """Holds `data.holdout` of each class out as the test images of a data set without any.

  Args:
    config: the `data` part of a recipe.
    images: the training images.

  Returns:
    The remaining and the held-out images; None if no image has a label, or nothing is to be held out.
  """
  if not config.holdout or images.classes < 2 or not (images.labels >= 0).any():
    return images, None
  rest, held_out = labels.held_out_split(
    images.labels, images.class_names, config.holdout, config.holdout_seed
  )
  return (images.subset(rest), images.subset(held_out)) if len(held_out) else (images, None)


def in_memory(config: ml_collections.ConfigDict) -> bool:
  """Whether the images of a recipe were in memory, so that they cannot be loaded; `config`: its `data` part."""
  return config.source == 'arrays' and not config.dir


def _source(config):
  if not config.train_split:
    raise ConfigError(
      'no train split: put images into the sub-folders train/ and test/, or name the split with '
      '--config.data.train_split'
    )
  return importlib.import_module(f'{__name__}.{config.source}')


def _test_lacks_labels(config) -> bool:
  """Whether the test split is a folder of images without labels, so that others are held out; no image is read."""
  if config.source != 'folder' or not config.holdout:
    return False
  try:
    return not _source(config).has_labels(config, config.test_split)
  except ConfigError:
    return False  # reported when the split is loaded


def _training(images, config):
  return _resident(labels.select(images, config) if config.labels else images, config)


def _resident(images, config):
  if not isinstance(images, Arrays):
    return images
  return dataclasses.replace(images, resident=fits_on_device(config, images.images.nbytes))


def summary(config: ml_collections.ConfigDict, train: Dataset, test: Dataset | None) -> list[str]:
  """Describes a data set in one line, and what was decided about it in further lines.

  Args:
    config: the `data` part of a recipe.
    train, test: its images, of `load_splits`.
  """
  place = config.table or config.dir or config.name or config.source
  counts = f'{len(train):,} training' + (f' and {len(test):,} test' if test else '') + ' images'
  unlabelled = bool(config.test_split) and train.labelled and _test_lacks_labels(config)
  if test and (unlabelled or not config.test_split):
    counts += f' (held out: {config.holdout:.0%} of each class, seed {config.holdout_seed}'
    counts += f'; {config.test_split} has no labels)' if unlabelled else ')'
  lines = [f'{place}: {counts}, {_classes(train, test)}']
  remarks = [*getattr(train, 'remarks', ()), *(getattr(test, 'remarks', ()) if test else ())]
  return [printable(line) for line in lines + list(dict.fromkeys(remarks))]


def _classes(train, test) -> str:
  """The names of the classes with their numbers of training images."""
  if not train.labelled or not train.classes:
    known = int((train.labels >= 0).sum()) if train.classes else 0
    return (
      f'{train.classes} classes, labels for {known:,} training images' if known else 'no labels'
    )
  counts = np.bincount(train.labels, minlength=train.classes)
  shown = [f'{name} {count:,}' for name, count in zip(train.class_names[:SHOWN], counts)]
  more = f', ... ({counts.min():,} to {counts.max():,} per class)' if train.classes > SHOWN else ''
  text = f'{train.classes} classes: {", ".join(shown)}{more}'
  if test and test.labelled:
    unseen = [test.class_names[c] for c in np.unique(test.labels) if not counts[c]]
    if unseen:
      names = {name.strip().casefold() for name in np.array(train.class_names)[counts > 0]}
      same = [name for name in unseen if name.strip().casefold() in names]
      text += f'; without training images: {", ".join(unseen[:5])}'
      text += f' (only letter case or spaces differ: {", ".join(same[:5])})' if same else ''
  return text


def check_same(datasets: Mapping[str, Dataset | None]) -> None:
  """Raises ConfigError, with the name of the data set, if the processes of a run have different images."""
  if jax.process_count() > 1:
    distributed.check_equal(
      {name: images.fingerprint() if images else None for name, images in datasets.items()}
    )
