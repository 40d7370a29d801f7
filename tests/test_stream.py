"""Images read from files have the same views, batches and training results as images in memory."""

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import TINY
from scipy import ndimage

from simclr_jax import config, data, sharding, train_state
from simclr_jax.data import augment, crop, decode, folder, loader, order, stream
from simclr_jax.errors import ConfigError

SIZES = [(70, 90), (25, 30), (150, 60)]


def smooth_image(h, w, seed=0):
  """A smooth random uint8 image `[h, w, 3]`, suitable for bicubic and bilinear interpolation."""
  noise = np.random.default_rng(seed).random((h, w, 3))
  smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
  smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
  return np.round(255 * smooth).astype(np.uint8)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """A folder of 24 PNG files of three sizes, and their pixels."""
  root = tmp_path_factory.mktemp('photos')
  pixels = [smooth_image(*SIZES[i % len(SIZES)], seed=i) for i in range(24)]
  for i, x in enumerate(pixels):
    PIL.Image.fromarray(x).save(root / f'{i:02}.png')
  return root, pixels


@pytest.fixture(scope='module')
def one_size(tmp_path_factory):
  """A folder of 64 PNG files of one size."""
  root = tmp_path_factory.mktemp('one_size')
  for i in range(64):
    PIL.Image.fromarray(smooth_image(40, 40, seed=i)).save(root / f'{i:02}.png')
  return root


def recipe(root, **changes):
  images = {'data.source': 'folder', 'data.dir': str(root), 'data.train_split': '.'}
  small = {**TINY, 'data.test_split': '', 'data.num_classes': '0', 'image_size': '32'}
  return config.load('simclr_digits', {**small, **images, **changes})


VIEWS = {
  'simclr': 'simclr_crop(0.08, 1) | flip | grayscale(p=0.5)',
  'moco': 'torch_crop(0.2, 1) | flip | grayscale(p=0.5)',
}


@pytest.mark.parametrize('resize_on', ['device', 'host'])
@pytest.mark.parametrize('views', VIEWS)
def test_views_of_canvases_equal_views_of_whole_images(photos, views, resize_on):
  """Breaks if host and device draw different crops, or an image is cropped or resized differently."""
  root, pixels = photos
  c = recipe(root, **{'augment.view1': VIEWS[views], 'data.resize_on': resize_on})
  files = data.load(c.data, 'train')
  assert isinstance(files, folder.Files)
  pipelines = augment.pipelines(c.augment, 2)
  mesh = sharding.make_mesh(jax.devices()[:1])
  batches = loader.for_training(files, 7, 24, pipelines, 32, mesh)
  draw = jax.jit(
    lambda b: augment.views(
      b['images'], b['epoch'], b['position'], pipelines, 7, 32, b.get('crops')
    )
  )
  batch = jax.device_get(batches(0))
  batches.close()
  np.testing.assert_array_equal(batch['index'], order.rows(7, 0, 24, 24)['index'])
  ours = np.asarray(draw(batch))
  error = np.array([
    np.abs(draw({
      'images': pixels[row][None],
      'epoch': batch['epoch'][i : i + 1],
      'position': batch['position'][i : i + 1],
    })[0] - ours[i]).max()
    for i, row in enumerate(batch['index'])
  ])  # fmt: skip
  canvas = crop.canvas_shape(32, 2, resize_on)
  assert batch['images'].shape == (24, *canvas, 3) and batch['images'].dtype == np.uint8
  on_host = (batch['crops'][:, 1] == [0, 32, 32, 32]).all((1, 2))
  if resize_on == 'device':  # except for windows that are larger than the canvas
    assert 0 < on_host.sum() < 12 and error[~on_host].max() < 2e-5
  else:
    assert on_host.all()
  assert error.max() < 0.51 / 255  # the host rounds to 8 bits


@pytest.mark.parametrize(
  'text', ['simclr_crop(0.08, 1)', 'torch_crop(0.2, 1)', 'torch_center_crop']
)
def test_places_equal_crops_of_static_sizes(text):
  """Breaks if a crop depends on whether the size of the image is traced or static."""
  op = augment.parse(text)[0]
  for h, w in [(375, 500), (1, 1), (10, 20000)]:
    heights, widths, zeros = np.full(8, h), np.full(8, w), np.zeros(8, np.int32)
    place = augment.places(
      heights, widths, zeros, np.arange(8), pipelines=(text, text), seed=3, size=224
    )
    place = np.asarray(place)
    keys = jax.vmap(lambda p: augment._view_keys(jax.random.key(3), 0, p))(np.arange(8))
    for i in range(3):
      key = jax.random.split(keys[i, 1], (1, 2))[0, 1]
      static = np.broadcast_to(np.asarray(op(key, h, w, 224)), (2, 4))
      np.testing.assert_array_equal(place[i, 1], static)
      support = place[i, 1, 1]
      assert (support[:2] >= 0).all() and (support[:2] + support[2:] <= [h, w]).all()


def test_crop_then_resize_equals_resize_then_crop():
  """Breaks if the second rectangle of a crop, which differs in MoCo's evaluation, is ignored."""
  x = smooth_image(90, 70)
  place = np.asarray(crop.torchvision_center(90, 70, 32, 0.875))
  ours = crop.crop_and_resize(x / 255, place, 32, 'triangle')
  resized = PIL.Image.fromarray(x).resize((37, 37 * 90 // 70), PIL.Image.BILINEAR)
  left, top = (round((side - 32) / 2) for side in resized.size)
  theirs = np.asarray(resized.crop((left, top, left + 32, top + 32)))
  assert np.abs(255 * np.asarray(ours) - theirs).max() < 1.01


def losses_and_hashes(c, devices=1, count=4):
  """The training set, and (loss, batch_hash) of each of the first steps."""
  dataset = data.load(c.data, 'train')
  state, step = train_state.build(c, dataset, sharding.make_mesh(jax.devices()[:devices]))
  results = []
  for i in range(count):
    state, metrics = step(state, i)
    results.append((float(metrics['loss']), int(metrics['batch_hash'])))
  step.loader.close()
  return dataset, results


def test_training_from_files_equals_training_from_memory(one_size):
  """Breaks if a result depends on where the images are stored."""
  memory, resident = losses_and_hashes(recipe(one_size))
  assert isinstance(memory, data.Arrays) and memory.resident
  files, streamed = losses_and_hashes(recipe(one_size, **{'data.on_device': 'no'}))
  assert isinstance(files, folder.Files)
  np.testing.assert_allclose([a for a, _ in streamed], [a for a, _ in resident], rtol=1e-4)
  # Batches that are gathered on the host have the same images.
  on_host = data.Arrays(memory.images, memory.labels, resident=False)
  host_step = train_state.build(recipe(one_size), on_host)[1]
  device_step = train_state.build(recipe(one_size), memory)[1]
  for i in (0, 5):
    batch = loader.with_images(device_step.loader.constants, device_step.loader(i))
    for k, v in host_step.loader(i).items():
      np.testing.assert_array_equal(v, batch[k])
  host_step.loader.close(), device_step.loader.close()


@pytest.mark.slow
def test_streamed_training_on_one_and_eight_devices(photos):
  """Breaks if the rows of a batch are split over the devices in another order."""
  c = recipe(photos[0], batch_size='16')
  _, one = losses_and_hashes(c)
  _, eight = losses_and_hashes(c, devices=8)
  np.testing.assert_allclose([a for a, _ in eight], [a for a, _ in one], rtol=1e-5)
  _, again = losses_and_hashes(c)
  assert again == one  # bit for bit


def test_loader_seeks_and_continues(photos):
  """Breaks if a batch depends on earlier calls, or prefetching loses a batch."""
  c = recipe(photos[0], batch_size='8')
  files = data.load(c.data, 'train')
  mesh = sharding.make_mesh(jax.devices()[:8])
  batches = loader.for_training(files, 0, 8, augment.pipelines(c.augment, 2), 32, mesh)
  in_order = [jax.device_get(batches(i)) for i in range(6)]
  assert not batches.ready(2)
  batches.wait(2)
  assert batches.ready(2)
  for i in (2, 3, 0, 5, 4):
    for k, v in jax.device_get(batches(i)).items():
      np.testing.assert_array_equal(v, in_order[i][k])
  batches.close()
  assert batches.ready(5) is False


def test_loader_raises_errors_of_its_thread(tmp_path):
  """Breaks if an error of the prefetching thread is lost, or the loader cannot be used after it."""
  for i in range(8):
    PIL.Image.fromarray(smooth_image(20 + i, 30)).save(tmp_path / f'{i}.png')
  bad = tmp_path / '3.png'
  good = bad.read_bytes()
  bad.write_bytes(good[:-300])
  c = recipe(tmp_path, batch_size='8')
  files = data.load(c.data, 'train')
  mesh = sharding.make_mesh(jax.devices()[:1])
  batches = loader.for_training(files, 0, 8, augment.pipelines(c.augment, 2), 32, mesh)
  with pytest.raises(ConfigError, match='3.png is a broken PNG'):
    batches(0)
  bad.write_bytes(good)
  assert batches(0)['images'].shape[0] == 8
  batches.close()


def test_canvases_call_python_once_per_block(photos):
  """Breaks if a Python function is called more often than once per block of images."""
  c = recipe(photos[0], batch_size='8')
  files = data.load(c.data, 'train')
  encoded = files.train_iterator(0, 8, 0, np.arange(8))
  canvases = decode.canvases(encoded, augment.pipelines(c.augment, 2), 32, 0, c.data)
  calls = []
  original = decode._plan
  decode._plan = lambda *a, **k: calls.append(len(a[0])) or original(*a, **k)
  try:
    for _ in stream.with_threads(canvases, c.data).take(128).as_numpy_iterator():
      pass
  finally:
    decode._plan = original
  assert set(calls) == {decode.BLOCK} and len(calls) <= 128 // decode.BLOCK + 3


def test_order_of_a_billion_images():
  """Breaks if computing a position takes memory or time that grows with the data."""
  n = 10**9
  rows = order.rows(0, 3 * n // 4096, 4096, n)
  assert len(set(rows['index'])) > 4090 and rows['index'].max() < n  # repeats: of the next epoch
  assert set(rows['epoch']) <= {2, 3}
  spread = np.histogram(rows['index'], 16, (0, n))[0]
  assert ((spread - 256) ** 2 / 256).sum() < 37.7  # chi-squared, 15 degrees of freedom, 99.9 %


@pytest.mark.parametrize('n', [5, 10, 37])
def test_orders_are_random(n):
  """Breaks if some images prefer some positions, or neighbours stay together."""
  epochs = 3000
  index = np.stack([order.permute(1, e, np.arange(n), n) for e in range(epochs)])
  np.testing.assert_array_equal(np.sort(index, 1), np.tile(np.arange(n), (epochs, 1)))
  counts = np.stack([np.bincount(column, minlength=n) for column in index.T])
  chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
  freedom = (n - 1) ** 2
  assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)
  steps = np.bincount(((index[:, 1:] - index[:, :-1]) % n).ravel(), minlength=n)[1:]
  expected = steps.sum() / (n - 1)
  assert ((steps - expected) ** 2 / expected).sum() < (n - 2) + 4 * np.sqrt(2 * (n - 2))
