"""Encoded images -> canvases from which the device cuts the views: the host's part of the augmentation.

An image is decoded once for all of its views, and only the window that the views need. The window is put onto a
canvas; the device cuts the views out of the canvas and resizes them. If a window is larger than the canvas, each
view is cut and resized here. Everything is a tf.data graph of TensorFlow's C++ kernels; Python processes one
block of headers at a time. Images that need more than TensorFlow's decoders are decoded by `special`.
"""

import contextlib
import functools
from typing import TypeVar

import jax
import ml_collections
import numpy as np

from simclr_jax.data import augment, crop, headers, special, stream, values
from simclr_jax.data.dataset import Arrays
from simclr_jax.data.stream import Stream, tf
from simclr_jax.errors import ConfigError

StreamT = TypeVar('StreamT', bound=Stream)

BLOCK = 64  # images planned at a time
OTHER, SPECIAL, BAD = 4, 5, 6  # branches of `_decode`; 0-3: JPEG at 1/1, 1/2, 1/4, 1/8
SCAN = b'\xff\xda'  # starts a scan of a JPEG
MAX_SCANS = 100  # of a JPEG; usual are 1 to 12, and every one costs as much time as a whole image


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
    Elements with `images`, uint8 `[h, w, data.channels]` of shape `crop.canvas_shape`, and `crops`, float32
    `[views, 2, 4]`, instead of `bytes`.
  """
  parallel = stream.threads(config)
  shape = crop.canvas_shape(size, len(pipelines), config.resize_on)
  kernels = [augment.parse(p)[0].kernel for p in pipelines]

  def plan(head, jpeg_shape, rest, epoch, position):
    return _plan(
      head, jpeg_shape, rest, epoch, position, pipelines=pipelines, size=size, seed=np.uint32(seed),
      config=config,
    )  # fmt: skip

  def add_plan(e):
    outputs = {
      'branch': (tf.int32, []),
      'kind': (tf.int32, []),
      'orientation': (tf.int32, []),
      'size': (tf.int32, [2]),
      'window': (tf.int32, [4]),
      'crops': (tf.float32, [len(pipelines), 2, 4]),
    }
    inputs = [e.pop('head'), e.pop('shape'), e.pop('rest'), e['epoch'], e['position']]
    return {**e, **_call_numpy(plan, inputs, outputs)}

  def add_canvas(e):
    window = _decode(
      e.pop('bytes'), e.pop('kind'), e.pop('branch'), e.pop('size'), e.pop('window'), config
    )
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
  """Adds the first bytes, the size of a JPEG, and all bytes of what `_headers` may have to read further."""
  contents = e['bytes']
  is_jpeg = tf.strings.substr(contents, 0, 3) == b'\xff\xd8\xff'
  shape = tf.cond(
    is_jpeg, lambda: tf.io.extract_jpeg_shape(contents)[:2], lambda: tf.zeros(2, tf.int32)
  )
  # These bytes may also be in a preview, or in what follows the image: then `_headers` counts with care.
  few_scans = tf.size(tf.strings.split(contents, SCAN)) - 1 <= MAX_SCANS
  return {
    **e,
    'head': tf.strings.substr(contents, 0, headers.HEAD),
    'shape': tf.ensure_shape(shape, [2]),
    'rest': tf.where(is_jpeg & few_scans, b'', contents),
  }


def _many_scans(contents):
  return headers.scans(contents) > MAX_SCANS


def _first_bytes(contents):
  """uint8 `[n, headers.HEAD]`: the first bytes of each of n files, padded with zeros."""
  rows = b''.join(c[: headers.HEAD].ljust(headers.HEAD, b'\0') for c in contents)
  return np.frombuffer(rows, np.uint8).reshape(-1, headers.HEAD)


def longest(config: ml_collections.ConfigDict) -> int:
  """The largest size of an image file in bytes: 16 per pixel, four channels of 32 bits, and 1 MiB for the rest."""
  return 16 * config.max_pixels + 2**20


# Planning: which part of which file is decoded.


def _headers(head, jpeg_shape, rest, config):
  """For a block of images: kind, displayed size, orientation, whether deep (`special.Header`), branch of `_decode`."""
  kind, shape, orientation, plain = headers.read(_first_bytes(head), jpeg_shape)
  for i in np.flatnonzero(kind == headers.JPEG):
    if rest[i] and _many_scans(rest[i]):
      shape[i] = 0  # `problem` finds the reason
  if config.channels not in (1, 3):
    plain[:] = False  # alpha may be a channel
  shown, deep = headers.shown(shape, orientation), np.zeros(len(kind), bool)
  too_large = shape.prod(1) > config.max_pixels
  for i in np.flatnonzero(~plain & ~too_large & (kind != headers.UNKNOWN)):
    try:
      height, width, deep[i] = special.header(rest[i] or head[i], int(kind[i]), longest(config))
      shown[i], orientation[i] = (height, width), 1
    except special.Unreadable:
      shown[i] = 0
  bad = [bool(p) for p in headers.problems(kind, shown, config.max_pixels)]
  branch = np.where(bad, BAD, np.where(plain, OTHER, SPECIAL)).astype(np.int32)
  return kind, shown, orientation, deep, branch


def _plan(head, jpeg_shape, rest, epoch, position, *, pipelines, size, seed, config):
  """For a block of images: branch of `_decode`, kind, orientation, displayed size, window, and crops relative to it."""
  n = len(head)
  kind, shown, orientation, _, branch = _headers(head, jpeg_shape, rest, config)
  shown = np.where((branch == BAD)[:, None], 1, shown)

  def pad_block(x):  # one shape, one compilation
    return np.concatenate([x, np.ones((BLOCK - n, *x.shape[1:]), x.dtype)]).astype(np.int32)

  with jax.default_device(_cpu()):
    places = augment.places(
      *pad_block(shown).T, pad_block(epoch), pad_block(position),
      pipelines=pipelines, seed=seed, size=size,
    )  # fmt: skip
  crops = np.asarray(places)[:n]  # [n, v, 2, 4]

  ratio = np.ones(n)
  if config.scaled_decoding:  # DCT scaling, never below the size of the view
    smallest = crops[:, :, 0, 2:].min((1, 2)) / size
    ratio = 2.0 ** np.floor(np.log2(np.clip(smallest, 1, 8)))
    ratio = np.where((kind == headers.JPEG) & (branch == OTHER), ratio, 1.0)
  crops = crops / ratio[:, None, None, None].astype(np.float32)
  limit = np.ceil(shown / ratio[:, None])
  low = np.floor(crops[:, :, 1, :2].min(1))
  low = np.clip(low, 0, limit - 1)
  high = np.clip(np.ceil((crops[:, :, 1, :2] + crops[:, :, 1, 2:]).max(1)), low + 1, limit)
  crops[..., :2] -= low[:, None, None]
  window = _stored(low, high, limit, orientation)
  branch = np.where((kind == headers.JPEG) & (branch == OTHER), np.log2(ratio), branch)
  return (
    branch.astype(np.int32), kind, orientation, shown.astype(np.int32), window.astype(np.int32),
    crops.astype(np.float32),
  )  # fmt: skip


def _stored(low, high, limit, orientation):
  """A window of the displayed image -> (top, left, height, width) in the stored image."""
  mirrored = np.stack(headers.mirrored(orientation), 1)
  start = np.where(mirrored, limit - high, low)
  window = np.stack([start, high - low], 1)  # [n, 2 (start, length), 2 (y, x)]
  transposed = (orientation >= 5)[:, None, None]
  return np.where(transposed, window[..., ::-1], window).reshape(len(low), 4)


def _cpu():
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names only an accelerator
    return jax.local_devices()[0]


# Decoding and drawing.


def _decode(contents, kind, branch, size, window, config):
  """The window of an image of this size as stored: uint8 `[h, w, channels]`."""

  def jpeg(ratio):
    def decode():
      # tf.io.decode_and_crop_jpeg has no ratio.
      image = tf.raw_ops.DecodeAndCropJpeg(
        contents=contents, crop_window=window, channels=3, ratio=ratio
      )
      return _with_channels(image, config)

    return decode

  def other():
    return _cut(_of_size(_with_channels(_rgb(contents), config), size), window)

  def from_special():
    return _cut(_of_size(_special(contents, kind, config)[0], size), window)

  branches = [*(jpeg(r) for r in (1, 2, 4, 8)), other, from_special, lambda: _bad(config)]
  return tf.ensure_shape(tf.switch_case(branch, branches), [None, None, config.channels])


def _bad(config):
  failed = tf.io.decode_jpeg('', channels=1)  # fails; `stream.read` then finds the reason
  return tf.zeros([tf.shape(failed)[0], 1, config.channels], tf.uint8)


def _rgb(contents):
  """The first frame of an 8-bit image in RGB: gray is repeated, alpha is discarded."""
  image = tf.io.decode_image(contents, expand_animations=False)
  image.set_shape([None, None, None])
  channels = tf.shape(image)[-1]
  return tf.cond(
    channels < 3, lambda: tf.repeat(image[..., :1], 3, axis=-1), lambda: image[..., :3]
  )


def _with_channels(rgb, config):
  """RGB, or with `data.channels` 1 its luma: as `values.finish`."""
  if config.channels != 1:  # other numbers of channels never get here
    rgb.set_shape([None, None, 3])
    return rgb
  luma = tf.tensordot(tf.cast(rgb, tf.float64), tf.constant(values.LUMA, tf.float64), 1)
  return tf.cast(tf.floor(luma + 0.5), tf.uint8)[..., None]


def _special(contents, kind, config):
  """`special.read`: the image, uint8 `[h, w, channels]`, and int32 `[3]`: transparent, hides, clipped."""
  settings = values.settings(config)

  def read(contents, kind):
    try:
      image = special.read(contents, int(kind), settings)
    except special.Unreadable:
      return np.zeros((0, 0, settings.channels), np.uint8), np.zeros(3, np.int32)
    flags = [image.transparent, image.hides, min(image.clipped, 2**31 - 1)]
    return image.pixels, np.array(flags, np.int32)

  image, flags = tf.numpy_function(read, [contents, kind], [tf.uint8, tf.int32])
  image.set_shape([None, None, config.channels])
  image = tf.cond(tf.size(image) > 0, lambda: image, lambda: _bad(config))
  return image, tf.ensure_shape(flags, [3])


def _of_size(image, size):
  """The same image. Fails if its size is not the one that its header says: `problem` then finds that out."""
  same = tf.debugging.Assert(
    tf.reduce_all(tf.shape(image)[:2] == size), ['the size is not that of the header']
  )
  with tf.control_dependencies([same]):
    return tf.identity(image)


def _cut(image, window):
  top, left, height, width = tf.unstack(window)
  return image[top : top + height, left : left + width]


def _turn(image, orientation):
  """An image as stored -> as displayed, by its EXIF orientation."""
  rows, columns = headers.mirrored(orientation)

  def turn():
    y = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    y = tf.cond(rows, lambda: y[::-1], lambda: y)
    return tf.cond(columns, lambda: y[:, ::-1], lambda: y)

  return tf.cond(orientation > 1, turn, lambda: image)


def _canvas(window, crops, shape, size, kernels, resize_on):
  """The canvas of a window, uint8 `[*shape, channels]`, and its crops, float32 `[views, 2, 4]`."""

  def resized():
    return _resized_views(window, crops, shape, size, kernels)

  if resize_on == 'host':
    canvas, new_crops = resized()
  else:
    fits = tf.reduce_all(tf.shape(window)[:2] <= shape)
    canvas, new_crops = tf.cond(fits, lambda: (_padded(window, shape), crops), resized)
  canvas.set_shape([*shape, window.shape[-1]])
  return canvas, new_crops


def _padded(window, shape):
  """A canvas with the window in its upper left corner."""
  h, w, c = tf.shape(window)[0], tf.shape(window)[1], window.shape[-1]
  flat = tf.reshape(window, [h, c * w])  # padding is much faster in two dimensions
  flat = tf.pad(flat, [[0, shape[0] - h], [0, c * (shape[1] - w)]])
  return tf.reshape(flat, [*shape, c])


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
  """The view of a crop `[2, 4]`: `crop.crop_and_resize`, rounded to uint8 `[size, size, channels]`."""
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
  encoded: tf.data.Dataset,
  config: ml_collections.ConfigDict,
  skip: bool = False,
  block: int = BLOCK,
) -> tf.data.Dataset:
  """Adds to encoded images what their headers say.

  Args:
    encoded: elements with `bytes`.
    config: the `data` part of the recipe.
    skip: whether images that cannot be read are skipped; otherwise reading them fails.
    block: images whose headers are read together.

  Returns:
    Elements with `kind`, `shape` as displayed, `orientation`, `deep` (`special.Header`), and `branch`.
  """

  def add_headers(e):
    outputs = {
      'kind': (tf.int32, []),
      'shape': (tf.int64, [2]),
      'orientation': (tf.int32, []),
      'deep': (tf.bool, []),
      'branch': (tf.int32, []),
    }
    inputs = [e.pop('head'), e.pop('shape'), e.pop('rest')]
    columns = _call_numpy(functools.partial(_headers, config=config), inputs, outputs)
    return {**e, **columns, 'shape': tf.cast(columns['shape'], tf.int32)}

  if skip:
    encoded = encoded.ignore_errors()
  headed = encoded.map(_with_header, stream.threads(config))
  if skip:
    headed = headed.ignore_errors()
  return headed.batch(block).map(add_headers).unbatch()


def whole(
  e: dict[str, tf.Tensor], config: ml_collections.ConfigDict
) -> tuple[tf.Tensor, tf.Tensor]:
  """The whole image of an element of `sized`.

  Args:
    e: the element.
    config: the `data` part of the recipe.

  Returns:
    The image as displayed, uint8 `[h, w, channels]`, and int32 `[3]`: whether it is transparent, whether
    transparency hides it, and the number of clipped values (`special.Image`). A corrupt image fails.
  """
  none = tf.zeros(3, tf.int32)
  decoded, flags = tf.switch_case(
    e['branch'] - OTHER,
    [
      lambda: (_with_channels(_rgb(e['bytes']), config), none),
      lambda: _special(e['bytes'], e['kind'], config),
      lambda: (_bad(config), none),
    ],
  )
  return _of_size(_turn(decoded, e['orientation']), e['shape']), flags


def read_all(source: Stream, height: int, width: int) -> Arrays | None:
  """Decodes a stream of images of one size into memory; returns None if an image has another size.

  Raises:
    ConfigError: an image cannot be decoded.
  """

  config = source.settings

  def decoded(e):
    # A corrupt image must fail here instead of becoming a black image.
    fits = tf.reduce_all(e['shape'] == [height, width]) | (e['branch'] == BAD)
    image = tf.cond(
      fits,
      lambda: whole(e, config)[0],
      lambda: tf.zeros([height, width, config.channels], tf.uint8),
    )
    return tf.ensure_shape(image, [height, width, config.channels]), e['label'], fits

  count = len(source)
  images = np.empty((count, height, width, config.channels), np.uint8)
  labels = np.empty(count, np.int32)
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
  labels = stream.checked_labels(labels, source)
  return Arrays(images, labels, class_names=source.class_names, range=tuple(config.range))


# Error messages.


def header(contents: bytes, config: ml_collections.ConfigDict) -> tuple[int, np.ndarray]:
  """Kind, an index into `headers.KINDS`, and displayed height and width of an encoded image; 0 if unknown."""
  shape = np.zeros((1, 2), np.int32)
  if contents[:3] == b'\xff\xd8\xff':
    with contextlib.suppress(tf.errors.InvalidArgumentError):
      shape[0] = tf.io.extract_jpeg_shape(contents).numpy()[:2]
  kind, shown, *_ = _headers([contents], shape, [contents], config)
  return int(kind[0]), shown[0]


def problem(contents: bytes, config: ml_collections.ConfigDict) -> str:
  """Why an encoded image cannot be decoded, a phrase that follows its name; empty if it can be."""
  if not contents:
    return 'is empty'
  kind, shape = header(contents, config)
  reason = headers.problems(np.array([kind]), shape[None], config.max_pixels)[0]
  if kind == headers.JPEG and _many_scans(contents):
    return (
      f'has {headers.scans(contents):,} scans, more than {MAX_SCANS}, which would take very long'
    )
  if kind == headers.UNKNOWN:
    return reason + (', but a page of HTML or XML' if contents.lstrip()[:1] == b'<' else '')
  plain = headers.read(_first_bytes([contents]), np.ones((1, 2), np.int32)).plain[0]
  try:
    if reason and shape.all():  # too large
      return reason
    if not plain or config.channels not in (1, 3):
      special.header(contents, kind, longest(config))
      found = special.read(contents, kind, values.settings(config)).pixels.shape[:2]
    elif not reason:
      found = _rgb(contents).shape[:2]
      shape = shape if found == tuple(shape) else shape[::-1]  # shown, not stored
    else:
      return reason
    if tuple(found) != tuple(shape):
      return (
        f'is a broken {headers.KINDS[kind]}: it has {found[1]:,} x {found[0]:,} pixels, and its header says '
        f'{shape[1]:,} x {shape[0]:,}'
      )
  except special.Unreadable as error:
    return str(error)
  except tf.errors.OpError as error:
    text = error.message.split('}} ')[-1].split(' [Op:')[0].strip().splitlines()[-1]
    return f'is a broken {headers.KINDS[kind]}: {text}'
  return reason
