"""Boxes of random crops, and the resizing of what they cut out.

Two libraries' definitions: TensorFlow's, of SimCLR's code, and torchvision's, of MoCo's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def tensorflow_box(
  key: jax.Array,
  height: int,
  width: int,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
  min_object_covered: float = 0.1,
  attempts: int = 10,
) -> jax.Array:
  """Draws the box of a random crop like `tf.image.sample_distorted_bounding_box`.

  The aspect ratio is uniform, the height a uniform integer among those that the area range allows,
  the corner uniform but never so that the box touches the bottom or right edge unless it fills that
  side. With the whole image as the object, `min_object_covered` is a second lower bound on the area:
  SimCLR's 0.1 is above its 0.08, so the smallest crop is 10 % of the image. An attempt that breaks a
  bound is drawn again; if all do, the box is the image. TensorFlow tries 100 times; an attempt fails
  so seldom that 10 make no difference (all fail less than once in 10^9 on a square image).

  Args:
    key: the randomness.
    height, width: of the image, in pixels.
    area: range of the box's area over the image's.
    aspect: range of the box's width over its height.
    min_object_covered: least share of the image that the box covers.
    attempts: how often to draw.

  Returns:
    int32 `[4]`: top, left, height, width.
  """
  ratio_key, height_key, top_key, left_key = jax.random.split(key, 4)
  min_area, max_area = area[0] * height * width, area[1] * height * width
  ratio = jax.random.uniform(ratio_key, (attempts,), minval=aspect[0], maxval=aspect[1])

  def to_width(h):
    return jnp.round(h * ratio)

  highest = jnp.round(jnp.sqrt(max_area / ratio))
  # The tallest box of this aspect that is not wider than the image.
  highest = jnp.where(to_width(highest) > width, jnp.floor((width + 0.5 - 1e-7) / ratio), highest)
  highest = jnp.minimum(highest, height)
  lowest = jnp.minimum(jnp.round(jnp.sqrt(min_area / ratio)), highest)
  h = lowest + jnp.floor(jax.random.uniform(height_key, (attempts,)) * (highest - lowest + 1))
  # Rounding may leave the area just outside its range: one pixel puts it back.
  h = jnp.where(h * to_width(h) < min_area, h + 1, h)
  h = jnp.where(h * to_width(h) > max_area, h - 1, h)
  w = to_width(h)
  covered = h * w
  ok = (
    (covered >= jnp.maximum(min_area, min_object_covered * height * width))
    & (covered <= max_area)
    & (h <= height) & (w <= width) & (h > 0) & (w > 0)
  )  # fmt: skip
  first = jnp.argmax(ok)
  h = jnp.where(ok.any(), h[first], height)
  w = jnp.where(ok.any(), w[first], width)
  top = jnp.floor(jax.random.uniform(top_key) * (height - h))
  left = jnp.floor(jax.random.uniform(left_key) * (width - w))
  return jnp.stack([top, left, h, w]).astype(jnp.int32)


def torchvision_box(
  key: jax.Array,
  height: int,
  width: int,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
  attempts: int = 10,
) -> jax.Array:
  """Draws the box of a random crop like torchvision's `RandomResizedCrop.get_params`.

  The area is uniform, the aspect ratio log-uniform, the corner uniform over all places. A box that
  does not fit is drawn again; after ten of them it is the largest central one within `aspect`.

  Args and returns as in `tensorflow_box`.
  """
  area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
  target = jax.random.uniform(area_key, (attempts,), minval=area[0], maxval=area[1])
  target = target * (height * width)
  low, high = np.log(aspect)
  ratio = jnp.exp(jax.random.uniform(ratio_key, (attempts,), minval=low, maxval=high))
  h, w = jnp.round(jnp.sqrt(target / ratio)), jnp.round(jnp.sqrt(target * ratio))
  ok = (h > 0) & (h <= height) & (w > 0) & (w <= width)
  first, found = jnp.argmax(ok), ok.any()
  h = jnp.where(found, h[first], min(height, round(width / aspect[0])))
  w = jnp.where(found, w[first], min(width, round(height * aspect[1])))
  top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1))
  left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1))
  top = jnp.where(found, top, (height - h) // 2)
  left = jnp.where(found, left, (width - w) // 2)
  return jnp.stack([top, left, h, w]).astype(jnp.int32)


def resize_matrix(
  start: int | jax.Array, length: int | jax.Array, size: int, out: int, kernel: str = 'bicubic'
) -> jax.Array:
  """The linear map that cuts `length` of `size` pixels at `start` and resizes them to `out`.

  Half-pixel centres, weights outside the cut left out and the others scaled to sum 1.

  Args:
    start, length, size, out: in pixels; only the first two may be traced.
    kernel: 'bicubic', Keys' with a = -0.5 and no antialiasing, as `tf.image.resize`; or 'triangle',
      bilinear with antialiasing, as Pillow and so torchvision resize.

  Returns:
    float32 `[out, size]`.
  """
  length = jnp.asarray(length, jnp.float32)
  scale = length / out
  centre = (jnp.arange(out) + 0.5) * scale - 0.5  # in pixels of the cut
  pixel = jnp.arange(size) - start
  d = jnp.abs(centre[:, None] - pixel[None, :])
  if kernel == 'bicubic':
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weight = jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))
  else:
    weight = jnp.maximum(1 - d / jnp.maximum(scale, 1.0), 0.0)
  weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0.0)
  return weight / weight.sum(axis=1, keepdims=True)


def apply_matrices(rows: jax.Array, image: jax.Array, columns: jax.Array) -> jax.Array:
  """`rows` `[i, h]` and `columns` `[j, w]` times an image `[h, w, 3]`: `[i, j, 3]`."""
  return jnp.einsum('ih,hwc,jw->ijc', rows, image, columns, precision='highest')


def crop_and_resize(
  image: jax.Array, box: jax.Array, size: int, kernel: str = 'bicubic'
) -> jax.Array:
  """`image` `[h, w, 3]` cut to `box` (top, left, height, width), as `[size, size, 3]`.

  Bicubic values may leave [0, 1] a little.
  """
  rows = resize_matrix(box[0], box[2], image.shape[0], size, kernel)
  columns = resize_matrix(box[1], box[3], image.shape[1], size, kernel)
  return apply_matrices(rows, image, columns)


def tensorflow_center(image: jax.Array, size: int, fraction: float) -> jax.Array:
  """The central square with `fraction` of the shorter side, resized bicubically to `size`."""
  h, w = image.shape[:2]
  side = max(round(fraction * min(h, w)), 1)
  box = np.array([(h - side + 1) // 2, (w - side + 1) // 2, side, side])
  return crop_and_resize(image, box, size)


def torchvision_center(image: jax.Array, size: int, fraction: float) -> jax.Array:
  """torchvision's `Resize(size / fraction)` of the shorter side and `CenterCrop(size)`.

  Only the rows and columns of the resized image that the crop keeps are computed.
  """
  shorter = min(image.shape[:2])
  resized = math.floor(size / fraction + 0.5)

  def matrix(side):
    out = resized * side // shorter
    start = round((out - size) / 2)
    return resize_matrix(0, side, side, out, 'triangle')[start : start + size]

  return apply_matrices(matrix(image.shape[0]), image, matrix(image.shape[1]))
