"""Augmentation ops against tf.image or numpy, and their draws against the stated distributions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config
from simclr_jax.data import augment

tf = pytest.importorskip('tensorflow', reason='tf.image is the oracle')


@functools.cache
def images(n=4, size=16):
  """Random ones, and corner cases: black, white, grey, pure colours."""
  x = np.random.default_rng(0).random((n, size, size, 3)).astype(np.float32)
  x[0, :4] = 0.0
  x[0, 4:8] = 1.0
  x[1, :8] = x[1, :8, :, :1]
  x[2, :4] = [1.0, 0.0, 0.0]
  x[2, 4:8] = [0.0, 1.0, 1.0]
  return x


@pytest.mark.parametrize('factor', [0.0, 0.3, 1.0, 1.7])
def test_colour_ops_equal_tf_image(factor):
  """Breaks if an op's arithmetic leaves tf.image's (HSV saturation, per-channel contrast)."""
  for x in images():
    pairs = [
      (augment.contrast(x, factor), tf.image.adjust_contrast(x, factor)),
      (augment.hue_and_saturation(x, 0.0, factor), tf.image.adjust_saturation(x, factor)),
      (augment.brightness_add(x, factor - 1), tf.image.adjust_brightness(x, factor - 1)),
      (augment.brightness_multiply(x, factor), x * np.float32(factor)),
    ]
    for ours, theirs in pairs:
      np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize('delta', [-0.2, -0.05, 0.0, 0.1, 0.2])
def test_hue_equals_tf_image(delta):
  """Breaks if hue turns the wrong way or by another unit."""
  for x in images():
    ours = augment.hue_and_saturation(x, delta, 1.0)
    np.testing.assert_allclose(ours, tf.image.adjust_hue(x, delta), atol=3e-6)


def test_grayscale():
  """Breaks if the luma weights change (tf.image has 0.2989, 0.587, 0.114)."""
  for x in images():
    expected = np.repeat(tf.image.rgb_to_grayscale(x), 3, axis=-1)
    np.testing.assert_allclose(augment.grayscale(x), expected, atol=1e-6)


@pytest.mark.parametrize('box', [(0, 0, 16, 16), (3, 5, 7, 9), (0, 0, 4, 4), (10, 2, 6, 12)])
@pytest.mark.parametrize('size', [8, 16, 32])
def test_crop_and_resize_equals_tf_image(box, size):
  """Breaks if weights reach outside the crop, or centres are not half-pixel."""
  top, left, height, width = box
  for x in images():
    ours = augment.crop_and_resize(jnp.asarray(x), jnp.array(box), size)
    cut = x[top : top + height, left : left + width]
    theirs = tf.image.resize(cut, (size, size), method='bicubic')
    # TensorFlow reads its kernel from a table of 1,024 steps.
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize('sigma', [0.1, 0.7, 2.0])
@pytest.mark.parametrize('kernel_size', [3, 9])
def test_blur_equals_numpy(sigma, kernel_size):
  """Breaks if the kernel's width, its normalisation or the zero padding changes."""
  radius = kernel_size // 2
  t = np.arange(-radius, radius + 1)
  k = np.exp(-(t**2) / (2 * sigma**2))
  k /= k.sum()
  for x in images():
    padded = np.pad(x.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)))
    rows = sum(k[i] * padded[i : i + 16] for i in range(len(k)))
    expected = sum(k[i] * rows[:, i : i + 16] for i in range(len(k)))
    ours = augment.gaussian_blur(jnp.asarray(x), jnp.float32(sigma), kernel_size)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize('shape', [(375, 500), (500, 375), (32, 32)])
def test_crop_equals_tensorflows_sampler(shape):
  """Breaks if areas, heights, widths or corners are drawn otherwise than by TensorFlow's op."""
  n = 20_000
  keys = jax.random.split(jax.random.key(1), n)
  ours = np.asarray(jax.jit(jax.vmap(lambda k: augment.sample_box(k, *shape)))(keys))

  def draw(seed):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      (*shape, 3), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed=tf.stack([seed, 7]),
      min_object_covered=0.1, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0),
      max_attempts=100,
    )  # fmt: skip
    return tf.concat([begin[:2], size[:2]], 0)

  theirs = np.stack(list(tf.data.Dataset.range(n).map(draw).as_numpy_iterator()))
  for column, name in enumerate(('top', 'left', 'height', 'width')):
    side = shape[column % 2]
    # Largest distance of the two distribution functions; 0.02 is its 99.9 % quantile for this n.
    values = np.arange(side + 1)
    a, b = (np.searchsorted(np.sort(x[:, column]), values, 'right') / n for x in (ours, theirs))
    assert np.abs(a - b).max() < 0.02, name
  area = ours[:, 2] * ours[:, 3] / np.prod(shape)
  assert area.min() >= 0.1  # min_object_covered and not the area range's 0.08
  if shape == (32, 32):  # quantiles published for SimCLR's code; one step of area there is 0.02
    found = np.quantile(area, [0.01, 0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(found, [0.106, 0.141, 0.220, 0.404, 0.610, 0.781], atol=0.02)
  # The far edge is touched by boxes that fill the side only.
  top, left, h, w = ours.T
  assert ((top + h < shape[0]) | (h == shape[0])).all()
  assert ((left + w < shape[1]) | (w == shape[1])).all()


def test_jitter_factors_and_order():
  """Breaks if a factor's range, the uniformity of the 24 orders, or the clip after each op changes."""
  strength, n = 0.5, 12_000
  image = jnp.asarray(images()[3])
  keys = jax.random.split(jax.random.key(2), n)

  def factors(key):
    order_key, *rest = jax.random.split(key, 5)
    return jax.random.permutation(order_key, 4)

  orders = np.asarray(jax.jit(jax.vmap(factors))(keys))
  counts = np.array([(orders == p).all(1).sum() for p in itertools.permutations(range(4))])
  assert counts.sum() == n
  chi2 = ((counts - n / 24) ** 2 / (n / 24)).sum()
  assert chi2 < 49.7, chi2  # 99.9 % quantile, 23 degrees of freedom

  few = keys[:300]
  ours = np.asarray(jax.jit(jax.vmap(lambda k: augment.color_jitter(k, image, strength)))(few))
  assert ours.min() >= 0 and ours.max() <= 1

  # One image at a time, with tf.image and the same draws.
  for key, got, order in zip(few[:40], ours, orders):
    _, *rest = jax.random.split(key, 5)
    low = [0.6, 0.6, 0.6, -0.1]
    high = [1.4, 1.4, 1.4, 0.1]
    b, c, s, h = (
      float(jax.random.uniform(k, minval=u, maxval=v)) for k, u, v in zip(rest, low, high)
    )
    x = np.asarray(image)
    ops = [tf.multiply, tf.image.adjust_contrast, tf.image.adjust_saturation, tf.image.adjust_hue]
    for op in order:
      x = np.clip(ops[op](x, (b, c, s, h)[op]), 0, 1)
    np.testing.assert_allclose(got, x, atol=1e-5)


def test_additive_brightness_of_v1():
  """Breaks if v1's brightness is not a shift within 0.8 times the strength."""
  gray = jnp.full((4, 4, 3), 0.5)  # contrast, saturation and hue leave it alone
  keys = jax.random.split(jax.random.key(3), 4000)
  out = jax.jit(jax.vmap(lambda k: augment.color_jitter(k, gray, 0.5, True)))(keys)
  shift = np.asarray(out)[:, 0, 0, 0] - 0.5
  np.testing.assert_allclose([shift.min(), shift.max()], [-0.4, 0.4], atol=0.01)
  np.testing.assert_allclose([shift.mean(), shift.std()], [0, 0.8 / 12**0.5], atol=0.012)
  out = jax.jit(jax.vmap(lambda k: augment.color_jitter(k, gray, 0.5, False)))(keys)
  factor = np.asarray(out)[:, 0, 0, 0] / 0.5
  np.testing.assert_allclose([factor.min(), factor.max()], [0.6, 1.4], atol=0.01)


def recipe(**values):
  c = config.load('simclr_cifar10').augment
  with c.unlocked():
    c.update(values)
  return c


def draw_views(c, image, n=4000, size=8):
  x = jnp.broadcast_to(jnp.asarray(image), (n, *image.shape))
  draw = jax.jit(lambda x, e, p: augment.views(x, e, p, c, 0, size))
  return np.asarray(draw(x, jnp.zeros(n, jnp.int32), jnp.arange(n, dtype=jnp.int32)))


WHOLE = {'crop_area_min': 1.0, 'crop_min_object_covered': 1.0}


def test_flip_colour_and_gray_frequencies():
  """Breaks if a view's probabilities differ from 1/2, 4/5 and 1/5, or views of an image are tied."""
  image = images(size=8)[3]
  only_flip = draw_views(recipe(**WHOLE, color_strength=0.0), image)  # [n, 2, 8, 8, 3]
  flipped = np.abs(only_flip - image[:, ::-1]).max((2, 3, 4)) < 1e-5
  plain = np.abs(only_flip - image).max((2, 3, 4)) < 1e-5
  assert (flipped ^ plain).all()
  np.testing.assert_allclose(flipped.mean(0), 0.5, atol=0.03)
  assert abs(np.corrcoef(flipped.T)[0, 1]) < 0.06

  c = recipe(**WHOLE, flip=False, grayscale_probability=0.0)
  changed = np.abs(draw_views(c, image) - image).max((2, 3, 4)) > 1e-4
  np.testing.assert_allclose(changed.mean(0), 0.8, atol=0.03)

  c = recipe(**WHOLE, flip=False, color_probability=0.0)
  gray = draw_views(c, image)
  gray = np.abs(gray - gray[..., :1]).max((2, 3, 4)) < 1e-5
  np.testing.assert_allclose(gray.mean(0), 0.2, atol=0.03)


def test_blur_sigma_per_example_or_batch():
  """Breaks if sigma leaves U(0.1, 2), or 'batch' does not share it within a view."""
  image = np.zeros((32, 32, 3), np.float32)
  image[16, 16] = 1.0
  off = {**WHOLE, 'flip': False, 'color_strength': 0.0, 'blur_probability': 1.0}
  centre = draw_views(recipe(**off), image, 3000, 32)[:, :, 16, 16, 0]
  visible = centre < 0.999
  # The centre keeps 1 / (1 + 2 exp(-1 / 2 sigma^2))^2.
  side = (1 / np.sqrt(np.where(visible, centre, 0.25)) - 1) / 2
  sigma = np.sqrt(-1 / (2 * np.log(side)))
  np.testing.assert_allclose([sigma[visible].max()], [2.0], atol=0.01)
  np.testing.assert_allclose(np.median(np.where(visible, sigma, 0.1)), 1.05, atol=0.05)
  shared = draw_views(recipe(**off, blur_sigma='batch'), image, 50, 32)[:, :, 16, 16, 0]
  np.testing.assert_allclose(shared, np.broadcast_to(shared[:1], shared.shape), atol=1e-6)
  assert shared[0, 0] != shared[0, 1]
  some = draw_views(recipe(**{**off, 'blur_probability': 0.5}), image, 3000, 32)[:, :, 16, 16, 0]
  expected = 0.5 * visible.mean()
  np.testing.assert_allclose((some < 0.999).mean(), expected, atol=0.03)


def test_views_depend_on_seed_epoch_and_position_alone():
  """Breaks if a view depends on the batch it is in, or repeats over epochs, positions or seeds."""
  c = recipe(blur_probability=0.5)
  x = jnp.asarray(images(16, 16))
  draw = jax.jit(lambda x, e, p: augment.views(x, e, p, c, 0, 16))
  epoch, position = jnp.zeros(16, jnp.int32), jnp.arange(100, 116, dtype=jnp.int32)
  all_at_once = np.asarray(draw(x, epoch, position))
  order = np.random.default_rng(0).permutation(16)
  np.testing.assert_array_equal(draw(x[order], epoch, position[order]), all_at_once[order])
  assert np.abs(np.asarray(draw(x, epoch + 1, position)) - all_at_once).max((1, 2, 3, 4)).min() > 0
  assert np.abs(np.asarray(draw(x, epoch, position + 1)) - all_at_once).max((1, 2, 3, 4)).min() > 0
  other = jax.jit(lambda x, e, p: augment.views(x, e, p, c, 1, 16))(x, epoch, position)
  assert np.abs(np.asarray(other) - all_at_once).max((1, 2, 3, 4)).min() > 0
  assert np.abs(all_at_once[:, 0] - all_at_once[:, 1]).max((1, 2, 3)).min() > 0
  assert all_at_once.min() >= 0 and all_at_once.max() <= 1


def test_center_view():
  """Breaks if the evaluation crops another part than SimCLR's central 87.5 %."""
  x = np.random.default_rng(0).random((40, 64, 3)).astype(np.float32)
  cut = x[3:38, 15:50]  # round(0.875 * 40) = 35; offsets (5 + 1) // 2 and (29 + 1) // 2
  expected = np.clip(tf.image.resize(cut, (20, 20), method='bicubic'), 0, 1)
  np.testing.assert_allclose(augment.center_view(jnp.asarray(x), 20), expected, atol=1e-3)
  square = (255 * images()[0]).astype(np.uint8)
  np.testing.assert_allclose(
    augment.center_view(jnp.asarray(square), 16), square / 255.0, atol=1e-6
  )
