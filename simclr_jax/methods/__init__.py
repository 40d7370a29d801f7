"""Pretraining methods, one file each.

A method is a module with `build(config) -> Method` and, for recipe fields of its own, `FIELDS`: name ->
`fields.Field`. `method=NAME` finds it here, `method=path/to/mine.py` anywhere else. The trainer knows two pure
functions of a method:

  init(rng, batch) -> (params, state)
  loss(params, state, batch, rng) -> (loss, (state, metrics))

Everything learned by gradient lives in `params`; everything else (BatchNorm statistics, an EMA encoder, a queue)
lives in `state`. `loss` is what is minimised. `batch` holds

  views        float32 `[n, v, h, w, 3]` in [0, 1]
  label, index int32 `[n]`; label -1: unknown
  step, steps  int32 `[]`: this step, from 0, and the number of steps of the training, for schedules
  teacher      a `Teacher`, for methods with `needs_teacher`

`metrics['loss']` is what is logged. Two entries of `metrics` are arrays from which others compute metrics:
`embeddings`, unit rows `[n, v, d]` (`simclr_jax.health`), and `features`, `[n v, d]`, on which the online probe trains.

`params['probe']` is the online probe and has an optimizer of its own; `params['classifier']` gets no layer-wise
adaptation. Other top-level keys of `params` may be optimizer groups of their own, see `optim.Group`.
"""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import ml_collections

from simclr_jax import fields, plugins
from simclr_jax.errors import ConfigError
from simclr_jax.models import linear
from simclr_jax.optim import Group

PyTree = Any


class Method(NamedTuple):
  """What `build` of a method's module returns.

  Attributes:
    init, loss: see above.
    encoder: `encoder(params, state)`, the variables of the encoder to evaluate and export.
    views: views of each image in `batch['views']`.
    joint_views: how many of them go through the network in one batch, so that they share BatchNorm
      statistics and, in a contrastive method, are candidates of each other.
    contrastive: every device needs the embeddings of all devices.
    sharded_state: keys of `state` whose arrays are split over the devices by rows, not replicated.
    ema_state: keys of `state` that are moving averages of parameters; split as these with sharding=fsdp.
    needs_labels: learns from `batch['label']` of every image.
    needs_teacher: learns from `batch['teacher']`.
    optimizer_groups: top-level key of `params` -> learning rate of that part.
    load_pretrained: `load_pretrained(params, state, pretrained)`, outside jit: the `params` and `state` of
      `init` with the weights of another run (`runs.load_pretrained`); None: starts from scratch.
    classifier: `classifier(params, state)`, the variables of a `models.classifier`; None: has none.
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
  load_pretrained: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
  classifier: Callable[[PyTree, PyTree], PyTree] | None = None


@flax.struct.dataclass
class Teacher:
  """A classifier that a student learns from.

  Attributes:
    variables: its weights.
    architecture: JSON of `config.architecture`; compiled programs depend on it.
  """

  variables: PyTree
  architecture: str = flax.struct.field(pytree_node=False)


def module(name: str) -> ModuleType:
  """The file of a method.

  Raises:
    ConfigError: there is none.
  """
  fields.of_method(name)  # raises for an unknown name
  if plugins.is_file(name):
    return plugins.load(name, 'method', 'build()')
  return importlib.import_module(f'{__name__}.{name}')


def build(config: ml_collections.ConfigDict) -> Method:
  """The recipe's method, its online probe included.

  Raises:
    ConfigError: the method cannot be used with this recipe.
  """
  method = module(config.method).build(config)
  groups, part = config.model.bn_groups, config.batch_size // config.accumulate_steps
  if part * method.joint_views == groups:
    raise ConfigError(
      f'model.bn_groups={groups} leaves one example in each group: use a larger batch_size'
    )

  def loss(params, state, batch, rng):
    objective, (state, metrics) = method.loss(params, state, batch, rng)
    h = metrics.pop('features', None)
    if h is not None and 'probe' in params:
      label = jnp.repeat(batch['label'], len(h) // len(batch['label']))
      error, metrics['probe_acc'] = linear.online_loss(params['probe'], h, label)
      objective += error
    return objective, (state, metrics)

  return method._replace(loss=loss)
