"""TensorFlow Datasets whose images are all of one size and fit into memory."""

import pathlib

import ml_collections
import numpy as np

from simclr_jax.data import Dataset
from simclr_jax.errors import ConfigError

MAX_BYTES = 16 * 2**30


def load(config: ml_collections.ConfigDict, split: str) -> Dataset:
  """Reads a prepared data set through tf.data, once, in TFDS's deterministic order.

  Args:
    config: `name` as TFDS knows it; `dir`, TFDS's `data_dir`, empty for its default.
    split: in TFDS's syntax, such as `train[:10%]`.

  Raises:
    ConfigError: TensorFlow is not installed; the data set, split or files are missing or broken; the
      images differ in size or are too many for memory.
  """
  try:
    import tensorflow as tf
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ConfigError(
      f'data.source=tfds needs TensorFlow ({error}): pip install tensorflow-cpu tensorflow-datasets'
    ) from None
  tf.config.set_visible_devices([], 'GPU')  # TensorFlow only feeds
  folder = str(pathlib.Path(config.dir).expanduser()) if config.dir else None
  try:
    builder = tfds.builder(config.name, data_dir=folder)
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError):
    raise ConfigError(f'data.name={config.name!r} is not a TFDS data set') from None
  prepare = f'tfds build {config.name}' + (f' --data_dir={folder}' if folder else '')
  if not builder.is_prepared():
    raise ConfigError(f'{config.name} is not prepared in {builder.data_dir}; prepare it: {prepare}')
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError):
    raise ConfigError(
      f'{config.name} has no split {split!r}, only {", ".join(builder.info.splits)}'
    ) from None
  if 'image' not in builder.info.features:
    raise ConfigError(f'{config.name} has no images, only {", ".join(builder.info.features)}')
  feature = builder.info.features['image']
  if None in feature.shape:
    raise ConfigError(
      f'{config.name} has images of different sizes, and so far only one size can be read'
    )
  size = int(np.prod(feature.shape)) * count
  if size > MAX_BYTES:
    raise ConfigError(
      f'{config.name} {split} takes {size / 2**30:.0f} GiB, more than the 16 allowed'
    )

  images = np.empty((count, *feature.shape), np.uint8)
  labels = np.full(count, -1, np.int32)
  read = 0
  try:
    source = builder.as_dataset(split=split, shuffle_files=False)
    for example in source.batch(1024).prefetch(1).as_numpy_iterator():
      rows = slice(read, read + len(example['image']))
      images[rows] = example['image']
      if 'label' in example:
        labels[rows] = example['label']
      read = rows.stop
  except (tf.errors.OpError, ValueError) as error:
    reason = str(error).split('\n')[0].split('}} ')[-1].split(' [Op:')[0]
    raise ConfigError(f'{config.name} in {builder.data_dir} cannot be read: {reason}') from None
  if read != count:  # a file cut off between two records ends early without an error
    raise ConfigError(
      f'{config.name} in {builder.data_dir} has {read} of its {count} images: prepare it again'
    )
  if images.shape[-1] == 1:
    images = np.repeat(images, 3, axis=-1)
  return Dataset(images, labels)
