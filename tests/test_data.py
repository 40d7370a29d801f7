"""The order of the training images, and the sources digits, arrays and TFDS with their errors."""

import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from simclr_jax import config, data
from simclr_jax.data import digits, order, tfds as tfds_source
from simclr_jax.errors import ConfigError


def source(**values):
  c = config.load('simclr_cifar10').data
  with c.unlocked():
    c.update(values)
  return c


def test_every_image_once_per_epoch_and_none_dropped():
  """Breaks if an epoch repeats or skips an image, or the partial batch at its end is dropped."""
  n, size = 50, 16
  batches = [order.rows(3, step, size, n) for step in range(25)]  # 8 epochs
  index = np.concatenate([b['index'] for b in batches])
  epoch = np.concatenate([b['epoch'] for b in batches])
  position = np.concatenate([b['position'] for b in batches])
  for e in range(8):
    assert sorted(index[epoch == e]) == list(range(n))
    assert list(position[epoch == e]) == list(range(n))
  assert not np.array_equal(index[epoch == 0], index[epoch == 1])


def test_batches_are_a_function_of_seed_and_step():
  """Breaks if a batch depends on earlier calls: a resumed run would read other images."""
  late = order.rows(0, 1000, 32, 500)
  order.rows(0, 3, 32, 500)
  for k, v in order.rows(0, 1000, 32, 500).items():
    np.testing.assert_array_equal(v, late[k])
    assert v.dtype == np.int32
  assert not np.array_equal(order.rows(1, 1000, 32, 500)['index'], late['index'])


def test_digits():
  """Breaks if the bundled data set changes: size, split by scan, balance, dark background."""
  train, test = (digits.load(None, s) for s in ('train', 'test'))
  assert train.images.shape == (6000, 32, 32, 3) and test.images.shape == (1188, 32, 32, 3)
  assert train.images.dtype == np.uint8 and train.labelled and test.labelled
  assert np.bincount(train.labels).min() >= 500
  corner = train.images[:, 0, 0].astype(int)
  assert corner.max() <= 51 and (corner.max(1) == corner.min(1)).mean() > 0.9  # dark, gray
  assert train.images.max((1, 2, 3)).min() > 100  # bright ink
  again = digits.load(None, 'train')
  np.testing.assert_array_equal(train.images, again.images)
  # Placements of one scan differ.
  assert not np.array_equal(train.images[0], train.images[1])
  with pytest.raises(ConfigError, match='splits train and test'):
    digits.load(None, 'validation')


def test_npz(tmp_path):
  """Breaks if labels are required, or a corrupt file causes a traceback."""
  x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
  c = source(source='arrays', dir=str(tmp_path))
  with pytest.raises(ConfigError, match='neither train.npz nor train_images.npy'):
    data.load(c, 'train')
  np.savez(tmp_path / 'train.npz', images=x)
  arrays = data.load(c, 'train')
  np.testing.assert_array_equal(arrays.images, x)
  assert not arrays.labelled and (arrays.labels == -1).all()
  np.savez(tmp_path / 'train.npz', images=x, labels=np.arange(5))
  assert data.load(c, 'train').labelled
  np.savez(tmp_path / 'train.npz', images=x, labels=np.arange(4))
  with pytest.raises(ConfigError, match='5 images, but labels'):
    data.load(c, 'train')
  np.savez(tmp_path / 'train.npz', images=x.astype(np.float32))
  with pytest.raises(ConfigError, match='float32 from 0 to 255, and floats are read from 0 to 1'):
    data.load(c, 'train')
  np.savez(tmp_path / 'train.npz', images=x, labels=np.arange(5) / 2)
  with pytest.raises(ConfigError, match='labels must be integers or strings, these are float64'):
    data.load(c, 'train')
  np.savez(tmp_path / 'train.npz', first=x, second=x)
  with pytest.raises(ConfigError, match='no array "images"'):
    data.load(c, 'train')
  np.savez(tmp_path / 'train.npz', images=np.array([{}], object))
  with pytest.raises(ConfigError, match='cannot be read'):  # pickles are not loaded
    data.load(c, 'train')
  for content in (b'<html>', b''):
    (tmp_path / 'train.npz').write_bytes(content)
    with pytest.raises(ConfigError, match='cannot be read'):
      data.load(c, 'train')
  (tmp_path / 'train.npz').unlink()
  np.save(tmp_path / 'train_images.npy', x)
  mapped = data.load(c, 'train')
  assert isinstance(mapped.images, np.memmap) and not mapped.labelled
  np.testing.assert_array_equal(mapped.images, x)
  np.save(tmp_path / 'train_labels.npy', np.arange(5))
  assert list(data.load(c, 'train').labels) == list(range(5))
  with pytest.raises(ConfigError, match='data.dir is empty'):
    data.load(source(source='arrays', dir=''), 'train')


@pytest.mark.slow
def test_arrays_never_import_tensorflow():
  """Breaks if training on arrays imports TensorFlow."""
  program = """
import pathlib, sys, tempfile
from simclr_jax import config, train
from simclr_jax.evaluate import knn, probe, logistic
from simclr_jax.interop import orbax
small = {'model.width_multiplier': '0.125', 'batch_size': '8', 'steps': '1', 'warmup_epochs': '0'}
recipe = config.load('simclr_digits', {**small, 'tensorboard': 'false'})
assert train.pretrain(recipe, pathlib.Path(tempfile.mkdtemp()) / 'run') == 0
assert 'tensorflow' not in sys.modules, 'TensorFlow was imported'
"""
  subprocess.run([sys.executable, '-c', program], check=True)


def test_cifar10_from_tfds(test_data):
  """Breaks if images, labels or their order differ from TFDS."""
  tfds = pytest.importorskip('tensorflow_datasets')
  c = source(dir=str(test_data / 'tfds'))
  part = tfds_source.load(c, 'train[:1000]')
  assert part.images.shape == (1000, 32, 32, 3) and part.labelled
  builder = tfds.builder('cifar10', data_dir=str(test_data / 'tfds'))
  for i, example in zip(range(5), builder.as_dataset(split='train').as_numpy_iterator()):
    np.testing.assert_array_equal(part.images[i], example['image'])
    assert part.labels[i] == example['label']


@pytest.mark.parametrize(
  'values, split, message',
  [
    (dict(name='cifar11'), 'train', "'cifar11' is not a TFDS data set"),
    (dict(name='mnist'), 'train', 'tfds build mnist'),
    (dict(name='cifar10'), 'valid', "no split 'valid', only"),
  ],
)
def test_tfds_errors_are_one_sentence(test_data, values, split, message):
  """Breaks if the message for a missing data set lists all of TFDS, or lacks the command that prepares it."""
  pytest.importorskip('tensorflow_datasets')
  with pytest.raises(ConfigError, match=message) as error:
    tfds_source.load(source(dir=str(test_data / 'tfds'), **values), split)
  assert len(str(error.value)) < 400 and '\n' not in str(error.value)


def test_truncated_tfds_shard_is_an_error(test_data, tmp_path):
  """Breaks if a shard that is truncated between two records is read as a shorter data set."""
  pytest.importorskip('tensorflow_datasets')

  folder = tmp_path / 'cifar10' / '3.0.2'
  shutil.copytree(test_data / 'tfds' / 'cifar10' / '3.0.2', folder)
  shard = sorted(folder.glob('*test*tfrecord*'))[0]
  shard.chmod(0o644)
  content, at = shard.read_bytes(), 0
  for _ in range(10):  # a record is its length (8 bytes), a CRC, the bytes, a CRC
    at += 8 + 4 + struct.unpack('<Q', content[at : at + 8])[0] + 4
  shard.write_bytes(content[:at])
  with pytest.raises(ConfigError, match='00000-of-00008 has 10 of its 1,250 records'):
    tfds_source.load(source(dir=str(tmp_path)), 'test')
