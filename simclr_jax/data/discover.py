"""What `--data=SOMETHING` means, and which recipe suits it."""

import os
import pathlib

import numpy as np

from simclr_jax.data import Arrays
from simclr_jax.errors import ConfigError

TRAIN = ('train', 'training')
TEST = ('test', 'validation', 'valid', 'val')


def fields(what: str) -> dict[str, str]:
  """The fields of a recipe that say where the images are.

  Args:
    what: a folder of images, with or without `train` and `test` in it; npz or npy files or a folder of
      them; the folder of a prepared TFDS data set; TFDS's name for one; or `digits`.

  Raises:
    ConfigError: it is none of these.
  """
  if what == 'digits':
    return _fields('digits', '', 'train', 'test')
  path = pathlib.Path(what).expanduser()
  if '://' in what or path.is_dir():
    return _folder(what.rstrip('/') if '://' in what else str(path))
  if path.suffix in ('.npz', '.npy') and path.is_file():
    name = path.stem.removesuffix('_images')
    beside = [p.name.removesuffix(path.name[len(name) :]) for p in path.parent.iterdir()]
    return {**_choose('arrays', str(path.parent), beside), 'data.train_split': name}
  if path.exists():
    raise ConfigError(f'--data={what} is neither a folder nor an npz or npy file')
  from simclr_jax.data import tfds

  if not tfds.known(what):
    raise ConfigError(
      f'--data={what}: there is no such folder or file, and no TFDS data set of that name'
      + tfds.did_you_mean(what)
    )
  return {**_choose('tfds', '', tfds.split_names(what, '')), 'data.name': what}


def _folder(path):
  from simclr_jax.data import tfds
  from simclr_jax.data.stream import tf

  names = []
  if '://' not in path:
    names = os.listdir(path)
  elif tf.io.gfile.isdir(path):
    names = [n.rstrip('/') for n in tf.io.gfile.listdir(path)]
  infos = [f'{path}/{n}' for n in names if n == 'dataset_info.json']
  if names and not infos:
    infos = tf.io.gfile.glob(f'{path}/*/dataset_info.json')
  if infos:
    newest = sorted(infos)[-1].removesuffix('/dataset_info.json')
    return _choose('tfds', newest, tfds.split_names('', newest))
  for suffix in ('.npz', '_images.npy'):
    held = [n.removesuffix(suffix) for n in names if n.endswith(suffix)]
    if any(n in TRAIN for n in held):
      return _choose('arrays', path, held)
  if not any(n in TRAIN for n in names):
    return _fields('folder', path, '.', '')
  return _choose('folder', path, names)


def _choose(source, folder, names):
  """Of the names of splits, those that are for training and for tests."""
  train = next((n for n in TRAIN if n in names), TRAIN[0])
  return _fields(source, folder, train, next((n for n in TEST if n in names), ''))


def _fields(source, folder, train, test):
  return {
    'data.source': source,
    'data.name': '',
    'data.dir': folder,
    'data.train_split': train,
    'data.test_split': test,
  }


def recipe(dataset, accelerators: int) -> tuple[str, dict[str, str]]:
  """A shipped recipe and other values of its fields, for images of this number and size.

  Args:
    dataset: the training images.
    accelerators: how many GPUs or TPU cores there are; 0: only a CPU.
  """
  count, side = len(dataset), typical_side(dataset)
  if accelerators:
    variant = '32' if side <= 40 else '64' if side <= 96 else '224'
    chosen = {'epochs': np.clip(128_000_000 // count, 100, 1000)}
    most = 512 * accelerators
  else:
    variant = 'cpu'
    chosen = {'epochs': np.clip(60_000 // count, 1, 200)}
    if side <= 48:
      chosen |= {'image_size': 32, 'model.stem': 'strided'}
    most = 128
  together = max(accelerators, 1)
  while most > together and most > count // 2:
    most //= 2
  chosen['batch_size'] = max(most, 2)
  return f'simclr_images:{variant}', {k: str(v) for k, v in chosen.items()}


def typical_side(dataset) -> int:
  """The median of the shorter side, in pixels, of some of the images."""
  if isinstance(dataset, Arrays):
    return min(dataset.images.shape[1:3])
  from simclr_jax.data import decode, stream

  few = dataset.sample(256)
  sizes = decode.sized(few.once(), few.settings, skip=True).map(lambda e: e['shape'])
  sides = [min(size) for size in stream.with_threads(sizes, few.settings).as_numpy_iterator()]
  return int(np.median([side for side in sides if side] or [224]))
