"""`--data=SOMETHING`: what it is taken for, and the recipe that is chosen for it."""

import numpy as np
import PIL.Image
import pytest

from simclr_jax import config, data
from simclr_jax.data import discover
from simclr_jax.errors import ConfigError


def images(count, side=8):
  return np.zeros((count, side, side, 3), np.uint8)


def test_folders(tmp_path):
  """Breaks if splits inside a folder are missed, or a plain folder gets some."""
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
  """Breaks if npz or npy files are not found, alone or by their folder."""
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
  with pytest.raises(ConfigError, match='data.test_split is empty'):
    data.load(c.data, 'test')


def test_names(test_data):
  """Breaks if a prepared data set is not found by its folder, or its splits are guessed."""
  cifar10 = test_data / 'tfds' / 'cifar10'
  for where in (cifar10, cifar10 / '3.0.2'):
    found = discover.fields(str(where))
    assert (found['data.source'], found['data.name']) == ('tfds', '')
    assert found['data.test_split'] == 'test'
    c = config.load('simclr_images', {**found, 'data.train_split': 'train[:100]'})
    assert data.load(c.data, 'train').images.shape == (100, 32, 32, 3)
  assert discover.fields('cifar10')['data.name'] == 'cifar10'
  assert discover.fields('digits')['data.source'] == 'digits'


@pytest.mark.parametrize(
  'what, message',
  [
    ('no/such/folder', 'no such folder or file'),
    ('cifar11', 'did you mean cifar10'),
    (__file__, 'neither a folder nor'),
  ],
)
def test_errors(what, message):
  """Breaks if a typing error gives a traceback or a catalogue."""
  with pytest.raises(ConfigError, match=message) as error:
    discover.fields(what)
  assert len(str(error.value)) < 300


def arrays(count, side):
  return data.Arrays(images(count, side), np.full(count, -1, np.int32))


@pytest.mark.parametrize('accelerators', [0, 1, 8])
@pytest.mark.parametrize(
  'count, side', [(5, 300), (300, 32), (3000, 96), (60_000, 32), (9000, 224)]
)
def test_recipes_can_be_trained(count, side, accelerators):
  """Breaks if a recipe that is chosen is refused, or its batch does not fit data or devices."""
  dataset = arrays(count, side) if count * side < 500_000 else arrays(count // 60, side)
  name, values = discover.recipe(dataset, accelerators)
  c = config.with_examples(config.load(name, values), len(dataset))
  assert c.image_size <= max(side, 96)
  if len(dataset) > 2 * accelerators:  # else no recipe fits
    assert c.batch_size <= len(dataset) and c.batch_size % max(accelerators, 1) == 0


def test_typical_side_of_files(tmp_path):
  """Breaks if the longer side, or an unreadable file, decides."""
  for i in range(9):
    PIL.Image.new('RGB', (300, 100 + i)).save(tmp_path / f'{i}.jpg')
  (tmp_path / 'bad.jpg').write_bytes(b'')
  c = config.load('simclr_images', discover.fields(str(tmp_path)))
  assert discover.typical_side(data.load(c.data, 'train')) == 104
