"""Builds the encoder of a recipe: a ResNet, or an encoder of the user's own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import plugins
from simclr_jax.errors import ConfigError
from simclr_jax.models import resnet


def build(
  config: Any, dtype: Any = jnp.float32, frozen: int = -1, rematerialize: str = 'false'
) -> nn.Module:
  """The encoder of a recipe.

  Args:
    config: the `model` part of the recipe. `encoder` may name a Python file with a function
      `build(config, dtype) -> flax module`.
    dtype: dtype of the convolutions and matrix products.
    frozen, rematerialize: as for `resnet.ResNet`. An encoder of the user's own cannot be frozen in part.

  Returns:
    A module, `module(x, train)`: images `[n, h, w, c]` in [0, 1] -> features `[n, d]`.

  Raises:
    ConfigError: the Python file fails, builds no flax module, or cannot be rematerialised.
  """
  if not config['encoder']:
    return resnet.from_config(config, dtype, frozen, rematerialize)
  module = plugins.load(config['encoder'], 'encoder', 'build()').build(config, dtype)
  if not isinstance(module, nn.Module):
    raise ConfigError(
      f'build() in {config["encoder"]} returns {type(module).__name__}, not a flax.linen module'
    )
  if rematerialize != 'false':
    raise ConfigError(
      f'rematerialize={rematerialize} is for ResNets; use flax.linen.remat in your encoder'
    )
  return module


def compute_dtype(name: str) -> Any:
  """The dtype that a recipe's `dtype` names: 'float32', 'bfloat16', or 'auto', bfloat16 on accelerators only."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
