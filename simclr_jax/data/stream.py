"""The interface of every stream of encoded images, and what streams share: TensorFlow, threads, order, errors."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import ml_collections
import numpy as np

from simclr_jax.data import order
from simclr_jax.data.dataset import Arrays, Dataset
from simclr_jax.errors import ConfigError

# TensorFlow keeps the memory of a batch for the next one; new memory costs the system more time than copying the images.
os.environ.setdefault('TF_CPU_ALLOCATOR_USE_BFC', 'true')
try:
  import tensorflow as tf
except ImportError as error:
  raise ConfigError(
    f'reading images and TFDS needs TensorFlow ({error}): '
    'pip install tensorflow-cpu tensorflow-datasets'
  ) from None
tf.config.set_visible_devices([], 'GPU')  # TensorFlow only reads and decodes


class Stream(Dataset, Protocol):
  """Encoded images that are read when they are needed.

  `folder.Files`, `records.Records` or `records.IndexedRecords`.
  """

  @property
  def settings(self) -> ml_collections.ConfigDict:
    """The `data` part of the recipe."""
    ...

  @property
  def sequential(self) -> bool:
    """Whether the images can only be read in sequence; otherwise, in any order."""
    ...

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """An endless sequence of shuffled epochs, as of `order.rows` unless the stream is sequential.

    Args:
      seed, batch_size: of the run.
      first: the step at which to start.
      local: the rows of each batch to read, int `[n]`.

    Returns:
      An element for each image: `bytes`, the encoded image, and int32 `label`, `index`, `epoch`, `position`.
    """
    ...

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """Every image once, in order: elements as of `train_iterator`; of `parts` equal parts, only `part`."""
    ...

  def name(self, index: int) -> str:
    """The name of an image in messages, such as its path."""
    ...

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """Finds an image or file that cannot be read.

    Args:
      suspects: indices of the images to check; by default all.

    Returns:
      The name of the first one and the reason; empty if there is none.
    """
    ...


def as_stream(dataset: Dataset) -> Stream:
  """The same object with the type `Stream`: every data set is a stream unless it is `Arrays`."""
  assert not isinstance(dataset, Arrays)
  return cast(Stream, dataset)


def threads(config: ml_collections.ConfigDict) -> int:
  """Number of threads for a data set: one per core, or 8 per core where they wait for a network."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return config.threads or cores * (8 if '://' in config.dir else 1)


def with_threads(dataset: tf.data.Dataset, config: ml_collections.ConfigDict) -> tf.data.Dataset:
  """The same elements in the same order, computed by a thread pool of its own."""
  options = tf.data.Options()
  options.deterministic = True
  options.threading.private_threadpool_size = threads(config)
  options.threading.max_intra_op_parallelism = 1
  return dataset.with_options(options)


def expand(folder: str) -> str:
  """Resolves `~` in the name of a folder; buckets (gs://) are unchanged."""
  return folder if '://' in folder else os.path.expanduser(folder)


def rows(
  examples: int, seed: int, batch_size: int, first: int, local: np.ndarray
) -> tf.data.Dataset:
  """The endless sequence of `order.rows`, one batch at a time.

  Args:
    examples: number of images.
    seed, batch_size: of the run.
    first: the step at which to start.
    local: the rows of each batch to keep.

  Returns:
    Elements with int32 `[len(local)]`: `index`, `epoch`, `position`.
  """
  names = ('index', 'epoch', 'position')

  def local_rows(step):
    batch = order.rows(seed, int(step), batch_size, examples)
    return [batch[name][local] for name in names]

  def batch(step):
    columns = tf.numpy_function(local_rows, [step], [tf.int32] * 3)
    return {name: tf.ensure_shape(x, [len(local)]) for name, x in zip(names, columns)}

  return tf.data.Dataset.counter(first).map(batch)


def rows_once(examples: int, part: int, parts: int) -> tf.data.Dataset:
  """Elements as of `rows`, but for one image each: the data set in order, or one of `parts` equal parts."""
  ends = [examples * p // parts for p in (part, part + 1)]

  def row(i):
    i = tf.cast(i, tf.int32)
    return {'index': i, 'epoch': 0, 'position': i}

  return tf.data.Dataset.range(*ends).map(row)


def checked_labels(labels: np.ndarray, source: Stream) -> np.ndarray:
  """The same labels. Raises ConfigError if one is beyond the classes of the stream."""
  wrong = np.flatnonzero((labels >= source.classes) & (source.classes > 0))
  if len(wrong):
    raise ConfigError(
      f'{source.name(int(wrong[0]))} has the label {labels[wrong[0]]:,}, which is none of the {source.classes:,} classes'
    )
  return labels


def read(
  dataset: tf.data.Dataset,
  source: Stream,
  suspects: Callable[[int], Iterable[int]] | None = None,
) -> Iterator[Any]:
  """The elements of a pipeline in numpy.

  Args:
    dataset: a pipeline that starts with `source.train_iterator` or `source.iterate_once`.
    source: the stream.
    suspects: i -> indices of the images that element i may have been waiting for; by default all images.

  Yields:
    Elements.

  Raises:
    ConfigError: instead of TensorFlow's error, one sentence that names the file.
  """
  elements = with_threads(dataset, source.settings).as_numpy_iterator()
  count, message = 0, None
  try:
    for element in elements:
      yield element
      count += 1
  except tf.errors.OpError as error:
    message = error.message
  finally:
    del elements
  if message is None:
    return
  # Not in the except block: errors raised there refer to the traceback, and the traceback to the iterator. If
  # the garbage collector deletes an iterator, in whatever thread, it may wait for itself forever.
  problem = source.find_problem(suspects and suspects(count))
  if problem:
    raise ConfigError(
      f'{problem}; remove it, or skip up to N such images with --config.data.skip_bad=N'
    )
  reason = message.split('}} ')[-1].split('\n')[0]
  raise ConfigError(f'the data cannot be read: {reason}')
