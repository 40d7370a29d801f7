"""Pretraining methods, one file each.

A method is a module with `build(config) -> Method`, and `FIELDS`, its own recipe fields: name ->
(neutral value, what is allowed: the lowest and highest number, None for no limit, or the words; None:
any text).
The trainer knows two pure functions of a method:

  init(rng, batch) -> (params, state)
  loss(params, state, batch, rng) -> (loss, (state, metrics))

Everything learned by gradient lives in `params`; everything else (BatchNorm statistics, a key encoder,
a queue) lives in `state`. `batch` holds `views` `[n, v, h, w, 3]` float32 in [0, 1], `label` and
`index` int32 `[n]` (label -1: unknown). `loss` is what is minimised; `metrics['loss']` is what is
logged. Two entries of `metrics` are arrays that others turn into figures: `embeddings`, unit rows
`[n, v, d]` (`simclr_jax.health`), and `features`, `[n v, d]`, on which the online probe trains.
A third function, `encoder(params, state)`, gives the variables to evaluate and export.
What else the batches need and no step changes, such as a teacher, is in `batch['given']`.

`params['probe']` is the online probe's and gets an optimizer of its own; `params['classifier']` gets no
layer-wise adaptation.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections

from simclr_jax.errors import ConfigError
from simclr_jax.models import linear

PyTree = Any


class Method(NamedTuple):
  """What `build` of a method's module returns.

  Attributes:
    init, loss, encoder: see above.
    views: how many views of each image `batch['views']` must have.
    row_state: keys of `state` whose arrays are split over the devices by rows, not replicated.
    needs_labels: whether it learns from `batch['label']`, of every image.
    start: `start(params, state)`, outside jit: puts other weights into those of `init`, or None.
    given: `given()`, outside jit: arrays for `batch['given']`, or None.
    classifier: `classifier(params, state)`, the variables of a `models.classifier`, or None.
  """

  init: Callable[..., tuple[PyTree, PyTree]]
  loss: Callable[..., tuple[Any, tuple[PyTree, dict[str, Any]]]]
  encoder: Callable[[PyTree, PyTree], PyTree]
  views: int = 2
  row_state: tuple[str, ...] = ()
  needs_labels: bool = False
  start: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
  given: Callable[[], PyTree] | None = None
  classifier: Callable[[PyTree, PyTree], PyTree] | None = None


def names() -> list[str]:
  """All methods: the files of this folder."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
  """The file of a method.

  Raises:
    ConfigError: there is none.
  """
  if name not in names():
    raise ConfigError(f'method={name!r} is not one of {", ".join(names())}')
  return importlib.import_module(f'{__name__}.{name}')


def build(config: ml_collections.ConfigDict) -> Method:
  """The recipe's method, its online probe included."""
  method = module(config.method).build(config)

  def loss(params, state, batch, rng):
    objective, (state, metrics) = method.loss(params, state, batch, rng)
    h = metrics.pop('features', None)
    if h is not None and 'probe' in params:
      label = jnp.repeat(batch['label'], len(h) // len(batch['label']))
      error, metrics['probe_acc'] = linear.online_loss(params['probe'], h, label)
      objective += error
    return objective, (state, metrics)

  return method._replace(loss=loss)
