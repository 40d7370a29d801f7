"""Decodes every image of a data set once, to find corrupt images."""

import collections
import dataclasses
from typing import TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from simclr_jax.data import decode, headers, stream
from simclr_jax.data.stream import Stream, tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import preemption

StreamT = TypeVar('StreamT', bound=Stream)


@dataclasses.dataclass(frozen=True)
class Scan:
  """Properties of a stream of N images, m of which can be decoded.

  Attributes:
    index: int32 `[m]`, indices of the images that can be decoded, ascending.
    shape: int32 `[m, 2]`, their height and width as displayed.
    kind: int32 `[m]`, their formats, indices into `headers.KINDS`.
    rotated: bool `[m]`, whether they are EXIF-rotated: stored in another orientation than displayed.
    digest: int64 `[m]`, equal for files with equal bytes.
    label: int32 `[m]`, -1 where unknown.
    bad: indices of the images that cannot be decoded, ascending.
  """

  index: np.ndarray
  shape: np.ndarray
  kind: np.ndarray
  rotated: np.ndarray
  digest: np.ndarray
  label: np.ndarray
  bad: list[int]

  def duplicates(self) -> int:
    """Number of images whose bytes are equal to those of an earlier image."""
    return len(self.digest) - len(np.unique(self.digest))

  def kinds(self) -> dict[str, int]:
    """Number of images by format."""
    return dict(collections.Counter(headers.KINDS[k] for k in self.kind).most_common())


def scan(source: Stream) -> Scan:
  """Decodes all images of a stream, on all cores, with a progress bar."""

  def examine(e):
    image = decode.whole(e)
    return {
      'index': tf.cast(e['index'], tf.int32),
      'shape': tf.shape(image)[:2],
      'kind': e['kind'],
      'rotated': e['orientation'] > 1,
      'label': e['label'],
      'digest': tf.strings.to_hash_bucket_strong(e['bytes'], 2**62, [1, 2]),
    }

  images = (
    decode.sized(source.iterate_once(), source.settings, skip=True)
    .map(examine, stream.threads(source.settings))
    .ignore_errors()
  )
  # So that there is one block, even if no image can be decoded.
  blocks = [
    {k: np.zeros([0, *x.shape], x.dtype.as_numpy_dtype) for k, x in images.element_spec.items()}
  ]
  with tqdm(total=len(source), unit='image', desc='checking') as bar:
    for block in stream.with_threads(images.batch(256), source.settings).as_numpy_iterator():
      blocks.append(block)
      preemption.heartbeat()
      bar.update(len(block['index']))
  columns = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
  bad = np.setdiff1d(np.arange(len(source)), columns['index'])
  return Scan(**columns, bad=bad.tolist())


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
      f'data.skip_bad={source.settings.skip_bad}; the first: {source.find_problem(bad)}'
    )
  if bad and len(bad) == len(source):
    raise ConfigError(f'no image can be decoded; the first: {source.find_problem(bad)}')
  for index in bad:
    logging.warning('skipped: %s', source.find_problem([index]))
  if bad:
    logging.warning('%d of %d images are skipped', len(bad), len(source))
  return source.subset(np.setdiff1d(np.arange(len(source)), bad)) if bad else source
