"""Encoded images in the files that TFDS writes, TFRecord and ArrayRecord, as streams."""

import dataclasses
import functools
import os
import pathlib
import posixpath
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import ml_collections
import numpy as np

from simclr_jax.data import decode, order, scan, stream
from simclr_jax.data.dataset import choose
from simclr_jax.data.shards import Shard, Shards
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32
from simclr_jax.runtime.files import open_to_read

OPEN_SHARDS = 16  # files that are interleaved
BLOCK_LENGTH = 8  # consecutive records of a file before the next file
LONGEST = 2**31  # bytes of a record


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EncodedRecords:
  """What both kinds of records share.

  Attributes:
    parse: serialized record -> (encoded image, label).
    labelled: whether every image has a label.
    class_names: names of the classes; empty without labels.
    settings: the `data` part of the recipe.
    overrides: int32 `[N]`, labels that replace those of the records.
  """

  parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
  labelled: bool
  class_names: list[str]
  settings: ml_collections.ConfigDict
  overrides: np.ndarray | None = None

  @property
  def classes(self) -> int:
    """Number of classes; 0 without labels."""
    return len(self.class_names)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int32 `[N]`, -1 where unknown; all files are read for them."""
    source = cast(stream.Stream, self)  # as each of the two kinds is
    if self.overrides is not None:
      return self.overrides
    if not self.labelled:
      return np.full(len(source), -1, np.int32)
    labels = source.iterate_once().map(lambda e: e['label']).batch(4096)
    return stream.checked_labels(np.concatenate(list(stream.read(labels, source))), source)

  def names(self) -> None:
    """None: records have no names."""

  def with_labels(self, labels: np.ndarray) -> Self:
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, overrides=labels, labelled=bool((labels >= 0).all()))

  def _overrides_of(self, indices):
    return None if self.overrides is None else self.overrides[indices]

  @functools.cached_property
  def _label_table(self):
    with tf.init_scope():  # the first use may be inside a tf.data function
      return tf.constant(self.overrides)

  def _parsed(self, e):
    """An element with `bytes` and `label` instead of `record`."""
    image, label = self.parse(e.pop('record'))
    if self.overrides is not None:
      label = self._label_table[e['index']]
    return {**e, 'bytes': image, 'label': label}

  def _problem(self, record):
    """Why the image of a serialized record cannot be decoded; empty if it can be."""
    try:
      image, _ = self.parse(record)
    except tf.errors.OpError as error:
      return f'has other features than features.json says: {reason(error)}'
    return decode.problem(image.numpy(), self.settings)

  def _checksum(self, files: list[Shard], numbers: np.ndarray) -> int:
    names = [f'{posixpath.basename(s.path)} {s.skip} {s.take}' for s in files]
    overrides = np.zeros(0) if self.overrides is None else self.overrides
    return crc32('\n'.join(names), numbers.astype(np.int64), overrides.astype(np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records(_EncodedRecords):
  """Encoded images in TFRecord files, a `stream.Stream` with sequential access.

  In each epoch the files are shuffled, the records of 16 files are interleaved, and a shuffle buffer shuffles
  the records. This order is a function of (seed, epoch, part), where each host reads one part. A resumed
  run reads the records up to its position again, without decoding them.

  Attributes:
    shards: the records.
  """

  shards: Shards

  sequential = True

  def __len__(self) -> int:
    return len(self.shards)

  def name(self, index: int) -> str:
    """The file of an image, and the number of its record in the file."""
    shard, number = self.shards.locate(index)
    return f'record {number:,} of {shard.path}'

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """The first damaged file or, without one, the first of the suspects that cannot be decoded, and why."""
    for shard in self.shards.files:
      problem = _damage(shard)
      if problem:
        return problem
    if suspects is None:
      return next(iter(scan.scan(self).bad.values()), '')
    suspects = set(suspects)
    spans = self.shards.spans(np.arange(len(self.shards.files)), 0, 1)
    records = self._read(spans[:-1], 1).as_numpy_iterator() if suspects else ()
    for index, record in records:
      if index in suspects:
        problem = self._problem(record)
        if problem:
          return f'{self.name(index)} {problem}'
        suspects.remove(index)
        if not suspects:
          break
    return ''

  def fingerprint(self) -> int:
    """CRC-32 of the names of the files, the selected records, and labels that replace those of the records."""
    return self._checksum(self.shards.files, self.shards.numbers)

  def subset(self, indices: np.ndarray) -> Self:
    """The data set of the images with these indices, in the order of the files."""
    overrides = self._overrides_of(np.sort(indices))
    return dataclasses.replace(self, shards=self.shards.subset(indices), overrides=overrides)

  def sample(self, count: int) -> Self:
    """The first `count` images, or all if there are fewer."""
    shards = self.shards.first(count)
    overrides = self._overrides_of(np.arange(len(shards)))
    return dataclasses.replace(self, shards=shards, overrides=overrides)

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """An endless sequence of shuffled epochs; see `stream.Stream`.

    With H hosts an epoch has H parts, and each host reads another part in every epoch. The order is
    reproducible for a given number of hosts.
    """
    host, parts = int(local[0]) // len(local), batch_size // len(local)

    def spans(epoch):
      count = len(self.shards.files)
      files = order.permute(seed, epoch, np.arange(count), count)
      return self.shards.spans(files, (host + epoch) % parts, parts)

    first_epoch, done = (
      0,
      first * len(local),
    )  # done: images of the first epoch that precede step `first`
    while done >= self.shards.count(spans(first_epoch)):
      done -= self.shards.count(spans(first_epoch))
      first_epoch += 1

    def one_epoch(epoch):
      columns = tf.numpy_function(
        lambda e: tuple(spans(int(e))), [epoch], [tf.string, tf.int64, tf.int64, tf.int64, tf.int64]
      )
      records = self._read(columns[:-1], OPEN_SHARDS)
      records = records.shuffle(
        self.settings.shuffle_buffer, seed=seed + epoch * 2**32, reshuffle_each_iteration=False
      )
      records = records.enumerate(tf.ensure_shape(columns[-1], [])).skip(
        tf.where(epoch == first_epoch, tf.constant(done, tf.int64), 0)
      )
      return records.map(lambda position, e: self._element(e[0], e[1], epoch, position))

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch)

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """Every image once, in order; see `stream.Stream`."""
    spans = self.shards.spans(np.arange(len(self.shards.files)), part, parts)
    return self._read(spans[:-1], 1).map(lambda i, record: self._element(i, record, 0, i))

  def _element(self, index, record, epoch, position):
    epoch, position = tf.cast(epoch, tf.int32), tf.cast(position, tf.int32)
    return self._parsed({'index': index, 'record': record, 'epoch': epoch, 'position': position})

  def _read(self, spans, open_shards):
    """Elements (index, serialized record) of the spans (path, skip, take, first), interleaved."""

    def of_file(path, skip, take, first):
      path = tf.ensure_shape(tf.numpy_function(_checked, [path], tf.string), [])
      records = tf.data.TFRecordDataset(path, buffer_size=2**20).skip(skip).take(take)
      # A file that was cut off between two records ends early without an error.
      records = records.apply(tf.data.experimental.assert_cardinality(take))
      return records.enumerate(first)

    files = tf.data.Dataset.from_tensor_slices(tuple(tf.ensure_shape(x, [None]) for x in spans))
    records = files.interleave(
      of_file, open_shards, BLOCK_LENGTH, num_parallel_calls=min(open_shards, 4), deterministic=True
    )
    if not self.shards.excluded:
      return records.map(lambda number, record: (tf.cast(number, tf.int32), record))
    with tf.init_scope():
      indices = tf.constant(self.shards.indices())
    return records.map(lambda number, record: (indices[number], record)).filter(
      lambda index, record: index >= 0
    )


@functools.lru_cache(maxsize=100_000)
def _checked(path: bytes) -> bytes:
  """The same path; raises if TensorFlow must not read the file. Each file is checked once in a process."""
  problem = _bad_length(os.fsdecode(path))
  if problem:
    raise ValueError(problem)
  return path


def _bad_length(path: str, total: int = 0) -> str:
  """What is wrong with the lengths of the records of a TFRecord file, a phrase that follows its name; '' if nothing is.

  TensorFlow takes memory for a record before it reads it, and a length that is too large ends the process. Only the
  12 bytes before each record are read. A file in a bucket, or one that does not exist, is left to TensorFlow.

  Args:
    path: the file.
    total: number of its records, for the message.
  """
  if '://' in path:
    return ''
  try:
    with open_to_read(pathlib.Path(path)) as file:
      size, end, count = os.fstat(file.fileno()).st_size, 0, 0
      while len(header := file.read(12)) == 12:
        length = int.from_bytes(header[:8], 'little')
        end += 12 + length + 4
        if end > size or length > LONGEST:
          of = f' of its {total:,}' if total else ''
          return f'is damaged after {count:,}{of} records: truncated record of {length:,} bytes'
        file.seek(end)
        count += 1
  except FileNotFoundError:
    return ''
  except ConfigError as error:
    return str(error).removeprefix(f'{path} ')
  return ''


def check(shard: Shard) -> None:
  """Raises ConfigError if TensorFlow must not read a TFRecord file."""
  problem = _bad_length(shard.path, shard.total)
  if problem:
    raise ConfigError(f'{shard.path} {problem}')


def check_total(shard: Shard) -> None:
  """Raises ConfigError if a local TFRecord file cannot have so many records, since each has 16 bytes or more."""
  if '://' not in shard.path and not 0 <= 16 * shard.total <= os.path.getsize(shard.path):
    raise ConfigError(_damage(shard))


def _damage(shard: Shard) -> str:
  """The path of a TFRecord file that is damaged or incomplete, and why; empty if it is neither."""
  if '://' in shard.path or not os.path.exists(shard.path):
    return _damage_of(shard)
  found = os.stat(shard.path)
  return _damage_of_state(shard, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _damage_of_state(shard, size, mtime):  # so that a file is read again only if it has changed
  return _damage_of(shard)


def _damage_of(shard):
  problem = _bad_length(shard.path, shard.total)
  if problem:
    return f'{shard.path} {problem}'
  count = 0
  try:
    for _ in tf.data.TFRecordDataset(shard.path):
      count += 1
  except tf.errors.OpError as error:
    return (
      f'{shard.path} is damaged after {count:,} of its {shard.total:,} records: {reason(error)}'
    )
  return (
    '' if count == shard.total else f'{shard.path} has {count:,} of its {shard.total:,} records'
  )


def reason(error: Exception) -> str:
  """One line of an error of TensorFlow or of a reader of records."""
  text = getattr(error, 'message', str(error)).split('}} ')[-1].split(' [Op:')[0].split(';')[0]
  return (text.strip().splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedRecords(_EncodedRecords):
  """Encoded images in ArrayRecord files, a `stream.Stream` with random access.

  Attributes:
    source: a TFDS data source, which returns the serialized records with given numbers.
    numbers: int64 `[N]`, the number of each image in `source`.
    files: the shards.
    folder: the folder of the files.
  """

  source: Any
  numbers: np.ndarray
  files: list[Shard]
  folder: str

  sequential = False

  def __len__(self) -> int:
    return len(self.numbers)

  def name(self, index: int) -> str:
    """The number of a record, and the folder."""
    return f'record {self.numbers[index]:,} of the split in {self.folder}'

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """The name of the first of the suspects that cannot be decoded, and why; see `stream.Stream`."""
    if suspects is None:
      return next(iter(scan.scan(self).bad.values()), '')
    for index in suspects:
      try:
        record = self._fetch(np.array([index]))[0]
      except Exception as error:  # whatever the reader raises
        raise ConfigError(f'{self.name(index)} cannot be read: {reason(error)}') from None
      problem = self._problem(record)
      if problem:
        return f'{self.name(index)} {problem}'
    return ''

  def fingerprint(self) -> int:
    """CRC-32 of the names of the files, the selected records, and labels that replace those of the records."""
    return self._checksum(self.files, self.numbers)

  def subset(self, indices: np.ndarray) -> Self:
    """The data set of the images with these indices."""
    return dataclasses.replace(
      self, numbers=self.numbers[indices], overrides=self._overrides_of(indices)
    )

  def sample(self, count: int) -> Self:
    """`count` images, or all if there are fewer; always the same images."""
    return self.subset(choose(count, len(self)))

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """The endless sequence of `order.rows`; see `stream.Stream`."""
    return self._read(stream.rows(len(self), seed, batch_size, first, local))

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """Every image once, in order; see `stream.Stream`."""
    return self._read(stream.rows_once(len(self), part, parts).batch(256))

  def _fetch(self, indices):
    records = self.source.__getitems__(self.numbers[indices].tolist())
    return np.array([bytes(r) for r in records], object)

  def _read(self, batches):
    def fetch(e):
      records = tf.numpy_function(self._fetch, [e['index']], tf.string)
      return {**e, 'record': tf.reshape(records, tf.shape(e['index']))}

    return batches.map(fetch).unbatch().map(self._parsed)
