"""Which network a recipe's `model` part means: a ResNet, or an encoder of the user's own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import plugins
from simclr_jax.errors import ConfigError
from simclr_jax.models import resnet


def build(
  config: Any, dtype: Any = jnp.float32, frozen: int = -1, rematerialize: bool = False
) -> nn.Module:
  """A module whose call `(x, train)` maps images `[n, h, w, c]` in [0, 1] to features `[n, d]`.

  Args:
    config: the `model` part of a recipe. `encoder` may name a Python file with a function
      `build(config, dtype) -> flax module`.
    dtype: of the convolutions and matrix products.
    frozen, rematerialize: as of `resnet.ResNet`. Of an encoder of the user's own, only all (4) is frozen.

  Raises:
    ConfigError: the file cannot be loaded, or what it builds is no flax module.
  """
  if not config['encoder']:
    return resnet.from_config(config, dtype, frozen, rematerialize)
  module = plugins.load(config['encoder'], 'encoder', 'build()').build(config, dtype)
  if not isinstance(module, nn.Module):
    raise ConfigError(
      f'build() in {config["encoder"]} returns {type(module).__name__}, not a flax.linen module'
    )
  if rematerialize:
    raise ConfigError('rematerialize=true is for ResNets; use flax.linen.remat in your encoder')
  return module


def compute_dtype(name: str) -> Any:
  """'float32', 'bfloat16', or 'auto': bfloat16 on accelerators and float32 on CPUs."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
