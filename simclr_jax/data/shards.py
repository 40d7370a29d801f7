"""Which records of which files make up a data set: arithmetic on indices, without TensorFlow.

A record has a number, which counts all records of the shards, and an index, which does not count the excluded ones.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shard:
  """Consecutive records of a file: `take` of its `total` records, after the first `skip`."""

  path: str
  skip: int
  take: int
  total: int


class Spans(NamedTuple):
  """Consecutive records in each of several files.

  Attributes:
    path: bytes `[n]`, the files.
    skip, take: int64 `[n]`, as of `Shard`.
    first: int64 `[n]`, the number of the first record of each span.
    position: int64, how many records of the epoch precede all spans.
  """

  path: np.ndarray
  skip: np.ndarray
  take: np.ndarray
  first: np.ndarray
  position: np.int64


@dataclasses.dataclass(frozen=True)
class Shards:
  """The records of several files, in order, except for the excluded ones.

  Attributes:
    files: the shards.
    excluded: numbers of the excluded records, ascending.
  """

  files: list[Shard]
  excluded: tuple[int, ...] = ()

  def __len__(self) -> int:
    return len(self.numbers)

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """The number of the first record of each shard, and the number of all records: int64 `[shards + 1]`."""
    return np.cumsum([0, *(f.take for f in self.files)])

  @functools.cached_property
  def numbers(self) -> np.ndarray:
    """The number of each record that is not excluded: int64 `[N]`."""
    return np.setdiff1d(np.arange(self.starts[-1]), self.excluded)

  def indices(self) -> np.ndarray:
    """The index of each record, -1 if it is excluded: int32."""
    indices = np.full(self.starts[-1], -1, np.int32)
    indices[self.numbers] = np.arange(len(self))
    return indices

  def locate(self, index: int) -> tuple[Shard, int]:
    """The shard of a record, and the number of the record in its file."""
    number = self.numbers[index]
    i = int(np.searchsorted(self.starts, number, 'right')) - 1
    return self.files[i], self.files[i].skip + int(number - self.starts[i])

  def subset(self, indices: np.ndarray) -> Self:
    """The records with these indices, in the order of the files."""
    excluded = np.setdiff1d(np.arange(self.starts[-1]), self.numbers[indices])
    return dataclasses.replace(self, excluded=tuple(excluded.tolist()))

  def first(self, count: int) -> Self:
    """The first `count` records, or all if there are fewer; the rest of the files is not read."""
    last = int(self.numbers[:count][-1])
    files = [
      dataclasses.replace(file, take=min(file.take, last + 1 - int(start)))
      for file, start in zip(self.files, self.starts)
      if start <= last
    ]
    return dataclasses.replace(
      self, files=files, excluded=tuple(i for i in self.excluded if i <= last)
    )

  def spans(self, order: np.ndarray, part: int, parts: int) -> Spans:
    """One of `parts` equal parts of the records.

    Args:
      order: int `[shards]`, the order of the files.
      part, parts: which part of how many. Excluded records are counted when the parts are made.
    """
    takes = np.diff(self.starts)[order]
    ends = np.cumsum(takes)
    starts = ends - takes
    low, high = (int(ends[-1]) * p // parts for p in (part, part + 1))
    begin, end = np.maximum(starts, low), np.minimum(ends, high)
    inside = begin < end
    offset = (begin - starts)[inside]  # of a span in its shard
    order = order[inside]
    return Spans(
      np.array([self.files[i].path.encode() for i in order], object),
      np.array([self.files[i].skip for i in order], np.int64) + offset,
      (end - begin)[inside].astype(np.int64),
      self.starts[order].astype(np.int64) + offset,
      np.int64(low),
    )

  def count(self, spans: Spans) -> int:
    """How many records of the spans are not excluded."""
    excluded = np.array(self.excluded, np.int64)
    first = spans.first[:, None]
    inside = (excluded >= first) & (excluded < first + spans.take[:, None])
    return int(spans.take.sum() - inside.sum())
