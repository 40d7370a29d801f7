"""Arithmetic on pixels against tf.image, Pillow or numpy; crops against TensorFlow and torchvision."""

import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from simclr_jax.data import augment, crop, ops, pixels

tf = pytest.importorskip('tensorflow', reason='tf.image is the oracle')


@functools.cache
def images(n=4, size=16):
  """Random images with corner cases: black, white, gray, pure colours."""
  x = np.random.default_rng(0).random((n, size, size, 3)).astype(np.float32)
  x[0, :4] = 0.0
  x[0, 4:8] = 1.0
  x[1, :8] = x[1, :8, :, :1]
  x[2, :4] = [1.0, 0.0, 0.0]
  x[2, 4:8] = [0.0, 1.0, 1.0]
  return x


def pillow(height, width, seed=0):
  """A random Pillow image, and the same as a float array."""
  u = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(u), jnp.asarray(u / 255, jnp.float32)


def levels(ours, theirs):
  """Differences in 8-bit levels: `ours`, in [0, 1], minus Pillow's."""
  return 255 * np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)


@pytest.mark.parametrize('factor', [0.0, 0.3, 1.0, 1.7])
def test_colour_ops_equal_tf_image(factor):
  """Breaks if an op differs from tf.image (HSV saturation, per-channel contrast)."""
  for x in images():
    pairs = [
      (pixels.contrast(x, factor), tf.image.adjust_contrast(x, factor)),
      (pixels.hue_and_saturation(x, 0.0, factor), tf.image.adjust_saturation(x, factor)),
      (pixels.brightness_add(x, factor - 1), tf.image.adjust_brightness(x, factor - 1)),
      (pixels.brightness_multiply(x, factor), x * np.float32(factor)),
    ]
    for ours, theirs in pairs:
      np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize('delta', [-0.2, -0.05, 0.0, 0.1, 0.2])
def test_hue_equals_tf_image(delta):
  """Breaks if the hue is shifted in the wrong direction or unit."""
  for x in images():
    ours = pixels.hue_and_saturation(x, delta, 1.0)
    np.testing.assert_allclose(ours, tf.image.adjust_hue(x, delta), atol=3e-6)


@pytest.mark.parametrize('turns', [-0.4, -0.1, 0.0, 0.05, 0.37, 0.5])
def test_hue_equals_pillow(turns):
  """Breaks if the hue is not shifted in Pillow's 8-bit HSV, which loses a step when it wraps around."""
  picture, x = pillow(96, 96)
  h, s, v = picture.convert('HSV').split()
  turned = (np.asarray(h).astype(int) + int(255 * turns)) % 256
  theirs = Image.merge('HSV', (Image.fromarray(turned.astype(np.uint8)), s, v)).convert('RGB')
  off = np.abs(levels(pixels.pillow_hue(x, jnp.float32(turns)), theirs))
  # One in 400 hues is at the edge of a step, where rounding errors decide: 6 levels.
  assert (off > 1.01).mean() < 3e-3
  assert off.max() < 6.5


def test_grayscale():
  """Breaks if the luma weights change (tf.image has 0.2989, 0.587, 0.114)."""
  for x in images():
    expected = np.repeat(tf.image.rgb_to_grayscale(x), 3, axis=-1)
    np.testing.assert_allclose(pixels.grayscale(x), expected, atol=1e-6)
  picture, x = pillow(20, 30)
  off = levels(pixels.grayscale(x), np.asarray(picture.convert('L'))[..., None])
  assert np.abs(off).max() < 0.6  # half of it is Pillow's rounding


def test_solarize_and_equalize_equal_pillow():
  """Breaks if an op differs from ImageOps at any of the 256 values, or on images of few values."""
  pictures = [pillow(33, 47, seed) for seed in range(3)]
  narrow = (np.asarray(pictures[0][0]) // 8 + 90).astype(np.uint8)
  flat = np.full((33, 47, 3), 77, np.uint8)
  flat[:2, :, 0] = 200  # channels of two values and of one
  for u in (narrow, flat):
    pictures.append((Image.fromarray(u), jnp.asarray(u / 255, jnp.float32)))
  for picture, x in pictures:
    assert np.abs(levels(pixels.solarize(x, 0.5), ImageOps.solarize(picture, 128))).max() < 1e-3
    assert np.abs(levels(pixels.equalize(x), ImageOps.equalize(picture))).max() < 1e-3


def test_sobel_equals_tf_image():
  """Breaks if the kernels, their scale or the mirrored border change."""
  for x in images():
    edges = np.asarray(tf.image.sobel_edges(tf.constant(x[None])))[0]
    expected = np.minimum(np.sqrt((edges**2).sum(-1)) / 4, 1)
    np.testing.assert_allclose(pixels.sobel(jnp.asarray(x)), expected, atol=1e-5)


def test_cutout_equals_slicing():
  """Breaks if the square has another side, position or value, or wraps around the border."""
  x = images()[3]
  for row, column, side in [(5, 9, 4), (0, 15, 6), (7, 7, 5), (3, 3, 0), (8, 8, 40)]:
    top, left = row - side // 2, column - side // 2
    expected = x.copy()
    expected[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    np.testing.assert_array_equal(pixels.cutout(x, row, column, side), expected)


@pytest.mark.parametrize('box', [(0, 0, 16, 16), (3, 5, 7, 9), (0, 0, 4, 4), (10, 2, 6, 12)])
@pytest.mark.parametrize('size', [8, 16, 32])
def test_crop_and_resize_equals_tf_image_and_pillow(box, size):
  """Breaks if pixels outside the crop are used, pixel centres are wrong, or antialiasing changes."""
  top, left, height, width = box
  for x in images():
    ours = crop.crop_and_resize(jnp.asarray(x), jnp.array(box), size)
    cut = x[top : top + height, left : left + width]
    theirs = tf.image.resize(cut, (size, size), method='bicubic')
    # TensorFlow reads its kernel from a table of 1,024 steps.
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
  picture, x = pillow(16, 16)
  ours = crop.crop_and_resize(x, jnp.array(box), size, 'triangle')
  theirs = picture.crop((left, top, left + width, top + height)).resize((size, size), 2)
  assert np.abs(levels(ours, theirs)).max() < 1.01  # Pillow rounds rows, then columns


def test_evaluation_crops():
  """Breaks if the crop of an evaluation is not the central 7/8 of its reference."""
  x = np.random.default_rng(0).random((40, 64, 3)).astype(np.float32)
  cut = x[3:38, 15:50]  # round(0.875 * 40) = 35; offsets (5 + 1) // 2 and (29 + 1) // 2
  expected = np.clip(tf.image.resize(cut, (20, 20), method='bicubic'), 0, 1)
  ours = augment.eval_view(jnp.asarray(x), 'simclr_eval', 20)
  np.testing.assert_allclose(ours, expected, atol=1e-3)

  for (h, w), size in [((375, 500), 224), ((61, 40), 56)]:
    picture, x = pillow(h, w)
    resized = size * 8 // 7  # 256 for 224
    longer = resized * max(h, w) // min(h, w)
    picture = picture.resize((longer, resized) if w > h else (resized, longer), 2)
    left, top = (round((side - size) / 2) for side in picture.size)
    theirs = picture.crop((left, top, left + size, top + size))
    assert np.abs(levels(augment.eval_view(x, 'moco_eval', size), theirs)).max() < 1.01

  for pipeline in (
    'simclr_eval',
    'moco_eval',
    'resize',
  ):  # images of the right size are not cropped
    square = (255 * images()[0]).astype(np.uint8)
    whole = augment.eval_view(jnp.asarray(square), pipeline, 16)
    np.testing.assert_allclose(whole, square / 255.0, atol=1e-6)
  picture, x = pillow(30, 50)
  theirs = ImageOps.solarize(picture.resize((20, 20), 2))
  off = np.abs(levels(augment.eval_view(x, 'resize | solarize', 20), theirs))
  assert np.quantile(off, 0.99) < 1.01  # except for values that rounding moves across the threshold


@pytest.mark.parametrize('sigma', [0.1, 0.7, 2.0])
@pytest.mark.parametrize('radius, pad', [(1, 'constant'), (4, 'constant'), (8, 'edge')])
def test_blur_equals_numpy(sigma, radius, pad):
  """Breaks if the kernel's width, its normalisation or the padding changes."""
  t = np.arange(-radius, radius + 1)
  k = np.exp(-(t**2) / (2 * sigma**2))
  k /= k.sum()
  for x in images():
    padded = np.pad(x.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), pad)
    rows = sum(k[i] * padded[i : i + 16] for i in range(len(k)))
    expected = sum(k[i] * rows[:, i : i + 16] for i in range(len(k)))
    ours = pixels.gaussian_blur(jnp.asarray(x), jnp.float32(sigma), radius, pad)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize('sigma', [0.1, 0.5, 1.0, 2.0])
def test_torch_blur_is_near_pillows(sigma):
  """Breaks if MoCo's blur has another radius or border than Pillow's approximation by box filters."""
  coarse, _ = pillow(6, 6)
  picture = coarse.resize((96, 96), 3)  # as smooth as photographs
  x = jnp.asarray(np.asarray(picture) / 255, jnp.float32)
  blur = jax.jit(lambda x: ops.OPS['torch_blur'].function(jax.random.key(0), x, 96, sigma, sigma))
  off = np.abs(levels(blur(x), picture.filter(ImageFilter.GaussianBlur(sigma))))
  assert off.max() < 3
  assert off.mean() < 0.7
  untouched = np.abs(levels(x, picture.filter(ImageFilter.GaussianBlur(sigma))))
  assert sigma < 1 or untouched.max() > 3  # smaller sigmas hardly change this smooth image


def distribution_distance(a, b):
  """The Kolmogorov-Smirnov statistic of two samples."""
  values = np.union1d(a, b)
  at = (np.searchsorted(np.sort(x), values, 'right') / len(x) for x in (a, b))
  return np.abs(np.subtract(*at)).max()


@pytest.mark.parametrize('shape', [(375, 500), (32, 32)])
def test_crop_equals_tensorflows_sampler(shape):
  """Breaks if areas, heights, widths or corners have other distributions than in TensorFlow's op."""
  n = 8_000
  keys = jax.random.split(jax.random.key(1), n)
  ours = np.asarray(jax.jit(jax.vmap(lambda k: crop.tensorflow_box(k, *shape)))(keys))

  def draw(seed):
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
      (*shape, 3), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed=tf.stack([seed, 7]),
      min_object_covered=0.1, aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0),
      max_attempts=100,
    )  # fmt: skip
    return tf.concat([begin[:2], size[:2]], 0)

  theirs = np.stack(list(tf.data.Dataset.range(n).map(draw).as_numpy_iterator()))
  for column, name in enumerate(('top', 'left', 'height', 'width')):
    # 0.031 is the 99.9 % quantile for this n.
    assert distribution_distance(ours[:, column], theirs[:, column]) < 0.031, name
  area = ours[:, 2] * ours[:, 3] / np.prod(shape)
  assert area.min() >= 0.1  # min_object_covered, not the 0.08 of the area range
  if shape == (32, 32):  # quantiles published for SimCLR's code; the area has steps of 0.02
    quantiles = np.quantile(area, [0.01, 0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(quantiles, [0.106, 0.141, 0.220, 0.404, 0.610, 0.781], atol=0.02)
  # Only boxes that fill a side touch the far edge.
  top, left, h, w = ours.T
  assert ((top + h < shape[0]) | (h == shape[0])).all()
  assert ((left + w < shape[1]) | (w == shape[1])).all()


def share_of_whole_images(n, height, width, attempts, rng):
  """How often `attempts` random boxes all violate a bound of SimCLR's crop, by rejection in numpy."""
  ratio = rng.uniform(3 / 4, 4 / 3, (n, attempts))  # width / height
  low, high = (np.sqrt(share * height * width / ratio) for share in (0.08, 1.0))
  highest = np.minimum(np.minimum(np.round(high), height), np.floor((width + 0.5) / ratio))
  lowest = np.minimum(np.round(low), highest)
  h = lowest + np.floor(rng.uniform(size=ratio.shape) * (highest - lowest + 1))
  w = np.round(h * ratio)
  valid = (h * w >= 0.1 * height * width) & (h <= height) & (w <= width)
  return 1 - valid.any(1).mean()


@pytest.mark.parametrize('shape', [(500, 50), (50, 500), (640, 50), (50, 640)])
def test_crop_of_long_images(shape):
  """Breaks if a crop of a panorama is the whole image more often than after TensorFlow's 100 attempts, or if more
  attempts change the boxes of the first ones.
  """
  n = 4000
  keys = jax.random.split(jax.random.key(2), n)
  draw = functools.partial(crop.tensorflow_box, height=shape[0], width=shape[1])
  boxes, ten = (
    np.asarray(jax.jit(jax.vmap(functools.partial(draw, attempts=a)))(keys)) for a in (100, 10)
  )
  default = np.asarray(jax.jit(jax.vmap(draw))(keys))
  np.testing.assert_array_equal(default, boxes)
  share, share_of_ten = ((b[:, 2:] == shape).all(1).mean() for b in (boxes, ten))
  expected = share_of_whole_images(n, *shape, 100, np.random.default_rng(0))
  assert abs(share - expected) < 4 * (0.5 / n) ** 0.5
  assert share < share_of_ten - 0.05
  found = ~(ten[:, 2:] == shape).all(1)
  np.testing.assert_array_equal(boxes[found], ten[found])


def torchvision_boxes(n, height, width, low, rng):
  """A scalar implementation of RandomResizedCrop.get_params."""
  for _ in range(n):
    for _ in range(10):
      area = height * width * rng.uniform(low, 1)
      ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
      w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
      if 0 < w <= width and 0 < h <= height:
        yield rng.integers(height - h + 1), rng.integers(width - w + 1), h, w
        break
    else:
      h, w = min(height, round(width / 0.75)), min(width, round(height * 4 / 3))
      yield (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize('shape, low', [((375, 500), 0.2), ((32, 32), 0.08), ((20, 64), 0.6)])
def test_crop_equals_torchvisions_sampler(shape, low):
  """Breaks if area, aspect, corner or the central fallback have other distributions than in torchvision."""
  n = 20_000
  keys = jax.random.split(jax.random.key(1), n)
  draw = jax.jit(jax.vmap(lambda k: crop.torchvision_box(k, *shape, (low, 1.0))))
  ours = np.asarray(draw(keys))
  theirs = np.array(list(torchvision_boxes(n, *shape, low, np.random.default_rng(0))))
  for column, name in enumerate(('top', 'left', 'height', 'width')):
    assert distribution_distance(ours[:, column], theirs[:, column]) < 0.02, name
  assert distribution_distance(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]) < 0.02
  assert (ours[:, 0] + ours[:, 2]).max() == shape[0]  # the far edge is reached
  if shape == (20, 64):  # most attempts do not fit
    fallback = np.mean((theirs == [0, 18, 20, 27]).all(1))
    assert fallback > 0.9 and abs(np.mean((ours == [0, 18, 20, 27]).all(1)) - fallback) < 0.02


TORCHVISION = """
import sys
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

f, bilinear = transforms.functional, transforms.InterpolationMode.BILINEAR
torch.manual_seed(0)
image, aspect = torch.zeros(3, 375, 500), (3 / 4, 4 / 3)
sampler = transforms.RandomResizedCrop.get_params
picture = Image.fromarray(np.load(sys.argv[1]))
np.savez(
  sys.argv[2],
  boxes=[sampler(image, (0.2, 1), aspect) for _ in range(5000)],
  crop=f.resized_crop(picture, 10, 20, 70, 55, [32, 32], bilinear),
  center=f.center_crop(f.resize(picture, 64, bilinear), [56, 56]),
  hue=f.adjust_hue(picture, 0.3),
)
"""


def test_torchvision_itself(tmp_path):
  """Breaks if the reference implementations in this file differ from torchvision."""
  if not importlib.util.find_spec('torchvision'):
    pytest.skip('torchvision is not installed: pip install torch torchvision')
  picture, x = pillow(100, 150)
  np.save(tmp_path / 'in.npy', picture)
  # In its own process: importing torch beside TensorFlow may crash.
  command = [sys.executable, '-c', TORCHVISION, tmp_path / 'in.npy', tmp_path / 'out.npz']
  subprocess.run(command, check=True)
  theirs = np.load(tmp_path / 'out.npz')

  keys = jax.random.split(jax.random.key(2), 5000)
  boxes = jax.jit(jax.vmap(lambda k: crop.torchvision_box(k, 375, 500, (0.2, 1.0))))(keys)
  for ours, drawn in zip(np.asarray(boxes).T, theirs['boxes'].T):
    assert distribution_distance(ours, drawn) < 0.039  # 99.9 % quantile for this n
  ours = crop.crop_and_resize(x, jnp.array([10, 20, 70, 55]), 32, 'triangle')
  assert np.abs(levels(ours, theirs['crop'])).max() < 1.01
  assert np.abs(levels(augment.eval_view(x, 'moco_eval', 56), theirs['center'])).max() < 1.01
  off = np.abs(levels(pixels.pillow_hue(x, jnp.float32(0.3)), theirs['hue']))
  assert (off > 1.01).mean() < 3e-3
