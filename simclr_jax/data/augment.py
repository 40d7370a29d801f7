"""Augmented views of images, computed on the device in the training step by pipelines of ops.

A pipeline is a string: ops of `ops.py` with their arguments, or names of `PIPELINES`, joined by `|`, such as
`resize | rotate | cutout(0.25, p=0.5)` or `moco_v2 | solarize(p=0.2)`. The first op sets the size of the view;
all other ops take `p`, the probability that the op is applied to an image (default: 1; for `flip` 0.5).
`path/to/ops.py: ` before a pipeline makes the ops of that file available.

Pixel values are in [0, 1]; networks that need another range normalise their input themselves.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import plugins
from simclr_jax.data import crop
from simclr_jax.data.ops import OPS, Definition, defined_in
from simclr_jax.errors import ConfigError
from simclr_jax.validation import Range, did_you_mean

# As in the released code of SimCLR (v1: additive brightness, v2: multiplicative) and MoCo. Both blurs
# draw sigma from U(0.1, 2). MoCo v1 converts to grayscale before the jitter, v2 after it.
PIPELINES = {
  'simclr_v1': (
    'simclr_crop(0.08, 1) | flip | simclr_jitter(1, "additive", p=0.8) | grayscale(p=0.2)'
    ' | simclr_blur("batch", p=0.5)'
  ),
  'simclr_v2': (
    'simclr_crop(0.08, 1) | flip | simclr_jitter(1, p=0.8) | grayscale(p=0.2)'
    ' | simclr_blur("batch", p=0.5)'
  ),
  'simclr_cifar10_v1': (
    'simclr_crop(0.08, 1) | flip | simclr_jitter(0.5, "additive", p=0.8) | grayscale(p=0.2)'
  ),
  'simclr_cifar10_v2': (
    'simclr_crop(0.08, 1) | flip | simclr_jitter(0.5, p=0.8) | grayscale(p=0.2)'
  ),
  'moco_v1': 'torch_crop(0.2, 1) | grayscale(p=0.2) | torch_jitter(0.4, 0.4, 0.4, 0.4) | flip',
  'moco_v2': (
    'torch_crop(0.2, 1) | torch_jitter(0.4, 0.4, 0.4, 0.1, p=0.8) | grayscale(p=0.2)'
    ' | torch_blur(0.1, 2, p=0.5) | flip'
  ),
  'moco_cifar10': (
    'torch_crop(0.08, 1) | flip | torch_jitter(0.4, 0.4, 0.4, 0.1, p=0.8) | grayscale(p=0.2)'
  ),
  'supervised': 'simclr_crop(0.08, 1) | flip',
  # Not of a paper: for images that are not RGB.
  'crop_flip_blur': 'simclr_crop(0.08, 1) | flip | simclr_blur("batch", p=0.5)',
  'simclr_eval': 'center_crop(0.875)',
  'moco_eval': 'torch_center_crop(0.875)',
}

# SimCLR's code does not clip values outside [0, 1], which its bicubic crop produces, before these ops.
_UNCLIPPED = ('flip', 'simclr_jitter', 'grayscale')


@dataclasses.dataclass(frozen=True)
class Op:
  """An op with its arguments.

  Attributes:
    name: of the op.
    definition: its function and the allowed arguments.
    arguments: all arguments, including defaults.
    p: probability that the op is applied to an image.
  """

  name: str
  definition: Definition
  arguments: dict[str, float | str]
  p: float

  @property
  def random(self) -> bool:
    """Whether the result depends on a key."""
    return self.definition.draws or self.p < 1

  @property
  def kernel(self) -> str:
    """The kernel of the resizing, if the op sets the size of views."""
    return self.definition.kernel

  def __call__(self, key: jax.Array | None, *args) -> jax.Array:
    return self.definition.function(key, *args, **self.arguments)


# Parsing.


@functools.cache
def parse(text: str, random: bool = True) -> tuple[Op, ...]:
  """The ops of a pipeline.

  Args:
    text: the pipeline.
    random: whether the ops may be random; False for evaluations.

  Raises:
    ConfigError: the pipeline, or the file with ops, is invalid. The message names the mistake and what is
      allowed, in one sentence.
  """
  path, text = split_ops(text)
  available = {**OPS, **_own_ops(path)} if path else OPS
  try:
    ops = tuple(_ops(ast.parse(text.strip(), mode='eval').body, available))
  except (SyntaxError, RecursionError, MemoryError):
    raise ConfigError(f'{text!r} is not a pipeline: write ops joined by |, such as '
                     f'{PIPELINES["supervised"]!r}') from None  # fmt: skip
  if not ops[0].definition.sized:
    sized = ', '.join(name for name, op in available.items() if op.sized)
    raise ConfigError(
      f'the pipeline {text!r} does not start with an op that sets the size: {sized}'
    )
  random_ops = [op.name for op in ops if op.random]
  if random_ops and not random:
    raise ConfigError(f'the pipeline {text!r} is for evaluation but {random_ops[0]} is random')
  return ops


def check_channels(pipeline: str, channels: int) -> None:
  """Checks that all ops of a pipeline are defined for this number of channels.

  Raises:
    ConfigError: an op needs RGB images.
  """
  named = [op.name for op in parse(pipeline) if op.definition.rgb] if channels != 3 else []
  if named:
    raise ConfigError(
      f'{" and ".join(dict.fromkeys(named))} need{"s" * (len(set(named)) == 1)} RGB images, but data.channels={channels}:'
      ' set --config.augment.view1=crop_flip_blur (and view2, if the recipe has one)'
    )


def with_ops(pipeline: str, path: str) -> str:
  """A pipeline that may use the ops of the file `path`; unchanged without a file."""
  return f'{path}: {pipeline}' if path and pipeline else pipeline


def split_ops(pipeline: str) -> tuple[str, str]:
  """The inverse of `with_ops`: the path of the file with ops, empty without one, and the pipeline."""
  path, separator, rest = pipeline.partition('.py: ')
  return (f'{path}.py', rest) if separator else ('', pipeline)


def _own_ops(path):
  ops = defined_in(vars(plugins.load(path, 'ops')))
  if not ops:
    raise ConfigError(f'{path} has no ops: decorate functions with simclr_jax.data.ops.op')
  return ops


def _ops(tree, available: Mapping[str, Definition]):
  """The ops below a node of the syntax tree, from left to right."""
  if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
    return [*_ops(tree.left, available), *_ops(tree.right, available)]
  call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
  if not isinstance(call.func, ast.Name):
    raise ConfigError(f'{ast.unparse(tree)!r} is not an op: write name or name(arguments)')
  name = call.func.id
  if name in PIPELINES and call is not tree:
    return parse(PIPELINES[name])
  if name not in available:
    names = [*available, *PIPELINES]
    hint = did_you_mean(name, names) or f'; available: {", ".join(names)}'
    raise ConfigError(f'{name} is neither an op nor a published pipeline{hint}')
  return [_bind(name, available[name], call)]


def _bind(name, definition, call):
  """Checks the arguments of a call and returns the op."""
  allowed, parameters = definition.allowed, definition.parameters
  if not definition.sized:
    allowed = {**allowed, 'p': Range(0.0, 1.0)}
    p = inspect.Parameter('p', inspect.Parameter.KEYWORD_ONLY, default=definition.p)
    parameters = [*parameters, p]
  try:
    args = [ast.literal_eval(a) for a in call.args]
    bound = inspect.Signature(parameters).bind(
      *args, **{k.arg: ast.literal_eval(k.value) for k in call.keywords}
    )
  except ValueError:
    raise ConfigError(f'{ast.unparse(call)}: arguments must be numbers or strings') from None
  except TypeError as e:
    takes = f'it takes {", ".join(allowed)}' if allowed else 'it takes none'
    raise ConfigError(f'{ast.unparse(call)}: {e}; {takes}') from None
  bound.apply_defaults()
  values = bound.arguments
  for argument, value in values.items():
    allowed[argument].check(f'{name}: {argument}', value)
    lower = values.get(argument.replace('_max', '_min'), value)
    if lower > value:
      raise ConfigError(f'{name}: {argument}={value!r} is below its lower bound, {lower!r}')
  p = values.pop('p', 1.0)
  return Op(name, definition, dict(values), p)


# Views.


def view(
  key: jax.Array,
  image: jax.Array,
  pipeline: str,
  size: int,
  shared: jax.Array | None = None,
  place: jax.Array | None = None,
) -> jax.Array:
  """One random view of one image.

  Args:
    key: the source of all randomness of the view.
    image: `[h, w, c]`, uint8 or float in [0, 1].
    pipeline: ops, or the name of a pipeline.
    size: of the view.
    shared: a key that all images of a batch share, for ops with per='batch'; without it these ops use
      `key`.
    place: the crop, float32 `[2, 4]`; by default a crop drawn with `key`.

  Returns:
    float32 `[size, size, c]` in [0, 1].
  """
  ops = parse(pipeline)
  image = _to_float(image)
  keys = jax.random.split(key, (len(ops), 2))
  if place is None:
    place = ops[0](keys[0, 1], *image.shape[:2], size)
  image = crop.crop_and_resize(image, place, size, ops[0].kernel)
  for i, op in enumerate(ops[1:], 1):
    on_key, op_key = keys[i]
    if shared is not None and op.arguments.get('per') == 'batch':
      op_key = jax.random.fold_in(shared, i)
    if op.name not in _UNCLIPPED:
      image = jnp.clip(image, 0.0, 1.0)
    changed = op(op_key, image, size)
    if op.p < 1:
      changed = jnp.where(jax.random.bernoulli(on_key, op.p), changed, image)
    image = changed
  return jnp.clip(image, 0.0, 1.0)


def views(
  images: jax.Array,
  epoch: jax.Array,
  position: jax.Array,
  pipelines: tuple[str, ...],
  seed: int | jax.Array,
  size: int,
  crops: jax.Array | None = None,
) -> jax.Array:
  """Views of every image of a batch.

  The augmentation of an image depends only on (seed, epoch, position), so it is the same on any number of
  devices and after any restart. Ops with per='batch' also depend on the position of the batch in the epoch.

  Args:
    images: `[n, h, w, c]`, uint8 or float in [0, 1].
    epoch, position: int32 `[n]`: the epoch, and the position of the image in its order.
    pipelines: of each view.
    seed: of the run; may be traced.
    size: of the views.
    crops: float32 `[n, views, 2, 4]`, if `images` are only parts of images, as of `decode.canvases`.

  Returns:
    float32 `[n, views, size, size, c]` in [0, 1].
  """
  base = jax.random.key(seed)
  # The key that a batch shares comes from its first image.
  shared = jax.random.fold_in(
    jax.random.fold_in(jax.random.fold_in(base, 1), epoch[0]), position[0]
  )
  shared = jax.random.split(shared)

  def views_of_image(image, epoch, position, crops):
    keys = _view_keys(base, epoch, position)
    return jnp.stack([
      view(keys[i], image, pipeline, size, shared[i], None if crops is None else crops[i])
      for i, pipeline in enumerate(pipelines)
    ])  # fmt: skip

  return jax.vmap(views_of_image)(images, epoch, position, crops)


@functools.partial(jax.jit, static_argnames=('pipelines', 'size'))
def places(
  height: jax.Array,
  width: jax.Array,
  epoch: jax.Array,
  position: jax.Array,
  pipelines: tuple[str, ...],
  seed: int | jax.Array,
  size: int,
) -> jax.Array:
  """The crops that `views` will take, so that only these parts of the images need to be decoded.

  Args:
    height, width: int32 `[n]`, of the images.
    epoch, position, seed, size: as for `views`.
    pipelines: of each view; the crop of one that is not random is the crop of `eval_view`.

  Returns:
    float32 `[n, views, 2, 4]`, crops as in `crop.py`.
  """
  base = jax.random.key(seed)

  def crops_of_image(height, width, epoch, position):
    keys = _view_keys(base, epoch, position)
    crops = []
    for key, pipeline in zip(keys, pipelines):
      ops = parse(pipeline)
      place = ops[0](jax.random.split(key, (len(ops), 2))[0, 1], height, width, size)
      if not any(op.random for op in ops):  # as in `eval_view`
        same_size = (height == size) & (width == size)
        place = jnp.where(same_size, crop.whole(height, width), place)
      crops.append(jnp.broadcast_to(place, (2, 4)).astype(jnp.float32))
    return jnp.stack(crops)

  return jax.vmap(crops_of_image)(height, width, epoch, position)


def pipelines(config: ml_collections.ConfigDict, count: int) -> tuple[str, ...]:
  """The pipelines of the first `count` views, from a recipe's `augment` part: `view2` defaults to `view1`."""
  views = (config.view1, config.view2 or config.view1)[:count]
  return tuple(with_ops(view, config.ops) for view in views)


def _view_keys(base, epoch, position):
  # The base key is folded with 0 and 1 in this file, and with 2 for the randomness of the method.
  return jax.random.split(
    jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, 0), epoch), position)
  )


def eval_view(
  image: jax.Array, pipeline: str, size: int, place: jax.Array | None = None
) -> jax.Array:
  """The view of one image `[h, w, c]` for an evaluation: float32 `[size, size, c]` in [0, 1].

  An image that already has this size is not cropped. `place` is as for `view`.
  """
  ops = parse(pipeline, random=False)
  image = _to_float(image)
  if image.shape[:2] != (size, size):
    if place is None:
      place = ops[0](None, *image.shape[:2], size)
    image = crop.crop_and_resize(image, place, size, ops[0].kernel)
  for op in ops[1:]:
    image = op(None, jnp.clip(image, 0.0, 1.0), size)
  return jnp.clip(image, 0.0, 1.0)


def _to_float(image):
  return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
