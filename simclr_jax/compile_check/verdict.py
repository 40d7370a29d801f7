"""Judges a compiled step: what its collectives move, whether that is right, and the bottleneck of its time."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import health, methods
from simclr_jax.compile_check import gpus, hardware, hlo
from simclr_jax.compile_check.text import format_bytes
from simclr_jax.data import crop
from simclr_jax.models import network
from simclr_jax.train_state import TrainState


def step_shapes(
  config: ml_collections.ConfigDict, state: TrainState, devices: int, width: int
) -> hlo.StepShapes:
  """The shapes by which the collectives of a recipe are recognised.

  Args:
    config: a recipe, as of `check.prepare`.
    state: its state, arrays or their shapes.
    devices: number of devices.
    width: of the embeddings, `embedding_width`.
  """
  method, side = methods.build(config), config.image_size
  n = _images_per_loss(config, method)
  m = method.views * n
  parameters = {hlo.squeeze(p.shape) for p in jax.tree.leaves(state.params)}
  parameters |= {  # and the part of each on a device, with sharding=fsdp
    hlo.squeeze((*p[:i], size // devices, *p[i + 1 :]))
    for p in parameters
    for i, size in enumerate(p)
    if size % devices == 0 and size > devices
  }
  parameters |= {(math.prod(p),) for p in parameters}  # flat, in the all-reduces of GPUs
  # Metrics are computed from embeddings or, of a classifier, from features.
  widths = {width}
  widths |= {
    state.params[k]['kernel'].shape[0] for k in ('classifier', 'probe') if k in state.params
  }
  images = min(config.batch_size, health.IMAGES)
  sharded = jax.tree.leaves({k: state.state[k] for k in method.sharded_state})
  return hlo.StepShapes(
    embeddings=frozenset({(n, width), (m, width)}),
    similarities=frozenset({(a, b) for a in (n, m) for b in (n, m)}),
    parameters=frozenset(parameters),
    channels=config.data.channels,
    image_sizes=((side, side), crop.canvas_shape(side, method.views, config.data.resize_on)),
    metrics=frozenset(hlo.squeeze((images, v, w)) for v in (1, 2) for w in widths),
    shuffled=n * side * side * config.data.channels
    if config.get('shuffle', 'none') != 'none'
    else 0,
    sharded_rows=frozenset(hlo.squeeze(x.shape[1:]) for x in sharded if x.ndim > 1),
  )


def embedding_width(
  config: ml_collections.ConfigDict, state: TrainState, teacher: methods.Teacher | None = None
) -> int:
  """d of the embeddings `[n, d]` that a contrastive method compares between devices.

  It is read from the method itself, so that a method in a file of your own may have any projection head.

  Args:
    config: a recipe, as of `check.prepare`.
    state: its state, arrays or their shapes.
    teacher: for methods with `needs_teacher`; arrays or their shapes.
  """
  method, n, side = methods.build(config), config.batch_size, config.image_size
  if not method.contrastive:
    return network.output_size(config)
  vector, scalar = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((n,), ()))
  batch = {
    'views': jax.ShapeDtypeStruct((n, method.views, side, side, config.data.channels), jnp.float32),
    'label': vector,
    'index': vector,
    'step': scalar,
    'steps': scalar,
    'teacher': teacher,
  }

  def embeddings(params, state, batch):
    _, (_, metrics) = method.loss(params, state, batch, jax.random.key(0))
    return metrics['embeddings']

  return jax.eval_shape(embeddings, state.params, state.state, batch).shape[-1]


@dataclasses.dataclass(frozen=True)
class CollectiveGroup:
  """Collectives of the same kind, size and purpose.

  Attributes:
    kind, devices: as in `hlo.Collective`.
    purposes: (purpose, bytes) of each part.
    count: how many run per step.
    traffic: bytes that a device sends per step for all of them, at least.
  """

  kind: str
  purposes: tuple[tuple[str, int], ...]
  devices: int
  count: int
  traffic: float

  @property
  def bytes(self) -> int:
    """Size of one collective."""
    return sum(size for _, size in self.purposes)

  @property
  def text(self) -> str:
    """All purposes, that of the largest part first."""
    return ', '.join(name for name, _ in sorted(self.purposes, key=lambda p: -p[1]))


def group_collectives(
  collectives: Sequence[hlo.Collective], shapes: hlo.StepShapes | None, devices: int
) -> list[CollectiveGroup]:
  """Groups equal collectives, in the order of the program.

  Args:
    collectives: of the program.
    shapes: of the arrays of the step; None: the purposes are unknown, 'inside a slice'.
    devices: number of devices of the program.
  """
  groups: dict[tuple, list[hlo.Collective]] = {}
  for c in collectives:
    sizes: collections.Counter[str] = collections.Counter()
    for array in c.arrays:
      scattered = c.devices if c.kind == 'reduce-scatter' else 1
      name = hlo.purpose(array, shapes, devices) if shapes else 'inside a slice'
      sizes[name] += scattered * array.bytes
    groups.setdefault((c.kind, tuple(sorted(sizes.items())), c.devices), []).append(c)
  return [
    CollectiveGroup(
      kind, purposes, size, sum(c.times for c in equal), sum(c.traffic for c in equal)
    )
    for (kind, purposes, size), equal in groups.items()
  ]


def problems(
  config: ml_collections.ConfigDict,
  state: TrainState,
  groups: Sequence[CollectiveGroup],
  devices: int,
  width: int,
) -> list[str]:
  """What is wrong with the collectives of a recipe on several devices: one sentence per problem.

  Args:
    config: a recipe, as of `check.prepare`.
    state: its state, arrays or their shapes.
    groups: the collectives.
    devices: number of devices.
    width: of the embeddings, `embedding_width`.
  """
  if devices == 1:
    return []
  checks = (
    _moved_images(groups),
    _missing_embeddings(config, groups, width),
    _missing_batch_norm(config, state, groups, devices),
  )
  return [sentence for sentence in checks if sentence]


def _with_purpose(groups, *purposes):
  return [g for purpose in purposes for g in groups if any(p == purpose for p, _ in g.purposes)]


def _moved_images(groups):
  images = _with_purpose(groups, 'images', 'activations', 'activations (backward)')
  if not images:
    return ''
  largest = max(images, key=lambda g: g.bytes)
  return (
    f'images move between devices: {sum(g.count for g in images)} collectives, the largest '
    f'{largest.kind} of {format_bytes(largest.bytes)} ({largest.text})'
  )


def _images_per_loss(config, method):
  """The number of images whose embeddings a loss compares."""
  keeps = methods.keeps_negatives(config, method)
  return config.batch_size if keeps else config.batch_size // config.accumulate_steps


def _missing_embeddings(config, groups, width):
  method = methods.build(config)
  if not method.contrastive:
    return ''
  n = _images_per_loss(config, method)
  float32 = method.joint_views * n * width * 4  # bytes
  for group in _with_purpose(groups, 'embeddings'):
    if group.kind in ('all-gather', 'all-reduce') and dict(group.purposes)['embeddings'] >= float32:
      return ''
  return 'the embeddings are not gathered from all devices: each device has only its own images as negatives'


def _missing_batch_norm(config, state, groups, devices):
  bn_groups = config.model.bn_groups
  frozen = config.get('fine_tune_after_block', -1) == 4
  expected = 4 * sum(math.prod(s.shape) for s in jax.tree.leaves(_batch_stats(config, state)))
  if bn_groups % devices == 0 or frozen or not expected:
    return ''
  forward = 'BatchNorm (forward)'
  exchanged = sum(g.count * dict(g.purposes)[forward] for g in _with_purpose(groups, forward))
  if exchanged and (exchanged >= expected or bn_groups > 1):
    return ''
  return (
    f'BatchNorm of {bn_groups} group(s) does not reach all devices: its statistics take '
    f'{format_bytes(expected)}, and {format_bytes(exchanged)} are exchanged'
  )


def _batch_stats(config, state):
  """The running averages of BatchNorm: of the whole network where the method has them, else of the encoder."""
  if 'stats' in state.state:
    return state.state['stats']
  encoder = methods.build(config).encoder(state.params, state.state)
  return encoder.get('batch_stats', {})


def roofline(
  topology: hardware.Topology | gpus.Gpus,
  compute: float,
  bytes_accessed: float,
  groups: Sequence[CollectiveGroup],
  transfers: Sequence[tuple[str, int]],
) -> dict[str, float]:
  """Seconds that each resource needs per step at its published peak; the largest is the bottleneck.

  Args:
    topology: the TPU or GPUs.
    compute: seconds of the operations.
    bytes_accessed: per device. XLA's cost analysis also counts bytes of arrays that stay on the chip.
    groups: the collectives.
    transfers: `hlo.between_slices`.

  Returns:
    `compute`; `memory`, the HBM; `links`, the interconnect (ICI); with several slices also `network`, the
    data centre network (DCN), where its bandwidth is published.
  """
  chip, slices = topology.chip, topology.slices
  seconds = {
    'compute': compute,
    'memory': bytes_accessed * chip.devices / chip.hbm_bandwidth,
    'links': sum(g.traffic for g in groups) * chip.devices / chip.ici_bandwidth,
  }
  if slices > 1 and chip.dcn_bandwidth:
    factor = {'all-reduce': 2 * (slices - 1) / slices, 'all-gather': slices - 1}
    sent = sum(size * factor.get(kind, 1) for kind, size in transfers)
    seconds['network'] = sent * chip.devices / chip.dcn_bandwidth
  return seconds
