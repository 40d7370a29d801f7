"""Compiles a recipe's training step for TPUs that are not there, and looks at what came out.

The step is that of `train_state`, the compiler is the one that TPUs use (libtpu), the topology is described
and not found. What the compiler says is memory, operations and collectives; times are those divided by the
published peaks of the chip, not a prediction.
"""

import collections
import importlib.metadata
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from simclr_jax import config as recipes, methods, runs, sharding, train_state
from simclr_jax.compile_check import hardware, hlo, verdict
from simclr_jax.compile_check.text import format_bytes
from simclr_jax.data import loader
from simclr_jax.errors import ConfigError
from simclr_jax.models import classifier

IMAGENET = 1_281_167  # training images
GIB = 2**30


class DoesNotFit(RuntimeError):
  """The step needs more memory than a device has: `needed` and `limit` in bytes, None where unsaid."""

  def __init__(self, message: str):
    super().__init__(message)
    self.needed, self.limit = memory_in(message)


def memory_in(message: str) -> tuple[float | None, float | None]:
  """Bytes needed and bytes there, of the compiler's RESOURCE_EXHAUSTED."""
  unit = {'': 1, 'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}

  def size(match):
    return float(match[1]) * unit[match[2]] if match else None

  number = r'([\d.]+)([KMGT]?)i?B?'
  needed = re.search(rf'(?:Used |temporaries \(|requirement is |allocate ){number}', message)
  limit = re.search(rf'(?: of |\(HBM \(|available HBM \(|limit (?:is|of) ){number}', message)
  return size(needed), size(limit)


def devices_of(topology: hardware.Topology) -> list[Any]:
  """The JAX devices of a topology, described.

  Raises:
    ConfigError: TPU's library is missing, or it knows no such topology.
  """
  from jax.experimental import topologies

  os.environ.update(hardware.ENVIRONMENT)  # read when the library is loaded, now
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise ConfigError(
      "the TPU compiler, libtpu, is missing: pip install 'jax[tpu]', as the extra compile-check does "
      '(Linux on x86-64 only)'
    ) from None
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=topology.name, **topology.options
    ).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
    reason = str(error).split('\n')[0]
    raise ConfigError(
      f'--topology={topology.text!r}: the TPU compiler refuses it: {reason}'
    ) from None
  if len(found) != topology.devices:
    raise ConfigError(
      f'--topology={topology.text!r} should have {topology.devices} devices, but the TPU compiler '
      f'describes {len(found)}'
    )
  return list(found)


def prepared(
  config: ml_collections.ConfigDict, devices: int
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """The recipe as it is on TPUs, and what was assumed for it.

  Raises:
    ConfigError: it cannot be run on so many devices.
  """
  notes = []
  examples = config.data.examples
  if not examples:
    examples = IMAGENET
    if not config.data.name.startswith('imagenet2012'):
      notes.append(f'assumed: {examples:,} training images, ImageNet (--config.data.examples=N)')
  filled = recipes.with_examples(config, examples)
  with filled.unlocked():
    if filled.dtype == 'auto':
      filled.dtype = 'bfloat16'
  size = filled.batch_size
  if size % devices:
    unit = math.lcm(devices, filled.model.bn_groups)
    near = ' or '.join(f'{n}' for n in (size // unit * unit, -(-size // unit) * unit) if n)
    raise ConfigError(
      f'batch_size={size} is not divisible by the number of devices, {devices}: '
      f'set --config.batch_size={near}'
    )
  return filled.lock(), notes


def lowered(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
  """The training step of a prepared recipe, `train_state.train_step`, not yet compiled."""
  method = methods.build(config)
  init, step = train_state.programs(config, mesh)
  resident = None
  if config.data.on_device == 'yes' or config.data.source == 'digits':
    resident = (config.image_size, config.image_size)
  constants, rows = loader.shapes(
    config.data.examples,
    config.batch_size,
    method.views,
    config.image_size,
    config.data.resize_on,
    resident,
  )
  seed = jax.ShapeDtypeStruct((), np.uint32)
  with jax.set_mesh(mesh):
    state = jax.eval_shape(init, seed)
    return state, step.lower(state, seed, _teacher(config, method), constants, rows)


def _teacher(config, method):
  """The shapes of the teacher that the method needs; without a run, of one as large as the student."""
  if not method.needs_teacher:
    return None
  if config.teacher:
    return jax.eval_shape(lambda: runs.load_teacher(config))
  net = classifier.build(config.model, config.data.num_classes, config.head_layer)
  x = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
  # The key is made inside: in the scope of a described mesh, nothing can be computed.
  shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)
  return methods.Teacher(shapes, json.dumps(recipes.architecture(config, classifier=True)))


def compiled(step) -> Any:
  """Compiles.

  Raises:
    DoesNotFit: into the memory of a device.
  """
  try:
    return step.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFit(str(error)) from None


# What came out.


def memory(program, limit: float) -> dict[str, float]:
  """HBM of a device by kind, bytes. What is aliased is both argument and output, and there once."""
  m = program.memory_analysis()
  found = {
    'arguments': m.argument_size_in_bytes,
    'outputs': m.output_size_in_bytes,
    'aliased': -m.alias_size_in_bytes,
    'temporaries': m.temp_size_in_bytes,
    'code': m.generated_code_size_in_bytes,
  }
  return {**found, 'total': sum(found.values()), 'limit': limit}


def check(
  config: ml_collections.ConfigDict,
  topology: hardware.Topology,
  recipe: str = '',
  text_to: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles and judges.

  Args:
    config: a checked recipe (`config.load`).
    topology: what it is compiled for.
    recipe: its name, for the report.
    text_to: a file that gets the compiled program, as XLA writes it.

  Returns:
    Plain data: what was compiled, `memory`, `flops`, `bytes_accessed`, `collectives`, `seconds`,
    `bound`, `problems` (none: all is well), `notes`. Figures are of one device and step.

  Raises:
    ConfigError: it cannot be compiled at all: the recipe, the topology, a missing library.
  """
  devices = devices_of(topology)
  mesh = sharding.make_mesh(devices)
  config, notes = prepared(config, len(devices))
  result = {
    'recipe': recipe,
    'method': config.method,
    'topology': topology.text,
    'shape': topology.name,
    'slices': topology.slices,
    'devices': len(devices),
    'hosts': len({d.process_index for d in devices}),
    'device_kind': devices[0].device_kind,
    'batch_size': config.batch_size,
    'dtype': config.dtype,
    'bn_groups': config.model.bn_groups,
    'versions': {'jax': jax.__version__, 'libtpu': importlib.metadata.version('libtpu')},
    'notes': notes,
  }
  if methods.build(config).needs_teacher and not config.teacher:
    notes.append("assumed: a teacher of the student's size (--config.teacher=RUN)")
  state, step = lowered(config, mesh)
  parameters = jax.tree.leaves(state.params)
  result['parameters'] = sum(math.prod(p.shape) for p in parameters)
  began = time.monotonic()
  try:
    program = compiled(step)
  except DoesNotFit as error:
    limit = error.limit or topology.chip.hbm
    needs = (
      f'needs {format_bytes(error.needed)} of HBM on a device' if error.needed else 'does not fit'
    )
    if 'HLO temporaries' in str(error):  # the state comes on top of it
      needs += ', temporaries alone'
    result |= {
      'compile_seconds': round(time.monotonic() - began, 1),
      'memory': {'total': error.needed, 'limit': limit},
      'message': str(error).split('\n')[0],
      'problems': [
        f'batch_size={config.batch_size} {needs}, there are {format_bytes(limit)}: lower --config.batch_size '
        '(--find-batch finds the largest) or take more devices'
      ],
    }
    return result
  result['compile_seconds'] = round(time.monotonic() - began, 1)
  text = program.as_text()
  if text_to:
    text_to.write_text(text)
  cost = program.cost_analysis()
  flops, accessed = cost['flops'], cost['bytes accessed']
  one = topology.slices == 1
  what = verdict.known(config, state, len(devices)) if one else None
  found = verdict.moved(hlo.collectives(text, len(devices)), what, len(devices))
  transfers = hlo.between_slices(text)
  seconds = verdict.bounds(topology, flops, accessed, found, transfers)
  if not one:
    notes.append(
      'several slices: the compiler does not say what a collective is for; whether negatives and '
      'BatchNorm reach all devices is told of one slice only'
    )
  if any(p == 'shuffled images' for g in found for p, _ in g.purposes):
    notes.append(
      f'shuffle={config.shuffle} moves the key images between devices, as the recipe asks'
      + (': shuffle=transpose moves fewer' if config.shuffle == 'permute' else '')
    )
  result |= {
    'memory': memory(program, topology.chip.hbm),
    'flops': flops,
    'bytes_accessed': accessed,
    'intensity': flops / accessed,
    'collectives': [
      {
        'kind': g.kind,
        'purpose': g.text,
        'count': g.count,
        'bytes': g.bytes,
        'bytes_by_purpose': dict(g.purposes),
        'devices': g.devices,
      }
      for g in found
    ],
    'between_slices': [
      {'kind': kind, 'bytes': size, 'count': count}
      for (kind, size), count in collections.Counter(transfers).items()
    ],
    'seconds': seconds,
    'bound': max(seconds, key=seconds.get),
    'problems': verdict.problems(config, state, found, len(devices)) if one else [],
  }
  return result


def fits(config: ml_collections.ConfigDict, topology: hardware.Topology) -> bool:
  """Whether the step can be compiled."""
  devices = devices_of(topology)
  config, _ = prepared(config, len(devices))
  try:
    compiled(lowered(config, sharding.make_mesh(devices))[1])
  except DoesNotFit:
    return False
  return True


def largest(start: int, unit: int, fits, most: int = 2**20) -> int:
  """The largest multiple of `unit` up to `most` that fits; 0 if `unit` itself does not.

  Doubles or halves from near `start`, then bisects; what fits is assumed to fit when smaller.

  Args:
    start: a first guess.
    unit: of the search.
    fits: a function of a multiple of `unit`.
    most: the end of the search.
  """
  low, high = 0, most // unit + 1  # in units: the largest that fits, the smallest that does not
  guess = max(2 ** round(math.log2(max(start / unit, 1))), 1)
  while high - low > 1:
    guess = min(max(guess, low + 1), high - 1)
    if fits(guess * unit):
      low = guess
    else:
      high = guess
    if low == 0:
      guess = high // 2
    elif high > most // unit:
      guess = 2 * low
    else:
      guess = (low + high) // 2
  return low * unit


def find_batch(
  config: ml_collections.ConfigDict, topology: hardware.Topology, say=lambda text: None
) -> int:
  """The largest global batch of a recipe that fits; 0 if none does."""
  unit = math.lcm(topology.devices, config.model.bn_groups)

  def try_batch(size):
    changed = config.copy_and_resolve_references()
    changed.batch_size = size
    recipes.check(changed)
    found = fits(changed.lock(), topology)
    say(f'batch {size:,}: {"fits" if found else "does not fit"}')
    return found

  examples = config.data.examples or IMAGENET
  return largest(config.batch_size, unit, try_batch, examples)
