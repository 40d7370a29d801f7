"""Decoding every image of a data set once, to find those that cannot be."""

import collections
import dataclasses
import hashlib
import pathlib

import ml_collections
import numpy as np
import PIL.Image
from absl import logging
from tqdm import tqdm

from simclr_jax import data, stopping
from simclr_jax.data import decode, headers, stream
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError


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
    decode.sized(source.once(), source.settings, skip=True)
    .map(look, stream.threads(source.settings))
    .ignore_errors()
  )
  blocks = []
  with tqdm(total=len(source), unit='image', desc='checking') as bar:
    for block in stream.with_threads(images.batch(256), source.settings).as_numpy_iterator():
      blocks.append(block)
      stopping.alive()
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
  return source.only(np.setdiff1d(np.arange(len(source)), bad)) if bad else source


# For people.


def report(config: ml_collections.ConfigDict, sheet: pathlib.Path | None) -> int:
  """Prints what is in the splits of a data set; 1 if an image cannot be decoded, else 0.

  Args:
    config: the recipe's `data` part.
    sheet: where to write a contact sheet, as PNG.

  Raises:
    ConfigError: there is nothing to look at, or the sheet cannot be written.
  """
  if sheet and (sheet.suffix != '.png' or not sheet.parent.is_dir()):
    raise ConfigError(f'--sheet={sheet} is not the name of a .png file in a folder that exists')
  splits = [s for s in ('train', 'test') if config[f'{s}_split']]
  bad = 0
  for split in splits:
    dataset = data.load(config, split)
    print(f'{split}: {len(dataset):,} images', flush=True)
    if isinstance(dataset, data.Arrays):
      labels = dataset.labels
      _line('size', f'all {dataset.images.shape[2]} x {dataset.images.shape[1]}')
      digests = {hashlib.blake2b(x.tobytes()).digest() for x in dataset.images}
      _line('duplicates', f'{len(dataset) - len(digests):,}')
    else:
      found = scan(dataset)
      labels, bad = found.label, bad + len(found.bad)
      _describe(dataset, found)
    if dataset.labelled:
      counts = np.bincount(labels, minlength=dataset.classes)
      _line('classes', f'{dataset.classes}, of {counts.min():,} to {counts.max():,} images')
    if sheet and split == 'train':
      _contact_sheet(dataset, sheet)
      print(f'wrote {sheet}')
  return int(bad > 0)


def _line(name, text):
  print(f'  {name:20}{text}', flush=True)


def _describe(dataset, found):
  if len(found.index):
    pixels = found.shape.prod(1)
    for name, i in (
      ('smallest', pixels.argmin()),
      ('typical', np.argsort(pixels)[len(pixels) // 2]),
      ('largest', pixels.argmax()),
    ):
      h, w = found.shape[i]
      _line(name, f'{w} x {h}, {dataset.name(int(found.index[i]))}')
    _line('formats', ', '.join(f'{k} {n:,}' for k, n in found.kinds().items()))
    _line('turned (EXIF)', f'{found.turned.sum():,}')
    _line('exact duplicates', f'{found.duplicates():,}')
  _line('cannot be decoded', f'{len(found.bad):,}')
  for index in found.bad[:20]:
    print(f'    {dataset.find_problem([index])}')
  if len(found.bad) > 20:
    print(f'    and {len(found.bad) - 20:,} more')
  if found.bad:
    print(f'  to leave them out: --config.data.skip_bad={len(found.bad)}')


def _contact_sheet(dataset, path, columns=8, rows=6, side=160):
  """Some images, whole, on one page."""
  few = dataset.sample(columns * rows)
  if isinstance(few, data.Arrays):
    images = few.images
  else:
    images = decode.sized(few.once(), few.settings, skip=True).map(decode.whole).ignore_errors()
    images = list(images.as_numpy_iterator())
  page = PIL.Image.new('RGB', (columns * side, rows * side), 'white')
  for i, image in enumerate(images):
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((side - 6, side - 6))
    left, top = (i % columns) * side, i // columns * side
    page.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
  page.save(path)
