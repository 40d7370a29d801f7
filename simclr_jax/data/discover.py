"""The fields of a recipe that `--data=DATASET` stands for."""

import os
import pathlib

from simclr_jax.errors import ConfigError

TRAIN = ('train', 'training')
TEST = ('test', 'validation', 'valid', 'val')


def fields(dataset: str) -> dict[str, str]:
  """The fields of a recipe that specify a data set.

  Args:
    dataset: a folder of images, with or without sub-folders `train` and `test`; an npz or npy file, or a
      folder of such files; the folder or the TFDS name of a prepared data set; or `digits`.

  Raises:
    ConfigError: `dataset` is none of these.
  """
  if dataset == 'digits':
    return _fields('digits', '', 'train', 'test')
  path = pathlib.Path(dataset).expanduser()
  if '://' in dataset or path.is_dir():
    return _folder(dataset.rstrip('/') if '://' in dataset else str(path))
  if path.suffix in ('.npz', '.npy') and path.is_file():
    name = path.stem.removesuffix('_images')
    suffix = path.name[len(name) :]
    splits = [p.name.removesuffix(suffix) for p in path.parent.iterdir()]
    return {**_choose('arrays', str(path.parent), splits), 'data.train_split': name}
  if path.exists():
    raise ConfigError(f'--data={dataset} is neither a folder nor an npz or npy file')
  from simclr_jax.data import tfds

  if not tfds.exists(dataset):
    raise ConfigError(
      f'--data={dataset}: no such folder or file, and no TFDS data set of this name'
      + tfds.did_you_mean(dataset)
    )
  return {**_choose('tfds', '', tfds.split_names(dataset, '')), 'data.name': dataset}


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
    splits = [n.removesuffix(suffix) for n in names if n.endswith(suffix)]
    if any(n in TRAIN for n in splits):
      return _choose('arrays', path, splits)
  if not any(n in TRAIN for n in names):
    return _fields('folder', path, '.', '')
  return _choose('folder', path, names)


def _choose(source, folder, splits):
  """The fields of a data set with these splits; the first of `TRAIN` and of `TEST` are used."""
  train = next((n for n in TRAIN if n in splits), TRAIN[0])
  return _fields(source, folder, train, next((n for n in TEST if n in splits), ''))


def _fields(source, folder, train, test):
  return {
    'data.source': source,
    'data.name': '',
    'data.dir': folder,
    'data.train_split': train,
    'data.test_split': test,
  }
