"""Features of images under a frozen encoder."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import sharding
from simclr_jax.data import Arrays, Dataset, augment, loader
from simclr_jax.models import classifier, encoders
from simclr_jax.runtime import preemption
from simclr_jax.runtime.checksum import crc32

PyTree = Any


def eval_views(batch: dict[str, jax.Array], pipeline: str, size: int) -> jax.Array:
  """`augment.eval_view` of a batch of `loader.iterate_once`: float32 `[n, size, size, 3]`."""
  if 'crops' not in batch:
    return jax.vmap(lambda x: augment.eval_view(x, pipeline, size))(batch['images'])
  places = batch['crops'][:, 0]
  return jax.vmap(lambda x, p: augment.eval_view(x, pipeline, size, p))(batch['images'], places)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen encoder: call it with images to get features.

  Attributes:
    architecture: `config.architecture`: the recipe's `model` part, `image_size`, and `eval_view`, the
      preprocessing pipeline.
    variables: `params` and, with BatchNorm, `batch_stats`.
    provenance: of the weights.
  """

  architecture: dict[str, Any]
  variables: PyTree
  provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

  def embed(
    self, dataset: Dataset, batch_size: int = 256, progress: Callable[[int], None] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Features h and labels of a data set, in its order; every image is evaluated exactly once.

    Args:
      dataset: images; those of another size than `image_size` are preprocessed by `eval_view`.
      batch_size: images at a time; rounded up to a multiple of the number of devices.
      progress: called with the number of images that are done.

    Returns:
      float32 `[N, d]` and int32 `[N]`, -1 where unknown.

    Raises:
      ConfigError: an image cannot be read.
      Stopped: by a signal.
    """
    if not len(dataset):
      raise ValueError('there are no images to embed')
    mesh = sharding.make_mesh()
    encode = _compiled(json.dumps(self.architecture, sort_keys=True), mesh)
    variables = sharding.put_replicated(mesh, self.variables)
    batch_size += -batch_size % mesh.size
    h, labels = None, np.full(len(dataset), -1, np.int32)
    seen = np.zeros(len(dataset), np.int32)
    pipeline, size = self.architecture['eval_view'], self.architecture['image_size']
    for batch in loader.iterate_once(dataset, pipeline, size, batch_size, mesh):
      out = jax.device_get(encode(variables, batch))
      real = out['index'] >= 0
      index = out['index'][real]
      if h is None:
        h = np.empty((len(dataset), out['h'].shape[1]), np.float32)
      h[index], labels[index] = out['h'][real], out['label'][real]
      np.add.at(seen, index, 1)
      preemption.check()
      if progress:
        progress(int(seen.sum()))
    if (seen != 1).any():
      raise RuntimeError(f'{(seen != 1).sum()} of {len(dataset)} images were not seen once')
    return h, labels

  def __call__(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Features `[n, d]` of images, uint8 `[n, height, width, 3]`; see `embed`."""
    return self.embed(Arrays(images, np.full(len(images), -1, np.int32)), batch_size)[0]

  def digest(self) -> int:
    """CRC-32 over all variables."""
    return crc32(*jax.tree.leaves(jax.device_get(self.variables)))


@functools.lru_cache(maxsize=8)
def _compiled(architecture: str, mesh: jax.sharding.Mesh):
  """The jitted forward pass of an architecture (JSON), compiled once for all weights."""
  parts = json.loads(architecture)
  forward = classifier.forward(parts)

  def encode(variables, batch):
    views = eval_views(batch, parts['eval_view'], parts['image_size'])
    return {'h': forward(variables, views), 'label': batch['label'], 'index': batch['index']}

  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  return jax.jit(encode, in_shardings=(whole, rows), out_shardings=whole)


def untrained(architecture: dict[str, Any], seed: int = 0) -> Encoder:
  """An encoder with random weights, as at the start of a training."""
  size = architecture['image_size']
  net = encoders.build(architecture)
  init = jax.jit(lambda key: net.init(key, jnp.zeros((1, size, size, 3)), train=False))
  return Encoder(architecture, init(jax.random.key(seed)), {'untrained': True, 'seed': seed})


def raw_pixels(dataset: Dataset, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """The pixels as features: the simplest baseline.

  Images of one size are used as they are, others are cropped to their central square and resized to
  `size`. Returns as `Encoder.embed`.
  """
  if isinstance(dataset, Arrays):
    return dataset.images.reshape(len(dataset), -1) / np.float32(255), dataset.labels
  views, labels = preprocess(dataset, 'center_crop(1)', size)
  return views.reshape(len(views), -1), labels


def preprocess(dataset: Dataset, pipeline: str, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Every image through an evaluation pipeline: float32 `[N, size, size, 3]`, and labels `[N]`."""
  mesh = sharding.make_mesh(jax.local_devices()[:1])
  draw = jax.jit(functools.partial(eval_views, pipeline=pipeline, size=size))
  views = np.empty((len(dataset), size, size, 3), np.float32)
  labels = np.empty(len(dataset), np.int32)
  for batch in loader.iterate_once(dataset, pipeline, size, min(64, len(dataset)), mesh):
    preemption.check()
    index = np.asarray(batch['index'])
    real = index >= 0
    views[index[real]] = np.asarray(draw(batch))[real]
    labels[index[real]] = np.asarray(batch['label'])[real]
  return views, labels
