"""Images read from files give the views, the batches and the training that images in memory give."""

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


def picture(h, w, seed=0):
  """A smooth uint8 image `[h, w, 3]`: bicubic and bilinear interpolation have something to follow."""
  noise = np.random.default_rng(seed).random((h, w, 3))
  smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
  smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
  return np.round(255 * smooth).astype(np.uint8)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """A folder of 24 PNG files of three sizes, and their pixels."""
  root = tmp_path_factory.mktemp('photos')
  pixels = [picture(*SIZES[i % len(SIZES)], seed=i) for i in range(24)]
  for i, x in enumerate(pixels):
    PIL.Image.fromarray(x).save(root / f'{i:02}.png')
  return root, pixels


@pytest.fixture(scope='module')
def equal(tmp_path_factory):
  """A folder of 64 PNG files of one size."""
  root = tmp_path_factory.mktemp('equal')
  for i in range(64):
    PIL.Image.fromarray(picture(40, 40, seed=i)).save(root / f'{i:02}.png')
  return root


def recipe(root, **changes):
  where = {'data.source': 'folder', 'data.dir': str(root), 'data.train_split': '.'}
  small = {**TINY, 'data.test_split': '', 'data.num_classes': '0', 'image_size': '32'}
  return config.load('simclr_digits', {**small, **where, **changes})


VIEWS = {
  'simclr': 'simclr_crop(0.08, 1) | flip | grayscale(p=0.5)',
  'moco': 'torch_crop(0.2, 1) | flip | grayscale(p=0.5)',
}


@pytest.mark.parametrize('resize_on', ['device', 'host'])
@pytest.mark.parametrize('views', VIEWS)
def test_views_are_those_of_the_whole_image(photos, views, resize_on):
  """Breaks if host and device draw different boxes, or an image is cut or resized differently."""
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
  off = np.array([
    np.abs(draw({
      'images': pixels[row][None],
      'epoch': batch['epoch'][i : i + 1],
      'position': batch['position'][i : i + 1],
    })[0] - ours[i]).max()
    for i, row in enumerate(batch['index'])
  ])  # fmt: skip
  canvas = crop.canvas_shape(32, 2, resize_on)
  assert batch['images'].shape == (24, *canvas, 3) and batch['images'].dtype == np.uint8
  by_host = (batch['crops'][:, 1] == [0, 32, 32, 32]).all((1, 2))
  if resize_on == 'device':  # but what does not fit the canvas
    assert 0 < by_host.sum() < 12 and off[~by_host].max() < 2e-5
  else:
    assert by_host.all()
  assert off.max() < 0.51 / 255  # what the host resizes is rounded to 8 bits


@pytest.mark.parametrize(
  'text', ['simclr_crop(0.08, 1)', 'torch_crop(0.2, 1)', 'torch_center_crop']
)
def test_boxes_do_not_depend_on_what_is_known_when(text):
  """Breaks if a box differs by whether the size of the image is known to the compiler."""
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
      known = np.broadcast_to(np.asarray(op(key, h, w, 224)), (2, 4))
      np.testing.assert_array_equal(place[i, 1], known)
      inside = place[i, 1, 1]  # what may be looked at lies inside the image
      assert (inside[:2] >= 0).all() and (inside[:2] + inside[2:] <= [h, w]).all()


def test_cut_then_resized_as_resized_then_cut():
  """Breaks if the support of a crop, which differs from it in MoCo's evaluation, is lost."""
  x = picture(90, 70)
  place = np.asarray(crop.torchvision_center(90, 70, 32, 0.875))
  whole = crop.crop_and_resize(x / 255, place, 32, 'triangle')
  resized = PIL.Image.fromarray(x).resize((37, 37 * 90 // 70), PIL.Image.BILINEAR)
  left, top = (round((side - 32) / 2) for side in resized.size)
  theirs = np.asarray(resized.crop((left, top, left + 32, top + 32)))
  assert np.abs(255 * np.asarray(whole) - theirs).max() < 1.01


def steps(c, devices=1, count=4, first=0):
  dataset = data.load(c.data, 'train')
  state, step = train_state.build(c, dataset, sharding.make_mesh(jax.devices()[:devices]))
  found = []
  for i in range(first, first + count):
    state, metrics = step(state, i)
    found.append((float(metrics['loss']), int(metrics['batch_hash'])))
  step.loader.close()
  return dataset, found


def test_training_from_files_equals_training_from_memory(equal):
  """Breaks if where the images are kept changes a result."""
  memory, resident = steps(recipe(equal))
  assert isinstance(memory, data.Arrays) and memory.resident
  files, streamed = steps(recipe(equal, **{'data.on_device': 'no'}))
  assert isinstance(files, folder.Files)
  np.testing.assert_allclose([a for a, _ in streamed], [a for a, _ in resident], rtol=1e-4)
  # Arrays that are gathered on the host are the same numbers.
  gathered = train_state.build(
    recipe(equal), data.Arrays(memory.images, memory.labels, resident=False)
  )[1]
  kept = train_state.build(recipe(equal), memory)[1]
  for i in (0, 5):
    batch = loader.with_images(kept.loader.constants, kept.loader(i))
    for k, v in gathered.loader(i).items():
      np.testing.assert_array_equal(v, batch[k])
  gathered.loader.close(), kept.loader.close()


def test_streamed_training_on_one_and_eight_devices(photos):
  """Breaks if a batch is split over the devices in another order than its rows."""
  c = recipe(photos[0], batch_size='16')
  _, one = steps(c)
  _, eight = steps(c, devices=8)
  np.testing.assert_allclose([a for a, _ in eight], [a for a, _ in one], rtol=1e-5)
  _, again = steps(c)
  assert again == one  # bit for bit


def test_feed_seeks_and_goes_on(photos):
  """Breaks if a batch depends on what was asked before, or reading ahead loses one."""
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


def test_feed_passes_errors_on(tmp_path):
  """Breaks if an error of the reading thread is lost, or stops the thread for good."""
  for i in range(8):
    PIL.Image.fromarray(picture(20 + i, 30)).save(tmp_path / f'{i}.png')
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


def test_canvases_never_need_python_for_each_image(photos):
  """Breaks if a Python function is called more often than once a block."""
  c = recipe(photos[0], batch_size='8')
  files = data.load(c.data, 'train')
  encoded = files.examples(0, 8, 0, np.arange(8))
  canvases = decode.canvases(encoded, augment.pipelines(c.augment, 2), 32, 0, c.data)
  calls = []
  original = decode._plan
  decode._plan = lambda *a: calls.append(len(a[0])) or original(*a)
  try:
    for _ in stream.with_threads(canvases, c.data).take(128).as_numpy_iterator():
      pass
  finally:
    decode._plan = original
  assert set(calls) == {decode.BLOCK} and len(calls) <= 128 // decode.BLOCK + 3


def test_order_of_a_billion():
  """Breaks if finding a place in the order takes memory or time that grows with the data."""
  n = 10**9
  rows = order.rows(0, 3 * n // 4096, 4096, n)
  assert len(set(rows['index'])) > 4090 and rows['index'].max() < n  # repeats: of another pass
  assert set(rows['epoch']) <= {2, 3}
  spread = np.histogram(rows['index'], 16, (0, n))[0]
  assert ((spread - 256) ** 2 / 256).sum() < 37.7  # chi-squared, 15 degrees of freedom, 99.9 %


@pytest.mark.parametrize('n', [5, 10, 37])
def test_orders_are_random(n):
  """Breaks if a pass prefers some places for some images, or keeps neighbours together."""
  passes = 3000
  found = np.stack([order.permute(1, e, np.arange(n), n) for e in range(passes)])
  np.testing.assert_array_equal(np.sort(found, 1), np.tile(np.arange(n), (passes, 1)))
  places = np.stack([np.bincount(column, minlength=n) for column in found.T])
  chi2 = ((places - passes / n) ** 2 / (passes / n)).sum()
  freedom = (n - 1) ** 2
  assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)
  steps = np.bincount(((found[:, 1:] - found[:, :-1]) % n).ravel(), minlength=n)[1:]
  expected = steps.sum() / (n - 1)
  assert ((steps - expected) ** 2 / expected).sum() < (n - 2) + 4 * np.sqrt(2 * (n - 2))
