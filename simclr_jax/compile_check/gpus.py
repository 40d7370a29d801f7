"""NVIDIA GPUs: their names, their published peaks, and their description for the compiler.

Imports no JAX, so that `ENVIRONMENT` can be set before it is imported.
"""

import dataclasses
import re
from typing import Any

from simclr_jax.compile_check.text import format_bytes
from simclr_jax.errors import ConfigError
from simclr_jax.validation import did_you_mean

# JAX's plugin for CUDA on a machine without a driver: it must not compare versions with those of the driver.
ENVIRONMENT = {'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}
# Triton's matrix products are chosen by measuring them on the GPU, and without one some have no tiling.
COMPILER_OPTIONS = {'xla_gpu_enable_triton_gemm': False}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Core:
  """A streaming multiprocessor (SM) of a compute capability.

  Attributes:
    shared_memory: KiB.
    shared_memory_per_block: KiB that a kernel may ask for.
    threads: resident threads.
    float32_units: float32 multiply-adds per clock.
  """

  shared_memory: int
  shared_memory_per_block: int
  threads: int
  float32_units: int


# Source: CUDA C++ Programming Guide, "Compute Capabilities": technical specifications, arithmetic throughput.
CORES = {
  (7, 0): Core(96, 96, 2048, 64),
  (7, 5): Core(64, 64, 1024, 64),
  (8, 0): Core(164, 163, 2048, 64),
  (8, 6): Core(100, 99, 1536, 128),
  (8, 9): Core(100, 99, 1536, 128),
  (9, 0): Core(228, 227, 2048, 128),
}


@dataclasses.dataclass(frozen=True)
class Card:
  """A kind of GPU.

  Attributes:
    kind: NVIDIA's name, JAX's `device_kind`.
    capability: compute capability, (major, minor).
    cores: number of SMs.
    clock: boost clock, GHz.
    cache: L2 cache, MiB.
    memory: GiB, as the card is sold.
    hbm_bandwidth: bytes/s of the device memory.
    flops: 16-bit FLOP/s of the tensor cores, with sums in float32, without sparsity.
    float32_flops: float32 FLOP/s without tensor cores.
    link: the connection of the GPUs of a machine.
    ici_bandwidth: bytes/s to other GPUs, over all links, in one direction.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  clock: float
  cache: float
  memory: float
  hbm_bandwidth: float
  flops: float
  float32_flops: float
  link: str
  ici_bandwidth: float
  devices: int = 1
  dcn_bandwidth: float | None = None

  @property
  def hbm(self) -> float:
    """Bytes that a step may use: 90 %. Error correction, CUDA itself and the workspace of cuDNN need the rest."""
    return 0.9 * self.memory * GIB


# Sources: NVIDIA's data sheets "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "A100 Tensor Core GPU" (SXM),
# "L40S", "L4 Tensor Core GPU", "A10 Tensor Core GPU", "T4", "V100" (SXM2): peaks, bandwidths, links in both
# directions (halved here); peaks that are given with sparsity are halved. SMs, clocks and caches: the white papers of
# the architectures Volta, Turing, Ampere (GA100, GA102), Ada and Hopper, the last two also for the RTX cards.
CARDS = {
  'h100': Card('NVIDIA H100 80GB HBM3', (9, 0), 132, 1.98, 50, 80, 3.35e12, 989.4e12, 66.9e12, 'NVLink', 450e9),
  'h200': Card('NVIDIA H200', (9, 0), 132, 1.98, 50, 141, 4.8e12, 989.4e12, 66.9e12, 'NVLink', 450e9),
  'a100-40': Card('NVIDIA A100-SXM4-40GB', (8, 0), 108, 1.41, 40, 40, 1.555e12, 312e12, 19.5e12, 'NVLink', 300e9),
  'a100-80': Card('NVIDIA A100-SXM4-80GB', (8, 0), 108, 1.41, 40, 80, 2.039e12, 312e12, 19.5e12, 'NVLink', 300e9),
  'l40s': Card('NVIDIA L40S', (8, 9), 142, 2.52, 96, 48, 864e9, 362e12, 91.6e12, 'PCIe', 32e9),
  'l4': Card('NVIDIA L4', (8, 9), 58, 2.04, 48, 24, 300e9, 121e12, 30.3e12, 'PCIe', 32e9),
  'a10': Card('NVIDIA A10', (8, 6), 72, 1.695, 6, 24, 600e9, 125e12, 31.2e12, 'PCIe', 32e9),
  't4': Card('Tesla T4', (7, 5), 40, 1.59, 4, 16, 300e9, 65e12, 8.1e12, 'PCIe', 16e9),
  'v100-32': Card('Tesla V100-SXM2-32GB', (7, 0), 80, 1.53, 6, 32, 900e9, 125e12, 15.7e12, 'NVLink', 150e9),
  'rtx3090': Card('NVIDIA GeForce RTX 3090', (8, 6), 82, 1.695, 6, 24, 936e9, 71e12, 35.6e12, 'PCIe', 32e9),
  'rtx4090': Card('NVIDIA GeForce RTX 4090', (8, 9), 128, 2.52, 72, 24, 1.008e12, 165.2e12, 82.6e12, 'PCIe', 32e9),
}  # fmt: skip
MACHINE = 8  # GPUs of one machine, at most

DEFAULT_SHARE = 0.75  # of a GPU's memory that JAX takes
SHARE_NOTE = 'JAX takes 75 % of the memory of a GPU, and this step needs more: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95'


@dataclasses.dataclass(frozen=True)
class Gpus:
  """One or several equal GPUs of one machine.

  Attributes:
    text: the user's name for them.
    chip: the kind.
    devices: how many.
  """

  text: str
  chip: Card
  devices: int = 1
  slices: int = 1

  @property
  def name(self) -> str:
    """XLA's name of the arrangement: slices x machines x GPUs."""
    return f'1x1x{self.devices}'

  @property
  def options(self) -> dict[str, Any]:
    """XLA's other options."""
    return {'target_config': target(self.chip)}


def topology(text: str) -> Gpus | None:
  """Parses a name such as 'h100' or 'a100-40x8', eight GPUs; None if it is no name of a GPU.

  Raises:
    ConfigError: there is no such GPU, or they are too many for one machine.
  """
  match = re.fullmatch(r'(.*?\ds?)(?:x(\d+))?', text.strip().lower())
  if not match:
    return None
  name, number = match[1], int(match[2] or 1)
  if name in CARDS and 1 <= number <= MACHINE:
    return Gpus(text, CARDS[name], number)
  if name in CARDS:
    raise ConfigError(f'--topology={text!r}: a machine has 1 to {MACHINE} GPUs, such as {name}x8')
  if re.match(r'(h|a|b|l|t|p|rtx|gtx)\d|v100', name):
    longer = [f', did you mean {card!r}?' for card in CARDS if card.startswith(name)]
    hint = longer[0] if longer else did_you_mean(name, CARDS)
    raise ConfigError(
      f'--topology={text!r}: there is no GPU {name!r} here, only {", ".join(CARDS)}{hint}'
    )
  return None


def target(card: Card) -> str:
  """The description of a GPU for XLA, a GpuTargetConfigProto as text."""
  core = CORES[card.capability]
  fields = {
    'threads_per_block_limit': 1024,
    'threads_per_warp': 32,
    'shared_memory_per_block': 48 * 1024,
    'shared_memory_per_block_optin': core.shared_memory_per_block * 1024,
    'shared_memory_per_core': core.shared_memory * 1024,
    'threads_per_core_limit': core.threads,
    'core_count': card.cores,
    'fpus_per_core': core.float32_units,
    'block_dim_limit_x': 2**31 - 1,
    'block_dim_limit_y': 2**16 - 1,
    'block_dim_limit_z': 2**16 - 1,
    'registers_per_core_limit': 2**16,
    'registers_per_block_limit': 2**16,
    'memory_bandwidth': int(card.hbm_bandwidth),
    'l2_cache_size': int(card.cache * 2**20),
    'clock_rate_ghz': card.clock,
    'device_memory_size': int(card.memory * GIB),
  }
  major, minor = card.capability
  lines = [f'  {name}: {value}' for name, value in fields.items()]
  return '\n'.join([
    'gpu_device_info {', *lines, f'  cuda_compute_capability {{ major: {major} minor: {minor} }}', '}',
    'platform_name: "CUDA"',
    'dnn_version_info { major: 9 minor: 10 }',
    f'device_description_str: "{card.kind}"',
  ])  # fmt: skip


def announce(device: Any, memory: Any) -> str:
  """A GPU of this machine and the memory of a step, in one sentence, before the first step.

  Args:
    device: a `jax.Device`; the state and the batch are in its memory already.
    memory: `memory_analysis()` of the compiled step.
  """
  stats = device.memory_stats()
  needed = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  free = stats['bytes_limit'] - stats['bytes_in_use']
  card = next((c for c in CARDS.values() if c.kind == device.device_kind), None)
  peaks = (
    f' ({card.flops / 1e12:.0f} TFLOP/s in 16 bits, {card.hbm_bandwidth / 1e12:.2f} TB/s)'
    if card
    else ''
  )
  sentence = f'{device.device_kind}{peaks}: a step needs {format_bytes(needed)} of {format_bytes(free)} that are free'
  if needed <= free:
    return sentence
  return (
    f'{sentence}: if it fails, lower --config.batch_size, or export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (JAX takes 75 % '
    'of a GPU)'
  )
