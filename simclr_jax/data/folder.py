"""Image files in a folder and its sub-folders, local or in a bucket (gs://)."""

import collections
import dataclasses
import functools
import os
import posixpath
from collections.abc import Iterable

import ml_collections
import numpy as np

from simclr_jax.data import decode, scan, stream
from simclr_jax.data.dataset import Arrays, choose, fits_on_device
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif')
SAMPLE = 32  # files that are looked at to see whether all are of one size


@dataclasses.dataclass(frozen=True)
class Files:
  """Encoded images, one a file: read in any order.

  Attributes:
    root: the folder.
    paths: of the files, relative to it, sorted.
    labels: int32 `[N]`, the number of the sub-folder directly below `root`; -1 without.
    class_names: of the labels.
    settings: the recipe's `data` part.
  """

  root: str
  paths: list[str]
  labels: np.ndarray
  class_names: list[str]
  settings: ml_collections.ConfigDict

  sequential = False

  def __len__(self) -> int:
    return len(self.paths)

  @property
  def labelled(self) -> bool:
    """Whether every image has a label."""
    return bool(self.class_names) and bool((self.labels >= 0).all())

  @property
  def classes(self) -> int:
    """How many there are; 0 without labels."""
    return len(self.class_names)

  def names(self) -> list[str]:
    """Their paths below the folder."""
    return self.paths

  def name(self, index: int) -> str:
    """An image in a message: its path."""
    return posixpath.join(self.root, self.paths[index])

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """The first of the suspects, or of all, that cannot be decoded, and why; '' if all can."""
    for index in scan.scan(self).bad if suspects is None else suspects:
      try:
        found = decode.problem(self._contents(index), self.settings.max_pixels)
      except tf.errors.OpError as error:
        found = f'cannot be read: {error.message.split(";")[-1].strip()}'
      if found:
        return f'{self.name(index)} {found}'
    return ''

  def _contents(self, index):
    return tf.io.read_file(self._table[0][int(index)]).numpy()

  def fingerprint(self) -> int:
    """CRC-32 that tells data sets apart: of the files' names and labels."""
    return crc32('\n'.join(self.paths), self.labels)

  def subset(self, indices: np.ndarray) -> 'Files':
    """The data set of these images."""
    return dataclasses.replace(
      self, paths=[self.paths[i] for i in indices], labels=self.labels[indices]
    )

  def with_labels(self, labels: np.ndarray) -> 'Files':
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, labels=labels)

  def sample(self, count: int) -> 'Files':
    """`count` images, or all: always the same ones."""
    return self.subset(choose(count, len(self)))

  @functools.cached_property
  def _table(self):
    # Names need not be valid UTF-8.
    root = os.fsencode(posixpath.join(self.root, ''))
    with tf.init_scope():  # also when it is first wanted inside a tf.data function
      return tf.constant([root + os.fsencode(p) for p in self.paths]), tf.constant(self.labels)

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """The endless sequence of `order.rows`, from step `first` on.

    Args:
      seed, batch_size: of the run.
      first: a step.
      local: which rows of each batch to read.

    Returns:
      Elements with `bytes`, and int32 `label`, `index`, `epoch`, `position`.
    """
    rows = stream.rows(len(self), seed, batch_size, first, local)
    return rows.unbatch().map(self._read, tf.data.AUTOTUNE)

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """Every image once, in order: elements as of `examples`; of `parts`, the one that is `part`."""
    return stream.rows_once(len(self), part, parts).map(self._read, tf.data.AUTOTUNE)

  def _read(self, e):
    paths, labels = self._table
    return {
      **e,
      'bytes': tf.io.read_file(tf.gather(paths, e['index'])),
      'label': tf.gather(labels, e['index']),
    }


def load(config: ml_collections.ConfigDict, split: str) -> Files | Arrays:
  """The images below `<data.dir>/<split>`; a split of '.' is `data.dir` itself.

  Names that begin with a dot are passed over. Labels are there if all images lie in two sub-folders
  or more. Small images of one size are read into memory.

  Raises:
    ConfigError: no such folder, or nothing in it, or images that cannot be read.
  """
  if not config.dir:
    raise ConfigError('data.dir is empty: set it to the folder with the images')
  base = stream.expand(config.dir)
  root = base if split == '.' else posixpath.join(base, split)
  if not tf.io.gfile.isdir(root):
    raise ConfigError(f'{root} {_why_not(root)}: data.dir and the split name a folder of images')
  paths, others = list_images(root)
  if not paths:
    seen = ', '.join(f'{n:,} {suffix or "without suffix"}' for suffix, n in others.most_common(3))
    raise ConfigError(
      f'{root} has no images ({", ".join(SUFFIXES)}) in it or below'
      + (f', only other files: {seen}' if seen else '')
    )
  files = Files(root, paths, *_labels(paths, _class_names(base, config, paths)), config)
  if config.skip_bad:
    files = scan.without_bad(files)
  return _in_memory(files) or files


def _why_not(root):
  try:
    return 'is not a folder' if tf.io.gfile.exists(root) else 'does not exist'
  except tf.errors.OpError as error:
    return f'cannot be reached ({error.message.splitlines()[0]})'


def list_images(root: str) -> tuple[list[str], collections.Counter]:
  """Paths of the images below `root`, relative to it and sorted; other files, counted by suffix.

  Symbolic links are followed, each folder is entered once.
  """
  found, others, seen = [], collections.Counter(), set()

  def failed(error):
    raise ConfigError(f'{error.filename} cannot be listed: {error.strerror}')

  remote = '://' in root
  walk = tf.io.gfile.walk(root) if remote else os.walk(root, onerror=failed, followlinks=True)
  for folder, folders, files in walk:
    if not remote:
      here = os.path.realpath(folder)
      if here in seen:
        folders.clear()  # a loop of links
        continue
      seen.add(here)
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    relative = posixpath.relpath(folder, root)
    for name in files:
      suffix = posixpath.splitext(name)[1].lower()
      if name.startswith('.'):
        continue
      if suffix in SUFFIXES:
        found.append(name if relative == '.' else posixpath.join(relative, name))
      else:
        others[suffix] += 1
  return sorted(found, key=os.fsencode), others


def _class_names(base, config, paths):
  """Sub-folders with images, of the training and the test split alike: one numbering for both."""
  names = {p.split('/')[0] for p in paths if '/' in p}
  for split in (config.train_split, config.test_split):
    root = posixpath.join(base, split)
    if split not in ('', '.') and tf.io.gfile.isdir(root):
      listed = tf.io.gfile.listdir(root) if '://' in root else os.listdir(root)
      isdir = tf.io.gfile.isdir if '://' in root else os.path.isdir
      names |= {
        n.rstrip('/') for n in listed
        if not n.startswith('.') and isdir(posixpath.join(root, n))
      }  # fmt: skip
  return sorted(names)


def _labels(paths, names):
  if len(names) < 2 or not all('/' in p for p in paths):
    return np.full(len(paths), -1, np.int32), []
  number = {name: i for i, name in enumerate(names)}
  return np.array([number[p.split('/')[0]] for p in paths], np.int32), names


def _in_memory(files):
  """The same as Arrays, if all images have one size and fit on the device; else None."""
  sizes = set()
  for i in np.linspace(0, len(files) - 1, SAMPLE).astype(int):
    try:
      sizes.add(tuple(decode.header(files._contents(i))[1]))
    except tf.errors.OpError:
      return None  # it will be named when it is read
  (h, w), *rest = sizes
  if rest or not h * w or not fits_on_device(files.settings, len(files) * h * w * 3):
    return None
  found = decode.read_all(files, h, w)
  return found and dataclasses.replace(found, image_names=files.paths)
