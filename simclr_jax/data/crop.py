"""Random and central crops, and resizing.

There are two definitions: of TensorFlow, which SimCLR's code uses, and of torchvision, which MoCo's code uses.

A crop is float32 `[2, 4]`, two rectangles (top, left, height, width) in pixels: the region that the view shows,
and the region of the pixels that may be read for it. They differ only if an image is resized before it is cropped.
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
  attempts: int = 100,
) -> jax.Array:
  """Draws the box of a random crop like `tf.image.sample_distorted_bounding_box`.

  The aspect ratio is uniform, the height is a uniform integer among those that the area range allows, and the
  corner is uniform, but the box never touches the bottom or right edge unless it fills that side. Since the
  object is the whole image, `min_object_covered` is a second lower bound on the area: SimCLR's 0.1 is above its
  0.08, so the smallest crop is 10 % of the image. If all attempts violate a bound, the box is the image. Attempt i
  draws the same numbers for any number of attempts.

  Args:
    key: the randomness.
    height, width: of the image, in pixels; may be traced.
    area: range of the box's area over the image's area.
    aspect: range of the box's width over its height.
    min_object_covered: minimum fraction of the image that the box covers.
    attempts: number of boxes that are drawn; the first valid box is used.

  Returns:
    int32 `[4]`: top, left, height, width.
  """
  height, width = jnp.float32(height), jnp.float32(width)
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
  # Rounding may leave the area just outside its range: one pixel corrects this.
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

  The area is uniform, the aspect ratio log-uniform, and the corner uniform over all positions. If no attempt
  fits into the image, the box is the largest central box within `aspect`.

  Args and returns as in `tensorflow_box`.
  """
  height, width = jnp.float32(height), jnp.float32(width)
  area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
  target = jax.random.uniform(area_key, (attempts,), minval=area[0], maxval=area[1])
  target = target * (height * width)
  low, high = np.log(aspect)
  ratio = jnp.exp(jax.random.uniform(ratio_key, (attempts,), minval=low, maxval=high))
  h, w = jnp.round(jnp.sqrt(target / ratio)), jnp.round(jnp.sqrt(target * ratio))
  ok = (h > 0) & (h <= height) & (w > 0) & (w <= width)
  first, any_ok = jnp.argmax(ok), ok.any()
  h = jnp.where(any_ok, h[first], jnp.minimum(height, jnp.round(width / aspect[0])))
  w = jnp.where(any_ok, w[first], jnp.minimum(width, jnp.round(height * aspect[1])))
  top = jnp.floor(jax.random.uniform(top_key) * (height - h + 1))
  left = jnp.floor(jax.random.uniform(left_key) * (width - w + 1))
  top = jnp.where(any_ok, top, (height - h) // 2)
  left = jnp.where(any_ok, left, (width - w) // 2)
  return jnp.stack([top, left, h, w]).astype(jnp.int32)


def tensorflow_center(height: int, width: int, fraction: float) -> jax.Array:
  """The box of the central square whose side is `fraction` of the shorter side; as `tensorflow_box`."""
  side = jnp.maximum(jnp.round(fraction * jnp.minimum(height, width)), 1).astype(jnp.int32)
  return jnp.stack([(height - side + 1) // 2, (width - side + 1) // 2, side, side])


def torchvision_center(height: int, width: int, size: int, fraction: float) -> jax.Array:
  """The crop `[2, 4]` of torchvision's `Resize(size / fraction)` and `CenterCrop(size)`."""
  shorter = jnp.minimum(height, width)
  resized = math.floor(size / fraction + 0.5)

  def span(side):
    out = resized * side // shorter
    scale = side / out
    return jnp.round((out - size) / 2) * scale, size * scale

  (top, h), (left, w) = span(height), span(width)
  return jnp.stack([jnp.stack([top, left, h, w]), whole(height, width)])


def whole(height: int, width: int) -> jax.Array:
  """The box of the whole image: float32 `[4]`."""
  return jnp.stack([0.0, 0.0, jnp.float32(height), jnp.float32(width)])


def resize_matrix(
  start: float | jax.Array,
  length: float | jax.Array,
  size: int,
  out: int,
  kernel: str = 'bicubic',
  support: tuple[float | jax.Array, float | jax.Array] | None = None,
) -> jax.Array:
  """The linear map that crops `length` of `size` pixels at `start` and resizes them to `out` pixels.

  Pixel centres are at half-integers; weights outside the support are 0, and the other weights have sum 1.

  Args:
    start, length, size, out: in pixels; only the first two may be traced.
    kernel: 'bicubic', Keys' kernel with a = -0.5 and no antialiasing, as `tf.image.resize`; or 'triangle',
      bilinear with antialiasing, as Pillow and therefore torchvision.
    support: start and length of the pixels that may be read; by default the cropped pixels.

  Returns:
    float32 `[out, size]`.
  """
  first, count = support or (start, length)
  scale = jnp.asarray(length, jnp.float32) / out
  pixel = np.arange(size)
  centre = (np.arange(out) + 0.5) * scale - 0.5  # in pixels of the crop
  d = jnp.abs(centre[:, None] - (pixel - start)[None, :])
  if kernel == 'bicubic':
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weight = jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))
  else:
    weight = jnp.maximum(1 - d / jnp.maximum(scale, 1.0), 0.0)
  weight = jnp.where((pixel >= first) & (pixel < first + count), weight, 0.0)
  return weight / weight.sum(axis=1, keepdims=True)


def apply_matrices(rows: jax.Array, image: jax.Array, columns: jax.Array) -> jax.Array:
  """`rows` `[i, h]` and `columns` `[j, w]` times an image `[h, w, 3]`: `[i, j, 3]`."""
  return jnp.einsum('ih,hwc,jw->ijc', rows, image, columns, precision='highest')


def crop_and_resize(
  image: jax.Array, crop: jax.Array, size: int, kernel: str = 'bicubic'
) -> jax.Array:
  """Crops an image `[h, w, 3]` by a crop `[2, 4]` or box `[4]` and resizes it to `[size, size, 3]`.

  Bicubic values may be slightly outside [0, 1].
  """
  crop = jnp.broadcast_to(crop, (2, 4))
  rows, columns = (
    resize_matrix(crop[0, i], crop[0, i + 2], image.shape[i], size, kernel,
                  (crop[1, i], crop[1, i + 2]))
    for i in range(2)
  )  # fmt: skip
  return apply_matrices(rows, image, columns)


def canvas_shape(size: int, views: int, resize_on: str) -> tuple[int, int]:
  """Height and width of the canvas for views of this size.

  The canvas has 2.25 times the side of the view: for photographs of 500 pixels and views of 224 pixels, 95 % of
  the windows fit. If the host resizes, the canvas holds only the views.
  """
  if resize_on == 'host':
    return size, views * size
  side = 32 * math.ceil(2.25 * size / 32)
  return side, side
