"""Decoding every image of a data set once, to find those that cannot be."""

import collections
import dataclasses

import numpy as np
from absl import logging
from tqdm import tqdm

from simclr_jax.data import decode, headers, stream
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import preemption


@dataclasses.dataclass(frozen=True)
class Scan:
  """What was found in a stream of N images, m of which can be decoded.

  Attributes:
    index: int32 `[m]`, those that can be decoded, in order.
    shape: int32 `[m, 2]`, their height and width as they are shown.
    kind: int32 `[m]`, an index into `headers.KINDS`.
    turned: bool `[m]`, whether EXIF says that they are stored in another orientation.
    digest: int64 `[m]`, equal for files of equal bytes.
    label: int32 `[m]`, -1 where unknown.
    bad: the indices of the others.
  """

  index: np.ndarray
  shape: np.ndarray
  kind: np.ndarray
  turned: np.ndarray
  digest: np.ndarray
  label: np.ndarray
  bad: list[int]

  def duplicates(self) -> int:
    """How many images are byte for byte the same as another before them."""
    return len(self.digest) - len(np.unique(self.digest))

  def kinds(self) -> dict[str, int]:
    """Images by format."""
    return dict(collections.Counter(headers.KINDS[k] for k in self.kind).most_common())


def scan(source) -> Scan:
  """Decodes all images of a stream, on all cores, with a progress bar."""

  def look(e):
    image = decode.whole(e)
    return {
      'index': tf.cast(e['index'], tf.int32),
      'shape': tf.shape(image)[:2],
      'kind': e['kind'],
      'turned': e['orientation'] > 1,
      'label': e['label'],
      'digest': tf.strings.to_hash_bucket_strong(e['bytes'], 2**62, [1, 2]),
    }

  images = (
    decode.sized(source.iterate_once(), source.settings, skip=True)
    .map(look, stream.threads(source.settings))
    .ignore_errors()
  )
  blocks = []
  with tqdm(total=len(source), unit='image', desc='checking') as bar:
    for block in stream.with_threads(images.batch(256), source.settings).as_numpy_iterator():
      blocks.append(block)
      preemption.heartbeat()
      bar.update(len(block['index']))
  if not blocks:
    return Scan(*(np.zeros(s, np.int32) for s in (0, (0, 2), 0, 0, 0, 0)), list(range(len(source))))
  found = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
  bad = np.setdiff1d(np.arange(len(source)), found['index'])
  return Scan(**found, bad=[int(i) for i in bad])


def without_bad(source):
  """The stream less the images that cannot be decoded, each named in the log.

  Which they are depends on the files alone, so every host and every restart leaves out the same.

  Raises:
    ConfigError: there are more than `data.skip_bad`, or no others.
  """
  damage = source.find_problem(())  # of files that hold many images: no matter of single ones
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
    logging.warning('left out: %s', source.find_problem([index]))
  if bad:
    logging.warning('%d of %d images are left out', len(bad), len(source))
  return source.subset(np.setdiff1d(np.arange(len(source)), bad)) if bad else source
