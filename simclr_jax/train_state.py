"""The state of a training and the step that updates it."""

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

from simclr_jax import config as recipes, fields, health, methods, optim, sharding
from simclr_jax.data import Dataset, augment, loader
from simclr_jax.data.loader import DeviceBatch, Loader
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import compile_cache

PyTree = Any
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and so everything that a checkpoint contains.

  Attributes:
    step: int32 `[]`, number of finished steps.
    params: parameters that are learned by gradient.
    state: the rest of the method's state: BatchNorm statistics, EMA parameters, queues.
    opt_state: the optimizer state.
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
  channels: int = 3,
) -> TrainState:
  """The initial state. It depends on the recipe and `seed` only. Call this function inside jit.

  Args:
    method, optimizer: of the recipe.
    seed: integer, may be traced.
    image_size: side of the views in pixels.
    channels: of the images.
  """
  batch = {'views': jnp.zeros((2, method.views, image_size, image_size, channels))}
  params, state = method.init(jax.random.key(seed), batch)
  return TrainState(jnp.zeros((), jnp.int32), params, state, optimizer.init(params))


def train_step(
  method: methods.Method,
  optimizer: optax.GradientTransformation,
  rate: optax.Schedule,
  config: ml_collections.ConfigDict,
  ts: TrainState,
  seed: jax.Array,
  teacher: methods.Teacher | None,
  constants: DeviceBatch,
  rows: DeviceBatch,
) -> tuple[TrainState, Metrics]:
  """One update of the parameters.

  Args:
    method, optimizer, rate, config: the method, its optimizer, learning rate and recipe; not traced.
    ts: the state before the step.
    seed: the seed of the run, uint32 `[]`. It is traced, so that runs with other seeds share the compiled program.
    teacher: for methods with `needs_teacher`.
    constants, rows: the batch, as `data.loader.for_training` returns it.

  Returns:
    The state after the step, and scalar metrics: those of the method; `learning_rate`, `grad_norm`,
    `param_norm`, float32; `health.embedding_metrics`, NaN except in steps that are logged; and `batch_hash`, a
    uint32 checksum of the views that depends on every pixel and on the order.
  """
  # The base key is never advanced, so a resumed run draws the same numbers as an uninterrupted one.
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), ts.step)
  steps = optim.train_steps(config, config.data.examples)

  def make_batch(rows):
    batch = _augmented(config, method, loader.with_images(constants, rows), seed)
    return batch | {'step': ts.step, 'steps': jnp.int32(steps), 'teacher': teacher}

  def objective(params, state, rows, key):
    params, state = _gathered(config, method, params, state)
    batch = make_batch(rows)
    loss, (state, metrics) = method.loss(params, state, batch, key)
    return loss, (state, metrics | {'batch_hash': _hash(_row_sums(batch['views']))})

  def encode(params, rows, key):
    params, state = _gathered(config, method, params, ts.state)
    batch = make_batch(rows)
    assert method.encode is not None
    z, (state, extras) = method.encode(params, state, batch, key)
    return z, (state, extras, (batch['label'], _row_sums(batch['views'])))

  gradient, parts = jax.grad(objective, has_aux=True), config.accumulate_steps
  if parts == 1:
    grads, (state, metrics) = gradient(ts.params, ts.state, rows, key)
    metrics.pop('entries', None)
  elif methods.keeps_negatives(config, method):
    grads, state, metrics = _cached(encode, parts, method, ts, rows, key)
  else:
    grads, state, metrics = _accumulated(gradient, parts, method, ts, rows, key)
  updates, opt_state = optimizer.update(grads, ts.opt_state, ts.params)
  done = ts.step + 1
  logged = (done % config.log_every_steps == 0) | (done == 1) | (done == steps)
  metrics |= _embedding_metrics(metrics.pop('embeddings'), logged)
  metrics['learning_rate'] = rate(ts.step)
  arrays = jax.tree.leaves(grads)
  norms = optim.norms([*arrays, *jax.tree.leaves(ts.params)])
  metrics['grad_norm'] = jnp.linalg.norm(norms[: len(arrays)])
  metrics['param_norm'] = jnp.linalg.norm(norms[len(arrays) :])
  return TrainState(done, optax.apply_updates(ts.params, updates), state, opt_state), metrics


def _gathered(config, method, params, state):
  """Parameters and EMA parameters, replicated if they are sharded; XLA may gather them layer by layer."""
  if config.sharding != 'fsdp':
    return params, state
  ema = {k: state[k] for k in method.ema_state if k in state}
  params, ema = jax.tree.map(sharding.replicate, (params, ema))
  return params, {**state, **ema}


def _augmented(config, method, batch, seed):
  """The part of a method's batch that depends on the images: `views`, `label`, `index`."""
  views = augment.views(
    batch['images'],
    batch['epoch'],
    batch['position'],
    augment.pipelines(config.augment, method.views),
    seed,
    config.image_size,
    batch.get('crops'),
  )
  return {'views': views, 'label': batch['label'], 'index': batch['index']}


def _accumulated(gradient, parts, method, ts, rows, key):
  """Accumulates `gradient` over micro-batches: the mean gradient, the next state, the metrics.

  Micro-batch j of p has the rows j, j + p, j + 2p, ..., so that every device has equally many of its rows. The state
  follows once per step, see `methods`.
  """
  tables = _tables(method, ts.state)

  def add(carry, micro_batch):
    total, state = carry
    i, rows = micro_batch
    rows = jax.tree.map(sharding.shard_rows, rows)
    seen = jax.tree.map(lambda table, now, start: now if table else start, tables, state, ts.state)
    grads, (new, metrics) = gradient(ts.params, seen, rows, jax.random.fold_in(key, i))
    moved = _moved(tables, state, new, ts.state, parts, with_tables=not method.update)
    return (jax.tree.map(jnp.add, total, grads), moved), metrics

  rows = jax.tree.map(lambda x: _split(x, parts, len(x) // parts), rows)
  zeros = jax.tree.map(jnp.zeros_like, ts.params)
  (total, state), metrics = jax.lax.scan(add, (zeros, ts.state), (jnp.arange(parts), rows))
  z, checksum = metrics.pop('embeddings'), metrics.pop('batch_hash')
  entries = metrics.pop('entries', None)  # [parts, n / parts, ...]
  if method.update:
    entries = jax.tree.map(lambda x: _whole(x, x.shape[1]), entries)
    state = {**state, **method.update(ts.state, entries)}
  metrics = jax.tree.map(lambda x: x.mean(0), metrics)
  metrics |= {'embeddings': z.reshape(-1, *z.shape[2:]), 'batch_hash': checksum.sum()}
  return jax.tree.map(lambda x: x / parts, total), state, metrics


def _cached(encode, parts, method, ts, rows, key):
  """A step in micro-batches whose loss sees the whole batch: the gradient, the next state, the metrics.

  1. All micro-batches are encoded; only their embeddings are kept. 2. The loss and its gradient with respect to the
  embeddings. 3. Each micro-batch is encoded again, and its part of that gradient goes back through the encoder. The
  micro-batches are those of `_accumulated`.

  Source: Gao et al. 2021 (gradient caching, arXiv 2101.06983).
  """
  n = len(jax.tree.leaves(rows)[0]) // parts
  rows = jax.tree.map(lambda x: _split(x, parts, n), rows)
  tables = _tables(method, ts.state)

  def forward(state, micro_batch):
    i, rows = micro_batch
    rows = jax.tree.map(sharding.shard_rows, rows)
    z, (new, *rest) = encode(ts.params, rows, jax.random.fold_in(key, i))
    return _moved(tables, state, new, ts.state, parts, with_tables=False), (z, rest)

  state, arrays = jax.lax.scan(forward, ts.state, (jnp.arange(parts), rows))
  z, (extras, (label, sums)) = jax.tree.map(lambda x: _whole(x, n), arrays)
  if method.update:
    state = {**state, **method.update(ts.state, extras.pop('entries'))}

  def objective(params, z):
    loss, metrics = method.objective(z, ts.state)
    return methods.with_probe(params, {'label': label}, loss, metrics | extras)

  (grads, cotangents), metrics = jax.grad(objective, (0, 1), has_aux=True)(ts.params, z)

  def backward(total, micro_batch):
    i, rows, cotangents = micro_batch
    rows, cotangents = jax.tree.map(sharding.shard_rows, (rows, cotangents))
    to_params = jax.vjp(
      lambda params: encode(params, rows, jax.random.fold_in(key, i))[0], ts.params
    )[1]
    return jax.tree.map(jnp.add, total, to_params(cotangents)[0]), None

  cotangents = jax.tree.map(lambda x: _split(x, parts, n), cotangents)
  grads, _ = jax.lax.scan(backward, grads, (jnp.arange(parts), rows, cotangents))
  return grads, state, metrics | {'batch_hash': _hash(sums)}


def _moved(tables, now, new, start, parts, with_tables):
  """The state `now` after one of `parts` micro-batches, which made `new` of `start`; tables change `with_tables` only.

  The mean is a sum of changes: what does not change stays the same, bit for bit.
  """

  def move(table, now, new, start):
    if table:
      return new if with_tables else now
    return now + (new - start) / parts

  return jax.tree.map(move, tables, now, new, start)


def _split(x, parts, n):
  """The rows of x, equally many for each of `parts` n images, by micro-batch: `[parts, rows, ...]`."""
  x = x.reshape(n, parts, -1, *x.shape[1:])
  return x.swapaxes(0, 1).reshape(parts, -1, *x.shape[3:])


def _whole(x, n):
  """The inverse of `_split`."""
  x = x.reshape(len(x), n, -1, *x.shape[2:])
  return sharding.shard_rows(x.swapaxes(0, 1).reshape(-1, *x.shape[3:]))


def _tables(method, state):
  """For each leaf of `state`, whether it belongs to a table, of which there is no mean, see `methods`."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  with_integers = {path[:-1] for path, x in leaves if not jnp.issubdtype(x.dtype, jnp.floating)}

  def is_table(path, _):
    return path[:-1] in with_integers or getattr(path[0], 'key', None) in method.sharded_state

  return jax.tree_util.tree_map_with_path(is_table, state)


def _embedding_metrics(z, due):
  """`health.embedding_metrics` of z `[n, v, d]`, computed only when `due`; otherwise NaN."""
  absent = {k: jnp.float32(jnp.nan) for k in jax.eval_shape(health.embedding_metrics, z)}
  return jax.lax.cond(due, health.embedding_metrics, lambda z: absent, z)


def _row_sums(views):
  """A checksum of each row of views `[n, v, h, w, 3]`, uint32 `[n]`."""
  bits = jax.lax.bitcast_convert_type(views, jnp.uint32)
  return jnp.sum(bits, axis=range(1, bits.ndim), dtype=jnp.uint32)  # modulo 2^32


def _hash(sums):
  """A checksum of `_row_sums` and their order, uint32 `[]`."""
  return jnp.sum(sums * np.arange(1, 2 * len(sums), 2, dtype=np.uint32), dtype=jnp.uint32)


class Step:
  """The training step of a run: `step(state, i)` -> the next state and the metrics, see `train_step`.

  `i` selects the batch: step i of the run, from 0. The buffers of `state` are donated: it cannot be used again.

  Attributes:
    loader: the batches of the run; close it at the end.
  """

  def __init__(
    self,
    program: jax.stages.Wrapped,
    loader: Loader,
    seed: np.uint32,
    teacher: methods.Teacher | None,
    mesh: jax.sharding.Mesh,
  ):
    """`program`: the jitted step of `programs`."""
    self.loader = loader
    self._program, self._seed, self._teacher, self._mesh = program, seed, teacher, mesh
    self._compiled: jax.stages.Compiled | None = None

  def __call__(
    self, state: TrainState, i: int, before: Callable[[Any], None] | None = None
  ) -> tuple[TrainState, Metrics]:
    """Trains on batch i.

    Args:
      state, i: see the class.
      before: called before the step runs, with `memory_analysis()` of the compiled step. This step and those that
        follow then run that program, so that it is compiled once.

    Raises:
      ConfigError: an image cannot be read.
    """
    arguments = self._arguments(state, i)
    with jax.set_mesh(self._mesh):
      if before:
        self._compiled = self._program.lower(*arguments).compile()
        before(self._compiled.memory_analysis())
      return (self._compiled or self._program)(*arguments)

  def lower(self, state: TrainState, i: int) -> jax.stages.Lowered:
    """The program for batch i, lowered for inspection: `step.lower(state, 0).compile()`."""
    arguments = self._arguments(state, i)
    with jax.set_mesh(self._mesh):
      return self._program.lower(*arguments)

  def _arguments(self, state, i):
    rows = self.loader(i)
    return state, self._seed, self._teacher, self.loader.constants, rows


def build(
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  mesh: jax.sharding.Mesh | None = None,
  pretrained: PyTree | None = None,
  teacher: methods.Teacher | None = None,
  resuming: bool = False,
) -> tuple[TrainState, Step]:
  """The initial state and the step of a recipe.

  Args:
    config: a recipe; `data.examples` is filled in.
    dataset: the training images.
    mesh: the devices (default: all).
    pretrained: the weights of `init_from`, as `runs.load_pretrained` returns them.
    teacher: for distillation, as `runs.load_teacher` returns it.
    resuming: a checkpoint will replace the initial state, so that `pretrained` is not needed.

  Raises:
    ConfigError: the method cannot use these images or this recipe, or its weights are missing.
  """
  mesh = mesh or sharding.make_mesh()
  recipes.check(config)
  config = recipes.with_examples(config, len(dataset))
  method = methods.build(config)
  _check_inputs(config, method, dataset, teacher)
  if method.load_pretrained and pretrained is None and not resuming:
    raise ConfigError('init_from is set: pass its weights, runs.load_pretrained(config)')
  seed = np.uint32(config.seed)
  init, program = programs(config, mesh)
  with jax.set_mesh(mesh):
    ts = init(seed)
  if method.load_pretrained and not resuming:
    ts = _with_pretrained(config, method, ts, pretrained)
  batches = loader.for_training(
    dataset,
    config.seed,
    config.batch_size,
    augment.pipelines(config.augment, method.views),
    config.image_size,
    mesh,
  )
  if teacher is not None:
    teacher = sharding.put_replicated(mesh, teacher)
  return ts, Step(program, batches, seed, teacher, mesh)


def _check_inputs(config, method, dataset, teacher):
  if method.needs_labels and not dataset.labelled:
    raise ConfigError(f'method={config.method} needs labels, and not all training images have one')
  if method.views == 1 and config.augment.view2:
    raise ConfigError(f'augment.view2 is set, but method={config.method} uses view1 only')
  if method.needs_teacher and teacher is None:
    raise ConfigError(f'method={config.method} needs a teacher: pass runs.load_teacher(config)')


def programs(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
  """The jitted programs of a run; recipes that compile to the same programs share them.

  Args:
    config: a recipe with `data.examples`.
    mesh: the devices, which may be descriptions without hardware. Call and lower the programs under
      `jax.set_mesh(mesh)`.

  Returns:
    `init(seed) -> state` and `step(state, seed, teacher, constants, rows) -> (state, metrics)`, see `create` and
    `train_step`.
  """
  return _programs(_CompileKey(config), mesh)


class _CompileKey:
  """A recipe as key of the cache of programs: equal to another recipe if its programs are the same."""

  def __init__(self, config):
    self.config = config
    table = fields.of_recipe(config.method)
    flat = sorted(recipes.flatten(config).items())
    self.text = repr([(k, v) for k, v in flat if k not in table or table[k].compiled])

  def __eq__(self, other):
    return self.text == other.text

  def __hash__(self):
    return hash(self.text)


@functools.lru_cache(maxsize=4)
def _programs(key, mesh):
  config = key.config
  method = methods.build(config)
  rate = optim.schedule(config, config.data.examples)
  optimizer = optim.build(config, rate, method.optimizer_groups)
  replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))

  def step(ts, seed, teacher, constants, rows):
    return train_step(
      method, optimizer, rate, config, ts,
      seed=seed, teacher=teacher, constants=constants, rows=rows,
    )  # fmt: skip

  def init(seed):
    return create(method, optimizer, seed, config.image_size, config.data.channels)

  shapes = jax.eval_shape(init, np.uint32(0))

  def place(path, leaf):
    """The sharding of a leaf; `part` is a field of `TrainState`, `key` the key below it."""
    part, key = path[0].name, getattr(path[-1] if len(path) < 2 else path[1], 'key', None)
    if part == 'state' and key in method.sharded_state:
      return by_row
    if config.sharding == 'fsdp' and (part != 'state' or key in method.ema_state):
      return sharding.split(mesh, leaf.shape)
    return replicated

  shardings = jax.tree_util.tree_map_with_path(place, shapes)
  program = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, replicated, replicated, replicated, by_row),
    out_shardings=(shardings, replicated),
    compiler_options=sharding.compiler_options(mesh),
  )
  options = compile_cache.init_options(mesh.devices.flat[0].platform)
  return jax.jit(init, out_shardings=shardings, compiler_options=options), program


def _with_pretrained(config, method, ts, pretrained):
  """The initial state with pretrained weights, on the same devices; with those of a training, the state that it had."""
  params, state = method.load_pretrained(ts.params, ts.state, pretrained)
  opt_state, step, training = ts.opt_state, ts.step, pretrained.get('training')
  if training:
    if config.optimizer != 'sgd' or not config.momentum:
      raise ConfigError('init_state=true needs optimizer=sgd with momentum, as in MoCo')
    steps = training['epoch'] * config.data.examples // config.batch_size
    step, opt_state = np.int32(steps), optim.continued(opt_state, training['momentum'], steps)
  new, old = (
    {jax.tree_util.keystr(k[1:]): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in ((params, state, opt_state), (ts.params, ts.state, ts.opt_state))
  )
  for leaf in sorted(new.keys() | old.keys()):
    if new.get(leaf) != old.get(leaf):
      raise ConfigError(
        f'init_from is of another network: {leaf} is {new.get(leaf)} there and {old.get(leaf)} in this '
        'recipe; set the model.* fields to those of the pretraining'
      )

  def put(x, initial):
    if x is initial:
      return x
    # A copy, because the step donates its buffers.
    return sharding.put(np.array(jax.device_get(x)), initial.sharding)

  return jax.tree.map(put, TrainState(step, params, state, opt_state), ts)
