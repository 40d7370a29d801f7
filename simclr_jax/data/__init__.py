"""Data sets, batches on the devices, and augmented views.

A source is a module with `load(config, split) -> Dataset`, where `config` is the `data` part of a recipe;
`config.source` is the name of the module.
"""

import dataclasses
import importlib
from collections.abc import Mapping

import jax
import ml_collections

from simclr_jax.data import labels
from simclr_jax.data.dataset import Arrays, Dataset, channels, fits_on_device, value_range
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed

__all__ = ['Arrays', 'Dataset', 'channels', 'check_same', 'load', 'value_range']


def load(config: ml_collections.ConfigDict, split: str) -> Dataset:
  """Loads a split of the data set of a recipe.

  Args:
    config: the `data` part of a recipe.
    split: 'train' or 'test'; `data.train_split` and `data.test_split` are their names in the source.

  Raises:
    ConfigError: the data is missing, corrupt, or not what the recipe says.
  """
  module = importlib.import_module(f'{__name__}.{config.source}')
  name = config[f'{split}_split']
  if not name:
    raise ConfigError(
      f'no {split} split: put images into the sub-folders train/ and test/, or name the split with '
      f'--config.data.{split}_split'
    )
  images = module.load(config, name)
  if split == 'train' and config.labels:
    images = labels.select(images, config)
  if isinstance(images, Arrays):
    images = dataclasses.replace(images, resident=fits_on_device(config, images.images.nbytes))
  return images


def check_same(datasets: Mapping[str, Dataset | None]) -> None:
  """Raises ConfigError, with the name of the data set, if the processes of a run have different images."""
  if jax.process_count() > 1:
    distributed.check_equal(
      {name: images.fingerprint() if images else None for name, images in datasets.items()}
    )


def load_splits(config: ml_collections.ConfigDict) -> tuple[Dataset, Dataset | None]:
  """The training images and the test images; None if there is no test split."""
  train = load(config, 'train')
  return train, load(config, 'test') if config.test_split else None


def summary(config: ml_collections.ConfigDict, train: Dataset, test: Dataset | None) -> list[str]:
  """Describes a data set in one line, and what was decided about it in further lines."""
  return [f'{len(train):,} training images' + (f', {len(test):,} test images' if test else '')]
