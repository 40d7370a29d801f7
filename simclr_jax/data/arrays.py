"""Arrays on disk: `<dir>/<split>.npz`, or `<split>_images.npy` and `<split>_labels.npy`, or `<split>.npy`.

An npz file is read into memory; npy files with 8 bits are memory-mapped, so they may be larger than the memory. One
file may have several splits, with keys such as `x_train` and `test_labels`: then a split is `<file>:<part>`.

Arrays of other kinds are converted if there is one way to read them; `Arrays.remarks` says what was done.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from simclr_jax.data import npy, values
from simclr_jax.data.dataset import Arrays, natural
from simclr_jax.data.values import Pixels, Settings
from simclr_jax.errors import ConfigError

IMAGES = ('images', 'image', 'imgs', 'img', 'x', 'data', 'pixels', 'arr_0')
LABELS = ('labels', 'label', 'y', 'targets', 'target', 'arr_1')
NAMES = ('class_names', 'label_names')
TRAIN = ('train', 'training')
TEST = ('test', 'testing', 'val', 'valid', 'validation', 'dev', 'eval')
BLOCK = 256  # images converted at a time


def load(config: ml_collections.ConfigDict, split: str) -> Arrays:
  """Reads images, uint8 `[N, h, w, data.channels]`, and labels `[N]`, if the files have them; -1: unknown.

  The numbers of the classes and the range of values are those of the training and test images together and of the
  training images, whichever split is loaded.

  Raises:
    ConfigError: the files are missing, corrupt, or cannot be read in one way only.
  """
  if not config.dir:
    raise ConfigError(
      'data.dir is empty: name the folder of train.npz, train_images.npy or train.npy with --data or '
      '--config.data.dir'
    )
  path, part = _find(config, split)
  own = _Raw.read(path, part)
  others = {}
  for name in {config.train_split, config.test_split} - {split, ''}:
    try:
      others[name] = _Raw.read(*_find(config, name))
    except ConfigError:
      continue  # reported when that split is loaded
  limits = values.settings(config)
  if not any(limits.range):
    train = others.get(config.train_split, own)
    limits = limits._replace(range=train.range(limits))
  labelled = [raw.labels() for raw in (own, *others.values())]
  return own.arrays(limits, _class_values([x for x in labelled if x is not None], str(path)))


def read(path: pathlib.Path, settings: Settings | None = None) -> Arrays:
  """Reads one file: npz with `images` and optional `labels`; or npy, whose labels are in `..._labels.npy`."""
  return _Raw.read(path, '').convert(settings or Settings())


def convert(
  images: np.ndarray,
  labels: Any = None,
  settings: Settings | None = None,
  class_names: Sequence[str] = (),
  where: str = 'images',
) -> Arrays:
  """A data set of arrays in memory.

  Args:
    images: `[N, h, w]`, `[N, h, w, c]` or `[N, c, h, w]`: bool; integers; or floats in [0, 1], unless `settings` has a
      range. Gray images are repeated, and of 4 channels the last is alpha, unless `settings.channels` is 4.
    labels: integers or strings `[N]` or `[N, 1]`, -1 where unknown; or one-hot `[N, C]`; None: no labels.
    settings: channels, background and range; by default RGB on white.
    class_names: names of the classes, if labels are 0 to C - 1; by default the labels as text.
    where: the name of the images in messages.

  Raises:
    ConfigError: the arrays can be read in no way or in several ways; the message has the line of numpy that helps.
  """
  arrays = {'images': np.asarray(images)}
  if labels is not None:
    arrays['labels'] = np.asarray(labels)
  if len(class_names):
    arrays['names'] = np.asarray(class_names)
  return _Raw(where, arrays).convert(settings or Settings())


def splits(path: pathlib.Path) -> tuple[str, str] | None:
  """The training and test split of an npz file that has both, such as 'mnist:train'; None if it has not."""
  if path.suffix != '.npz':
    return None
  with npy.Npz(path) as file:
    parts = {part for part, _ in _keys(file.files) if part}
  train = next((p for p in TRAIN if p in parts), None)
  test = next((p for p in TEST if p in parts), None)
  return (f'{path.stem}:{train}', f'{path.stem}:{test}' if test else '') if train else None


# Files.


def _find(config, split) -> tuple[pathlib.Path, str]:
  """The file of a split, and the part of the file: '' for the whole file."""
  folder = pathlib.Path(config.dir).expanduser()
  name, _, part = split.partition(':')
  names = (f'{name}.npz', f'{name}_images.npy', f'{name}.npy')
  for candidate in names:
    if (folder / candidate).is_file():
      return folder / candidate, part
  raise ConfigError(
    f'{folder} holds neither {names[0]} nor {names[1]}: set data.train_split and data.test_split to the names '
    'of your files'
  )


def _keys(names) -> dict[tuple[str, str], str]:
  """(part, 'images', 'labels' or 'names') -> key, for the keys of an npz file; the part is '' without one."""
  found: dict[tuple[str, str], str] = {}
  for key in names:
    part, rest = _divided(key)
    for kind, known in (('images', IMAGES), ('labels', LABELS), ('names', NAMES)):
      if rest in known:
        # The first of the known names has priority.
        old = found.get((part, kind))
        if old is None or known.index(rest) < known.index(_divided(old)[1]):
          found[part, kind] = key
  return found


def _divided(key):
  """The part in the name of an array and the rest of the name: ('train', 'images') for 'train_images'."""
  tokens = key.lower().replace('-', '_').split('_')
  part = next((t for t in (*TRAIN, *TEST) if t in tokens), '')
  return part, '_'.join(t for t in tokens if t != part) if part else key.lower()


@dataclasses.dataclass(frozen=True)
class _Raw:
  """Arrays as they are in a file.

  Attributes:
    where: the file, in messages.
    content: `images`, and if present `labels` and `names` of the classes.
  """

  where: str
  content: Mapping[str, np.ndarray]

  @classmethod
  def read(cls, path, part) -> '_Raw':
    if path.suffix == '.npy':
      content = {'images': npy.load(path, mmap=True)}
      labels = path.with_name(path.name.replace('_images.npy', '_labels.npy'))
      if labels != path and labels.is_file():
        content['labels'] = npy.load(labels)
      return cls(str(path), content)
    with npy.Npz(path) as file:
      return cls(str(path), _select(file, part, path))

  def convert(self, settings: Settings) -> Arrays:
    if not any(settings.range):
      settings = settings._replace(range=self.range(settings))
    labels = self.labels()
    return self.arrays(settings, _class_values([] if labels is None else [labels], self.where))

  def range(self, settings: Settings) -> tuple[float, float]:
    """The values that are black and white; (0, 0) for 8 bits."""
    x = self.content['images']
    if x.dtype == np.uint8 or not x.size:
      return 0.0, 0.0
    if x.dtype.kind not in 'biuf':
      raise ConfigError(f'{self.where}: images are {x.dtype}, not numbers')
    if x.dtype.kind == 'b':
      return 0.0, 1.0
    if x.dtype.kind == 'f' and not all(np.isfinite(b).all() for b in _blocks(x)):
      raise ConfigError(f'{self.where}: images have NaN or infinite values: np.nan_to_num(images)')
    low = min(b.min().item() for b in _blocks(x))
    high = max(b.max().item() for b in _blocks(x))
    if x.dtype.kind in 'iu' and low >= 0 and high <= 255:
      return 0.0, 255.0 if high > 1 else 1.0
    if x.dtype.kind == 'f' and not (low >= 0 and high <= 1):
      fix = 'images.astype(np.uint8)' if low >= 0 and high <= 255 and high > 1 else None
      fix = fix or (
        '(images + 1) / 2' if low >= -1 and high <= 1 else '(images - low) / (high - low)'
      )
      raise ConfigError(
        f'{self.where}: images are {x.dtype} from {low:g} to {high:g}, and floats are read from 0 to 1: save '
        f'{fix}, or name the values of black and white with --config.data.range={low:g},{high:g}'
      )
    return values.limits(low, high, x.dtype)

  def labels(self) -> np.ndarray | None:
    """Integers or strings `[N]`; None without labels."""
    y = self.content.get('labels')
    if y is None:
      return None
    if y.ndim == 2 and y.shape[1] == 1:
      y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in 'biuf':
      if not (np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all()):
        raise ConfigError(
          f'{self.where}: labels of shape {list(y.shape)} are not one-hot: one label per image is needed, for '
          'example labels.argmax(1)'
        )
      y = y.argmax(1)
    if y.ndim != 1:
      raise ConfigError(
        f'{self.where}: labels must be [N], these are {list(y.shape)}: labels[:, 0]'
      )
    count = len(self.content['images'])
    if len(y) != count:
      raise ConfigError(f'{self.where}: {count} images, but labels of shape {list(y.shape)}')
    if y.dtype.kind == 'f':
      if not np.isfinite(y).all():
        raise ConfigError(f'{self.where}: labels have NaN or infinite values; -1 means unknown')
      if (y != np.floor(y)).any() or (abs(y) > 2**53).any():
        raise ConfigError(f'{self.where}: labels must be integers or strings, these are {y.dtype}')
      return y.astype(np.int64)
    if y.dtype.kind == 'S':
      return np.char.decode(y, 'utf-8', 'replace')
    if y.dtype.kind == 'O' and all(isinstance(v, str) for v in y):
      return y.astype(str)
    if y.dtype.kind == 'b':
      return y.astype(np.int64)
    if y.dtype.kind not in 'iuU':
      raise ConfigError(
        f'{self.where}: labels must be integers or strings, these are {y.dtype}: labels.astype(str)'
      )
    return y

  def arrays(self, settings: Settings, class_values: Sequence[int | str]) -> Arrays:
    """The data set; `class_values`: what the classes are called in the file, in the order of their numbers."""
    images, remarks = _pixels(
      self.where, self.content['images'], settings, self.content.get('labels')
    )
    y = self.labels()
    if y is None:
      unknown = np.full(len(images), -1, np.int32)
      return Arrays(images, unknown, range=settings.range, remarks=tuple(remarks))
    names = [str(v) for v in class_values]
    given = self.content.get('names')
    if given is not None and all(isinstance(v, int) and 0 <= v < len(given) for v in class_values):
      class_values, names = range(len(given)), [str(v) for v in given.tolist()]
    elif class_values and list(class_values) != list(range(len(class_values))):
      remarks.append(
        f'labels: {len(names):,} values, {names[0]} to {names[-1]}, are the classes 0 to {len(names) - 1:,}'
      )
    number = {v: i for i, v in enumerate(class_values)}
    labels = np.array([number.get(v, -1) for v in y.tolist()], np.int32)
    unknown_count = int((labels < 0).sum())
    if unknown_count and names:
      remarks.append(f'{unknown_count:,} labels are -1: unknown')
    return Arrays(images, labels, class_names=names, range=settings.range, remarks=tuple(remarks))


def _select(file, part, path) -> dict[str, np.ndarray]:
  """The arrays of a part of an npz file."""
  found = _keys(file.files)
  if not part and ('', 'images') not in found:
    part = next((p for p in TRAIN if (p, 'images') in found), '')
  if (part, 'images') not in found:
    loaded = {n: file[n] for n in file.files} if len(file.files) <= 2 and not part else {}
    pictures = [n for n, x in loaded.items() if x.ndim in (3, 4)]
    if len(pictures) != 1:
      raise ConfigError(
        f'{path} has no array "images"{f" of {part!r}" if part else ""}, only {sorted(file.files)}: '
        "np.savez('train.npz', images=images, labels=labels)"
      )
    found[part, 'images'] = pictures[0]
  names = found.get((part, 'names')) or found.get(('', 'names'))
  keys = {k: found[part, k] for k in ('images', 'labels') if (part, k) in found}
  return {k: file[key] for k, key in {**keys, **({'names': names} if names else {})}.items()}


# Labels.


def _class_values(labels: Sequence[np.ndarray], where: str) -> list[int | str]:
  """All values of the labels but -1, in natural order: the classes."""
  if len({y.dtype.kind == 'U' for y in labels}) > 1:
    raise ConfigError(f'{where}: the labels of one split are integers, those of the other strings')
  found = {v for y in labels for v in np.unique(y).tolist()} - {-1}
  strings = any(isinstance(v, str) for v in found)
  return sorted(found, key=lambda v: natural(str(v))) if strings else sorted(found)


# Pixels.


def _blocks(images):
  for i in range(0, len(images), BLOCK):
    yield images[i : i + BLOCK]


def _pixels(where, images, settings, labels) -> tuple[np.ndarray, list[str]]:
  """uint8 `[N, h, w, channels]`, and what was done."""
  layout, remarks = _layout(where, images, settings, labels)
  x = layout(images)
  dtype, channels = images.dtype, settings.channels
  has_alpha = x.shape[-1] == 4 and channels in (1, 3)
  if dtype == np.uint8 and x.shape[-1] == channels:
    return x, remarks
  if dtype == np.bool_:
    remarks.append('bool: false is black, true is white')
  elif dtype != np.uint8 and settings.range != (0, 255):
    remarks.append(f'{dtype} values {values.describe(settings.range)} are scaled to 0 to 255')
  out = np.empty((*x.shape[:3], channels), np.uint8)
  transparent = hides = 0
  for i in range(0, len(x), BLOCK):
    block, alpha = x[i : i + BLOCK], None
    if has_alpha:
      block, alpha = block[..., :3], block[..., 3]
      if dtype != np.uint8:
        alpha = values.scaled(alpha, settings.range) / 255
      clear = (alpha < values.full_range(alpha.dtype)[1]).any((1, 2))
      transparent += int(clear.sum())
    shown = values.finish(Pixels(block, alpha), settings)
    if has_alpha:
      hides += int((clear & _one_colour(shown) & ~_one_colour(x[i : i + BLOCK])).sum())
    out[i : i + BLOCK] = shown
  if transparent and settings.alpha != 'ignore':
    remarks.append(f'{transparent:,} images are transparent, on {settings.alpha} (data.alpha)')
  if hides:
    remarks.append(
      f'{hides:,} images are of one colour on {settings.alpha}: set --config.data.alpha'
    )
  return out, remarks


def _one_colour(images):
  return (images == images[:, :1, :1]).all((1, 2, 3))


def _layout(where, images, settings, labels):
  """A function that makes `[N, h, w, k]` of the images, and what it does."""
  shape, channels = images.shape, settings.channels
  known = {channels, 1, 3, 4} if channels in (1, 3) else {channels}
  text = f'{where}: images are {images.dtype} {list(shape)}'
  if images.dtype.kind not in 'biuf':
    raise ConfigError(f'{text}: they must be numbers')
  if not len(shape) or not shape[0]:
    raise ConfigError(f'{where} has no images')
  if len(shape) == 2:
    raise ConfigError(f'{text}: one row per image; save {_unflatten(shape[1])}')
  if len(shape) == 3:
    one_image = shape[2] in (3, 4) and (labels is None or len(labels) != shape[0])
    if one_image:
      raise ConfigError(
        f'{text}: one image? save images[None], or [N, height, width] for gray images'
      )
    if 1 not in known:
      raise ConfigError(f'{text}: gray images, but data.channels={channels}')
    copies = [] if channels == 1 else ['gray images, repeated to 3 channels (data.channels=1: not)']
    return lambda x: x[..., None], copies
  if len(shape) != 4:
    raise ConfigError(f'{text}: they must be [N, height, width, channels]')
  if shape[3] in known:
    first = shape[1] in known and shape[2] > 4
    remarks = (
      ['read as [N, height, width, channels]; else images.transpose(0, 2, 3, 1)'] if first else []
    )
    return lambda x: x, remarks + _channel_remarks(shape[3], settings)
  if shape[1] in known:
    remarks = ['[N, channels, height, width] is transposed', *_channel_remarks(shape[1], settings)]
    return lambda x: np.moveaxis(x, 1, 3), remarks
  square = shape[2] == shape[3] or shape[1] == shape[2]
  first = shape[2] == shape[3] if square else shape[1] < shape[3]
  fewest, moved = (shape[1], '.transpose(0, 2, 3, 1)') if first else (shape[3], '')
  raise ConfigError(
    f'{text}, not of data.channels={channels}: set --config.data.channels={fewest}, or keep some channels, '
    f'for example images{moved}[..., :{channels if fewest > channels else 1}]'
  )


def _channel_remarks(found, settings):
  if found == settings.channels:
    return []
  if found == 4:
    return [f'4 channels are RGB and alpha, on {settings.alpha} (data.channels=4: not)']
  return ['gray images, repeated to 3 channels (data.channels=1: not)' if found == 1
          else 'colours are converted to gray: data.channels=1']  # fmt: skip


def _unflatten(size):
  """The numpy code that makes images of rows of `size` values."""
  side = int(np.sqrt(size))
  if side * side == size:
    return f'images.reshape(-1, {side}, {side})'
  side = int(np.sqrt(size / 3))
  if 3 * side * side == size:
    return f'images.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1) if the channels come first, otherwise images.reshape(-1, {side}, {side}, 3)'
  return 'images.reshape(-1, height, width, channels)'
