"""Decodes the images of a data set once: corrupt images, duplicates, images that show nothing, the range of values."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from simclr_jax.data import decode, examine, headers, stream, values
from simclr_jax.data.dataset import Arrays
from simclr_jax.data.stream import Stream
from simclr_jax.errors import ConfigError

StreamT = TypeVar('StreamT', bound=Stream)
SAMPLE = 4096  # images whose values are measured
REMOTE_SAMPLE = 256  # the same in a bucket
FAINT = (
  32  # an image whose values, from 0 to 255, differ by less uses less than an eighth of its range
)


# Shape without images, and dtype, of the columns of a scan.
COLUMNS: dict[str, tuple[tuple[int, ...], type]] = {
  'index': ((0,), np.int32), 'shape': ((0, 2), np.int32), 'kind': ((0,), np.int32), 'rotated': ((0,), bool),
  'slow': ((0,), bool), 'deep': ((0,), bool), 'digest': ((0,), np.int64), 'label': ((0,), np.int32),
  'one_colour': ((0,), bool), 'used': ((0,), np.int32), 'transparent': ((0,), bool), 'hides': ((0,), bool),
  'clipped': ((0,), np.int32),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scan:
  """Properties of N images, m of which can be decoded.

  Attributes:
    index: int32 `[m]`, indices of the images that can be decoded, ascending.
    shape: int32 `[m, 2]`, their height and width as displayed.
    kind: int32 `[m]`, their formats, indices into `headers.KINDS`; `UNKNOWN` for arrays.
    rotated: bool `[m]`, whether they are EXIF-rotated: stored in another orientation than displayed.
    slow: bool `[m]`, whether they are decoded by `special`.
    deep: bool `[m]`, whether they have more than 8 bits.
    digest: int64 `[m]`, equal for files with equal bytes, or for arrays with equal pixels.
    label: int32 `[m]`, -1 where unknown.
    one_colour: bool `[m]`, whether all pixels are equal.
    used: int32 `[m]`, the highest minus the lowest value, from 0 to 255.
    transparent: bool `[m]`, whether a pixel is not opaque.
    hides: bool `[m]`, whether transparency makes an image of one colour out of one that is not.
    clipped: int32 `[m]`, number of values outside `data.range`.
    bad: index -> name and reason of each image that cannot be decoded, ascending.
  """

  index: np.ndarray
  shape: np.ndarray
  kind: np.ndarray
  rotated: np.ndarray
  slow: np.ndarray
  deep: np.ndarray
  digest: np.ndarray
  label: np.ndarray
  one_colour: np.ndarray
  used: np.ndarray
  transparent: np.ndarray
  hides: np.ndarray
  clipped: np.ndarray
  bad: dict[int, str]

  def duplicates(self) -> int:
    """Number of images whose bytes are equal to those of an earlier image."""
    return len(self.digest) - len(np.unique(self.digest))

  def copies(self, other: 'Scan | None' = None) -> list[tuple[int, int]]:
    """The images that are copies of an earlier image, or of an image of `other`.

    Returns:
      Rows of this scan and, for each, the row of the first image with the same bytes.
    """
    known: dict[int, int] = {}
    if other is not None:
      for row in range(len(other.digest)):
        known.setdefault(int(other.digest[row]), row)
      return [(i, known[d]) for i, d in enumerate(self.digest.tolist()) if d in known]
    firsts = ((i, known.setdefault(d, i)) for i, d in enumerate(self.digest.tolist()))
    return [(i, first) for i, first in firsts if i != first]

  def faint(self) -> np.ndarray:
    """bool `[m]`: images of more than one colour that use less than an eighth of the range."""
    return ~self.one_colour & (self.used < FAINT)

  def kinds(self, rows: np.ndarray | slice = slice(None)) -> dict[str, int]:
    """Number of images, or of those that `rows` selects, by format."""
    return dict(collections.Counter(headers.KINDS[k] for k in self.kind[rows]).most_common())


def scan(source: Stream) -> Scan:
  """Decodes all images of a stream, on all cores, in a process of its own (`examine`), with a progress bar."""
  with tqdm(total=len(source), unit='image', desc='checking') as bar:
    blocks, bad = examine.run(source, lambda done: bar.update(done - bar.n))
  columns = {k: np.concatenate([np.zeros(s, t), *(b[k] for b in blocks if k in b)]) for k, (s, t) in COLUMNS.items()}  # fmt: skip
  return Scan(**columns, bad=bad)


def scan_arrays(arrays: Arrays) -> Scan:
  """The same for images in memory, whose transparency and range were settled when they were read."""
  n, no = len(arrays), np.zeros(len(arrays), bool)
  one_colour, used, digest = no.copy(), np.zeros(n, np.int32), np.zeros(n, np.int64)
  for i, image in enumerate(arrays.images):
    one_colour[i] = (image == image[:1, :1]).all()
    used[i] = int(image.max()) - int(image.min())
    code = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
    digest[i] = int.from_bytes(code, 'little', signed=True)
  shape = np.tile(np.array(arrays.images.shape[1:3], np.int32), (n, 1))
  return Scan(
    index=np.arange(n, dtype=np.int32), shape=shape, kind=np.full(n, headers.UNKNOWN),
    rotated=no, slow=no, deep=np.full(n, any(arrays.range)), digest=digest, label=arrays.labels,
    one_colour=one_colour, used=used, transparent=no, hides=no, clipped=np.zeros(n, np.int32), bad={},
  )  # fmt: skip


def without_bad(source: StreamT) -> StreamT:
  """The stream without the images that cannot be decoded, whose names are logged.

  The result depends on the files only, so every host and every restart skips the same images.

  Raises:
    ConfigError: more than `data.skip_bad` images, or all images, cannot be decoded.
  """
  damage = source.find_problem(
    ()
  )  # a damaged file of many images; single images are not checked here
  if damage:
    raise ConfigError(damage)
  bad = scan(source).bad
  if len(bad) > source.settings.skip_bad:
    raise ConfigError(
      f'{len(bad):,} of {len(source):,} images cannot be decoded, more than '
      f'data.skip_bad={source.settings.skip_bad}; the first: {next(iter(bad.values()))}'
    )
  if bad and len(bad) == len(source):
    raise ConfigError(f'no image can be decoded; the first: {next(iter(bad.values()))}')
  for problem in bad.values():
    logging.warning('skipped: %s', problem)
  if bad:
    logging.warning('%d of %d images are skipped', len(bad), len(source))
  return source.subset(np.setdiff1d(np.arange(len(source)), list(bad))) if bad else source


# Values of more than 8 bits.


def measure(source: Stream) -> tuple[float, float]:
  """The range of the 16-bit and float images of a stream, of at most `SAMPLE` images; (0, 0) if all have 8 bits."""
  config = source.settings
  sample = source.sample(REMOTE_SAMPLE if '://' in config.dir else SAMPLE)
  sized = decode.sized(sample.iterate_once(), config, skip=True).filter(lambda e: e['deep'])
  deep = stream.with_threads(sized.map(lambda e: e['index']), config).as_numpy_iterator()
  indices = np.array(list(deep), int)
  if not len(indices):
    return 0.0, 0.0
  # Images that cannot be decoded are reported when they are read.
  found, _ = examine.run(sample.subset(indices), lambda done: None, examine.extremes)
  ends = np.concatenate([np.zeros((0, 2)), *(b['ends'] for b in found if 'ends' in b)])
  ends = ends[np.isfinite(ends).all(1)]
  if not len(ends):
    return 0.0, 0.0
  floats = all(b['floats'].all() for b in found if 'ends' in b)
  return values.limits(ends.min(), ends.max(), np.dtype(np.float32 if floats else np.uint16))


def with_range(source: StreamT, train: Callable[[], Stream]) -> StreamT:
  """The stream with the setting `range`, which is measured over the training images if the recipe has none.

  Args:
    source: a stream.
    train: the training images.
  """
  config = source.settings
  if any(config.range):
    return source
  limits = measure(train())
  if not any(limits):
    return source
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.range = limits
  return dataclasses.replace(source, settings=config)  # type: ignore[type-var]
