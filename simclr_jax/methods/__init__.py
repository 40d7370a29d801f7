"""Pretraining methods, one file each.

A method is a module with `build(config) -> Method`. The trainer knows two pure functions of it:

  init(rng, batch) -> (params, state)
  loss(params, state, batch, rng) -> (loss, (state, metrics))

Everything learned by gradient lives in `params`; everything else (BatchNorm statistics, a key encoder,
a queue) lives in `state`. `batch` holds `views` `[n, 2, h, w, 3]` float32 in [0, 1], `label` and
`index` int32 `[n]` (label -1: unknown). `loss` is what is minimised; `metrics['loss']` is what is
logged. A third function, `encoder(params, state)`, gives the variables to evaluate and export.

`params['probe']`, if there, is the online probe's and gets an optimizer of its own.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from simclr_jax.config import ConfigError

PyTree = Any


class Method(NamedTuple):
  """What `build` of a method's module returns."""

  init: Callable[..., tuple[PyTree, PyTree]]
  loss: Callable[..., tuple[Any, tuple[PyTree, dict[str, Any]]]]
  encoder: Callable[[PyTree, PyTree], PyTree]


def build(config: ml_collections.ConfigDict) -> Method:
  """The recipe's method: `build` of the module `simclr_jax.methods.<config.method>`."""
  name = f'{__name__}.{config.method}'
  if not config.method.isidentifier() or importlib.util.find_spec(name) is None:
    raise ConfigError(
      f'method={config.method!r}: there is no simclr_jax/methods/{config.method}.py'
    )
  return importlib.import_module(name).build(config)
