"""Views of images, made on the device inside the training step by pipelines of ops.

A pipeline is text: ops of `ops.py` with their arguments, or the name of one of `PIPELINES`, joined by
`|`, such as `resize | rotate | cutout(0.25, p=0.5)` or `moco_v2 | solarize(p=0.2)`. It starts with
an op that sets the size of the view; all others take `p`, the probability that they are applied to an
image (default: 1; for `flip` 1/2). `path/to/ops.py: ` before a pipeline makes the ops of that file available.

Pixel values are in [0, 1]; networks that want other ranges normalise them themselves.
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
    name: of the op.
    definition: its function, and what it allows.
    arguments: all arguments, defaults included.
    p: the probability that it is applied.
  """

  name: str
  definition: Definition
  arguments: dict[str, float | str]
  p: float

  @property
  def random(self) -> bool:
    """Whether its result depends on a key."""
    return self.definition.draws or self.p < 1

  @property
  def kernel(self) -> str:
    """The kernel of the resizing, if the op sets the size of views."""
    return self.definition.kernel

  def __call__(self, key: jax.Array | None, *args) -> jax.Array:
    return self.definition.function(key, *args, **self.arguments)


# From text to ops.


@functools.cache
def parse(text: str, random: bool = True) -> tuple[Op, ...]:
  """The ops of a pipeline.

  Args:
    text: of the pipeline.
    random: whether its ops may be random; False for evaluations.

  Raises:
    ConfigError: one sentence: what in `text` is wrong and what is allowed.
  """
  path, text = split_ops(text)
  known = {**OPS, **_own_ops(path)} if path else OPS
  try:
    ops = tuple(_ops(ast.parse(text.strip(), mode='eval').body, known))
  except (SyntaxError, RecursionError, MemoryError):
    raise ConfigError(f'{text!r} is not a pipeline: write ops joined by |, such as '
                     f'{PIPELINES["supervised"]!r}') from None  # fmt: skip
  if not ops[0].definition.sized:
    sized = ', '.join(name for name, op in known.items() if op.sized)
    raise ConfigError(
      f'the pipeline {text!r} does not start with an op that sets the size: {sized}'
    )
  drawn = [op.name for op in ops if op.random]
  if drawn and not random:
    raise ConfigError(f'the pipeline {text!r} is for evaluation but {drawn[0]} is random')
  return ops


def with_ops(pipeline: str, path: str) -> str:
  """A pipeline that may use the ops of the file `path`; '' is no file."""
  return f'{path}: {pipeline}' if path and pipeline else pipeline


def split_ops(pipeline: str) -> tuple[str, str]:
  """The arguments of `with_ops`, in its order reversed: (path, pipeline)."""
  path, separator, rest = pipeline.partition('.py: ')
  return (f'{path}.py', rest) if separator else ('', pipeline)


def _own_ops(path):
  own = defined_in(vars(plugins.load(path, 'ops')))
  if not own:
    raise ConfigError(f'{path} has no ops: decorate functions with simclr_jax.data.ops.op')
  return own


def _ops(tree, known: Mapping[str, Definition]):
  """The ops below a node of the syntax tree, from left to right."""
  if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
    return [*_ops(tree.left, known), *_ops(tree.right, known)]
  call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
  if not isinstance(call.func, ast.Name):
    raise ConfigError(f'{ast.unparse(tree)!r} is not an op: write name or name(arguments)')
  name = call.func.id
  if name in PIPELINES and call is not tree:
    return parse(PIPELINES[name])
  if name not in known:
    names = [*known, *PIPELINES]
    hint = did_you_mean(name, names) or f'; available: {", ".join(names)}'
    raise ConfigError(f'{name} is neither an op nor a published pipeline{hint}')
  return [_bind(name, known[name], call)]


def _bind(name, definition, call):
  """An op with the arguments of a call, checked."""
  allowed = definition.allowed if definition.sized else {**definition.allowed, 'p': Range(0.0, 1.0)}
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
  """Where `views` will crop, so that only that part of an image needs to be read.

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
  """The pipelines of the first `count` views, from a recipe's `augment` part: `view2` defaults to `view1`."""
  views = (config.view1, config.view2 or config.view1)[:count]
  return tuple(with_ops(view, config.ops) for view in views)


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
