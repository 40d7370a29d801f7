"""Encoded images -> canvases from which the device cuts the views: the host's part of the augmentation.

An image is decoded once for all of its views, and only the window that the views need. The window is put onto a
canvas; the device cuts the views out of the canvas and resizes them. If a window is larger than the canvas, each
view is cut and resized here. Everything is a tf.data graph of TensorFlow's C++ kernels; Python processes one
block of headers at a time.
"""

import contextlib

import jax
import ml_collections
import numpy as np

from simclr_jax.data import augment, crop, headers, stream
from simclr_jax.data.dataset import Arrays
from simclr_jax.data.stream import Stream, tf
from simclr_jax.errors import ConfigError

BLOCK = 64  # images planned at a time
OTHER, BAD = 4, 5  # branches of `_decode`; 0-3: JPEG at 1/1, 1/2, 1/4, 1/8


def canvases(
  encoded: tf.data.Dataset,
  pipelines: tuple[str, ...],
  size: int,
  seed: int,
  config: ml_collections.ConfigDict,
) -> tf.data.Dataset:
  """Encoded images -> canvases, in the same order.

  Args:
    encoded: elements with `bytes`, the encoded image, and int32 `epoch` and `position`. Other components are
      kept.
    pipelines: of each view; `augment.places` computes their crops.
    size: of the views.
    seed: of the run.
    config: the `data` part of the recipe.

  Returns:
    Elements with `images`, uint8 `[h, w, 3]` of shape `crop.canvas_shape`, and `crops`, float32
    `[views, 2, 4]`, instead of `bytes`.
  """
  parallel = stream.threads(config)
  shape = crop.canvas_shape(size, len(pipelines), config.resize_on)
  kernels = [augment.parse(p)[0].kernel for p in pipelines]

  def plan(head, jpeg_shape, epoch, position):
    return _plan(
      head, jpeg_shape, epoch, position, pipelines=pipelines, size=size, seed=seed,
      scaled=config.scaled_decoding, max_pixels=config.max_pixels,
    )  # fmt: skip

  def add_plan(e):
    outputs = {
      'branch': (tf.int32, []),
      'orientation': (tf.int32, []),
      'window': (tf.int32, [4]),
      'crops': (tf.float32, [len(pipelines), 2, 4]),
    }
    inputs = [e.pop('head'), e.pop('shape'), e['epoch'], e['position']]
    return {**e, **_call_numpy(plan, inputs, outputs)}

  def add_canvas(e):
    window = _decode(e.pop('bytes'), e.pop('branch'), e.pop('window'))
    window = _turn(window, e.pop('orientation'))
    canvas, crops = _canvas(window, e.pop('crops'), shape, size, kernels, config.resize_on)
    return {**e, 'images': canvas, 'crops': crops}

  blocks = encoded.map(_with_header, parallel).batch(BLOCK)
  return blocks.map(add_plan).unbatch().map(add_canvas, parallel)


def _call_numpy(function, inputs, outputs):
  """Calls a numpy function for a block; `outputs`: name -> dtype and shape for one image."""
  tensors = tf.numpy_function(function, inputs, [dtype for dtype, _ in outputs.values()])
  for tensor, (_, shape) in zip(tensors, outputs.values()):
    tensor.set_shape([None, *shape])
  return dict(zip(outputs, tensors))


def _with_header(e):
  head = tf.io.decode_raw(
    tf.strings.substr(e['bytes'], 0, headers.HEAD), tf.uint8, fixed_length=headers.HEAD
  )
  is_jpeg = tf.reduce_all(head[:3] == [0xFF, 0xD8, 0xFF])
  shape = tf.cond(
    is_jpeg, lambda: tf.io.extract_jpeg_shape(e['bytes'])[:2], lambda: tf.zeros(2, tf.int32)
  )
  return {**e, 'head': head, 'shape': tf.ensure_shape(shape, [2])}


# Planning: which part of which file is decoded.


def _plan(head, jpeg_shape, epoch, position, *, pipelines, size, seed, scaled, max_pixels):
  """For a block of images: the branch of `_decode`, orientation, window, and crops relative to the window."""
  n = len(head)
  kind, shape, orientation = headers.read(head, jpeg_shape)
  ok = np.array([not p for p in headers.problems(kind, shape, max_pixels)])
  shown = headers.shown(np.where(ok[:, None], shape, 1), orientation)

  def pad_block(x):  # one shape, one compilation
    return np.concatenate([x, np.ones((BLOCK - n, *x.shape[1:]), x.dtype)]).astype(np.int32)

  with jax.default_device(_cpu()):
    places = augment.places(
      *pad_block(shown).T, pad_block(epoch), pad_block(position),
      pipelines=pipelines, seed=seed, size=size,
    )  # fmt: skip
  crops = np.asarray(places)[:n]  # [n, v, 2, 4]

  ratio = np.ones(n)
  if scaled:  # DCT scaling, never below the size of the view
    smallest = crops[:, :, 0, 2:].min((1, 2)) / size
    ratio = 2.0 ** np.floor(np.log2(np.clip(smallest, 1, 8)))
    ratio = np.where(kind == headers.JPEG, ratio, 1.0)
  crops = crops / ratio[:, None, None, None].astype(np.float32)
  limit = np.ceil(shown / ratio[:, None])
  low = np.floor(crops[:, :, 1, :2].min(1))
  low = np.clip(low, 0, limit - 1)
  high = np.clip(np.ceil((crops[:, :, 1, :2] + crops[:, :, 1, 2:]).max(1)), low + 1, limit)
  crops[..., :2] -= low[:, None, None]
  window = _stored(low, high, limit, orientation)
  branch = np.where(kind == headers.JPEG, np.log2(ratio), OTHER)
  branch = np.where(ok, branch, BAD)
  return branch.astype(np.int32), orientation, window.astype(np.int32), crops.astype(np.float32)


def _stored(low, high, limit, orientation):
  """A window of the displayed image -> (top, left, height, width) in the stored image."""
  mirrored = np.stack(_mirrored(orientation), 1)
  start = np.where(mirrored, limit - high, low)
  window = np.stack([start, high - low], 1)  # [n, 2 (start, length), 2 (y, x)]
  transposed = (orientation >= 5)[:, None, None]
  return np.where(transposed, window[..., ::-1], window).reshape(len(low), 4)


def _mirrored(orientation):
  """Whether an EXIF orientation mirrors rows and columns; orientations from 5 on also transpose, first."""
  rows = (orientation == 3) | (orientation == 4) | (orientation == 7) | (orientation == 8)
  columns = (orientation == 2) | (orientation == 3) | (orientation == 6) | (orientation == 7)
  return rows, columns


def _cpu():
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names only an accelerator
    return jax.local_devices()[0]


# Decoding and drawing.


def _decode(contents, branch, window):
  """The window of an image as stored: uint8 `[h, w, 3]`."""

  def jpeg(ratio):
    def decode():
      # tf.io.decode_and_crop_jpeg has no ratio.
      return tf.raw_ops.DecodeAndCropJpeg(
        contents=contents, crop_window=window, channels=3, ratio=ratio
      )

    return decode

  def other():
    return _cut(_rgb(contents), window)

  image = tf.switch_case(branch, [*(jpeg(r) for r in (1, 2, 4, 8)), other, _bad])
  return tf.ensure_shape(image, [None, None, 3])


def _bad():
  return tf.io.decode_jpeg('', channels=3)  # fails; `stream.read` then finds the reason


def _rgb(contents):
  """The first frame of any image in RGB: gray is repeated, alpha is discarded, 16 bits are reduced to 8."""
  image = tf.io.decode_image(contents, expand_animations=False)
  image.set_shape([None, None, None])
  channels = tf.shape(image)[-1]
  return tf.cond(
    channels < 3, lambda: tf.repeat(image[..., :1], 3, axis=-1), lambda: image[..., :3]
  )


def _cut(image, window):
  """A part of an image, padded with black: the frame of a GIF may be smaller than its header says."""
  top, left, height, width = tf.unstack(window)
  image = image[top : top + height, left : left + width]
  missing = [height, width] - tf.shape(image)[:2]
  return tf.pad(image, [[0, missing[0]], [0, missing[1]], [0, 0]])


def _turn(image, orientation):
  """An image as stored -> as displayed, by its EXIF orientation."""
  rows, columns = _mirrored(orientation)

  def turn():
    y = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    y = tf.cond(rows, lambda: y[::-1], lambda: y)
    return tf.cond(columns, lambda: y[:, ::-1], lambda: y)

  return tf.cond(orientation > 1, turn, lambda: image)


def _canvas(window, crops, shape, size, kernels, resize_on):
  """The canvas of a window, uint8 `[*shape, 3]`, and its crops, float32 `[views, 2, 4]`."""

  def resized():
    return _resized_views(window, crops, shape, size, kernels)

  if resize_on == 'host':
    canvas, new_crops = resized()
  else:
    fits = tf.reduce_all(tf.shape(window)[:2] <= shape)
    canvas, new_crops = tf.cond(fits, lambda: (_padded(window, shape), crops), resized)
  canvas.set_shape([*shape, 3])
  return canvas, new_crops


def _padded(window, shape):
  """A canvas with the window in its upper left corner."""
  h, w = tf.shape(window)[0], tf.shape(window)[1]
  flat = tf.reshape(window, [h, 3 * w])  # padding is much faster in two dimensions
  flat = tf.pad(flat, [[0, shape[0] - h], [0, 3 * (shape[1] - w)]])
  return tf.reshape(flat, [*shape, 3])


def _resized_views(window, crops, shape, size, kernels):
  """A canvas with the resized views side by side, and their crops."""
  views = [_resize(window, crops[v], size, kernel) for v, kernel in enumerate(kernels)]
  below, right = shape[0] - size, shape[1] - len(views) * size
  boxes = [[0, v * size, size, size] for v in range(len(views))]
  return (
    tf.pad(tf.concat(views, 1), [[0, below], [0, right], [0, 0]]),
    tf.constant([[box, box] for box in boxes], tf.float32),
  )


def _resize(image, box, size, kernel):
  """The view of a crop `[2, 4]`: `crop.crop_and_resize`, rounded to uint8 `[size, size, 3]`."""
  top, left, height, width = tf.unstack(tf.cast(tf.round(box[1]), tf.int32))
  image = image[None, top : top + height, left : left + width]
  if kernel == 'bicubic':  # both rectangles of the crop are equal
    view = tf.raw_ops.ResizeBicubic(images=image, size=[size, size], half_pixel_centers=True)
  else:
    scale = size / box[0, 2:]
    start = box[0, :2] - tf.cast([top, left], tf.float32)
    view = tf.raw_ops.ScaleAndTranslate(
      images=image, size=[size, size], scale=scale, translation=-start * scale,
      kernel_type='triangle', antialias=True,
    )  # fmt: skip
  # This op rounds and clips.
  view = tf.raw_ops.QuantizeV2(input=view[0], min_range=0.0, max_range=255.0, T=tf.quint8).output
  return tf.bitcast(view, tf.uint8)


# Whole images.


def sized(
  encoded: tf.data.Dataset, config: ml_collections.ConfigDict, skip: bool = False
) -> tf.data.Dataset:
  """Adds to encoded images what their headers say: `kind`, `shape` as displayed, `orientation`, `branch`.

  Args:
    encoded: elements with `bytes`.
    config: the `data` part of the recipe.
    skip: whether images that cannot be read are skipped; otherwise reading them fails.
  """

  def read_headers(head, jpeg_shape):
    kind, shape, orientation = headers.read(head, jpeg_shape)
    bad = [bool(p) for p in headers.problems(kind, shape, config.max_pixels)]
    branch = np.where(bad, BAD, OTHER).astype(np.int32)
    return branch, kind, headers.shown(shape, orientation).astype(np.int32), orientation

  def add_headers(e):
    outputs = {
      'branch': (tf.int32, []),
      'kind': (tf.int32, []),
      'shape': (tf.int32, [2]),
      'orientation': (tf.int32, []),
    }
    return {**e, **_call_numpy(read_headers, [e.pop('head'), e.pop('shape')], outputs)}

  if skip:
    encoded = encoded.ignore_errors()
  headed = encoded.map(_with_header, stream.threads(config))
  if skip:
    headed = headed.ignore_errors()
  return headed.batch(BLOCK).map(add_headers).unbatch()


def whole(e: dict[str, tf.Tensor]) -> tf.Tensor:
  """The whole image of an element of `sized`, as displayed: uint8 `[h, w, 3]`; fails for a corrupt image."""
  decoded = tf.switch_case(e['branch'] - OTHER, [lambda: _rgb(e['bytes']), _bad])
  return _cut(_turn(decoded, e['orientation']), tf.concat([[0, 0], e['shape']], 0))


def read_all(source: Stream, height: int, width: int) -> Arrays | None:
  """Decodes a stream of images of one size into memory; returns None if an image has another size.

  Raises:
    ConfigError: an image cannot be decoded.
  """

  def decoded(e):
    # A corrupt image must fail here instead of becoming a black image.
    fits = tf.reduce_all(e['shape'] == [height, width]) | (e['branch'] == BAD)
    image = tf.cond(fits, lambda: whole(e), lambda: tf.zeros([height, width, 3], tf.uint8))
    return tf.ensure_shape(image, [height, width, 3]), e['label'], fits

  count = len(source)
  images, labels = np.empty((count, height, width, 3), np.uint8), np.empty(count, np.int32)
  done = 0
  blocks = sized(source.iterate_once(), source.settings).map(
    decoded, stream.threads(source.settings)
  )
  for block, label, fits in stream.read(blocks.batch(1024).prefetch(1), source):
    if not fits.all():
      return None
    images[done : done + len(block)], labels[done : done + len(block)] = block, label
    done += len(block)
  if done != count:
    raise ConfigError(f'{done:,} images were read instead of {count:,}')
  return Arrays(images, labels, class_names=source.class_names)


# Error messages.


def header(contents: bytes) -> tuple[int, np.ndarray]:
  """Kind, an index into `headers.KINDS`, and displayed height and width of an encoded image."""
  head = np.zeros((1, headers.HEAD), np.uint8)
  start = np.frombuffer(contents[: headers.HEAD], np.uint8)
  head[0, : len(start)] = start
  shape = np.zeros((1, 2), np.int32)
  if contents[:3] == b'\xff\xd8\xff':
    with contextlib.suppress(tf.errors.InvalidArgumentError):
      shape[0] = tf.io.extract_jpeg_shape(contents).numpy()[:2]
  kind, shape, orientation = headers.read(head, shape)
  return int(kind[0]), headers.shown(shape, orientation)[0]


def problem(contents: bytes, max_pixels: int) -> str:
  """Why an encoded image cannot be decoded, a phrase that follows its name; empty if it can be."""
  if not contents:
    return 'is empty'
  kind, shape = header(contents)
  reason = headers.problems(np.array([kind]), shape[None], max_pixels)[0]
  if reason:
    is_page = kind == headers.UNKNOWN and contents.lstrip()[:1] == b'<'
    return reason + (', but a page of HTML or XML' if is_page else '')
  try:
    _rgb(contents)
  except tf.errors.OpError as error:
    reason = error.message.split('}} ')[-1].split(' [Op:')[0].strip().splitlines()[-1]
    return f'is a broken {headers.KINDS[kind]}: {reason}'
  return ''
