"""What `--data=DATASET` means."""

import os
import pathlib

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
