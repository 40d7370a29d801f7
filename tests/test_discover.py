"""The fields that `--data=DATASET` stands for, and the recipe that is suggested for a data set."""

import re

import numpy as np
import PIL.Image
import pytest

from simclr_jax import config, data
from simclr_jax.data import discover, suggest
from simclr_jax.errors import ConfigError


def images(count, side=8):
  return np.zeros((count, side, side, 3), np.uint8)


def test_folders(tmp_path):
  """Breaks if the splits in a folder are not found, or a folder without splits gets some."""
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  plain = discover.fields(str(tmp_path))
  assert plain['data.source'] == 'folder' and plain['data.dir'] == str(tmp_path)
  assert (plain['data.train_split'], plain['data.test_split']) == ('.', '')
  (tmp_path / 'train').mkdir()
  (tmp_path / 'val').mkdir()
  split = discover.fields(f'{tmp_path}/')
  assert (split['data.train_split'], split['data.test_split']) == ('train', 'val')
  (tmp_path / 'test').mkdir()
  assert discover.fields(str(tmp_path))['data.test_split'] == 'test'


def test_arrays(tmp_path):
  """Breaks if npz or npy files are not found by their own name or by their folder."""
  np.savez(tmp_path / 'train.npz', images=images(3))
  alone = discover.fields(str(tmp_path / 'train.npz'))
  assert alone == discover.fields(str(tmp_path))
  assert (alone['data.source'], alone['data.train_split'], alone['data.test_split']) == (
    'arrays', 'train', '',
  )  # fmt: skip
  np.savez(tmp_path / 'validation.npz', images=images(3))
  assert discover.fields(str(tmp_path / 'train.npz'))['data.test_split'] == 'validation'
  np.save(tmp_path / 'mine_images.npy', images(4))
  mine = discover.fields(str(tmp_path / 'mine_images.npy'))
  assert mine['data.train_split'] == 'mine'
  c = config.load('simclr_images', mine)
  assert len(data.load(c.data, 'train')) == 4
  with pytest.raises(
    ConfigError,
    match='^no test split: put images into .* or name the split with --config.data.test_split$',
  ):
    data.load(c.data, 'test')


def test_tfds_data_sets(test_data):
  """Breaks if a prepared data set is not found by its folder or name, or its splits are not read."""
  cifar10 = test_data / 'tfds' / 'cifar10'
  for folder in (cifar10, cifar10 / '3.0.2'):
    fields = discover.fields(str(folder))
    assert (fields['data.source'], fields['data.name']) == ('tfds', '')
    assert fields['data.test_split'] == 'test'
    c = config.load('simclr_images', {**fields, 'data.train_split': 'train[:100]'})
    assert data.load(c.data, 'train').images.shape == (100, 32, 32, 3)
  assert discover.fields('cifar10')['data.name'] == 'cifar10'
  assert discover.fields('digits')['data.source'] == 'digits'


@pytest.mark.parametrize(
  'dataset, message',
  [
    ('no/such/folder', 'no such folder or file'),
    ('cifar11', 'did you mean cifar10_1 or cifar10'),
    (__file__, 'is neither a folder, nor an npz or npy file, nor a table'),
  ],
)
def test_wrong_data_sets_are_one_sentence(dataset, message):
  """Breaks if a typing error causes a traceback, or the message lists all of TFDS."""
  with pytest.raises(ConfigError, match=re.escape(message)) as error:
    discover.fields(dataset)
  assert len(str(error.value)) < 300


def arrays(count, side):
  return data.Arrays(images(count, side), np.full(count, -1, np.int32))


@pytest.mark.parametrize('accelerators', [0, 1, 8])
@pytest.mark.parametrize(
  'count, side', [(5, 300), (300, 32), (3000, 96), (60_000, 32), (9000, 224)]
)
def test_suggested_recipes_are_valid(count, side, accelerators):
  """Breaks if a suggested recipe is refused, or its batch size does not suit the data or the devices."""
  dataset = arrays(count, side) if count * side < 500_000 else arrays(count // 60, side)
  name, values = suggest.recipe(dataset, accelerators)
  c = config.with_examples(config.load(name, values), len(dataset))
  assert c.image_size <= max(side, 96)
  if len(dataset) > 2 * accelerators:  # otherwise no recipe is valid
    assert c.batch_size <= len(dataset) and c.batch_size % max(accelerators, 1) == 0


def test_median_side_of_files(tmp_path):
  """Breaks if the longer side is used, or a corrupt file counts."""
  for i in range(9):
    PIL.Image.new('RGB', (300, 100 + i)).save(tmp_path / f'{i}.jpg')
  (tmp_path / 'bad.jpg').write_bytes(b'')
  c = config.load('simclr_images', discover.fields(str(tmp_path)))
  assert suggest.median_side(data.load(c.data, 'train')) == 104
