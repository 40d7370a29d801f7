"""Views of images, made on the device inside the training step by pipelines of ops.

A pipeline is text: ops of `ops.py` with their arguments, or the name of one of `PIPELINES`, joined by
`|`, such as `resize | rotate | cutout(0.25, p=0.5)` or `moco_v2 | solarize(p=0.2)`. It begins with
an op that gives the view its size; all others take `p`, the probability that they are applied to an
image: 1 unless given, 1/2 for `flip`.

Pixel values are in [0, 1]; networks that want other ranges normalise them themselves.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax.data import crop
from simclr_jax.data.ops import OPS

# As in the released code of SimCLR (v1: additive brightness, v2: multiplicative) and MoCo. Both blurs
# draw sigma from U(0.1, 2). MoCo v1 drops the colour before the jitter, v2 after it.
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
  'simclr_eval': 'center_crop(0.875)',
  'moco_eval': 'torch_center_crop(0.875)',
}

# SimCLR's code does not clip what its bicubic crop leaves outside [0, 1] before these.
_UNCLIPPED = ('flip', 'simclr_jitter', 'grayscale')


@dataclasses.dataclass(frozen=True)
class Op:
  """An op with its arguments.

  Attributes:
    name: in `OPS`.
    arguments: all that it takes, defaults included.
    p: the probability that it is applied.
  """

  name: str
  arguments: dict[str, float | str]
  p: float

  @property
  def random(self) -> bool:
    return OPS[self.name].draws or self.p < 1

  @property
  def kernel(self) -> str:
    """Of the resizing, if it gives views their size."""
    return OPS[self.name].kernel

  def __call__(self, key: jax.Array | None, *args) -> jax.Array:
    return OPS[self.name].function(key, *args, **self.arguments)


# From text to ops.


@functools.cache
def parse(text: str, random: bool = True) -> tuple[Op, ...]:
  """The ops of a pipeline.

  Args:
    text: of the pipeline.
    random: whether it may draw anything; False for evaluations.

  Raises:
    ValueError: one sentence: what in `text` is wrong and what is allowed.
  """
  try:
    ops = tuple(_ops(ast.parse(text.strip(), mode='eval').body))
  except (SyntaxError, RecursionError, MemoryError):
    raise ValueError(f'{text!r} is not a pipeline: write ops joined by |, such as '
                     f'{PIPELINES["supervised"]!r}') from None  # fmt: skip
  if not OPS[ops[0].name].sized:
    sized = ', '.join(name for name, op in OPS.items() if op.sized)
    raise ValueError(f'the pipeline {text!r} does not begin with an op that gives a size: {sized}')
  drawn = [op.name for op in ops if op.random]
  if drawn and not random:
    raise ValueError(f'the pipeline {text!r} is for evaluation but {drawn[0]} is random')
  return ops


def _ops(tree):
  """The ops below a node of the syntax tree, from left to right."""
  if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
    return [*_ops(tree.left), *_ops(tree.right)]
  call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
  if not isinstance(call.func, ast.Name):
    raise ValueError(f'{ast.unparse(tree)!r} is not an op: write name or name(arguments)')
  name = call.func.id
  if name in PIPELINES and call is not tree:
    return parse(PIPELINES[name])
  if name not in OPS:
    close = difflib.get_close_matches(name, [*OPS, *PIPELINES], 1)
    hint = f'did you mean {close[0]}?' if close else 'there are ' + ', '.join([*OPS, *PIPELINES])
    raise ValueError(f'{name} is neither an op nor a published pipeline: {hint}')
  return [_bind(name, call)]


def _bind(name, call):
  """The op `name` with the arguments of a call, checked."""
  definition = OPS[name]
  allowed = definition.allowed if definition.sized else {**definition.allowed, 'p': (0.0, 1.0)}
  parameters = list(inspect.signature(definition.function).parameters.values())
  parameters = parameters[4 if definition.sized else 3 :]
  if not definition.sized:
    parameters.append(inspect.Parameter('p', inspect.Parameter.KEYWORD_ONLY, default=definition.p))
  try:
    args = [ast.literal_eval(a) for a in call.args]
    bound = inspect.Signature(parameters).bind(
      *args, **{k.arg: ast.literal_eval(k.value) for k in call.keywords}
    )
  except ValueError:
    raise ValueError(f'{ast.unparse(call)}: arguments are plain numbers and words') from None
  except TypeError as e:
    takes = f'it takes {", ".join(allowed)}' if allowed else 'it takes none'
    raise ValueError(f'{ast.unparse(call)}: {e}; {takes}') from None
  bound.apply_defaults()
  values = bound.arguments
  for argument, value in values.items():
    _check(f'{name}: {argument}={value!r}', value, allowed[argument])
    lower = values.get(argument.replace('_max', '_min'), value)
    if lower > value:
      raise ValueError(f'{name}: {argument}={value!r} is below {lower!r}, its lower bound')
  p = values.pop('p', 1.0)
  return Op(name, dict(values), p)


def _check(what, value, allowed):
  if isinstance(allowed[0], str):
    if value not in allowed:
      raise ValueError(f'{what} is not one of {", ".join(map(repr, allowed))}')
  elif type(value) not in (int, float) or not math.isfinite(value):
    raise ValueError(f'{what} is not a number')
  elif not allowed[0] <= value <= allowed[1]:
    raise ValueError(f'{what} is out of range: from {allowed[0]} to {allowed[1]}')


# From images to views.


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
    key: all of the view's randomness.
    image: `[h, w, 3]`, uint8 or float in [0, 1].
    pipeline: its text or name.
    size: of the view.
    shared: a key that the examples of a batch share, for ops with per='batch'; without it these
      draw for the example alone.
    place: the crop `[2, 4]` to take instead of the one that `key` draws.

  Returns:
    float32 `[size, size, 3]` in [0, 1].
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
  seed: int,
  size: int,
  crops: jax.Array | None = None,
) -> jax.Array:
  """Views of every image of a batch.

  What is drawn for an image depends on (seed, epoch, position) alone, so it is the same on any
  number of devices and after any restart; only what a batch shares also depends on the place of the
  batch in the epoch.

  Args:
    images: `[n, h, w, 3]`, uint8 or float in [0, 1].
    epoch, position: int32 `[n]`: the pass over the data, and the place in its order.
    pipelines: of each view.
    seed: of the run.
    size: of the views.
    crops: `[n, views, 2, 4]`, where `images` are only the parts of images that `places` asked for.

  Returns:
    float32 `[n, views, size, size, 3]` in [0, 1].
  """
  base = jax.random.key(seed)
  # What a batch shares comes from its first place.
  shared = jax.random.fold_in(
    jax.random.fold_in(jax.random.fold_in(base, 1), epoch[0]), position[0]
  )
  shared = jax.random.split(shared)

  def of_one(image, epoch, position, crops):
    keys = _view_keys(base, epoch, position)
    return jnp.stack([
      view(keys[i], image, pipeline, size, shared[i], None if crops is None else crops[i])
      for i, pipeline in enumerate(pipelines)
    ])  # fmt: skip

  return jax.vmap(of_one)(images, epoch, position, crops)


@functools.partial(jax.jit, static_argnames=('pipelines', 'size'))
def places(
  height: jax.Array,
  width: jax.Array,
  epoch: jax.Array,
  position: jax.Array,
  pipelines: tuple[str, ...],
  seed: int,
  size: int,
) -> jax.Array:
  """Where `views` will cut, for who reads only that part of an image.

  Args:
    height, width: int32 `[n]`, of the images.
    epoch, position, seed, size: as for `views`.
    pipelines: of each view; one that is not random ignores `epoch`, `position` and `seed`.

  Returns:
    float32 `[n, views, 2, 4]`, crops as in `crop.py`.
  """
  base = jax.random.key(seed)

  def of_one(height, width, epoch, position):
    keys = _view_keys(base, epoch, position)
    found = []
    for key, pipeline in zip(keys, pipelines):
      ops = parse(pipeline)
      place = ops[0](jax.random.split(key, (len(ops), 2))[0, 1], height, width, size)
      if not any(op.random for op in ops):  # as in `eval_view`
        right = (height == size) & (width == size)
        place = jnp.where(right, crop.whole(height, width), place)
      found.append(jnp.broadcast_to(place, (2, 4)).astype(jnp.float32))
    return jnp.stack(found)

  return jax.vmap(of_one)(height, width, epoch, position)


def pipelines(config: ml_collections.ConfigDict, count: int) -> tuple[str, ...]:
  """Of the first `count` views, from a recipe's `augment` part: an empty `view2` is as `view1`."""
  return (config.view1, config.view2 or config.view1)[:count]


def _view_keys(base, epoch, position):
  # The base key is folded with 0 and 1 here, with 2 for the method's own draws.
  return jax.random.split(
    jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, 0), epoch), position)
  )


def eval_view(
  image: jax.Array, pipeline: str, size: int, place: jax.Array | None = None
) -> jax.Array:
  """The evaluation's view of one image `[h, w, 3]`: float32 `[size, size, 3]` in [0, 1].

  An image that has that size already is not cropped. `place` is as for `view`.
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
