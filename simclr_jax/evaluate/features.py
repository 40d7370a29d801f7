"""Features of images under a frozen encoder."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import sharding, stopping
from simclr_jax.data import Arrays, augment, feed
from simclr_jax.models import classifier, resnet

PyTree = Any


def make_forward(
  architecture: dict[str, Any], dtype: Any = jnp.float32
) -> Callable[[PyTree, jax.Array], jax.Array]:
  """`forward(variables, x)`: x float32 `[n, h, w, 3]` in [0, 1] -> h `[n, d]`.

  BatchNorm uses its running statistics. With 'classes' in `architecture`, logits come out.
  `dtype` is that of the convolutions.
  """
  if 'classes' in architecture:
    head_layer, classes = architecture['head_layer'], architecture['classes']
    with_head = classifier.build(architecture, classes, head_layer, dtype=dtype)
    return lambda variables, x: with_head.apply(variables, x, False)[1]
  net = resnet.from_config(architecture, dtype)
  return functools.partial(net.apply, train=False)


def eval_views(batch: dict[str, jax.Array], pipeline: str, size: int) -> jax.Array:
  """`augment.eval_view` of a batch of `data.feed.once`: float32 `[n, size, size, 3]`."""
  if 'crops' not in batch:
    return jax.vmap(lambda x: augment.eval_view(x, pipeline, size))(batch['images'])
  places = batch['crops'][:, 0]
  return jax.vmap(lambda x, p: augment.eval_view(x, pipeline, size, p))(batch['images'], places)


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

  def embed(
    self, dataset, batch_size: int = 256, progress: Callable[[int], None] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Features h and labels of a data set, in its order; every image is looked at exactly once.

    Args:
      dataset: of any kind that `data.load` returns; an image of another size than the encoder's goes
        through its `eval_view`.
      batch_size: how many at a time; rounded up to a multiple of the number of devices.
      progress: told how many images are done.

    Returns:
      float32 `[N, d]` and int32 `[N]`, -1 where unknown.

    Raises:
      ConfigError: an image cannot be read.
      stopping.Stopped: by a signal.
    """
    if not len(dataset):
      raise ValueError('there are no images to embed')
    mesh = sharding.make_mesh()
    encode = _program(json.dumps(self.architecture, sort_keys=True), mesh)
    variables = sharding.put_replicated(mesh, self.variables)
    batch_size += -batch_size % mesh.size
    h, labels = None, np.full(len(dataset), -1, np.int32)
    seen = np.zeros(len(dataset), np.int32)
    pipeline, size = self.architecture['eval_view'], self.architecture['image_size']
    for batch in feed.once(dataset, pipeline, size, batch_size, mesh):
      out = jax.device_get(encode(variables, batch))
      real = out['index'] >= 0
      index = out['index'][real]
      if h is None:
        h = np.empty((len(dataset), out['h'].shape[1]), np.float32)
      h[index], labels[index] = out['h'][real], out['label'][real]
      np.add.at(seen, index, 1)
      stopping.check()
      if progress:
        progress(int(seen.sum()))
    if (seen != 1).any():
      raise RuntimeError(f'{(seen != 1).sum()} of {len(dataset)} images were not seen once')
    return h, labels

  def __call__(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Features `[n, d]` of images, uint8 `[n, height, width, 3]`; see `embed`."""
    return self.embed(Arrays(images, np.full(len(images), -1, np.int32)), batch_size)[0]

  def digest(self) -> int:
    """CRC-32 over all variables: equal before and after any evaluation."""
    crc = 0
    for leaf in jax.tree.leaves(jax.device_get(self.variables)):
      crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
    return crc


@functools.lru_cache(maxsize=8)
def _program(architecture: str, mesh: jax.sharding.Mesh):
  """What an encoder of this architecture (JSON) runs, compiled once for all weights."""
  known = json.loads(architecture)
  forward = make_forward(known)

  def encode(variables, batch):
    views = eval_views(batch, known['eval_view'], known['image_size'])
    return {'h': forward(variables, views), 'label': batch['label'], 'index': batch['index']}

  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  return jax.jit(encode, in_shardings=(whole, rows), out_shardings=whole)


def untrained(architecture: dict[str, Any], seed: int = 0) -> Encoder:
  """The encoder as it was before any training."""
  size = architecture['image_size']
  net = resnet.from_config(architecture)
  init = jax.jit(lambda key: net.init(key, jnp.zeros((1, size, size, 3)), train=False))
  return Encoder(architecture, init(jax.random.key(seed)), {'untrained': True, 'seed': seed})


def raw_pixels(dataset, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """The pixels as features: what an encoder has to beat.

  Images of one size are taken as they are, others are cut to their central square and resized to
  `size`. Returns as `Encoder.embed`.
  """
  if isinstance(dataset, Arrays):
    return dataset.images.reshape(len(dataset), -1) / np.float32(255), dataset.labels
  views, labels = pictures(dataset, 'center_crop(1)', size)
  return views.reshape(len(views), -1), labels


def pictures(dataset, pipeline: str, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Every image through an evaluation's pipeline: float32 `[N, size, size, 3]`, and labels `[N]`."""
  mesh = sharding.make_mesh(jax.local_devices()[:1])
  draw = jax.jit(functools.partial(eval_views, pipeline=pipeline, size=size))
  views = np.empty((len(dataset), size, size, 3), np.float32)
  labels = np.empty(len(dataset), np.int32)
  for batch in feed.once(dataset, pipeline, size, min(64, len(dataset)), mesh):
    stopping.check()
    index = np.asarray(batch['index'])
    real = index >= 0
    views[index[real]] = np.asarray(draw(batch))[real]
    labels[index[real]] = np.asarray(batch['label'])[real]
  return views, labels
