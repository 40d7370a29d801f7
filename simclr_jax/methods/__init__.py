"""Training methods, one file each.

A method is a module with a function `build(config) -> Method` and, if it has recipe fields of its own, a dict
`FIELDS`: name -> `fields.Field`. `method=NAME` is a file of this folder, `method=path/to/mine.py` any other file.
The training step calls two pure functions of a method:

    init(rng, batch) -> (params, state)
    loss(params, state, batch, rng) -> (loss, (state, metrics))

`params` are the parameters that are learned by gradient, `state` is everything else: BatchNorm statistics, an EMA
encoder, a queue. The returned `loss` is minimised. `batch` has the keys

    views        float32 `[n, v, h, w, 3]` in [0, 1]
    label, index int32 `[n]`: label, -1 if unknown, and index in the data set
    step, steps  int32 `[]`: this step, from 0, and the number of steps of the training, for schedules
    teacher      a `Teacher`, for methods with `needs_teacher`

`init` gets a batch with `views` only. `metrics` are scalars; `metrics['loss']` is the logged loss. In addition,
`metrics` has arrays: `embeddings`, unit rows `[n, v, d]`, for `simclr_jax.health`; and optionally `features`,
`[n v, d]`, for the online probe, and `entries`, for `Method.update`.

With `accumulate_steps` = p, `loss` is called for p micro-batches of n / p images, each time with the state from before
the step. The new state is the mean of the p states, so a moving average moves once per step, by the mean of the
micro-batches. Tables have no mean: `sharded_state`, and dicts that contain integers, such as a queue and its pointer. A
method writes its tables in `Method.update`, once per step; without `update`, each micro-batch passes them to the next.

A loss that compares the images of a batch with each other needs all n of them. Such a method has two more functions, of
which `loss` is composed, see `joined`:

    encode(params, state, batch, rng) -> (z, (state, extras))
    objective(z, state) -> (loss, metrics)

`z` is a tree of arrays that get a gradient; `extras` are the metrics `features` and `entries`, which get none. In each of
these arrays, the rows are in the order of the images. Micro-batches are then encoded one by one, and the loss is that of
the whole batch, see `train_state`. Such a method writes its tables in `update` only.

`params['probe']` is the online probe, which has its own optimizer. `params['classifier']` is excluded from the
layer-wise adaptation of LARS. Other top-level keys of `params` may have their own learning rate, see `optim.Group`.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import fields, plugins
from simclr_jax.errors import ConfigError
from simclr_jax.models import by_parts, linear, network
from simclr_jax.optim import Group

PyTree = Any


class Method(NamedTuple):
  """A training method, returned by `build` of its module.

  Attributes:
    init: see above.
    loss: see above.
    encoder: `encoder(params, state)` -> the variables of the encoder that is evaluated and exported.
    views: number of views of each image in `batch['views']`.
    joint_views: how many of these views go through the network in one batch, so that they share BatchNorm
      statistics and, in a contrastive method, are candidates of each other.
    contrastive: whether every device needs the embeddings of all devices.
    sharded_state: keys of `state` whose rows are split over the devices; other keys are replicated.
    ema_state: keys of `state` that are moving averages of parameters; with sharding=fsdp they are sharded, too.
    needs_labels: whether every image needs a label.
    needs_teacher: whether `batch` needs a teacher.
    optimizer_groups: top-level key of `params` -> learning rate of these parameters.
    update: `update(state, entries)` -> new values for some keys of `state`: writes what the images of a step leave in
      tables. `entries` are arrays `[n, ...]`, one row per image in the order of the batch. `loss` calls it, too, and
      returns its result in the state and `entries` in the metrics; None: the method has no such tables.
    load_pretrained: `load_pretrained(params, state, pretrained)`, called outside jit -> the `params` and `state` of
      `init` with the weights that `runs.load_pretrained` returns; None: the method starts from scratch.
    classifier: `classifier(params, state)` -> the variables of a `models.classifier.Classifier`; None: the method
      trains no classifier.
    encode: see above; None: with `accumulate_steps`, the loss is that of each micro-batch.
    objective: as `encode`.
    notes: `notes(devices)` -> sentences about how the recipe is computed on this number of devices.
  """

  init: Callable[..., tuple[PyTree, PyTree]]
  loss: Callable[..., tuple[Any, tuple[PyTree, dict[str, Any]]]]
  encoder: Callable[[PyTree, PyTree], PyTree]
  views: int = 2
  joint_views: int = 1
  contrastive: bool = False
  sharded_state: tuple[str, ...] = ()
  ema_state: tuple[str, ...] = ()
  needs_labels: bool = False
  needs_teacher: bool = False
  optimizer_groups: Mapping[str, Group] = {}
  update: Callable[[PyTree, PyTree], dict[str, PyTree]] | None = None
  load_pretrained: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
  classifier: Callable[[PyTree, PyTree], PyTree] | None = None
  encode: Callable[..., tuple[PyTree, tuple[PyTree, dict[str, Any]]]] | None = None
  objective: Callable[[PyTree, PyTree], tuple[Any, dict[str, Any]]] | None = None
  notes: Callable[[int], list[str]] | None = None


@flax.struct.dataclass
class Teacher:
  """The classifier on whose predictions a student is trained.

  Attributes:
    variables: its weights.
    architecture: `config.architecture` as JSON; compiled programs depend on it.
  """

  variables: PyTree
  architecture: str = flax.struct.field(pytree_node=False)


def module(name: str) -> ModuleType:
  """The module of a method: a built-in name, or the path of a Python file, which is executed.

  Raises:
    ConfigError: there is no such method, or its file has no `build`.
  """
  fields.of_method(name)  # raises ConfigError for an unknown name
  if plugins.is_file(name):
    return plugins.load(name, 'method', 'build()')
  return importlib.import_module(f'{__name__}.{name}')


def build(config: ml_collections.ConfigDict) -> Method:
  """The method of a recipe. Its `loss` includes the loss of the online probe, if the recipe has one.

  Raises:
    ConfigError: the method cannot be used with this recipe.
  """
  method = module(config.method).build(config)
  if config.init_from and not method.load_pretrained:
    method = method._replace(load_pretrained=functools.partial(warm_start, ema=method.ema_state))
  groups, micro_batch = config.model.bn_groups, config.batch_size // config.accumulate_steps
  if micro_batch * method.joint_views == groups:
    raise ConfigError(
      f'model.bn_groups={groups} leaves one example per group: use a larger batch_size or fewer groups'
    )

  def loss(params, state, batch, rng):
    value, (state, metrics) = method.loss(params, state, batch, rng)
    value, metrics = with_probe(params, batch, value, metrics)
    return value, (state, metrics)

  return method._replace(loss=loss)


def joined(
  encode: Callable[..., tuple[PyTree, tuple[PyTree, dict[str, Any]]]],
  objective: Callable[[PyTree, PyTree], tuple[Any, dict[str, Any]]],
  update: Callable[[PyTree, PyTree], dict[str, PyTree]] | None = None,
) -> Callable[..., tuple[Any, tuple[PyTree, dict[str, Any]]]]:
  """The `loss` of a method that is split in `encode` and `objective`; `update` as of `Method`."""

  def loss(params, state, batch, rng):
    z, (new, extras) = encode(params, state, batch, rng)
    value, metrics = objective(z, state)
    if update:
      new = {**new, **update(state, extras['entries'])}
    return value, (new, metrics | extras)

  return loss


def with_probe(
  params: PyTree, batch: PyTree, value: jax.Array, metrics: dict[str, Any]
) -> tuple[jax.Array, dict[str, Any]]:
  """Loss and metrics of a method, with those of the online probe if `params` has one.

  Args:
    params: of the method.
    batch: with `label`, int `[n]`.
    value: the loss.
    metrics: its metrics; `features` `[n v, d]`, if they are among them, are removed.
  """
  metrics = dict(metrics)
  h = metrics.pop('features', None)
  if h is None or 'probe' not in params:
    return value, metrics
  label = jnp.repeat(batch['label'], len(h) // len(batch['label']))
  probe_loss, metrics['probe_acc'] = linear.online_loss(params['probe'], h, label)
  return value + probe_loss, metrics


def keeps_negatives(config: ml_collections.ConfigDict, method: Method) -> bool:
  """Whether the loss sees the whole batch although the recipe accumulates gradients."""
  return method.encode is not None and config.accumulate_negatives == 'batch'


def notes(config: ml_collections.ConfigDict, devices: int) -> list[str]:
  """Sentences about how a recipe is computed on this number of devices: accumulation, large batches, parts."""
  method, parts, n = build(config), config.accumulate_steps, config.batch_size
  sentences = method.notes(devices) if method.notes else []
  if parts > 1:
    groups = parts * config.model.bn_groups
    seen = f'all {n:,} images of a step' if keeps_negatives(config, method) else 'one micro-batch'
    sentences.append(
      f'accumulate_steps={parts}: micro-batches of {n // parts:,} images; the loss sees {seen}, BatchNorm '
      f'normalises {groups} groups of {n // groups:,} images'
    )
  if config.rematerialize == 'parts':
    views = method.joint_views * n // (parts * devices)
    count = by_parts.number_of_parts(views)
    sentences.append(
      f'rematerialize=parts: each block on {count} parts of {views // count:,} views per device, BatchNorm as without parts'
      + (
        '' if count > 1 else ' (no number from 2 to 8 divides the views: choose another batch_size)'
      )
    )
  return sentences


def projection(config: ml_collections.ConfigDict, params: PyTree, state: PyTree) -> PyTree:
  """The variables of encoder and projection head, see `models.network.projection`.

  Raises:
    ConfigError: the method trains no projection head.
  """
  trained = fields.of_method(config.method)
  if 'head_layer' in trained or 'head' not in params or 'stats' not in state:
    raise ConfigError(
      f'method={config.method} trains no projection head, so there are no features z: use the features h'
    )
  return network.projection(params, state['stats'])


def warm_start(
  params: PyTree, state: PyTree, pretrained: PyTree, ema: tuple[str, ...] = ()
) -> tuple[PyTree, PyTree]:
  """The `load_pretrained` of methods that have none of their own: pretraining that starts from another run.

  The encoder is initialised with the pretrained weights, and so is the projection head if `head_fits`. Queues,
  optimizer and learning rate start as in a new run.

  Args:
    params, state: of `init`; `params` has the keys 'encoder' and 'head', `state` the key 'stats'.
    pretrained: as `runs.load_pretrained` returns it.
    ema: keys of `state` that are EMA encoders, see `momentum.init_ema`; they get the same weights.

  Raises:
    ConfigError: the method has no such encoder.
  """
  if 'encoder' not in params or 'stats' not in state:
    raise ConfigError('init_from is set, but the method has no load_pretrained')
  parts = ('encoder', 'head') if head_fits(params, pretrained) else ('encoder',)
  weights = {part: pretrained['params'][part] for part in parts}
  stats = {**state['stats'], **{part: pretrained['batch_stats'][part] for part in parts}}
  new = {key: {**state[key], 'params': {**state[key]['params'], **weights}, 'stats': stats} for key in ema if key in state}  # fmt: skip
  return {**params, **weights}, {**state, 'stats': stats, **new}


def head_fits(params: PyTree, pretrained: PyTree) -> bool:
  """Whether the pretrained projection head has the shapes of the head in `params`."""

  def shapes(tree):
    return {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}

  return shapes(params.get('head', {})) == shapes(pretrained['params']['head'])
