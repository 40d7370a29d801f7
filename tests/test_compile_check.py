"""What compile-check understands: names of TPUs, the text of a compiled program, and what is wrong with it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest
from conftest import TINY

from simclr_jax import (
  cli,
  config,
  data,
  methods,
  optim,
  sharding,
  train_state,
)
from simclr_jax.compile_check import check, hardware, hlo, verdict
from simclr_jax.data import augment, loader
from simclr_jax.errors import ConfigError

TABLE = pathlib.Path(__file__).parents[1] / 'benchmarks/tpu_table'


@pytest.mark.parametrize(
  ('text', 'slices', 'name', 'devices', 'options'),
  [
    ('v2-8', 1, 'v2:2x2', 8, {}),
    ('v3-8', 1, 'v3:2x2', 8, {}),
    ('v3-32', 1, 'v3:4x4', 32, {}),
    ('v3-64', 1, 'v3:4x8', 64, {}),
    ('v3-128', 1, 'v3:8x8', 128, {}),
    ('v4-8', 1, 'v4:2x2x1', 4, {'chip_config_name': 'megacore'}),
    ('v4-16', 1, 'v4:2x2x2', 8, {'chip_config_name': 'megacore'}),
    ('v4-128', 1, 'v4:4x4x4', 64, {'chip_config_name': 'megacore'}),
    ('v5litepod-1', 1, 'v5e:1x1', 1, {'chips_per_host_bounds': (1, 1, 1)}),
    ('v5e-4', 1, 'v5e:2x2', 4, {}),
    ('v5e-8', 1, 'v5e:2x4', 8, {'chips_per_host_bounds': (2, 4, 1)}),
    ('v5e-256', 1, 'v5e:16x16', 256, {}),
    ('v5e:2x8', 1, 'v5e:2x8', 16, {}),
    ('2x v5e-16', 1, 'v5e:4x4', 32, {'num_slices': 2}),
    ('v5e-16', 2, 'v5e:4x4', 32, {'num_slices': 2}),
    ('v5p-8', 1, 'v5p:2x2x1', 4, {}),
    ('v5p-32', 1, 'v5p:2x2x4', 16, {}),
    ('v5:2x2x4', 1, 'v5p:2x2x4', 16, {}),
    ('v6e-64', 1, 'v6e:8x8', 64, {}),
    ('tpu7x-8', 1, 'tpu7x:2x2x1', 8, {}),
  ],
)
def test_names_of_tpus(text, slices, name, devices, options):
  """Breaks if cores are taken for chips, or a slice gets another shape than the one that is sold."""
  found = hardware.topology(text, slices)
  assert (found.name, found.devices, found.options) == (name, devices, options)


@pytest.mark.parametrize(
  ('text', 'slices', 'mend'),
  [
    ('v3', 1, 'v3-128'),
    ('', 1, 'v3-128'),
    ('v9-8', 1, 'only v2, v3'),
    ('a100-8', 1, 'only v2, v3'),
    ('v3-100', 1, 'v3-64, v3-128'),
    ('v5e-48', 1, 'v5e-32, v5e-64'),
    ('v5e:4x4x4', 1, '2 dimensions, such as v5e:4x4'),
    ('v4:4x4', 1, '3 dimensions'),
    ('2x v3-8', 1, 'v4 or newer'),
    ('2x v5e-16', 2, 'leave one out'),
    ('0x v5e-16', 1, 'from 1'),
  ],
)
def test_other_names_are_refused(text, slices, mend):
  """Breaks if a typing error becomes another TPU, or a message does not say what there is."""
  with pytest.raises(ConfigError, match=mend):
    hardware.topology(text, slices)


# Lines of a real program: libtpu 0.0.42.1, simclr_imagenet with small images on v5e-4, shortened.
GATHER = """\
%fused.{i} (p: f32[16,128]) -> f32[64,128] {{
  %all-gather.{i} = f32[64,128]{{1,0:T(8,128)}} all-gather(%p), channel_id=47, replica_groups=mesh['axis_0'=4,'axis_1'=1] {{'axis_0'}}, dimensions={{0}}, use_global_device_ids=true, metadata={{op_name="jit(step)/jvp()/mul" stack_frame_id=66}}
}}
"""
MAIN = """\
ENTRY %main.1_spmd (param.1: f32[3,3,8,8]) -> f32[] {
  %fusion.1 = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%fused.13, metadata={op_name="jit(step)/jvp(ResNet)/stem_bn/reduce_sum" stack_frame_id=12}
  %all-reduce.157 = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(1)}) all-reduce(%fusion.1, %fusion.2), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, use_global_device_ids=true, to_apply=%region_5.8.clone, metadata={op_name="jit(step)/jvp(ResNet)/stem_bn/reduce_sum" stack_frame_id=32}
  %fusion.3 = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/transpose(jvp(ResNet))/stem_bn/reduce_sum" stack_frame_id=12}
  %fusion.4 = f32[64,1000]{0:T(128)S(1)} fusion(%x), kind=kLoop, metadata={op_name="jit(step)/transpose(jvp())/dot_general" stack_frame_id=12}
  %all-reduce.120 = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(1)}, f32[64,1000]{1,0:T(8,128)S(1)}, f32[]{:T(128)}, /*index=4*/f32[]{:T(128)}) all-reduce(%fusion.3, %fusion.3, %fusion.4, %y, /*index=4*/%z), channel_id=9, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(ResNet))/stem_bn/reduce_sum" stack_frame_id=103}
  ROOT %all-reduce.158 = (bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), channel_id=10, replica_groups=[1,4]<=[4], to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(ProjectionHead))/linear2/dot_general" stack_frame_id=1}
}
"""
TEXT = 'HloModule jit_step\n\n' + GATHER.format(i=11) + GATHER.format(i=13) + MAIN
KNOWN = hlo.Known(
  embeddings=frozenset({(64, 128), (32, 128)}),
  similarities=frozenset({(64, 64)}),
  parameters=frozenset({(3, 3, 8, 8), (64, 1000), (64, 128), (8,)}),
  sides=((32, 32), (96, 96)),
)


def test_collectives_of_a_text():
  """Breaks if a collective is missed or counted once for each fusion it stands in, or has another size."""
  found = hlo.collectives(TEXT, 4)
  assert [(c.kind, c.bytes, c.devices) for c in found] == [
    ('all-gather', 64 * 128 * 4, 4),
    ('all-reduce', 2 * 8 * 4, 4),
    ('all-reduce', 2 * 8 * 4 + 64 * 1000 * 4 + 2 * 4, 4),
    ('all-reduce', 2 * (9 * 64 + 64 * 128), 4),
  ]
  assert [c.traffic for c in found[:2]] == [0.75 * 64 * 128 * 4, 2 * 0.75 * 64]


def test_purposes():
  """Breaks if what was combined into one collective is told apart no more, or a kernel with the shape of the
  embeddings is taken for them."""
  found = verdict.moved(hlo.collectives(TEXT, 4), KNOWN, 4)
  assert [dict(g.purposes) for g in found] == [
    {'embeddings': 32768},
    {'BatchNorm (forward)': 64},
    {'BatchNorm (backward)': 64, 'gradients': 256000, 'metrics': 8},
    {'gradients': 2 * (9 * 64 + 64 * 128)},
  ]


@pytest.mark.parametrize(
  ('groups', 'devices'),
  [
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', 2),
    ('replica_groups=[4,2]<=[8]', 2),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', 4),
    ('replica_groups={}', 8),
  ],
)
def test_groups(groups, devices):
  """Breaks if a collective inside groups of devices passes for one of all, or the other way round."""
  text = f'  %c = f32[8] all-reduce(%a), channel_id=1, {groups}, to_apply=%add\n'
  assert [c.devices for c in hlo.collectives(text, 8)] == [devices]


def test_loops_count_as_often_as_they_turn():
  """Breaks if what a loop does in each turn is counted once."""
  text = """
%cond (p: (s32[])) -> pred[] {
  %n = s32[]{:T(256)} constant(6)
  %i = s32[]{:T(256)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(1024)} compare(%i, %n), direction=LT
}
%body (p: (s32[])) -> (s32[]) {
  %r = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[]) while(%p), condition=%cond, body=%body
}
"""
  (found,) = hlo.collectives(text, 2)
  assert found.times == 6 and found.traffic == 6 * 32


def judged(text, devices=4, **fields):
  """The problems of a text, of a recipe with a BatchNorm of 8 channels."""
  model = {'bn_groups': 1, 'head': 'mlp', 'head_dim': 128, **fields.pop('model', {})}
  c = ml_collections.ConfigDict({'method': 'simclr', 'batch_size': 32, 'model': model, **fields})
  stats = {'mean': np.zeros(8, np.float32), 'var': np.zeros(8, np.float32)}
  state = train_state.TrainState(0, {}, {'stats': stats}, {})
  found = verdict.moved(hlo.collectives(text, devices), KNOWN, devices)
  return verdict.problems(c, state, found, devices)


def test_a_sound_program_passes():
  """Breaks if a verdict is wrong about what is right."""
  assert judged(TEXT) == []


def test_lost_negatives_are_found():
  """Breaks if a program whose devices contrast their own images only passes."""
  (problem,) = judged('HloModule jit_step\n\n' + MAIN)
  assert 'embeddings are not gathered' in problem
  assert judged('HloModule jit_step\n\n' + MAIN, method='supervised') == []
  half = TEXT.replace('f32[64,128]{1,0:T(8,128)} all-gather', 'f32[32,128]{1,0} all-gather')
  assert 'embeddings are not gathered' in judged(half)[0]  # one of two views
  assert judged(half, method='moco') == []


@pytest.mark.parametrize('sabotage', ['stem_bn/reduce_sum', 'jvp(ResNet)/stem_bn'])
def test_lost_batch_norm_is_found(sabotage):
  """Breaks if a program whose devices normalise for themselves passes."""
  (problem,) = judged(TEXT.replace(sabotage, 'jvp()'))
  assert 'BatchNorm of 1 group(s) does not reach all devices' in problem
  lines = [x for x in TEXT.splitlines() if 'jvp(ResNet)/stem_bn' not in x or 'transpose' in x]
  assert len(judged('\n'.join(lines))) == 1
  assert judged('\n'.join(lines), model={'bn_groups': 8}) == []  # two whole groups on each device


@pytest.mark.parametrize(
  'moved',
  ['u8[64,96,96,3]', 'f32[2,32,3,32]', 'bf16[32,3072]', 'bf16[8,16,16,64]', 'f32[32,32,96]'],
)
@pytest.mark.parametrize('kind', ['all-gather', 'all-to-all', 'collective-permute'])
def test_moving_images_are_found(moved, kind):
  """Breaks if images, in whatever layout, or activations go from device to device unnoticed."""
  line = f'  %m = {moved}{{0}} {kind}(%a), channel_id=99, replica_groups={{{{0,1,2,3}}}}\n'
  (problem,) = judged(TEXT.replace('  ROOT', line + '  ROOT'))
  assert 'images move between devices' in problem


def test_shuffled_images_may_move():
  """Breaks if ShuffleBN, which moves images on purpose, is refused, or allows other images to move."""
  known = hlo.Known(
    frozenset(), frozenset(), frozenset(), ((32, 32), (96, 96)), shuffled=32 * 32 * 32 * 3
  )
  shuffled = hlo.Array('f32', (32, 32, 32, 3), 'jit(step)/jvp()/mul')
  assert hlo.purpose(shuffled, known, 4) == 'shuffled images'
  assert hlo.purpose(hlo.Array('u8', (32, 96, 96, 3), ''), known, 4) == 'images'
  assert hlo.purpose(hlo.Array('f32', (64, 32, 32, 3), ''), known, 4) == 'images'


@pytest.mark.parametrize(
  ('message', 'needed', 'limit'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(16.59G) exceeds available HBM (15.75G).',
      16.59,
      15.75,
    ),
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
      'Used 20.25G of 15.48G hbm. Exceeded hbm capacity by 4.77G.',
      20.25,
      15.48,
    ),
    ('RESOURCE_EXHAUSTED: something else', None, None),
  ],
)
def test_memory_in_messages(message, needed, limit):
  """Breaks if a program that does not fit is reported without its size."""
  gib = 2**30
  found = check.memory_in(message)
  assert found == (needed and needed * gib, limit and limit * gib)


@pytest.mark.parametrize('true', [0, 8, 24, 64, 72, 1000, 4096])
@pytest.mark.parametrize('start', [8, 100, 4096])
def test_search_for_the_largest_batch(true, start):
  """Breaks if the search stops early, tries the same twice, or leaves the multiples of the devices."""
  tried = []

  def fits(batch):
    assert batch % 8 == 0 and batch not in tried
    tried.append(batch)
    return batch <= true

  assert check.largest(start, 8, fits, 4096) == true // 8 * 8
  assert len(tried) < 24


@pytest.mark.parametrize('resize_on', ['device', 'host'])
def test_batches_have_the_shapes_that_are_compiled(tmp_path, resize_on):
  """Breaks if a batch of a real stream differs from what compile-check compiles for."""
  for i in range(8):
    pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / f'{i}.png')
  changes = {'image_size': '32', 'data.source': 'folder', 'data.dir': str(tmp_path)}
  changes |= {'data.train_split': '.', 'data.test_split': '', 'data.num_classes': '0'}
  c = config.load('simclr_digits', {**TINY, **changes, 'data.resize_on': resize_on})
  mesh = sharding.make_mesh(jax.devices()[:2])
  files = data.load(c.data, 'train')
  batches = loader.for_training(files, 0, 8, augment.pipelines(c.augment, 2), 32, mesh)
  real = {k: (v.shape, v.dtype) for k, v in batches(0).items()}
  batches.close()
  constants, rows = loader.shapes(8, 8, 2, 32, resize_on)
  assert real == {k: (v.shape, v.dtype) for k, v in rows.items()} and constants == {}


def test_resident_images_have_the_shapes_that_are_compiled():
  """Breaks if the batches of images that stay on the devices differ from what is compiled for."""
  c = config.load('simclr_digits', TINY)
  images = data.load(c.data, 'train')
  mesh = sharding.make_mesh(jax.devices()[:2])
  real = loader.for_training(images, 0, 8, augment.pipelines(c.augment, 2), c.image_size, mesh)
  constants, rows = loader.shapes(
    len(images), 8, 2, c.image_size, 'device', images.images.shape[1:3]
  )
  for found, expected in ((real.constants, constants), (real(0), rows)):
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
      k: (v.shape, v.dtype) for k, v in expected.items()
    }
  real.close()


def shapes_of(recipe):
  method = methods.build(recipe)
  optimizer = optim.build(recipe, optim.schedule(recipe, recipe.data.examples))
  return jax.eval_shape(lambda: train_state.create(method, optimizer, 0, recipe.image_size))


def test_a_recipe_is_made_ready():
  """Breaks if a recipe is compiled in float32, or with a batch that the devices cannot share."""
  recipe, notes = check.prepared(config.load('simclr_imagenet'), 128)
  assert (recipe.dtype, recipe.data.examples, notes) == ('bfloat16', 1281167, [])
  assert check.prepared(config.load('simclr_images'), 4)[1]
  with pytest.raises(ConfigError, match='128: set --config.batch_size=128 or 256'):
    check.prepared(config.load('moco_imagenet', {'batch_size': '200'}), 128)


def command(*words):
  return subprocess.run(
    [sys.executable, '-m', 'simclr_jax', 'compile-check', *words],
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.mark.parametrize(
  ('words', 'mend'),
  [
    (['--config=simclr_imagenet', '--topology=v3-100'], 'v3-64, v3-128'),
    (['--config=simclr_imagnet', '--topology=v3-8'], 'did you mean'),
  ],
)
def test_wrong_words(words, mend, capsys):
  """Breaks if a typing error is compiled, or answered with a traceback."""
  assert cli.main(['compile-check', *words]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and mend in error


def test_without_the_compiler(monkeypatch, capsys):
  """Breaks if a missing libtpu is not named."""
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  assert cli.main(['compile-check', '--config=simclr_imagenet', '--topology=v3-8']) == 2
  assert 'pip install' in capsys.readouterr().err


SMALL = {
  'model.depth': 18,
  'model.width_multiplier': 0.125,
  'image_size': 32,
  'batch_size': 48,
  'augment.view1': 'supervised',
}


def test_real_compilation():
  """Breaks if the TPU compiler refuses the step, or makes of it what would not be SimCLR."""
  pytest.importorskip('libtpu', reason='the TPU compiler is missing: pip install .[compile-check]')
  fields = [f'--config.{k}={v}' for k, v in SMALL.items()]
  done = command('--config=simclr_imagenet', '--topology=v5e-4', '--json', *fields)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result['problems'] == [] and result['devices'] == 4 and result['dtype'] == 'bfloat16'
  assert 0 < result['memory']['total'] < 2**28 and result['flops'] > 0

  total = dict.fromkeys(('embeddings', 'BatchNorm (forward)', 'gradients'), 0)
  for c in result['collectives']:
    assert c['devices'] == 4
    for name in total:
      total[name] += c['count'] * c['bytes_by_purpose'].get(name, 0)
  state = shapes_of(
    check.prepared(config.load('simclr_imagenet', {k: str(v) for k, v in SMALL.items()}), 4)[0]
  )
  assert total['embeddings'] == 2 * 48 * 128 * 4  # [2n, d], float32
  # Mean and mean square of every channel, float32.
  assert total['BatchNorm (forward)'] == 4 * sum(
    x.size for x in jax.tree.leaves(state.state['stats'])
  )
  # Kernels and the probe in float32; scales and offsets go with BatchNorm's sums.
  params = dict(state.params)
  probe = sum(p.size for p in jax.tree.leaves(params.pop('probe')))
  kernels = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
  assert total['gradients'] == 4 * (kernels + probe)
  assert sum(c['count'] for c in result['collectives'] if 'gradients' in c['bytes_by_purpose']) == 1


def test_real_compilation_of_a_distillation():
  """Breaks if the teacher's shapes, which no training has yet given, cannot be had without a device."""
  pytest.importorskip('libtpu', reason='the TPU compiler is missing: pip install .[compile-check]')
  fields = [f'--config.{k}={v}' for k, v in SMALL.items()]
  fields += ['--config.data.num_classes=10', '--config.model.sk_ratio=0']
  done = command('--config=distill_imagenet:self', '--topology=v5e-4', '--json', *fields)
  assert done.returncode == 0, done.stderr
  purposes = {p for c in json.loads(done.stdout)['collectives'] for p in c['bytes_by_purpose']}
  assert 'gradients' in purposes and 'images' not in purposes


def multiply_adds(size):
  """Of ResNet-50's convolutions on one image, layer by layer, from the papers' table; and of the stem alone."""
  side = size // 2
  stem = total = side**2 * 7 * 7 * 3 * 64
  side, channels = side // 2, 64
  for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
    for block in range(blocks):
      before = side
      side = side // stride if block == 0 else side
      total += before**2 * channels * width + side**2 * (9 * width * width + 4 * width * width)
      total += side**2 * channels * 4 * width * (block == 0)
      channels = 4 * width
  return total, stem


def test_figures_of_the_published_setting():
  """Breaks if the table's ResNet-50 does other work, or moves other bytes, than counting says it should."""
  cell = TABLE / 'simclr_imagenet-v1-v3-128.json'
  if not cell.exists():
    pytest.skip('benchmarks/tpu_table has no such cell: make tpu-table')
  cell = json.loads(cell.read_text())
  views = 2 * 4096 // 128
  total, stem = multiply_adds(224)
  assert 4.08e9 < total < 4.10e9  # the 4.1 GFLOP that are told of ResNet-50
  crop = 224 * 512 * 512 * 3 + 224 * 224 * 512 * 3  # two products with matrices
  expected = 2 * views * (3 * total - stem + crop)  # images need no gradient
  np.testing.assert_allclose(cell['flops'], expected, rtol=0.02)

  moved = dict.fromkeys(('embeddings', 'BatchNorm (forward)', 'gradients'), 0)
  for c in cell['collectives']:
    for name in moved:
      moved[name] += c['count'] * c['bytes_by_purpose'].get(name, 0)
  state = shapes_of(check.prepared(config.load('simclr_imagenet'), 128)[0])
  stats = sum(x.size for x in jax.tree.leaves(state.state['stats']))
  params = dict(state.params)
  probe = sum(p.size for p in jax.tree.leaves(params.pop('probe')))
  kernels = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
  assert moved == {
    'embeddings': 2 * 4096 * 128 * 4,
    'BatchNorm (forward)': 4 * stats,
    'gradients': 4 * (kernels + probe),
  }
