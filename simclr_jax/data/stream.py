"""What all streams of encoded images share: TensorFlow, its threads, the order, errors with names.

A stream is `folder.Files`, `tfds.Records` or `tfds.IndexedRecords`.
"""

import contextlib
import os
from collections.abc import Iterable

import ml_collections
import numpy as np

from simclr_jax.data import order
from simclr_jax.errors import ConfigError

try:
  import tensorflow as tf
except ImportError as error:
  raise ConfigError(
    f'reading images and TFDS needs TensorFlow ({error}): '
    'pip install tensorflow-cpu tensorflow-datasets'
  ) from None
tf.config.set_visible_devices([], 'GPU')  # TensorFlow only feeds


def threads(config: ml_collections.ConfigDict) -> int:
  """How many work on a data set: one a core, or more where reading means waiting for a network."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return config.threads or cores * (8 if '://' in config.dir else 1)


def with_threads(dataset: tf.data.Dataset, config: ml_collections.ConfigDict) -> tf.data.Dataset:
  """In the order given, on a pool of threads of its own."""
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = threads(config)
  options.threading.max_intra_op_parallelism = 1
  return dataset.with_options(options)


def expand(folder: str) -> str:
  """A folder as the user gave it, `~` resolved; buckets (gs://) stay as they are."""
  return folder if '://' in folder else os.path.expanduser(folder)


def rows(
  examples: int, seed: int, batch_size: int, first: int, local: np.ndarray
) -> tf.data.Dataset:
  """The endless sequence of `order.rows`, from step `first` on: a batch of it at a time.

  Args:
    examples: in the data set.
    seed, batch_size: of the run.
    first: a step.
    local: which rows of each batch.

  Returns:
    Elements with int32 `[len(local)]`: `index`, `epoch`, `position`.
  """
  names = ('index', 'epoch', 'position')

  def of_step(step):
    found = order.rows(seed, int(step), batch_size, examples)
    return [found[name][local] for name in names]

  def batch(step):
    found = tf.numpy_function(of_step, [step], [tf.int32] * 3)
    return {name: tf.ensure_shape(x, [len(local)]) for name, x in zip(names, found)}

  return tf.data.Dataset.counter(first).map(batch)


def rows_once(examples: int, part: int, parts: int) -> tf.data.Dataset:
  """Elements as of `rows`, one example each: the whole data set in its own order, or a part of it."""
  ends = [examples * p // parts for p in (part, part + 1)]

  def row(i):
    i = tf.cast(i, tf.int32)
    return {'index': i, 'epoch': 0, 'position': i}

  return tf.data.Dataset.range(*ends).map(row)


@contextlib.contextmanager
def errors(source, suspects: Iterable[int] | None = None):
  """Turns an error of TensorFlow into one sentence that names the file.

  Args:
    source: what is read.
    suspects: the indices of the images that were about to be read; by default all.

  Raises:
    ConfigError: from the block.
  """
  try:
    yield
  except tf.errors.OpError as error:
    found = source.find_problem(suspects)
    if found:
      raise ConfigError(
        f'{found}; remove it, or leave out up to N such with --config.data.skip_bad=N'
      ) from None
    reason = error.message.split('}} ')[-1].split('\n')[0]
    raise ConfigError(f'the data cannot be read: {reason}') from None
