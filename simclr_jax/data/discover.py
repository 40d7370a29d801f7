"""The fields of a recipe that `--data=DATASET` stands for."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from simclr_jax.data import layout, table
from simclr_jax.errors import ConfigError
from simclr_jax.validation import did_you_mean

_reported: set[str] = set()  # remarks that this process has reported


def fields(dataset: str, overrides: Mapping[str, Any] | None = None) -> dict[str, str]:
  """The fields of a recipe that specify a data set. What was decided about a folder is logged, once.

  Args:
    dataset: a folder of images, see `layout.read`, or several joined by commas; a table of images (`data.table`); an
      npz or npy file, or a folder of such files; the folder or the TFDS name of a prepared data set; or `digits`.
    overrides: fields that the user sets, which have priority. `data.table` names the splits of a folder, and with
      `data.train_split`, the folder itself is read, not a folder inside it.

  Raises:
    ConfigError: `dataset` is none of these.
  """
  if dataset == 'digits':
    return _fields('digits', '', 'train', 'test')
  path = pathlib.Path(dataset).expanduser()
  overrides = overrides or {}
  rows = overrides.get('data.table')
  if rows or (path.suffix.lower() in table.SUFFIXES and path.is_file()):
    return _table(rows or path, path if rows else path.parent, overrides)
  if '://' in dataset or path.is_dir():
    return _folder(dataset.rstrip('/') if '://' in dataset else str(path), overrides)
  if path.suffix in ('.npz', '.npy') and path.is_file():
    return _arrays(path)
  if path.exists():
    raise ConfigError(
      f'--data={dataset} is neither a folder, nor an npz or npy file, nor a table ({", ".join(table.SUFFIXES)})'
    )
  if ',' in dataset:
    return _folders([part.strip() for part in dataset.split(',') if part.strip()], overrides)
  from simclr_jax.data import tfds

  if '/' in dataset and path.parent.is_dir() and not tfds.exists(dataset):
    similar = did_you_mean(path.name, os.listdir(path.parent))
    raise ConfigError(f'--data={dataset}: no such folder or file{similar}')
  if not tfds.exists(dataset):
    raise ConfigError(
      f'--data={dataset}: no such folder or file, and no TFDS data set of this name'
      + tfds.did_you_mean(dataset)
    )
  return {**_choose('tfds', '', tfds.split_names(dataset, '')), 'data.name': dataset}


def name_of(dataset: str) -> str:
  """The name of a data set, such as that of its folder or file, for a run on it; `dataset` as for `fields`."""
  path = pathlib.Path(dataset.split(',')[0]).expanduser().resolve()
  return path.stem if path.is_file() else path.name


def _arrays(path):
  from simclr_jax.data import arrays

  inside = arrays.splits(path)
  if inside:
    return _fields('arrays', str(path.parent), *inside)
  name = path.stem.removesuffix('_images')
  suffix = path.name[len(name) :]
  names = [p.name.removesuffix(suffix) for p in path.parent.iterdir() if p.name.endswith(suffix)]
  is_train = layout.role(name) == layout.TRAIN
  test = layout.splits(sorted(n for n in names if n != name))[1] if is_train else ''
  return _fields('arrays', str(path.parent), name, test)


def _table(path, folder, overrides):
  train, test = '.', ''
  if 'data.train_split' not in overrides:
    train, test = table.read(path, str(folder)).split_names()
  return {**_fields('folder', str(folder), train, test), 'data.table': str(path)}


def _folders(parts, overrides):
  found = []
  for part in parts:
    if not pathlib.Path(part).expanduser().is_dir():
      raise ConfigError(f'--data={",".join(parts)}: {part} is not a folder')
    found.append(_folder(str(pathlib.Path(part).expanduser()), overrides))
  first = found[0]
  for part, other in zip(parts, found):
    for name in ('data.source', 'data.train_split', 'data.test_split'):
      if other[name] != first[name] or other['data.source'] != 'folder':
        raise ConfigError(
          f'--data={",".join(parts)}: the folders must have one layout, but {name} is {first[name]!r} in {parts[0]} and '
          f'{other[name]!r} in {part}'
        )
  return {**first, 'data.dir': ','.join(other['data.dir'] for other in found)}


def _folder(path, overrides):
  from simclr_jax.data import folder, tfds
  from simclr_jax.data.stream import tf

  names = []
  if '://' not in path:
    try:
      names = os.listdir(path)
    except OSError as error:
      raise ConfigError(f'--data={path} cannot be listed: {error.strerror}') from None
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
    if any(layout.role(n) == layout.TRAIN for n in splits):
      return _choose('arrays', path, splits)
  if '://' in path:  # the contents of the folders are not listed
    node = layout.Node(folders={n: layout.Node(1) for n in names if '.' not in n})
  else:
    node = folder.tree(path)
  if 'data.train_split' in overrides:
    names = [n for n in node.filled() if n != overrides['data.train_split']]
    in_folder = overrides['data.train_split'] != '.' and layout.role(overrides['data.train_split'])
    return _fields('folder', path, '.', layout.splits(sorted(names))[1] if in_folder else '')
  reading = layout.read(node, path)
  for remark in reading.remarks:
    if remark not in _reported:
      _reported.add(remark)
      logging.warning('%s', remark)
  root = f'{path}/{reading.root}' if reading.root else path
  return _fields('folder', root, reading.train, reading.test)


def _choose(source, folder, splits):
  """The fields of a data set with these splits."""
  train, test = layout.splits(sorted(splits))
  return _fields(source, folder, train or 'train', test)


def _fields(source, folder, train, test):
  return {
    'data.source': source,
    'data.name': '',
    'data.dir': folder,
    'data.table': '',
    'data.train_split': train,
    'data.test_split': test,
  }
