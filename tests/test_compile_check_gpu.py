"""compile-check for GPUs that are only described: names, counts from compiled programs, the largest batch, compilations."""

import collections
import importlib.util
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import cli, config
from simclr_jax.compile_check import batches, check, gpus, hardware, hlo, kernels, text, verdict
from simclr_jax.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(
  ('text', 'kind', 'devices'),
  [
    ('h100', 'NVIDIA H100 80GB HBM3', 1),
    ('H100x8', 'NVIDIA H100 80GB HBM3', 8),
    ('a100-40x2', 'NVIDIA A100-SXM4-40GB', 2),
    ('a100-80', 'NVIDIA A100-SXM4-80GB', 1),
    ('l4', 'NVIDIA L4', 1),
    ('l40s', 'NVIDIA L40S', 1),
    ('v100-32x8', 'Tesla V100-SXM2-32GB', 8),
    ('rtx3090', 'NVIDIA GeForce RTX 3090', 1),
    ('rtx4090x4', 'NVIDIA GeForce RTX 4090', 4),
  ],
)
def test_names_of_gpus(text, kind, devices):
  """Breaks if the number of GPUs is read from a name such as rtx3090, or one card is taken for another."""
  topology = hardware.topology(text)
  assert isinstance(topology, gpus.Gpus) and topology.slices == 1
  assert (topology.chip.kind, topology.devices, topology.name) == (kind, devices, f'1x1x{devices}')


@pytest.mark.parametrize(
  ('text', 'slices', 'hint'),
  [
    ('h10', 1, "did you mean 'h100'"),
    ('a100', 1, "did you mean 'a100-"),
    ('a100-8', 1, "did you mean 'a100-80'"),
    ('rtx309', 1, "did you mean 'rtx3090'"),
    ('rtx4090x9', 1, '1 to 8 GPUs, such as rtx4090x8'),
    ('h100x0', 1, '1 to 8 GPUs'),
    ('h100', 2, 'is for TPUs'),
    ('geforce', 1, 'GPUs: h100, '),
  ],
)
def test_invalid_names_of_gpus(text, slices, hint):
  """Breaks if a typo becomes another GPU or TPU, or the message does not list valid names."""
  with pytest.raises(ConfigError, match=hint):
    hardware.topology(text, slices)


# 16-bit multiply-adds of the tensor cores of an SM per clock, from the white papers of the architectures. GeForce cards
# have half of them where sums are in float32. The tensor cores of an H100 have a clock of 1.83 GHz.
TENSOR = {(7, 0): 512, (7, 5): 512, (8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048}


@pytest.mark.parametrize('name', gpus.CARDS)
def test_peaks_follow_from_cores_and_clocks(name):
  """Breaks if a peak has a typo, is that with sparsity, or belongs to another card."""
  card = gpus.CARDS[name]
  float32 = 2 * card.cores * gpus.CORES[card.capability].float32_units * card.clock * 1e9
  np.testing.assert_allclose(card.float32_flops, float32, rtol=0.02)
  clock = 1.83 if card.capability == (9, 0) else card.clock
  units = TENSOR[card.capability] / (2 if 'GeForce' in card.kind else 1)
  np.testing.assert_allclose(card.flops, 2 * card.cores * units * clock * 1e9, rtol=0.02)


# A program in XLA's text for GPUs, of real lines, shortened: 3 iterations of a loop, two branches of a condition.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_rows (param_0: f32[1000,16], param_1: s32[4,1]) -> f32[4,1,16] {
  %param_0 = f32[1000,16]{1,0} parameter(0)
  %param_1 = s32[4,1]{1,0} parameter(1)
  ROOT %gather.1 = f32[4,1,16]{2,1,0} gather(%param_0, %param_1), offset_dims={1,2}, slice_sizes={1,16}
}

%fused_update (param_0.1: f32[1000,16], param_1.1: f32[4,16], param_2.1: s32[]) -> f32[1000,16] {
  %param_0.1 = f32[1000,16]{1,0} parameter(0)
  %param_1.1 = f32[4,16]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  %constant.1 = s32[] constant(0)
  ROOT %dynamic-update-slice.1 = f32[1000,16]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1, %constant.1)
}

%fused_dot (param_0.2: f32[8,16], param_1.2: f32[16]) -> (f32[8], f32[8]) {
  %param_0.2 = f32[8,16]{1,0} parameter(0)
  %param_1.2 = f32[16]{0} parameter(1)
  %dot.1 = f32[8]{0} dot(%param_0.2, %param_1.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %negate.1 = f32[8]{0} negate(%dot.1)
  ROOT %tuple.1 = (f32[8]{0}, f32[8]{0}) tuple(%dot.1, %negate.1)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %get-tuple-element.1 = f32[8]{0} get-tuple-element(%p), index=1
  %copy.1 = f32[8]{0} copy(%get-tuple-element.1)
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%get-tuple-element.1, %copy.1)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %constant.2 = pred[] constant(true)
}

%yes (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %copy.2 = f32[8]{0} copy(%p.2)
}

%no (p.3: f32[8]) -> f32[8] {
  ROOT %p.3 = f32[8]{0} parameter(0)
}

ENTRY %main.1 (x.1: bf16[2,9,9,4], k.1: bf16[8,3,3,4], table.1: f32[1000,16], ids.1: s32[4,1], a.1: f32[2,5,7], b.1: f32[2,7,3], w.1: f32[8,16], v.1: f32[16], rows.1: f32[4,16], i.1: s32[]) -> f32[] {
  %x.1 = bf16[2,9,9,4]{3,2,1,0} parameter(0), metadata={op_name="x"}
  %k.1 = bf16[8,3,3,4]{3,2,1,0} parameter(1)
  %table.1 = f32[1000,16]{1,0} parameter(2)
  %ids.1 = s32[4,1]{1,0} parameter(3)
  %a.1 = f32[2,5,7]{2,1,0} parameter(4)
  %b.1 = f32[2,7,3]{2,1,0} parameter(5)
  %w.1 = f32[8,16]{1,0} parameter(6)
  %v.1 = f32[16]{0} parameter(7)
  %rows.1 = f32[4,16]{1,0} parameter(8)
  %i.1 = s32[] parameter(9)
  %cudnn-conv.1 = (bf16[2,4,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %k.1), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={}
  %y.1 = bf16[2,4,4,8]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %cudnn-conv-bw-filter.1 = (bf16[8,3,3,4]{3,2,1,0}, u8[512]{0}) custom-call(%x.1, %y.1), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter", backend_config={}
  %cudnn-conv-bw-input.1 = (bf16[2,9,9,4]{3,2,1,0}, u8[0]{0}) custom-call(%y.1, %k.1), window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput", backend_config={}
  %custom-call.1 = (f32[2,5,3]{2,1,0}, s8[4194304]{0}) custom-call(%a.1, %b.1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]}}}
  %loop_gather_fusion = f32[4,1,16]{2,1,0} fusion(%table.1, %ids.1), kind=kLoop, calls=%fused_rows
  %loop_update_fusion = f32[1000,16]{1,0} fusion(%table.1, %rows.1, %i.1), kind=kLoop, calls=%fused_update
  %gemv_fusion = (f32[8]{0}, f32[8]{0}) fusion(%w.1, %v.1), kind=kInput, calls=%fused_dot
  %get-tuple-element.2 = f32[8]{0} get-tuple-element(%gemv_fusion), index=0
  %tuple.3 = (s32[], f32[8]{0}) tuple(%i.1, %get-tuple-element.2)
  %while.1 = (s32[], f32[8]{0}) while(%tuple.3), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %cond.1 = f32[8]{0} conditional(%i.1, %get-tuple-element.2, %get-tuple-element.2), branch_computations={%no, %yes}
  ROOT %bitcast.1 = f32[8]{0} bitcast(%cond.1)
}
"""


def test_counts_of_a_program():
  """Breaks if an operation of cuDNN or cuBLAS is not counted, gradients of a convolution count their zeros, a loop counts
  once, or a kernel that reads a few rows counts the whole table."""
  counts = kernels.count(PROGRAM)
  assert counts.kernels == {
    'convolution': 3, 'matrix product': 1, 'fusion': 3, 'copy': 4,
  }  # fmt: skip
  # Outputs of the convolution times its products; [2, 5, 7] x [2, 7, 3] and [8, 16] x [16].
  assert counts.flops == 3 * 2 * (2 * 4 * 4 * 8) * (3 * 3 * 4)
  assert counts.float32_flops == 2 * (2 * 5 * 3 * 7 + 8 * 16)
  x, k, y = 2 * 2 * 9 * 9 * 4, 2 * 8 * 3 * 3 * 4, 2 * 2 * 4 * 4 * 8
  product = 4 * 2 * (5 * 7 + 7 * 3 + 5 * 3)
  gather, update = 4 * 4 + 2 * 4 * 4 * 16, 4 + 2 * 4 * 4 * 16
  dot, copies = 4 * (8 * 16 + 16 + 2 * 8), 4 * 2 * 4 * 8
  assert counts.bytes == 3 * (x + k + y) + product + gather + update + dot + copies


# Lines of simclr_imagenet on h100x8, shortened.
JOINED = """\
  %get-tuple-element.9 = bf16[64,1,1,64]{3,2,1,0} get-tuple-element(%cudnn-conv-bw-filter.9), index=0
  %bitcast.9 = bf16[4096]{0} bitcast(%get-tuple-element.9), metadata={scheduling_name="bitcast.9"}
  %input_reduce_fusion.7 = f32[64]{0} fusion(%x), kind=kInput, calls=%fused_reduce.7, metadata={op_name="jit(step)/jvp(ResNet)/stem_bn/reduce_sum"}
  %input_reduce_fusion.8 = f32[64]{0} fusion(%x), kind=kInput, calls=%fused_reduce.8, metadata={op_name="jit(step)/transpose(jvp(ResNet))/stem_bn/reduce_sum"}
  %wrapped_concatenate = f32[128]{0} fusion(%input_reduce_fusion.7, %input_reduce_fusion.8), kind=kLoop, calls=%wrapped_concatenate_computation, metadata={scheduling_name="wrapped_concatenate"}
  %all-reduce-start = f32[128]{0} all-reduce-start(%wrapped_concatenate), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, to_apply=%add
  %all-reduce-done = f32[128]{0} all-reduce-done(%all-reduce-start)
  %wrapped_concatenate.2 = bf16[4096]{0} fusion(%bitcast.9), kind=kLoop, calls=%wrapped_concatenate_computation.2
  %all-reduce-start.2 = bf16[4096]{0} all-reduce-start(%wrapped_concatenate.2), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
"""


def test_joined_collectives():
  """Breaks if the arrays that the compiler for GPUs joins to one all-reduce are not told apart."""
  shapes = hlo.StepShapes(
    frozenset(), frozenset(), parameters=frozenset({(64, 64), (4096,)}), image_sizes=((32, 32),)
  )
  groups = verdict.group_collectives(hlo.collectives(JOINED, 8), shapes, 8)
  assert [dict(g.purposes) for g in groups] == [
    {'BatchNorm (forward)': 256, 'BatchNorm (backward)': 256},
    {'gradients': 8192},
  ]


def test_trip_counts_of_gpu_programs():
  """Breaks if a collective in a loop of a GPU program, whose condition is a kernel, is counted once."""
  text = """
%body.2 (p: (s32[])) -> (s32[]) {
  %r = f32[8]{0} all-reduce-start(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[]) while(%p), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"6"}}
}
"""
  (collective,) = hlo.collectives(text, 2)
  assert collective.times == 6


def test_candidate_batch_sizes():
  """Breaks if a batch cannot be shared by the devices, or two neighbours differ by more than a quarter."""
  found = batches.sizes(16, 100_000)
  assert found[:12] == [16 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)]
  assert all(b <= 1.25 * a for a, b in zip(found[3:], found[4:])) and found[-1] <= 100_000


@pytest.mark.parametrize('limit', [0, 8 * GIB, 22.5 * GIB, 72 * GIB, 10_000 * GIB])
@pytest.mark.parametrize('start', [16, 256, 4096])
@pytest.mark.parametrize('shape', ['line', 'square', 'cliff', 'unknown'])
def test_search_for_the_largest_batch(limit, start, shape):
  """Breaks if the search stops early, compiles a size twice, or compiles many sizes."""
  candidates, tried = batches.sizes(16, 65536), []
  curves = {
    'line': lambda n: GIB * (1 + n / 40),
    'square': lambda n: (
      GIB * (0.3 + n / 100 + (n / 1000) ** 2)
    ),  # the similarities of 2n embeddings
    'cliff': lambda n: GIB * (1 + n / 100 + 15 * (n > 700)),  # other algorithms for larger arrays
    'unknown': lambda n: GIB * (1 + n / 40) if 1 + n / 40 <= limit / GIB else math.inf,
  }

  def memory(size):
    assert size in candidates and size not in tried
    tried.append(size)
    return curves[shape](size)

  fitting = [n for n in candidates if curves[shape](n) <= limit]
  assert batches.largest(candidates, limit, start, memory) == max(fitting, default=0)
  assert len(tried) <= (4 if shape == 'line' and start > 16 else 10)


def test_find_batch():
  """Breaks if a way is compiled with the fields of another, a time is not that of an image, or one way that the recipe
  refuses ends the search."""
  recipe = config.load('moco_cifar10', {'data.examples': '50000'})
  topology, lines = hardware.topology('rtx3090'), []

  def need(config, topology):
    ways = (config.rematerialize, config.accumulate_steps)
    per_image = {('false', 1): 10, ('true', 1): 4, ('parts', 1): 2, ('false', 8): 1}[ways] * 2**20
    if config.accumulate_steps > 1:
      raise ConfigError('no accumulation here')
    return per_image * config.batch_size, config.batch_size * (
      1 if config.rematerialize == 'false' else 1.25
    )

  rows = batches.find(recipe, topology, lines.append, need)
  assert rows[0] == {
    'way': 'plain', 'largest_batch': 2048, 'memory': 20 * GIB, 'relative_time': 1.0,
  }  # fmt: skip
  assert rows[1]['largest_batch'] == 5120 and rows[1]['relative_time'] == 1.25
  assert [row['way'] for row in rows] == list(batches.WAYS)
  assert rows[2]['largest_batch'] == 10240
  assert rows[3] == {'way': 'accumulate_steps=8', 'refused': 'no accumulation here'}
  assert 'plain: batch size 512 fits: 5 GiB of 21.6 GiB' in lines
  text = batches.table(rows, 1)
  assert '2,048' in text and 'no accumulation here' in text and '1.25' in text


def test_memory_of_a_gpu():
  """Breaks if a step that is too large passes, or one that needs more than JAX takes by default passes silently."""
  recipe, topology = config.load('simclr_imagenet'), hardware.topology('a100-40')
  assert topology.chip.hbm == 36 * GIB
  assert check._gpu_memory(recipe, topology, 20 * GIB) == ([], [])
  notes, problems = check._gpu_memory(recipe, topology, 30 * GIB)
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION' in notes[0] and not problems
  notes, problems = check._gpu_memory(recipe, topology, 37 * GIB)
  assert not notes and 'needs 37 GiB of memory per device, 36 GiB are available' in problems[0]


def test_report_of_gpus():
  """Breaks if the report of a GPU lacks kernels or the share of float32, or names its compiler or links as those of TPUs."""
  result = {
    'recipe': 'simclr_cifar10', 'topology': 'h100x2', 'devices': 2, 'slices': 1, 'device_kind': 'NVIDIA H100 80GB HBM3',
    'hosts': 1, 'batch_size': 512, 'dtype': 'bfloat16', 'compile_seconds': 31.4, 'notes': [gpus.SHARE_NOTE],
    'versions': {'jax': '0.10.2', 'jax-cuda12-plugin': '0.10.1'}, 'memory': {'temporaries': GIB, 'total': GIB, 'limit': 8 * GIB},
    'flops': 3e12, 'float32_flops': 5e11, 'bytes_accessed': 2e10, 'intensity': 150.0, 'collectives': [], 'between_slices': [],
    'kernels': {'fusion': 1200, 'copy': 34}, 'seconds': {'compute': 0.003, 'memory': 0.007, 'links': 0.001},
    'bound': 'memory', 'problems': [],
  }  # fmt: skip
  lines = text.report(result).splitlines()
  assert 'compiled in 31 s by jax-cuda12-plugin 0.10.1' in lines
  assert (
    'Kernels per step: 1,234 (fusion 1,200, copy 34); of the operations, 0.5 TFLOP are in float32'
    in lines
  )
  assert (
    '  memory           7.00 ms  <- bottleneck' in lines and '  links            1.00 ms' in lines
  )
  assert gpus.SHARE_NOTE in lines and lines[-1].startswith('OK: it fits')


def device(kind, limit, used):
  stats = {'bytes_limit': limit, 'bytes_in_use': used}
  return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


def test_announcement_of_a_gpu():
  """Breaks if memory that the donated state has already counts again, or a step that is too large is not named so."""
  memory = types.SimpleNamespace(
    temp_size_in_bytes=20 * GIB, output_size_in_bytes=3 * GIB, alias_size_in_bytes=2 * GIB
  )
  text = gpus.announce(device('NVIDIA H100 80GB HBM3', 60 * GIB, 10 * GIB), memory)
  assert text == (
    'NVIDIA H100 80GB HBM3 (989 TFLOP/s in 16 bits, 3.35 TB/s): a step needs 21 GiB of 50 GiB that are free'
  )
  text = gpus.announce(device('NVIDIA T1000', 6 * GIB, 0), memory)
  assert text.startswith('NVIDIA T1000: a step needs 21 GiB of 6 GiB') and 'batch_size' in text


def test_analysis_of_a_step_does_not_compile_again():
  """Breaks if the memory of a step costs a second compilation: if `lower().compile()` and the call share no program."""
  compiled = []

  def record(event, seconds, **kwargs):
    compiled.append(event) if 'backend_compile' in event else None

  mesh = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])
  place = NamedSharding(mesh, P())
  step = jax.jit(
    lambda state, x: (state - 3 * x, x.sum()), donate_argnums=0, in_shardings=(place, place)
  )
  state, x = (jax.device_put(jnp.ones((5, 3)), place) for _ in range(2))
  jax.monitoring.register_event_duration_secs_listener(record)
  try:
    with jax.set_mesh(mesh):
      assert step.lower(state, x).compile().memory_analysis().argument_size_in_bytes >= 120
      assert len(compiled) == 1
      step(state, x)
  finally:
    jax.monitoring.unregister_event_duration_listener(record)
  assert len(compiled) == 1


def test_without_the_wheels(monkeypatch, capsys):
  """Breaks if the error message for a missing compiler does not say how to install it."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for more in ([], ['--find-batch']):
    assert cli.main(['compile-check', '--config=simclr_cifar10', '--topology=l4', *more]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and "pip install 'simclr_jax[compile-check-gpu]'" in error


SMALL = {
  'model.depth': '18',
  'model.width_multiplier': '0.125',
  'image_size': '64',
  'batch_size': '48',
  'augment.view1': 'supervised',
}


@pytest.mark.skipif(
  not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)),
  reason="the compiler for GPUs is missing: pip install '.[compile-check-gpu]' && "
  'python -m pytest tests/test_compile_check_gpu.py',
)
@pytest.mark.parametrize('topology', [pytest.param('t4', marks=pytest.mark.slow), 'h100x2'])
def test_compile_simclr_for_gpus(topology):
  """Breaks if the compiler for GPUs rejects the step or the description, its text is not understood, or its program does
  not compute SimCLR over all devices."""
  fields = [f'--config.{k}={v}' for k, v in SMALL.items()]
  process = subprocess.run(
    [sys.executable, '-m', 'simclr_jax', 'compile-check', '--config=simclr_imagenet', '--json']
    + [f'--topology={topology}', *fields],
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  result = json.loads(process.stdout)
  assert result['problems'] == [] and 0 < result['memory']['total'] < 2**28
  # 20 convolutions forward, 20 gradients of kernels, 19 of inputs.
  assert result['kernels']['convolution'] >= 59 and result['kernels']['matrix product'] > 0
  if topology == 't4':  # it has no bfloat16
    assert result['flops'] == result['float32_flops']
  else:
    expected = 2 * (2 * 48 // 2) * multiply_adds()
    np.testing.assert_allclose(result['flops'] - result['float32_flops'], expected, rtol=0.03)
  moved: collections.Counter[str] = collections.Counter()
  for c in result['collectives']:
    for purpose, size in c['bytes_by_purpose'].items():
      moved[purpose] += c['count'] * size
  assert bool(moved['BatchNorm (forward)']) == bool(moved['gradients']) == (topology != 't4')


def multiply_adds():
  """Multiply-adds of all convolutions of `SMALL` for one image: the forward pass three times, without the gradient of the
  image."""
  side, channels = 32, 8
  stem = side**2 * 7 * 7 * 3 * channels
  total, side = 2 * stem, side // 2
  for width, stride in ((8, 1), (16, 2), (32, 2), (64, 2)):
    side //= stride
    total += 3 * side**2 * width * (9 * channels + channels + 9 * 3 * width)
    channels = width
  return total
