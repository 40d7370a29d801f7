"""The state of a training and the step that advances it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import config as recipes, health, methods, optim, sharding
from simclr_jax.data import augment, feed
from simclr_jax.errors import ConfigError

PyTree = Any

# Fields that no program depends on.
NOT_COMPILED = ('seed', 'data.dir', 'data.label_seed', 'teacher')


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and so everything that a checkpoint holds.

  Attributes:
    step: int32 `[]`, steps taken.
    params: learned by gradient.
    state: what else the method keeps: BatchNorm statistics, queues.
    opt_state: the optimizer's slots.
  """

  step: jax.Array
  params: PyTree
  state: PyTree
  opt_state: PyTree


def create(
  method: methods.Method,
  optimizer: optax.GradientTransformation,
  seed: int | jax.Array,
  image_size: int,
) -> TrainState:
  """A fresh state; a function of `seed` alone. Call it inside jit."""
  batch = {'views': jnp.zeros((2, method.views, image_size, image_size, 3))}
  params, state = method.init(jax.random.key(seed), batch)
  return TrainState(jnp.zeros((), jnp.int32), params, state, optimizer.init(params))


def train_step(
  method: methods.Method,
  optimizer: optax.GradientTransformation,
  rate: optax.Schedule,
  config: ml_collections.ConfigDict,
  ts: TrainState,
  seed: jax.Array,
  given: PyTree,
  constants: dict[str, jax.Array],
  rows: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Args:
    method, optimizer, rate, config: what is trained, and how; not traced.
    ts: the state before.
    seed: of the run, uint32 `[]`. An argument, so that runs of other seeds share what is compiled.
    given: what the method wants to find in `batch['given']`.
    constants, rows: the batch, as `data.feed.for_training` gives it.

  Returns:
    The state after, and scalar metrics: the method's, `learning_rate`, `grad_norm`, `param_norm`,
    figures of the embeddings in steps that are logged, and `batch_hash`, a uint32 checksum of the
    views, in which a changed pixel or order shows.
  """
  # The base key is never advanced, so a resumed run draws what the uninterrupted one would have.
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), ts.step)

  def objective(params, state, rows, key):
    if config.sharding == 'fsdp':  # gathered here, layer by layer as the compiler sees fit
      params = jax.tree.map(sharding.replicate, params)
      if 'key' in state:  # of the moving average
        state = {**state, 'key': jax.tree.map(sharding.replicate, state['key'])}
    batch = feed.pick(constants, rows)
    views = augment.views(
      batch['images'],
      batch['epoch'],
      batch['position'],
      augment.pipelines(config.augment, method.views),
      seed,
      config.image_size,
      batch.get('crops'),
    )
    batch = {'views': views, 'label': batch['label'], 'index': batch['index'], 'given': given}
    loss, (state, metrics) = method.loss(params, state, batch, key)
    return loss, (state, metrics | {'batch_hash': _hash(views)})

  gradient = jax.grad(objective, has_aux=True)
  if config.accumulate_steps == 1:
    grads, (state, metrics) = gradient(ts.params, ts.state, rows, key)
  else:
    grads, state, metrics = _accumulated(gradient, config.accumulate_steps, ts, rows, key)
  updates, opt_state = optimizer.update(grads, ts.opt_state, ts.params)
  done, total = ts.step + 1, optim.train_steps(config, config.data.examples)
  logged = (done % config.log_every_steps == 0) | (done == 1) | (done == total)
  metrics |= _health(metrics.pop('embeddings'), logged)
  metrics['learning_rate'] = rate(ts.step)
  metrics['grad_norm'] = optax.tree.norm(grads)
  metrics['param_norm'] = optax.tree.norm(ts.params)
  new = TrainState(ts.step + 1, optax.apply_updates(ts.params, updates), state, opt_state)
  return new, metrics


def _accumulated(gradient, parts, ts, rows, key):
  """`gradient` over the parts of a batch, one after the other: the mean, the last state, the metrics.

  Of p parts, the first has the rows 0, p, 2 p, ...: each device has as many rows of every part.
  """

  def add(carry, part):
    total, state = carry
    i, rows = part
    rows = jax.tree.map(sharding.by_rows, rows)
    grads, (state, metrics) = gradient(ts.params, state, rows, jax.random.fold_in(key, i))
    return (jax.tree.map(jnp.add, total, grads), state), metrics

  rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)
  zeros = jax.tree.map(jnp.zeros_like, ts.params)
  (total, state), metrics = jax.lax.scan(add, (zeros, ts.state), (jnp.arange(parts), rows))
  z, checksum = metrics.pop('embeddings'), metrics.pop('batch_hash')
  metrics = jax.tree.map(lambda x: x.mean(0), metrics)
  metrics |= {'embeddings': z.reshape(-1, *z.shape[2:]), 'batch_hash': checksum.sum()}
  return jax.tree.map(lambda x: x / parts, total), state, metrics


def _health(z, due):
  """The figures of embeddings z `[n, v, d]`, computed only when `due`; otherwise NaN."""
  absent = {k: jnp.float32(jnp.nan) for k in jax.eval_shape(health.embedding_figures, z)}
  return jax.lax.cond(due, health.embedding_figures, lambda z: absent, z)


def _hash(views):
  bits = jax.lax.bitcast_convert_type(views, jnp.uint32)
  rows = jnp.sum(bits, axis=range(1, bits.ndim), dtype=jnp.uint32)  # [n], modulo 2^32
  return jnp.sum(rows * np.arange(1, 2 * len(views), 2, dtype=np.uint32), dtype=jnp.uint32)


def build(
  config: ml_collections.ConfigDict,
  dataset,
  mesh: jax.sharding.Mesh | None = None,
  start: bool = True,
) -> tuple[TrainState, Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]]]:
  """A recipe and its images -> a fresh state and `step(state, i) -> (state, metrics)`.

  `i` picks the batch: step `i` of the run that `config` describes. The state given to `step` is used
  up (its buffers are donated). `step.feed` is where the batches come from; close it when done.

  Args:
    config: a recipe; `data.examples` is filled in.
    dataset: of any kind that `data.load` returns.
    mesh: the devices; all of them by default.
    start: whether weights that the recipe begins with (`init_from`) are read; no, if a checkpoint is
      going to be.

  Raises:
    ConfigError: the method cannot use these images, or needs another recipe.
  """
  mesh = mesh or sharding.make_mesh()
  config = recipes.with_examples(config, len(dataset))
  method = methods.build(config)
  if method.needs_labels and not dataset.labelled:
    raise ConfigError(f'method={config.method} needs labels, and not all training images have one')
  if method.views == 1 and config.augment.view2:
    raise ConfigError(f'augment.view2 is set, but method={config.method} looks at view1 only')
  seed = np.uint32(config.seed)
  init, compiled = programs(config, mesh)
  with jax.set_mesh(mesh):
    ts = init(seed)
  if method.start and start:
    ts = _started(method, ts)
  batches = feed.for_training(
    dataset,
    config.seed,
    config.batch_size,
    augment.pipelines(config.augment, method.views),
    config.image_size,
    mesh,
  )
  given = sharding.put_replicated(mesh, method.given()) if method.given else {}

  def run(ts, i, call=compiled):
    rows = batches(i)
    with jax.set_mesh(mesh):
      return call(ts, seed, given, batches.constants, rows)

  run.feed = batches
  run.lower = functools.partial(run, call=compiled.lower)  # to look at what was compiled
  return ts, run


def programs(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
  """What a run compiles, jitted for a mesh, whose devices may also be only described.

  Args:
    config: a recipe with `data.examples`.
    mesh: to be set (`jax.set_mesh`) when either is called or lowered.

  Returns:
    `init(seed) -> state` and `step(state, seed, given, constants, rows) -> (state, metrics)`, see
    `train_step`.
  """
  return _programs(_Key(config), mesh)


class _Key:
  """A recipe, equal to another if they differ in nothing that is compiled."""

  def __init__(self, config):
    self.config = config
    flat = recipes.flatten(config)
    self.text = repr([(k, flat[k]) for k in sorted(flat) if k not in NOT_COMPILED])

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


@functools.lru_cache(maxsize=4)
def _programs(key, mesh):
  config = key.config
  method = methods.build(config)
  rate = optim.schedule(config, config.data.examples)
  optimizer = optim.build(config, rate)
  replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))

  def step(ts, seed, given, constants, rows):
    return train_step(method, optimizer, rate, config, ts, seed, given, constants, rows)

  def init(seed):
    return create(method, optimizer, seed, config.image_size)

  shapes = jax.eval_shape(init, np.uint32(0))

  def place(path, leaf):
    part, key = path[0].name, getattr(path[-1] if len(path) < 2 else path[1], 'key', None)
    if part == 'state' and key in method.row_state:
      return by_row
    if config.sharding == 'fsdp' and (part != 'state' or key == 'key'):
      return sharding.split(mesh, leaf.shape)
    return replicated

  places = jax.tree_util.tree_map_with_path(place, shapes)
  compiled = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(places, replicated, replicated, replicated, by_row),
    out_shardings=(places, replicated),
  )
  return jax.jit(init, out_shardings=places), compiled


def _started(method, ts):
  params, state = method.start(ts.params, ts.state)
  new, old = (
    {jax.tree_util.keystr(k[1:]): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in ((params, state), (ts.params, ts.state))
  )
  for leaf in sorted(new.keys() | old.keys()):
    if new.get(leaf) != old.get(leaf):
      raise ConfigError(
        f'init_from is of another network: {leaf} is {new.get(leaf)} there and {old.get(leaf)} in this '
        'recipe; its model fields must be those of the pretraining'
      )

  def put(x, was):
    if x is was:
      return x
    # A copy: the step is going to reuse the buffers.
    return sharding.put(np.array(jax.device_get(x)), was.sharding)

  params, state = jax.tree.map(put, (params, state), (ts.params, ts.state))
  return dataclasses.replace(ts, params=params, state=state)
