"""Encoded images in the files that TFDS writes, TFRecord and ArrayRecord, as streams."""

import dataclasses
import functools
import posixpath
from collections.abc import Iterable
from typing import Any

import ml_collections
import numpy as np

from simclr_jax.data import decode, order, scan, stream
from simclr_jax.data.dataset import choose
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32

OPEN_SHARDS = 16  # files that records are taken from in turn
TOGETHER = 8  # records taken from one before the next


@dataclasses.dataclass(frozen=True)
class Shard:
  """Records of one file: `take` of the `total` that it holds, from `skip` on."""

  path: str
  skip: int
  take: int
  total: int


@dataclasses.dataclass(frozen=True)
class Records:
  """Encoded images in TFRecord files, which can only be read from front to back.

  The order of a pass is that of its files, shuffled, of records taken from 16 of them in turn, and of a
  shuffle buffer: a function of (seed, pass, part), where each host reads a part of its own. A place
  inside a pass is found again by reading up to it, without decoding.

  Attributes:
    shards: of the split.
    parse: serialized record -> (encoded image, label).
    labelled: whether every image has a label.
    class_names: of the labels; none without labels.
    settings: the recipe's `data` part.
    skipped: the indices of records that are left out.
    overrides: int32 `[N]`, labels instead of those of the records.
  """

  shards: list[Shard]
  parse: Any
  labelled: bool
  class_names: list[str]
  settings: ml_collections.ConfigDict
  skipped: tuple[int, ...] = ()
  overrides: np.ndarray | None = None

  sequential = True

  def __len__(self) -> int:
    return self._ends[-1] - len(self.skipped)

  @property
  def classes(self) -> int:
    """How many there are; 0 without labels."""
    return len(self.class_names)

  @functools.cached_property
  def _ends(self):
    return [0, *np.cumsum([s.take for s in self.shards])]

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """int32 `[N]`, -1 where unknown; reading them takes a pass over the files."""
    return _labels(self)

  def names(self) -> None:
    """Records have no names."""

  def name(self, index: int) -> str:
    """An image in a message: its file, and its index there."""
    index = self._kept()[index]
    shard = int(np.searchsorted(self._ends, index, 'right')) - 1
    where = self.shards[shard]
    return f'record {where.skip + index - self._ends[shard]:,} of {where.path}'

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """The first damaged file, or else image among the suspects, and why; '' if there is none."""
    for shard in self.shards:
      count = 0
      try:
        for _ in tf.data.TFRecordDataset(shard.path):
          count += 1
      except tf.errors.OpError as error:
        reason = error.message.split('}} ')[-1].split(' [Op:')[0].split(';')[0]
        return f'{shard.path} is damaged after {count:,} of its {shard.total:,} records: {reason}'
      if count != shard.total:
        return f'{shard.path} has {count:,} of its {shard.total:,} records'
    suspects = set(scan.scan(self).bad if suspects is None else suspects)
    for e in self.iterate_once().as_numpy_iterator() if suspects else ():
      found = e['index'] in suspects and decode.problem(e['bytes'], self.settings.max_pixels)
      if found:
        return f'{self.name(e["index"])} {found}'
    return ''

  def fingerprint(self) -> int:
    """CRC-32 that tells data sets apart: of files, which of their records are meant, and labels that were overrides."""
    return _fingerprint(self, self._kept())

  def subset(self, indices: np.ndarray) -> 'Records':
    """The data set of these images."""
    left_out = np.setdiff1d(np.arange(self._ends[-1]), self._kept()[indices])
    return dataclasses.replace(
      self, skipped=tuple(left_out.tolist()), overrides=_overrides_of(self, np.sort(indices))
    )

  def with_labels(self, labels: np.ndarray) -> 'Records':
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, overrides=labels, labelled=bool((labels >= 0).all()))

  def sample(self, count: int) -> 'Records':
    """The first `count` images, or all."""
    kept = self._kept()[:count]
    records, shards = kept[-1] + 1, []
    for shard in self.shards:
      take = min(shard.take, records)
      records -= take
      if take:
        shards.append(dataclasses.replace(shard, take=take))
    skipped = tuple(i for i in self.skipped if i <= kept[-1])
    return dataclasses.replace(
      self, shards=shards, skipped=skipped, overrides=_overrides_of(self, np.arange(len(kept)))
    )

  def _kept(self):
    return np.setdiff1d(np.arange(self._ends[-1]), self.skipped)

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """An endless shuffled sequence, from step `first` on.

    Each pass has every image once. One of H hosts reads one of H parts of each pass, another part
    every time; the order is exact for a overrides number of hosts.

    Args and returns as of `folder.Files.examples`.
    """
    host, parts = int(local[0]) // len(local), batch_size // len(local)

    def spans(epoch):
      files = order.permute(seed, epoch, np.arange(len(self.shards)), len(self.shards))
      return self._spans(files, (host + epoch) % parts, parts)

    epoch, before = 0, first * len(local)
    while before >= self._count(spans(epoch)):
      before -= self._count(spans(epoch))
      epoch += 1

    def one_pass(e):
      mine = tf.numpy_function(
        lambda e: spans(int(e)), [e], [tf.string, tf.int64, tf.int64, tf.int64, tf.int64]
      )
      start = mine[-1]
      records = self._read(mine[:-1], OPEN_SHARDS)
      records = records.shuffle(
        self.settings.shuffle_buffer, seed=seed + e * 2**32, reshuffle_each_iteration=False
      )
      records = records.enumerate(tf.ensure_shape(start, [])).skip(
        tf.where(e == epoch, tf.constant(before, tf.int64), 0)
      )
      return records.map(lambda p, r: self._example(r, tf.cast(e, tf.int32), tf.cast(p, tf.int32)))

    return tf.data.Dataset.counter(epoch).flat_map(one_pass)

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """Every image once, in order: elements as of `examples`; of `parts`, the one that is `part`."""
    mine = self._spans(np.arange(len(self.shards)), part, parts)
    return self._read(mine[:-1], 1).map(lambda *r: self._example(r, 0, r[0]))

  def _spans(self, files, part, parts):
    """Which records make up a part of the files in this order: path, skip, take, first index of each.

    Last comes the place of the part in the whole.
    """
    takes = np.array([s.take for s in self.shards])[files]
    ends = np.cumsum(takes)
    low, high = (int(ends[-1]) * p // parts for p in (part, part + 1))
    begin, end = np.maximum(ends - takes, low), np.minimum(ends, high)
    some = begin < end
    into = (begin - (ends - takes))[some]
    files = files[some]
    return (
      np.array([self.shards[f].path.encode() for f in files], object),
      np.array([self.shards[f].skip for f in files], np.int64) + into,
      (end - begin)[some].astype(np.int64),
      np.array([self._ends[f] for f in files], np.int64) + into,
      np.int64(low),
    )

  def _count(self, spans):
    _, _, takes, firsts, _ = spans
    left_out = np.array(self.skipped, np.int64)
    inside = (left_out >= firsts[:, None]) & (left_out < (firsts + takes)[:, None])
    return int(takes.sum() - inside.sum())

  def _read(self, spans, open_shards):
    """Elements (index, serialized record), by turns from several files."""

    def of_file(path, skip, take, first):
      records = tf.data.TFRecordDataset(path, buffer_size=2**20).skip(skip).take(take)
      # A file that was cut off between two records ends early without an error.
      records = records.apply(tf.data.experimental.assert_cardinality(take))
      return records.enumerate(first)

    files = tf.data.Dataset.from_tensor_slices(
      tuple(tf.ensure_shape(x, [None]) for x in spans)
    )  # fmt: skip
    records = files.interleave(
      of_file, open_shards, TOGETHER, num_parallel_calls=min(open_shards, 4), deterministic=True
    )
    records = records.map(lambda i, r: (tf.cast(i, tf.int32), r))
    if self.skipped:
      kept = np.ones(self._ends[-1], bool)
      kept[list(self.skipped)] = False
      with tf.init_scope():
        number = tf.constant(np.where(kept, np.cumsum(kept) - 1, -1), tf.int32)
      records = records.map(lambda i, r: (number[i], r)).filter(lambda i, r: i >= 0)
    return records

  @functools.cached_property
  def _table(self):
    with tf.init_scope():
      return tf.constant(self.overrides)

  def _example(self, record, epoch, position):
    index, serialized = record
    image, label = self.parse(serialized)
    if self.overrides is not None:
      label = self._table[index]
    return {
      'bytes': image, 'label': label, 'index': index, 'epoch': epoch, 'position': position,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class IndexedRecords:
  """Encoded images in ArrayRecord files: read in any order, like files of a folder.

  Attributes:
    source: gives the serialized records of a list of places.
    places: int64 `[N]`, of each image.
    parse, labelled, class_names, settings, overrides: as of `Records`.
    where: the folder.
    shards: the files.
  """

  source: Any
  places: np.ndarray
  parse: Any
  labelled: bool
  class_names: list[str]
  settings: ml_collections.ConfigDict
  where: str
  shards: list[Shard]
  overrides: np.ndarray | None = None

  sequential = False

  def __len__(self) -> int:
    return len(self.places)

  @property
  def classes(self) -> int:
    """How many there are; 0 without labels."""
    return len(self.class_names)

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """As of `Records`."""
    return _labels(self)

  def names(self) -> None:
    """Records have no names."""

  def name(self, index: int) -> str:
    """An image in a message."""
    return f'record {self.places[index]:,} of the split in {self.where}'

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """The first of the suspects, or of all, that cannot be decoded, and why; '' if all can."""
    for index in scan.scan(self).bad if suspects is None else suspects:
      try:
        image, _ = self.parse(self._fetch(np.array([index]))[0])
      except Exception as error:  # whatever the reader raises
        raise ConfigError(
          f'{self.name(index)} cannot be read: {str(error).splitlines()[0]}'
        ) from None
      found = decode.problem(image.numpy(), self.settings.max_pixels)
      if found:
        return f'{self.name(index)} {found}'
    return ''

  def fingerprint(self) -> int:
    """As of `Records`."""
    return _fingerprint(self, self.places)

  def subset(self, indices: np.ndarray) -> 'IndexedRecords':
    """The data set of these images."""
    return dataclasses.replace(
      self, places=self.places[indices], overrides=_overrides_of(self, indices)
    )

  def with_labels(self, labels: np.ndarray) -> 'IndexedRecords':
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, overrides=labels, labelled=bool((labels >= 0).all()))

  def sample(self, count: int) -> 'IndexedRecords':
    """`count` images, or all: always the same ones."""
    return self.subset(choose(count, len(self)))

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """As of `folder.Files`."""
    return self._read(stream.rows(len(self), seed, batch_size, first, local))

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """As of `folder.Files`."""
    return self._read(stream.rows_once(len(self), part, parts).batch(256))

  def _fetch(self, index):
    records = self.source.__getitems__(self.places[index].tolist())
    return np.array([bytes(r) for r in records], object)

  def _read(self, batches):
    def fetch(e):
      records = tf.numpy_function(self._fetch, [e['index']], tf.string)
      return {**e, 'record': tf.reshape(records, tf.shape(e['index']))}

    if self.overrides is not None:
      with tf.init_scope():
        overrides = tf.constant(self.overrides)

    def example(e):
      image, label = self.parse(e.pop('record'))
      if self.overrides is not None:
        label = overrides[e['index']]
      return {**e, 'bytes': image, 'label': label}

    return batches.map(fetch).unbatch().map(example)


def _fingerprint(source, which):
  files = [f'{posixpath.basename(s.path)} {s.skip} {s.take}' for s in source.shards]
  overrides = [] if source.overrides is None else source.overrides
  return crc32('\n'.join(files), np.int64(which), np.int32(overrides))


def _labels(source):
  if source.overrides is not None:
    return source.overrides
  if not source.labelled:
    return np.full(len(source), -1, np.int32)
  labels = source.iterate_once().map(lambda e: e['label']).batch(4096)
  return np.concatenate(list(stream.read(labels, source)))


def _overrides_of(source, indices):
  return None if source.overrides is None else source.overrides[indices]
