"""Image files in a folder and its sub-folders, local or in a bucket (gs://)."""

import collections
import contextlib
import dataclasses
import functools
import os
import posixpath
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import ml_collections
import numpy as np

from simclr_jax.data import decode, headers, layout, scan, stream, table
from simclr_jax.data.dataset import Arrays, choose, fits_on_device, natural
from simclr_jax.data.stream import tf
from simclr_jax.errors import ConfigError
from simclr_jax.runtime.checksum import crc32
from simclr_jax.validation import did_you_mean

SUFFIXES = frozenset(headers.SUFFIXES)
SAMPLE = 32  # files whose headers decide whether all images may have one size
CONTENTS = 256  # files whose bytes are part of the fingerprint
SETTLED = 2  # seconds after which a further change of a folder changes its time

_listings: dict[
  str, tuple[dict[str, int], 'Found']
] = {}  # root -> times of its folders, and what is in them


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files, a `stream.Stream` with random access.

  Attributes:
    root: the folder.
    paths: of the files, relative to `root`, sorted.
    labels: int32 `[N]`, indices in `class_names`; -1 without a label.
    class_names: names of the classes; empty without labels.
    settings: the `data` part of the recipe.
    remarks: what was decided about the folder, a sentence each.
  """

  root: str
  paths: list[str]
  labels: np.ndarray
  class_names: list[str]
  settings: ml_collections.ConfigDict
  remarks: tuple[str, ...] = ()

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
    if suspects is None:
      return next(iter(scan.scan(self).bad.values()), '')
    for index in suspects:
      try:
        problem = self._too_long(index) or decode.problem(self._contents(index), self.settings)
      except tf.errors.OpError as error:
        problem = f'cannot be read: {error.message.split(";")[-1].strip()}'
      if problem:
        return f'{self.name(index)} {problem}'
    return ''

  def _contents(self, index):
    if self._too_long(index):
      return b''
    return tf.io.read_file(self._table[0][int(index)]).numpy()

  def _too_long(self, index):
    size, longest = int(self.sizes[index]), decode.longest(self.settings)
    if size <= longest:
      return ''
    return (
      f'has {size:,} bytes, more than an image of data.max_pixels pixels can have ({longest:,})'
    )

  @functools.cached_property
  def _stats(self) -> np.ndarray:
    """Size in bytes and time of the last change in seconds of each file, int64 `[2, N]`; 0 in buckets or without it."""
    if '://' in self.root:
      return np.zeros((2, len(self)), np.int64)
    root = posixpath.join(self.root, '')
    return np.array([_size_and_time(root + path) for path in self.paths], np.int64).reshape(-1, 2).T

  @property
  def sizes(self) -> np.ndarray:
    """Size of each file in bytes, int64 `[N]`; 0 in buckets."""
    return self._stats[0]

  def modified(self) -> tuple[int, int]:
    """CRC-32 of the times of the last change of all files, and the newest time: whole seconds since 1970."""
    times = self._stats[1]
    return crc32(times), int(times.max(initial=0))

  def newer_than(self, mtime: int) -> list[str]:
    """The paths below the folder of the files that were changed after a time in seconds since 1970."""
    return [self.paths[i] for i in np.flatnonzero(self._stats[1] > mtime)]

  def fingerprint(self) -> int:
    """CRC-32 of the paths below the folder, the labels, the sizes, and the bytes of up to `CONTENTS` files.

    It does not depend on where the folder is. In buckets, sizes are not used and fewer files are read.
    """
    remote = '://' in self.root
    sample = choose(CONTENTS // 16 if remote else CONTENTS, len(self))
    parts: list[str | np.ndarray] = ['\n'.join(self.paths), self.labels]
    with contextlib.suppress(OSError, tf.errors.OpError):  # reported when the image is read
      if not remote:
        parts.append(self.sizes)
      parts += [np.frombuffer(self._contents(i), np.uint8) for i in sample]
    return crc32(*parts)

  def subset(self, indices: np.ndarray) -> Self:
    """The data set of the images with these indices."""
    part = dataclasses.replace(
      self, paths=[self.paths[i] for i in indices], labels=self.labels[indices]
    )
    part.__dict__['_stats'] = self._stats[:, indices]  # so that it is not read again
    return part

  def with_labels(self, labels: np.ndarray) -> Self:
    """The same images with other labels, int32 `[N]`."""
    same = dataclasses.replace(self, labels=labels)
    same.__dict__['_stats'] = self._stats
    return same

  def sample(self, count: int) -> Self:
    """`count` images, or all if there are fewer; always the same images."""
    return self.subset(choose(count, len(self)))

  @functools.cached_property
  def _table(self):
    # Names need not be valid UTF-8.
    root = os.fsencode(posixpath.join(self.root, ''))
    readable = self.sizes <= decode.longest(self.settings)
    with tf.init_scope():  # the first use may be inside a tf.data function
      paths = tf.constant([root + os.fsencode(p) for p in self.paths], tf.string)
      return paths, tf.constant(self.labels), tf.constant(readable)

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
    paths, labels, readable = self._table
    index = row['index']
    # Without its bytes, a file that is too long is one that cannot be decoded.
    contents = tf.cond(
      readable[index], lambda: tf.io.read_file(paths[index]), lambda: tf.constant(b'')
    )
    return {**row, 'bytes': contents, 'label': labels[index]}


def _size_and_time(path) -> tuple[int, int]:
  """Size in bytes and time of the last change in seconds; 0 without the file, which is reported when it is read."""
  try:
    found = os.stat(path)
  except OSError:
    return 0, 0
  return found.st_size, int(found.st_mtime)


@dataclasses.dataclass(frozen=True)
class Listing:
  """The images of a split.

  Attributes:
    root: a folder.
    paths: of the images, relative to `root`, sorted.
    classes: the name of the class of each image; None without a label.
    remarks: what was ignored, a sentence each.
    by_folder: whether the classes are folders: then either all images have one or none.
  """

  root: str
  paths: list[str]
  classes: list[str | None]
  remarks: tuple[str, ...] = ()
  by_folder: bool = True


def load(config: ml_collections.ConfigDict, split: str) -> Files | Arrays:
  """The images of a split, see `listing`. Small images of one size are read into memory.

  The sub-folders of the split are the classes if there are two or more with images and no image lies outside them.
  Both splits share one numbering of the classes, in natural order: 1, 2, 10.

  Raises:
    ConfigError: the folder does not exist or has no images, or an image cannot be read.
  """
  images = listing(config, split)
  labels, class_names = _labels(images, _class_names(config, split, images))
  files = Files(images.root, images.paths, labels, class_names, config, images.remarks)
  files = scan.with_range(files, lambda: _training_files(files, split))
  if config.skip_bad:
    files = scan.without_bad(files)
  return _read_into_memory(files) or files


def has_labels(config: ml_collections.ConfigDict, split: str) -> bool:
  """Whether all images of a split have a label; only names are read."""
  images = listing(config, split)
  labels, names = _labels(images, _class_names(config, split, images))
  return bool(names) and bool((labels >= 0).all())


def places(text: str) -> list[str]:
  """The folders of `data.dir`: one, or several joined by commas."""
  text = stream.expand(text)
  if '://' in text or ',' not in text or os.path.exists(text):
    return [text]
  return [stream.expand(part.strip()) for part in text.split(',') if part.strip()]


def listing(config: ml_collections.ConfigDict, split: str) -> Listing:
  """Lists the images of a split.

  Args:
    config: the `data` part of a recipe. `dir`: one or several folders. `table`: a CSV file that names images and
      labels; without it, all images below the folder of the split are used.
    split: a folder below each folder; '.' is the folder itself; in '*/train', the asterisk stands for the class. With
      a table, a value of its column for splits, or '.' for all rows.

  Raises:
    ConfigError: a folder or the table is missing or has no images.
  """
  if config.table:
    rows = table.read(stream.expand(config.table), places(config.dir)[0] if config.dir else '')
    return Listing(*rows.of_split(split))
  if not config.dir:
    raise ConfigError(
      'data.dir is empty: name the folder of images with --data or --config.data.dir'
    )
  parts = [_list_folder(base, split) for base in places(config.dir)]
  if len(parts) == 1:
    return parts[0]
  root = os.path.commonpath([os.path.abspath(part.root) for part in parts])
  images = sorted(
    (
      (os.path.relpath(os.path.join(os.path.abspath(part.root), path), root), name)
      for part in parts
      for path, name in zip(part.paths, part.classes)
    ),
    key=lambda image: os.fsencode(image[0]),
  )
  remarks = tuple(remark for part in parts for remark in part.remarks)
  return Listing(root, [p for p, _ in images], [n for _, n in images], remarks)


def _list_folder(base, split) -> Listing:
  folder = '.' if split.startswith('*/') else split
  root = base if folder == '.' else posixpath.join(base, folder)
  if not tf.io.gfile.isdir(root):
    raise ConfigError(
      f'{root} {_reason_not_a_folder(root)}: --data, or data.dir and the split, must name a folder of images'
      + _existing(base, folder)
    )
  found = list_images(root)
  paths, other_files = found.paths, found.other_files
  remarks = _ignored(root, other_files, found.ignored, found.irregular)
  if folder != split:
    inside = split.removeprefix('*/') + '/'
    paths = [p for p in paths if p.partition('/')[2].startswith(inside)]
  if not paths:
    counts = ', '.join(
      f'{n:,} {suffix or "without suffix"}' for suffix, n in other_files.most_common(3)
    )
    raise ConfigError(
      f'{root} has no images ({", ".join(headers.SUFFIXES)}), also not in sub-folders'
      + (f', only other files: {counts}' if counts else '')
    )
  return Listing(root, paths, [p.split('/')[0] if '/' in p else None for p in paths], remarks)


def _existing(base, split):
  """The sub-folders of a folder, for the message about one that does not exist."""
  if '://' in base or not os.path.isdir(base):
    return ''
  names = [n for n in os.listdir(base) if os.path.isdir(os.path.join(base, n)) and not layout.is_system(n)]  # fmt: skip
  names = sorted(names, key=natural)
  shown = ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')
  return f'; {base} has the folders {shown}{did_you_mean(split, names)}' if names else ''


def _ignored(root, other_files, folders, irregular) -> tuple[str, ...]:
  """One sentence on the files and folders that are not used."""
  parts = [f'{n:,} {suffix or "without suffix"}' for suffix, n in other_files.most_common(5)]
  if len(other_files) > 5:
    parts.append(
      f'{sum(other_files.values()) - sum(n for _, n in other_files.most_common(5)):,} other files'
    )
  if folders:
    names = sorted(folders, key=natural)
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    parts.append(f'{len(names)} system or empty folders ({", ".join(names[:3])}{more})')
  if irregular:
    parts.append(
      f'{len(irregular):,} that are no regular files, such as pipes or devices ({irregular[0]})'
    )
  return (f'ignored in {root}: {", ".join(parts)}',) if parts else ()


def _training_files(files, split):
  """The training images without labels, whose values `scan.with_range` measures."""
  name = files.settings.train_split
  if split == name or not name:
    return files
  try:
    images = listing(files.settings, name)
  except ConfigError:
    return files  # reported when the training images are loaded
  unknown = np.full(len(images.paths), -1, np.int32)
  return dataclasses.replace(files, root=images.root, paths=images.paths, labels=unknown)


def _reason_not_a_folder(root):
  try:
    return 'is not a folder' if tf.io.gfile.exists(root) else 'does not exist'
  except tf.errors.OpError as error:
    return f'cannot be reached ({error.message.splitlines()[0]})'


class Found(NamedTuple):
  """The files below a folder.

  Attributes:
    paths: of the images, relative to the folder, sorted.
    other_files: number of other files by suffix.
    ignored: sub-folders directly below the folder that are system folders or empty.
    irregular: images that are no regular files, as `paths`.
  """

  paths: list[str]
  other_files: collections.Counter[str]
  ignored: list[str]
  irregular: list[str]


def list_images(root: str) -> Found:
  """Lists the images below `root`, again only if a folder has changed.

  Symbolic links are followed; cycles of links are detected. Hidden and system files and folders are ignored, and what
  is no regular file after links, because reading a pipe or a device may never end.

  Raises:
    ConfigError: a folder cannot be listed.
  """
  times, found = _listings.get(root, ({}, None))
  if found is not None and all(_time_ns(place) == t for place, t in times.items()):
    return found
  times, found = {}, Found([], collections.Counter(), [], [])
  settled = time.time_ns() - SETTLED * 10**9
  for relative, folders, files, irregular in _walk(root, times):
    found.ignored.extend(f for f in folders if relative == '.' and layout.is_system(f))
    folders[:] = sorted(f for f in folders if not layout.is_system(f))
    if not folders and not files and '/' not in relative:
      found.ignored.append(relative)
    folder = '' if relative == '.' else f'{relative}/'
    for names, images in ((files, found.paths), (irregular, found.irregular)):
      for name in names:
        suffix = posixpath.splitext(name)[1].lower()
        if layout.is_system(name):
          continue
        if suffix in SUFFIXES:
          images.append(folder + name)
        elif names is files:
          found.other_files[suffix] += 1
  found.paths.sort(key=os.fsencode)
  if max(times.values(), default=settled) < settled:
    _listings[root] = times, found
  return found


def _time_ns(place):
  """When the names in a folder have changed; 0 without the folder."""
  try:
    return os.stat(place).st_mtime_ns
  except OSError:
    return 0


def _walk(root, times) -> Iterator[tuple[str, list[str], list[str], list[str]]]:
  """Of each folder: its path below `root`, names of sub-folders, of regular files, and of what is neither.

  The caller may remove sub-folders from the list. The times of the folders are added to `times`, not of buckets.
  """
  if '://' in root:
    for folder, folders, files in tf.io.gfile.walk(root):
      yield posixpath.relpath(folder, root), folders, files, []
    return
  waiting, visited = ['.'], set()
  while waiting:
    relative = waiting.pop()
    place = os.path.normpath(os.path.join(root, relative))
    real = os.path.realpath(place)
    if real in visited:
      continue
    visited.add(real)
    times[place] = _time_ns(place)
    names: tuple[list[str], list[str], list[str]] = ([], [], [])
    try:
      with os.scandir(place) as entries:
        for entry in entries:
          # A broken link is reported when the image is read.
          regular = entry.is_file() or not os.path.exists(entry.path)
          names[0 if entry.is_dir() else 1 if regular else 2].append(entry.name)
    except OSError as error:
      raise ConfigError(f'{place} cannot be listed: {error.strerror}') from None
    yield relative, *names
    waiting += [name if relative == '.' else f'{relative}/{name}' for name in reversed(names[0])]


def tree(folder: str) -> layout.Node:
  """The listing of a local folder for `layout.read`. Empty folders directly below it are included.

  Raises:
    ConfigError: a folder cannot be listed.
  """
  found = list_images(folder)
  root = layout.Node(folders={n: layout.Node() for n in found.ignored if not layout.is_system(n)})
  for place, count in collections.Counter(posixpath.dirname(p) for p in found.paths).items():
    node = root
    for name in place.split('/') if place else ():
      node = node.folders.setdefault(name, layout.Node())
    node.images = count
  return root


def _class_names(config, split, images: Listing) -> list[str]:
  """The classes of the training and the test split: both splits share one numbering."""
  names = set(images.classes)
  for other in {config.train_split, config.test_split} - {'', split}:
    try:
      names |= set(listing(config, other).classes)
    except ConfigError:
      continue  # reported when that split is loaded
  return sorted((n for n in names if n is not None), key=natural)


def _labels(images: Listing, class_names):
  """Labels of the images, int32 `[N]`, and names of the classes; -1 and no names without labels."""
  number = {name: i for i, name in enumerate(class_names)}
  labels = np.array([number.get(c, -1) for c in images.classes], np.int32)  # type: ignore[arg-type]
  if len(class_names) < 2 or (images.by_folder and (labels < 0).any()):
    return np.full(len(labels), -1, np.int32), []
  return labels, class_names


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
  return arrays and dataclasses.replace(
    arrays, image_names=files.paths, remarks=(*files.remarks, *arrays.remarks)
  )
