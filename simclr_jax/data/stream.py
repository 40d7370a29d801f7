"""What all streams of encoded images share: TensorFlow, its threads, the order, errors with names.

A stream is `folder.Files`, `records.Records` or `records.IndexedRecords`.
"""

import os
from collections.abc import Callable, Iterable

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


def read(dataset: tf.data.Dataset, source, suspects: Callable[[int], Iterable[int]] | None = None):
  """The elements of what was made of a stream, in numpy.

  Args:
    dataset: made of `source.examples` or `source.once`.
    source: the stream.
    suspects: i -> the indices of the images that element i may have been waiting for; by default all.

  Yields:
    Elements.

  Raises:
    ConfigError: in place of TensorFlow's error, one sentence that names the file.
  """
  elements = with_threads(dataset, source.settings).as_numpy_iterator()
  count = 0
  try:
    for element in elements:
      yield element
      count += 1
  except tf.errors.OpError as error:
    found = source.find_problem(suspects and suspects(count))
    reason = error.message.split('}} ')[-1].split('\n')[0]
    # Deleted by the garbage collector, in whatever thread, an iterator may wait for itself forever.
    error.__traceback__ = None
    raise ConfigError(
      f'{found}; remove it, or leave out up to N such with --config.data.skip_bad=N'
      if found
      else f'the data cannot be read: {reason}'
    ) from None
  finally:
    del elements
