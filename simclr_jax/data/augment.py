"""SimCLR's augmentations, on the device, inside the training step.

Every op works on one float image `[h, w, 3]`; `views` maps them over a batch. An op that draws takes
a key as its first argument; the arithmetic is in a function of its own that takes the drawn factors.
Pixel values are in [0, 1] and are not normalised further, as in SimCLR's code.

Definitions: Chen et al. 2020 (SimCLR), appendix A, and the image ops of TensorFlow that its code uses.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)


# Random resized crop.


def sample_box(
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


def resize_matrix(start: jax.Array, length: jax.Array, size: int, out: int) -> jax.Array:
  """The linear map that cuts `length` of `size` pixels at `start` and resizes them to `out`.

  Bicubic with Keys' kernel (a = -0.5), half-pixel centres, no antialiasing, weights outside the cut
  left out and the others scaled to sum 1: `tf.image.resize(..., 'bicubic')`.

  Returns:
    float32 `[out, size]`.
  """
  length = length.astype(jnp.float32)
  centre = (jnp.arange(out) + 0.5) * (length / out) - 0.5  # in pixels of the cut
  pixel = jnp.arange(size) - start
  d = jnp.abs(centre[:, None] - pixel[None, :])
  near = (1.5 * d - 2.5) * d * d + 1
  far = ((-0.5 * d + 2.5) * d - 4) * d + 2
  weight = jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))
  weight = jnp.where((pixel >= 0) & (pixel < length), weight, 0.0)
  return weight / weight.sum(axis=1, keepdims=True)


def crop_and_resize(image: jax.Array, box: jax.Array, size: int) -> jax.Array:
  """`image` `[h, w, 3]` cut to `box` (top, left, height, width), as `[size, size, 3]`.

  Bicubic, so values may leave [0, 1] a little; SimCLR clips them after the first colour op.
  """
  rows = resize_matrix(box[0], box[2], image.shape[0], size)
  columns = resize_matrix(box[1], box[3], image.shape[1], size)
  return jnp.einsum('ih,hwc,jw->ijc', rows, image, columns, precision='highest')


# Colour.


def brightness_multiply(image: jax.Array, factor: jax.Array) -> jax.Array:
  """SimCLR v2's brightness: a factor on every value."""
  return image * factor


def brightness_add(image: jax.Array, delta: jax.Array) -> jax.Array:
  """SimCLR v1's brightness: a shift of every value."""
  return image + delta


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
  """`tf.image.adjust_contrast`: distances from each channel's mean, times `factor`."""
  mean = jnp.mean(image, axis=(-3, -2), keepdims=True)
  return (image - mean) * factor + mean


def hue_and_saturation(image: jax.Array, delta: jax.Array, factor: jax.Array) -> jax.Array:
  """`tf.image.adjust_hue` by `delta` turns and `tf.image.adjust_saturation` by `factor`, in HSV.

  Value is kept; saturation is clipped to [0, 1]. (0, 1) changes nothing.
  """
  value = jnp.max(image, axis=-1)
  chroma = value - jnp.min(image, axis=-1)
  r, g, b = (image[..., i] for i in range(3))
  safe = jnp.where(chroma > 0, chroma, 1.0)
  # In sixths of a turn.
  hue = jnp.where(
    value == r, (g - b) / safe, jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
  )
  hue = jnp.where(chroma > 0, hue, 0.0) + 6 * delta
  saturation = jnp.where(value > 0, chroma / jnp.where(value > 0, value, 1.0), 0.0)
  new_chroma = value * jnp.clip(saturation * factor, 0.0, 1.0)
  k = jnp.mod(np.array([5.0, 3.0, 1.0], np.float32) + hue[..., None], 6.0)
  return value[..., None] - new_chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)


def color_jitter(
  key: jax.Array, image: jax.Array, strength: float, additive_brightness: bool = False
) -> jax.Array:
  """Brightness, contrast, saturation and hue in random order, clipped to [0, 1] after each.

  At strength s the factors of the first three are uniform in [max(1 - 0.8 s, 0), 1 + 0.8 s] (an
  additive brightness in [-0.8 s, 0.8 s]), the hue turns by up to 0.2 s of the circle either way.
  """
  order_key, *keys = jax.random.split(key, 5)
  wide, low = 0.8 * strength, max(1 - 0.8 * strength, 0.0)
  ranges = [(low, 1 + wide), (low, 1 + wide), (low, 1 + wide), (-0.2 * strength, 0.2 * strength)]
  if additive_brightness:
    ranges[0] = (-wide, wide)
  b, c, s, h = (jax.random.uniform(k, minval=lo, maxval=hi) for k, (lo, hi) in zip(keys, ranges))
  brightness = brightness_add if additive_brightness else brightness_multiply
  for op in jax.random.permutation(order_key, 4):
    # Mapped over a batch, every op runs in every place and the drawn one is kept; saturation and hue
    # share their way through HSV.
    image = jnp.select(
      [op == 0, op == 1],
      [brightness(image, b), contrast(image, c)],
      hue_and_saturation(image, jnp.where(op == 3, h, 0.0), jnp.where(op == 2, s, 1.0)),
    )
    image = jnp.clip(image, 0.0, 1.0)
  return image


def grayscale(image: jax.Array) -> jax.Array:
  """The luma 0.2989 R + 0.5870 G + 0.1140 B in all three channels."""
  gray = jnp.sum(image * LUMA, axis=-1, keepdims=True)
  return jnp.broadcast_to(gray, image.shape)


# Blur.


def gaussian_blur(image: jax.Array, sigma: jax.Array, kernel_size: int) -> jax.Array:
  """Gaussian blur, zero-padded as in SimCLR's code, which darkens the border.

  Args:
    image: `[h, w, 3]`.
    sigma: standard deviation in pixels, above 0.
    kernel_size: the kernel covers 2 * (kernel_size // 2) + 1 pixels; SimCLR takes height // 10.
  """
  radius = kernel_size // 2
  offset = np.arange(-radius, radius + 1)
  kernel = jnp.exp(-(offset**2) / (2.0 * sigma**2))
  kernel = kernel / kernel.sum()

  def matrix(size):  # banded [size, size]: a blur is a matrix product from either side
    distance = np.arange(size)[None, :] - np.arange(size)[:, None]
    inside = np.abs(distance) <= radius
    return jnp.where(inside, kernel[np.clip(distance + radius, 0, 2 * radius)], 0.0)

  rows, columns = matrix(image.shape[0]), matrix(image.shape[1])
  return jnp.einsum('ih,hwc,jw->ijc', rows, image, columns, precision='highest')


# The recipes.


def view(key: jax.Array, image: jax.Array, config: ml_collections.ConfigDict, size: int,
         sigma: jax.Array | None = None) -> jax.Array:  # fmt: skip
  """One random view of one image.

  Crop, flip (1/2), colour jitter (4/5), grayscale (1/5), clip, blur (1/2), clip: SimCLR, algorithm
  in appendix A.

  Args:
    key: all of the view's randomness.
    image: `[h, w, 3]`, uint8 or float in [0, 1].
    config: the recipe's `augment` part.
    size: of the view.
    sigma: the blur's, if all examples share one; otherwise it is drawn here.

  Returns:
    float32 `[size, size, 3]` in [0, 1].
  """
  crop_key, flip_key, jitter_key, jitter_on, gray_on, sigma_key, blur_on = jax.random.split(key, 7)
  if image.dtype == jnp.uint8:
    image = image.astype(jnp.float32) / 255
  box = sample_box(
    crop_key,
    *image.shape[:2],
    area=(config.crop_area_min, config.crop_area_max),
    min_object_covered=config.crop_min_object_covered,
  )
  image = crop_and_resize(image, box, size)
  if config.flip:
    image = jnp.where(jax.random.bernoulli(flip_key, 0.5), image[:, ::-1], image)
  if config.color_strength > 0:
    jittered = color_jitter(
      jitter_key, image, config.color_strength, config.brightness == 'additive'
    )
    image = jnp.where(jax.random.bernoulli(jitter_on, config.color_probability), jittered, image)
    image = jnp.where(
      jax.random.bernoulli(gray_on, config.grayscale_probability), grayscale(image), image
    )
  image = jnp.clip(image, 0.0, 1.0)
  if config.blur_probability > 0:
    if sigma is None:
      sigma = jax.random.uniform(sigma_key, minval=0.1, maxval=2.0)
    blurred = gaussian_blur(image, sigma, size // 10)
    on = jax.random.bernoulli(blur_on, config.blur_probability)
    image = jnp.clip(jnp.where(on, blurred, image), 0.0, 1.0)
  return image


def views(
  images: jax.Array,
  epoch: jax.Array,
  position: jax.Array,
  config: ml_collections.ConfigDict,
  seed: int,
  size: int,
) -> jax.Array:
  """Two views of every image of a batch.

  What is drawn for an image depends on (seed, epoch, position) alone, so it is the same on any
  number of devices and after any restart.

  Args:
    images: `[n, h, w, 3]`, uint8 or float in [0, 1].
    epoch, position: int32 `[n]`: the pass over the data, and the place in its order.
    config: the recipe's `augment` part.
    seed: of the run.
    size: of the views.

  Returns:
    float32 `[n, 2, size, size, 3]` in [0, 1].
  """
  base = jax.random.key(seed)  # folded with 0 and 1 here, with 2 for the method's own draws
  # SimCLR's code draws one sigma for each view of a whole batch: here from the batch's first place.
  batch = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, 1), epoch[0]), position[0])
  sigmas = jax.random.uniform(batch, (2,), minval=0.1, maxval=2.0)
  sigmas = sigmas if config.blur_sigma == 'batch' else [None, None]

  def pair(image, epoch, position):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, 0), epoch), position)
    keys = jax.random.split(key)
    return jnp.stack([view(k, image, config, size, s) for k, s in zip(keys, sigmas)])

  return jax.vmap(pair)(images, epoch, position)


def center_view(image: jax.Array, size: int) -> jax.Array:
  """The evaluation's view of one image `[h, w, 3]`: float32 `[size, size, 3]` in [0, 1].

  An image of that size is taken whole; of any other, the central 87.5 % of the shorter side, resized
  (SimCLR's CROP_PROPORTION).
  """
  if image.dtype == jnp.uint8:
    image = image.astype(jnp.float32) / 255
  h, w = image.shape[:2]
  if (h, w) == (size, size):
    return image
  side = round(0.875 * min(h, w))
  box = np.array([(h - side + 1) // 2, (w - side + 1) // 2, side, side])
  return jnp.clip(crop_and_resize(image, jnp.asarray(box), size), 0.0, 1.0)
