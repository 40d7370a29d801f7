"""Image files in a folder and its sub-folders, local or in a bucket (gs://)."""

import collections
import dataclasses
import functools
import os
import posixpath
from collections.abc import Iterable
from typing import Self

import ml_collections
import numpy as np

from simclr_jax.data import decode, headers, scan, stream
from simclr_jax.data.dataset import Arrays, choose, fits_on_device
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32

SUFFIXES = headers.SUFFIXES
SAMPLE = 32  # files whose headers decide whether all images may have one size


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files, a `stream.Stream` with random access.

  Attributes:
    root: the folder.
    paths: of the files, relative to `root`, sorted.
    labels: int32 `[N]`, the index in `class_names` of the sub-folder directly below `root`; -1 without.
    class_names: names of the classes; empty without labels.
    settings: the `data` part of the recipe.
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
    """Number of classes; 0 without labels."""
    return len(self.class_names)

  def names(self) -> list[str]:
    """The paths below the folder."""
    return self.paths

  def name(self, index: int) -> str:
    """The path of an image."""
    return posixpath.join(self.root, self.paths[index])

  def find_problem(self, suspects: Iterable[int] | None = None) -> str:
    """The path of the first of the suspects that cannot be decoded, and why; see `stream.Stream`."""
    for index in scan.scan(self).bad if suspects is None else suspects:
      try:
        problem = decode.problem(self._contents(index), self.settings)
      except tf.errors.OpError as error:
        problem = f'cannot be read: {error.message.split(";")[-1].strip()}'
      if problem:
        return f'{self.name(index)} {problem}'
    return ''

  def _contents(self, index):
    return tf.io.read_file(self._table[0][int(index)]).numpy()

  def fingerprint(self) -> int:
    """CRC-32 of the paths and labels."""
    return crc32('\n'.join(self.paths), self.labels)

  def subset(self, indices: np.ndarray) -> Self:
    """The data set of the images with these indices."""
    return dataclasses.replace(
      self, paths=[self.paths[i] for i in indices], labels=self.labels[indices]
    )

  def with_labels(self, labels: np.ndarray) -> Self:
    """The same images with other labels, int32 `[N]`."""
    return dataclasses.replace(self, labels=labels)

  def sample(self, count: int) -> Self:
    """`count` images, or all if there are fewer; always the same images."""
    return self.subset(choose(count, len(self)))

  @functools.cached_property
  def _table(self):
    # Names need not be valid UTF-8.
    root = os.fsencode(posixpath.join(self.root, ''))
    with tf.init_scope():  # the first use may be inside a tf.data function
      return tf.constant([root + os.fsencode(p) for p in self.paths]), tf.constant(self.labels)

  def train_iterator(
    self, seed: int, batch_size: int, first: int, local: np.ndarray
  ) -> tf.data.Dataset:
    """The endless sequence of `order.rows`; see `stream.Stream`."""
    rows = stream.rows(len(self), seed, batch_size, first, local)
    return rows.unbatch().map(self._read, tf.data.AUTOTUNE)

  def iterate_once(self, part: int = 0, parts: int = 1) -> tf.data.Dataset:
    """Every image once, in order; see `stream.Stream`."""
    return stream.rows_once(len(self), part, parts).map(self._read, tf.data.AUTOTUNE)

  def _read(self, row):
    paths, labels = self._table
    return {
      **row,
      'bytes': tf.io.read_file(tf.gather(paths, row['index'])),
      'label': tf.gather(labels, row['index']),
    }


def load(config: ml_collections.ConfigDict, split: str) -> Files | Arrays:
  """The images below `<data.dir>/<split>`; the split '.' is `data.dir` itself.

  Files and folders whose name starts with a dot are ignored. The sub-folders are the classes if there are
  two or more with images and no image lies outside them. Small images of one size are read into memory.

  Raises:
    ConfigError: the folder does not exist or has no images, or an image cannot be read.
  """
  if not config.dir:
    raise ConfigError(
      'data.dir is empty: name the folder of images with --data or --config.data.dir'
    )
  base = stream.expand(config.dir)
  root = base if split == '.' else posixpath.join(base, split)
  if not tf.io.gfile.isdir(root):
    raise ConfigError(
      f'{root} {_reason_not_a_folder(root)}: --data, or data.dir and the split, must name a folder of images'
    )
  paths, other_files = list_images(root)
  if not paths:
    counts = ', '.join(
      f'{n:,} {suffix or "without suffix"}' for suffix, n in other_files.most_common(3)
    )
    raise ConfigError(
      f'{root} has no images ({", ".join(SUFFIXES)}), also not in sub-folders'
      + (f', only other files: {counts}' if counts else '')
    )
  labels, class_names = _labels(paths, _class_names(base, config, paths))
  files = Files(root, paths, labels, class_names, config)
  files = decode.with_range(files, lambda: _training_files(files, base, split))
  if config.skip_bad:
    files = scan.without_bad(files)
  return _read_into_memory(files) or files


def _training_files(files, base, split):
  """The training images without labels, whose values `decode.with_range` measures."""
  name = files.settings.train_split
  if split == name or not name:
    return files
  root = base if name == '.' else posixpath.join(base, name)
  paths = list_images(root)[0] if tf.io.gfile.isdir(root) else []
  if not paths:
    return files
  return dataclasses.replace(
    files, root=root, paths=paths, labels=np.full(len(paths), -1, np.int32)
  )


def _reason_not_a_folder(root):
  try:
    return 'is not a folder' if tf.io.gfile.exists(root) else 'does not exist'
  except tf.errors.OpError as error:
    return f'cannot be reached ({error.message.splitlines()[0]})'


def list_images(root: str) -> tuple[list[str], collections.Counter[str]]:
  """Paths of the images below `root`, relative to it and sorted; number of other files by suffix.

  Symbolic links are followed; cycles of links are detected.
  """
  images: list[str] = []
  other_files: collections.Counter[str] = collections.Counter()
  visited: set[str] = set()

  def raise_error(error):
    raise ConfigError(f'{error.filename} cannot be listed: {error.strerror}')

  remote = '://' in root
  walk = tf.io.gfile.walk(root) if remote else os.walk(root, onerror=raise_error, followlinks=True)
  for folder, folders, files in walk:
    if not remote:
      real = os.path.realpath(folder)
      if real in visited:
        folders.clear()
        continue
      visited.add(real)
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    relative = posixpath.relpath(folder, root)
    for name in files:
      suffix = posixpath.splitext(name)[1].lower()
      if name.startswith('.'):
        continue
      if suffix in SUFFIXES:
        images.append(name if relative == '.' else posixpath.join(relative, name))
      else:
        other_files[suffix] += 1
  return sorted(images, key=os.fsencode), other_files


def _class_names(base, config, paths):
  """The sub-folders of the training and the test split: both splits share one numbering of the classes."""
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


def _labels(paths, class_names):
  """Labels of the images, int32 `[N]`, and names of the classes; -1 and no names without labels."""
  if len(class_names) < 2 or not all('/' in p for p in paths):
    return np.full(len(paths), -1, np.int32), []
  number = {name: i for i, name in enumerate(class_names)}
  return np.array([number[p.split('/')[0]] for p in paths], np.int32), class_names


def _read_into_memory(files: Files) -> Arrays | None:
  """The images as `Arrays`, if all have one size and fit into device memory; otherwise None."""
  sizes = set()
  for i in np.linspace(0, len(files) - 1, SAMPLE).astype(int):
    try:
      sizes.add(tuple(decode.header(files._contents(i), files.settings)[1]))
    except tf.errors.OpError:
      return None  # reported when the image is read
  (h, w), *other_sizes = sizes
  if (
    other_sizes
    or not h * w
    or not fits_on_device(files.settings, len(files) * h * w * files.settings.channels)
  ):
    return None
  arrays = decode.read_all(files, h, w)
  return arrays and dataclasses.replace(arrays, image_names=files.paths)
