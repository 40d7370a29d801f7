"""Ahead-of-time (AOT) compilation of a recipe's training step for TPUs or GPUs, without them.

The step is that of `train_state`, compiled by libtpu, the compiler that TPUs use, or by XLA's plugin for CUDA. Memory,
operations and collectives are read from the compiled program. Times divide them by the published peaks of the chip;
they are no prediction.
"""

import collections
import importlib.metadata
import importlib.util
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
from simclr_jax.compile_check import gpus, hardware, hlo, kernels, verdict
from simclr_jax.compile_check.text import format_bytes
from simclr_jax.data import loader
from simclr_jax.errors import ConfigError
from simclr_jax.models import classifier
from simclr_jax.runtime import files

IMAGENET = 1_281_167  # training images
GIB = 2**30
Topology = hardware.Topology | gpus.Gpus
CUDA = ('jax-cuda12-plugin', 'jax-cuda13-plugin')


class OutOfMemory(RuntimeError):
  """The step needs more memory than a device has: `needed` and `limit` in bytes, None if not in the message."""

  def __init__(self, message: str):
    super().__init__(message)
    self.needed, self.limit = memory_from_message(message)


def memory_from_message(message: str) -> tuple[float | None, float | None]:
  """The needed and the available bytes in the compiler's RESOURCE_EXHAUSTED message."""
  unit = {'': 1, 'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}

  def size(match):
    return float(match[1]) * unit[match[2]] if match else None

  number = r'([\d.]+)([KMGT]?)i?B?'
  needed = re.search(rf'(?:Used |temporaries \(|requirement is |allocate ){number}', message)
  limit = re.search(rf'(?: of |\(HBM \(|available HBM \(|limit (?:is|of) ){number}', message)
  return size(needed), size(limit)


def check(
  config: ml_collections.ConfigDict,
  topology: Topology,
  recipe: str = '',
  hlo_file: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles the training step of a recipe, and judges the program.

  Args:
    config: a checked recipe (`config.load`).
    topology: the TPU or GPUs.
    recipe: its name, for the report.
    hlo_file: a file that gets the compiled program, XLA's optimised HLO.

  Returns:
    Plain data: what was compiled; `memory`, `flops`, `bytes_accessed`, `collectives`, `seconds`, all per device
    and step; for GPUs also `kernels`, by kind; `bound`, the bottleneck; `problems`, empty if there are none; `notes`.
    A step that does not fit into a TPU's memory has `memory`, `message` and `problems` only.

  Raises:
    ConfigError: the recipe or the topology is invalid, or its compiler is missing.
  """
  devices = describe_devices(topology)
  config, notes = prepare(config, len(devices))
  teacher = teacher_shapes(config)
  if teacher and not config.teacher:
    notes.append("assumed: a teacher of the student's size (--config.teacher=RUN)")
  state, step = lower(config, sharding.make_mesh(devices), teacher)
  result = _description(config, topology, devices, recipe)
  result |= {'notes': notes, 'parameters': _count(state.params)}
  start = time.monotonic()
  try:
    program = compile_step(step, topology)
  except OutOfMemory as error:
    seconds = round(time.monotonic() - start, 1)
    return result | {'compile_seconds': seconds} | _does_not_fit(config, topology, error)
  result['compile_seconds'] = round(time.monotonic() - start, 1)
  if hlo_file:
    files.write_text(hlo_file, program.as_text())
  if topology.slices == 1:
    width = verdict.embedding_width(config, state, teacher)
    shapes = verdict.step_shapes(config, state, len(devices), width)
    groups = _collectives(program, shapes, len(devices))
    problems = verdict.problems(config, state, groups, len(devices), width)
    notes += _shuffle_notes(config, groups)
  else:
    groups, problems = _collectives(program, None, len(devices)), []
    notes.append(
      'multi-slice: the compiler drops the names of collectives, so whether negatives and BatchNorm '
      'statistics reach all devices is only checked for one slice'
    )
  measured = _measurements(program, topology, groups)
  if isinstance(topology, gpus.Gpus):
    more, too_large = _gpu_memory(config, topology, measured['memory']['total'])
    notes += more
    problems = too_large + problems
  return result | measured | {'problems': problems}


def describe_devices(topology: Topology) -> list[Any]:
  """The JAX devices of a topology; they are descriptions and cannot compute.

  Raises:
    ConfigError: the compiler is missing, or does not know the topology.
  """
  from jax.experimental import topologies

  if isinstance(topology, gpus.Gpus):
    _require_cuda()
    return list(
      topologies.get_topology_desc(
        platform='cuda', topology=topology.name, **topology.options
      ).devices
    )
  os.environ.update(hardware.ENVIRONMENT)  # libtpu reads it when it is loaded, below
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise ConfigError(
      "the TPU compiler, libtpu, is missing: pip install 'jax[tpu]', as the extra compile-check does "
      '(Linux on x86-64 only)'
    ) from None
  try:
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name=topology.name, **topology.options
    ).devices
  except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
    reason = str(error).split('\n')[0]
    raise ConfigError(
      f'--topology={topology.text!r}: the TPU compiler refuses it: {reason}'
    ) from None
  if len(devices) != topology.devices:
    raise ConfigError(
      f'--topology={topology.text!r} should have {topology.devices} devices, but the TPU compiler '
      f'describes {len(devices)}'
    )
  return list(devices)


def _require_cuda():
  os.environ.update(gpus.ENVIRONMENT)  # JAX's plugin reads it when it is loaded
  if not any(importlib.util.find_spec(name.replace('-', '_')) for name in CUDA):
    raise ConfigError(
      "the compiler for NVIDIA GPUs is missing: pip install 'simclr_jax[compile-check-gpu]' (Linux only)"
    )


def prepare(
  config: ml_collections.ConfigDict, devices: int
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """The recipe as a run on TPUs or GPUs has it, and the assumptions made.

  Raises:
    ConfigError: the batch cannot be split over the devices.
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


def teacher_shapes(config: ml_collections.ConfigDict) -> methods.Teacher | None:
  """The shapes of the teacher, if the method needs one; without `teacher` in the recipe, as large as the student."""
  if not methods.build(config).needs_teacher:
    return None
  if config.teacher:
    return jax.eval_shape(lambda: runs.load_teacher(config))
  net = classifier.build(config.model, config.data.num_classes, config.head_layer)
  size = config.image_size
  x = jax.ShapeDtypeStruct((2, size, size, config.data.channels), jnp.float32)
  shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)
  return methods.Teacher(shapes, json.dumps(recipes.architecture(config, classifier=True)))


def lower(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, teacher: methods.Teacher | None
) -> tuple[train_state.TrainState, Any]:
  """The shapes of the state, and the lowered training step, of a recipe that `prepare` returned."""
  init, step = train_state.programs(config, mesh)
  resident = None
  if config.data.on_device == 'yes' or config.data.source == 'digits':
    resident = (config.image_size, config.image_size)
  constants, rows = loader.shapes(
    config.data.examples,
    config.batch_size,
    methods.build(config).views,
    config.image_size,
    config.data.resize_on,
    resident,
    config.data.channels,
  )
  seed = jax.ShapeDtypeStruct((), np.uint32)
  with jax.set_mesh(mesh):
    state = jax.eval_shape(init, seed)
    return state, step.lower(state, seed, teacher, constants, rows)


def compile_step(step: Any, topology: Topology) -> Any:
  """Compiles what `lower` returned for the devices of a topology.

  Raises:
    OutOfMemory: it does not fit into the memory of a TPU; the compiler for GPUs does not check this.
  """
  if isinstance(topology, gpus.Gpus):
    return step.compile(compiler_options=gpus.COMPILER_OPTIONS)
  try:
    return step.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise OutOfMemory(str(error)) from None


def _count(params):
  return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def _description(config, topology, devices, recipe):
  """What is compiled, for which devices, and by which version of the compiler, the last of `versions`."""
  compilers = CUDA if isinstance(topology, gpus.Gpus) else ('libtpu',)
  versions = {
    name: importlib.metadata.version(name)
    for name in ('jax', *compilers)
    if importlib.util.find_spec(name.replace('-', '_'))
  }
  return {
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
    'versions': versions,
  }


def _does_not_fit(config, topology, error):
  """The part of the result that describes an `OutOfMemory` error."""
  limit = error.limit or topology.chip.hbm
  # The state is not included in temporaries.
  what = ', temporaries alone' if 'HLO temporaries' in str(error) else ''
  return {
    'memory': {'total': error.needed, 'limit': limit},
    'message': str(error).split('\n')[0],
    'problems': [_too_large(config, error.needed, limit, what)],
  }


def _too_large(config, needed, limit, what=''):
  needs = f'needs {format_bytes(needed)} of memory per device' if needed else 'does not fit'
  return (
    f'batch_size={config.batch_size} {needs}{what}, {format_bytes(limit)} are available: lower '
    '--config.batch_size (--find-batch finds the largest) or use more devices'
  )


def _gpu_memory(config, topology, needed):
  """Notes and problems of the memory of a GPU."""
  limit = topology.chip.hbm
  if needed > limit:
    return [], [_too_large(config, needed, limit)]
  if needed > gpus.DEFAULT_SHARE * limit:
    return [gpus.SHARE_NOTE], []
  return [], []


def _collectives(program, shapes, devices):
  return verdict.group_collectives(hlo.collectives(program.as_text(), devices), shapes, devices)


def _shuffle_notes(config, groups):
  if not any(purpose == 'shuffled images' for g in groups for purpose, _ in g.purposes):
    return []
  fewer = ': shuffle=transpose moves fewer' if config.shuffle == 'permute' else ''
  return [
    f'shuffle={config.shuffle} moves the key images between devices, as the recipe asks{fewer}'
  ]


def _measurements(program, topology, groups):
  """The part of the result that is read from the compiled program; all values per device and step."""
  costs, compute = _costs(program, topology)
  flops, accessed = costs['flops'], costs['bytes_accessed']
  transfers = hlo.between_slices(program.as_text())
  seconds = verdict.roofline(topology, compute, accessed, groups, transfers)
  return {
    'memory': _memory(program, topology.chip.hbm),
    **costs,
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
      for g in groups
    ],
    'between_slices': [
      {'kind': kind, 'bytes': size, 'count': count}
      for (kind, size), count in collections.Counter(transfers).items()
    ],
    'seconds': seconds,
    'bound': max(seconds, key=lambda name: seconds[name]),
  }


def _costs(program, topology):
  """`flops`, `bytes_accessed`, and for GPUs `float32_flops` and `kernels`; the seconds of the operations."""
  chip = topology.chip
  if not isinstance(topology, gpus.Gpus):
    cost = program.cost_analysis()
    costs = {'flops': cost['flops'], 'bytes_accessed': cost['bytes accessed']}
    return costs, cost['flops'] * chip.devices / chip.flops
  counts = kernels.count(program.as_text())
  costs = {
    'flops': counts.flops + counts.float32_flops,
    'float32_flops': counts.float32_flops,
    'bytes_accessed': counts.bytes,
    'kernels': counts.kernels,
  }
  return costs, counts.flops / chip.flops + counts.float32_flops / chip.float32_flops


def _memory(program, limit):
  """Memory of a device by kind, in bytes. Aliased buffers are both arguments and outputs, so they are subtracted once."""
  m = program.memory_analysis()
  sizes = {
    'arguments': m.argument_size_in_bytes,
    'outputs': m.output_size_in_bytes,
    'aliased': -m.alias_size_in_bytes,
    'temporaries': m.temp_size_in_bytes,
    'code': m.generated_code_size_in_bytes,
  }
  return {**sizes, 'total': sum(sizes.values()), 'limit': limit}


def need(config: ml_collections.ConfigDict, topology: Topology) -> tuple[float, float]:
  """Bytes of memory per device, and seconds per step by the roofline; (inf, inf) if only 'too much' is known.

  The compiler for TPUs counts a loop once, so with `accumulate_steps` the times are multiplied by it.

  Raises:
    ConfigError: the recipe or the topology is invalid, or its compiler is missing.
  """
  devices = describe_devices(topology)
  config, _ = prepare(config, len(devices))
  _, step = lower(config, sharding.make_mesh(devices), teacher_shapes(config))
  try:
    program = compile_step(step, topology)
  except OutOfMemory as error:
    needed = error.needed or math.inf
    return (needed if needed > topology.chip.hbm else math.inf), math.inf
  measured = _measurements(program, topology, _collectives(program, None, len(devices)))
  times = 1 if isinstance(topology, gpus.Gpus) else config.accumulate_steps
  return measured['memory']['total'], max(measured['seconds'].values()) * times
