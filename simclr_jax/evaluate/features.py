"""Features of images under a frozen encoder."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import sharding
from simclr_jax.data import augment
from simclr_jax.models import resnet

PyTree = Any


def make_forward(architecture: dict[str, Any]) -> Callable[[PyTree, jax.Array], jax.Array]:
  """`forward(variables, x)`: x float32 `[n, h, w, 3]` in [0, 1] -> h `[n, d]`.

  BatchNorm uses its running statistics.
  """
  net = resnet.from_config(architecture)
  return functools.partial(net.apply, train=False)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen encoder: call it with images to get features.

  Attributes:
    architecture: the recipe's `model` part, `image_size`, and `eval_view`, the pipeline that images
      go through.
    variables: `params` and `batch_stats`.
    provenance: where they come from.
  """

  architecture: dict[str, Any]
  variables: PyTree
  provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def _compiled(self):
    mesh = sharding.make_mesh()
    forward, size = make_forward(self.architecture), self.architecture['image_size']
    pipeline = self.architecture['eval_view']

    def encode(variables, images):
      return forward(variables, jax.vmap(lambda x: augment.eval_view(x, pipeline, size))(images))

    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
    jitted = jax.jit(encode, in_shardings=(whole, rows), out_shardings=whole)
    return mesh, jitted, sharding.put_replicated(mesh, self.variables)

  def __call__(
    self, images: np.ndarray, batch_size: int = 256, progress: Callable[[int], None] | None = None
  ) -> np.ndarray:
    """Features h of `images`.

    Args:
      images: uint8 or float32 in [0, 1], `[n, height, width, 3]`; another size than the encoder's goes
        through its `eval_view`.
      batch_size: how many at a time; rounded up to a multiple of the number of devices.
      progress: told how many images are done.

    Returns:
      float32 `[n, d]`.
    """
    mesh, jitted, variables = self._compiled
    batch_size += -batch_size % mesh.size
    blocks = []
    for start in range(0, len(images), batch_size):
      block = images[start : start + batch_size]
      padded = np.zeros((batch_size, *images.shape[1:]), images.dtype)  # one shape, one compilation
      padded[: len(block)] = block
      h = jitted(variables, sharding.put_batch(mesh, {'x': padded})['x'])
      blocks.append(np.asarray(h)[: len(block)])
      if progress:
        progress(start + len(block))
    if not blocks:
      raise ValueError('there are no images to embed')
    return np.concatenate(blocks)

  def with_variables(self, variables: PyTree) -> 'Encoder':
    """This encoder with other weights of the same shapes, sharing what is compiled."""
    other = dataclasses.replace(self, variables=variables)
    mesh, jitted, _ = self._compiled
    other.__dict__['_compiled'] = mesh, jitted, sharding.put_replicated(mesh, variables)
    return other

  def digest(self) -> int:
    """CRC-32 over all variables: equal before and after any evaluation."""
    crc = 0
    for leaf in jax.tree.leaves(jax.device_get(self.variables)):
      crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
    return crc


def untrained(architecture: dict[str, Any], seed: int = 0) -> Encoder:
  """The encoder as it was before any training."""
  size = architecture['image_size']
  net = resnet.from_config(architecture)
  init = jax.jit(lambda key: net.init(key, jnp.zeros((1, size, size, 3)), train=False))
  return Encoder(architecture, init(jax.random.key(seed)), {'untrained': True, 'seed': seed})
