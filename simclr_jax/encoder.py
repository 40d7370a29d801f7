"""A frozen encoder that computes features of images; raw pixels as a baseline."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import sharding
from simclr_jax.data import Arrays, Dataset, augment, loader, objects
from simclr_jax.errors import ConfigError
from simclr_jax.models import classifier, encoders, mlp
from simclr_jax.runtime import compile_cache, preemption
from simclr_jax.runtime.checksum import crc32

PyTree = Any


def eval_views(batch: dict[str, jax.Array], pipeline: str, size: int) -> jax.Array:
  """Preprocesses a batch of `loader.iterate_once` (`augment.eval_view`): float32 `[n, size, size, c]` in [0, 1]."""
  if 'crops' not in batch:
    return jax.vmap(lambda x: augment.eval_view(x, pipeline, size))(batch['images'])
  crops = batch['crops'][:, 0]
  return jax.vmap(lambda x, crop: augment.eval_view(x, pipeline, size, crop))(
    batch['images'], crops
  )


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen encoder: `encoder(images)` -> features.

  Attributes:
    architecture: plain data, see `config.architecture`.
    variables: `params` and, with BatchNorm, `batch_stats`.
    provenance: where the weights come from: `workdir`, `step`, `config`, `versions` of a run.
  """

  architecture: dict[str, Any]
  variables: PyTree
  provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

  def embed(
    self, dataset: Dataset, batch_size: int = 256, progress: Callable[[int], None] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of all images of a data set, in its order.

    Args:
      dataset: N images of any size; they are preprocessed by the pipeline `eval_view`.
      batch_size: images per batch; rounded up to a multiple of the number of devices.
      progress: called after each batch with the number of finished images.

    Returns:
      Features h, float32 `[N, d]`, and labels, int32 `[N]`, -1 where unknown.

    Raises:
      ValueError: the data set is empty.
      ConfigError: an image cannot be read.
      Stopped: a signal arrived.
    """
    if not len(dataset):
      raise ValueError('there are no images to embed')
    mesh = sharding.make_mesh()
    encode = _compiled(json.dumps(self.architecture, sort_keys=True), mesh)
    variables = sharding.put_replicated(mesh, self.variables)
    batch_size += -batch_size % mesh.size
    h, labels = np.empty((0, 0), np.float32), np.full(len(dataset), -1, np.int32)
    times_evaluated = np.zeros(len(dataset), np.int32)
    pipeline, size = self.architecture['eval_view'], self.architecture['image_size']
    for batch in loader.iterate_once(dataset, pipeline, size, batch_size, mesh):
      self._check_channels(batch['images'].shape[-1])
      out = jax.device_get(encode(variables, batch))
      real = out['index'] >= 0  # the other rows are padding
      index = out['index'][real]
      if not h.size:
        h = np.empty((len(dataset), out['h'].shape[1]), np.float32)
      h[index], labels[index] = out['h'][real], out['label'][real]
      np.add.at(times_evaluated, index, 1)
      preemption.check()
      if progress:
        progress(int(times_evaluated.sum()))
    wrong = int((times_evaluated != 1).sum())
    if wrong:
      raise RuntimeError(f'{wrong} of {len(dataset)} images were not evaluated exactly once')
    return h, labels

  def forward(self, views: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Features of images that are preprocessed already, on one device.

    Args:
      views: float32 `[n, size, size, c]` in [0, 1].
      batch_size: images per batch.

    Returns:
      float32 `[n, d]`.

    Raises:
      ConfigError: the images have another number of channels than the encoder.
      Stopped: a signal arrived.
    """
    self._check_channels(views.shape[-1])
    forward = _compiled_forward(json.dumps(self.architecture, sort_keys=True))
    parts = []
    for start in range(0, len(views), batch_size):
      preemption.check()
      part = views[start : start + batch_size]
      padding = np.zeros((min(batch_size, len(views)) - len(part), *views.shape[1:]), views.dtype)
      parts.append(
        np.asarray(forward(self.variables, np.concatenate([part, padding])))[: len(part)]
      )
    return np.concatenate(parts)

  def _check_channels(self, found):
    channels = self.architecture.get('channels', 3)
    if found != channels:
      raise ConfigError(f'the encoder needs images of {channels} channels, these have {found}')

  def __call__(self, images: Any, batch_size: int = 256) -> np.ndarray:
    """Features, float32 `[n, d]`, in the order of the images.

    Args:
      images: uint8 `[n, height, width, 3]`, or anything else that `data.objects.load` takes: a folder, a list.
      batch_size: as for `embed`, which has the errors.
    """
    config = self.provenance.get('config', {}).get('data')
    config = config and ml_collections.ConfigDict(config)
    return self.embed(objects.load(images, None, config), batch_size)[0]

  def digest(self) -> int:
    """The CRC-32 checksum of all variables."""
    return crc32(*jax.tree.leaves(jax.device_get(self.variables)))


@functools.lru_cache(maxsize=8)
def _compiled(architecture: str, mesh: jax.sharding.Mesh):
  """The jitted forward pass of an architecture (JSON), which all encoders of this architecture share."""
  parts = json.loads(architecture)
  forward = classifier.forward(parts)

  def encode(variables, batch):
    views = eval_views(batch, parts['eval_view'], parts['image_size'])
    return {'h': forward(variables, views), 'label': batch['label'], 'index': batch['index']}

  replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))
  return jax.jit(encode, in_shardings=(replicated, by_row), out_shardings=replicated)


@functools.lru_cache(maxsize=8)
def _compiled_forward(architecture: str):
  """The jitted forward pass of an architecture (JSON) on one device."""
  return jax.jit(classifier.forward(json.loads(architecture)))


def untrained(architecture: dict[str, Any], seed: int = 0) -> Encoder:
  """An encoder with random weights, initialised as for training."""
  options = compile_cache.init_options(jax.default_backend())
  init = jax.jit(_init(architecture), compiler_options=options)
  variables = init(jax.random.key(seed))
  return Encoder(architecture, variables, {'untrained': True, 'seed': seed})


def shapes(architecture: dict[str, Any]) -> PyTree:
  """Shapes and dtypes of the variables of an encoder, `jax.ShapeDtypeStruct`; nothing is computed."""
  return jax.eval_shape(_init(architecture), jax.random.key(0))


def head_shapes(architecture: dict[str, Any]) -> PyTree:
  """Shapes and dtypes of the variables of the projection head of an architecture; nothing is computed."""
  net, head, x = encoders.build(architecture), mlp.head(architecture), _image(architecture)

  def init(key):
    h, _ = net.init_with_output(key, x, train=False)
    return head.init(key, h, train=False)

  return jax.eval_shape(init, jax.random.key(0))


def _init(architecture):
  net, x = encoders.build(architecture), _image(architecture)
  return lambda key: net.init(key, x, train=False)


def _image(architecture):
  size = architecture['image_size']
  return jnp.zeros((1, size, size, architecture.get('channels', 3)))


def raw_pixels(dataset: Dataset, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
  """The pixels as features, in [0, 1]: the simplest baseline. Returns the same as `Encoder.embed`.

  Images of one size are used as they are. Other images are cropped to their central square and resized to `size`.
  """
  if isinstance(dataset, Arrays):
    return dataset.images.reshape(len(dataset), -1) / np.float32(255), dataset.labels
  views, labels = preprocess(dataset, 'center_crop(1)', size)
  return views.reshape(len(views), -1), labels


def preprocess(dataset: Dataset, pipeline: str, size: int) -> tuple[np.ndarray, np.ndarray]:
  """Preprocesses all images of a data set on one device.

  Args:
    dataset: N images.
    pipeline: an evaluation pipeline, such as 'center_crop(1)'.
    size: side of the result in pixels.

  Returns:
    Images, float32 `[N, size, size, c]` in [0, 1], and labels, int32 `[N]`, -1 where unknown.

  Raises:
    ConfigError: an image cannot be read.
    Stopped: a signal arrived.
  """
  mesh = sharding.make_mesh(jax.local_devices()[:1])
  draw = jax.jit(functools.partial(eval_views, pipeline=pipeline, size=size))
  views = np.empty((0,), np.float32)
  labels = np.empty(len(dataset), np.int32)
  for batch in loader.iterate_once(dataset, pipeline, size, min(64, len(dataset)), mesh):
    preemption.check()
    index = np.asarray(batch['index'])
    real = index >= 0
    drawn = np.asarray(draw(batch))
    if not len(views):
      views = np.empty((len(dataset), *drawn.shape[1:]), np.float32)
    views[index[real]] = drawn[real]
    labels[index[real]] = np.asarray(batch['label'])[real]
  return views, labels
