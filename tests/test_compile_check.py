"""compile-check: names of TPUs, parsing of compiled programs, problems that it must detect, real compilations."""

import collections
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import TINY

from simclr_jax import cli, config, data, sharding, train_state
from simclr_jax.compile_check import check, hardware, hlo, verdict
from simclr_jax.data import augment, loader
from simclr_jax.errors import ConfigError
from simclr_jax.models import network

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
def test_topology_names(text, slices, name, devices, options):
  """Breaks if cores are counted as chips, or a slice has another shape than the one that is sold."""
  topology = hardware.topology(text, slices)
  assert (topology.name, topology.devices, topology.options) == (name, devices, options)


@pytest.mark.parametrize(
  ('text', 'slices', 'hint'),
  [
    ('v3', 1, 'v3-128'),
    ('', 1, 'v3-128'),
    ('v9-8', 1, 'only v2, v3'),
    ('a100-8', 1, "there is no GPU 'a100-8' here"),
    ('v3-100', 1, 'v3-64, v3-128'),
    ('v5e-48', 1, 'v5e-32, v5e-64'),
    ('v5e:4x4x4', 1, '2 dimensions, such as v5e:4x4'),
    ('v4:4x4', 1, '3 dimensions'),
    ('2x v3-8', 1, 'v4 or newer'),
    ('2x v5e-16', 2, 'remove one of them'),
    ('0x v5e-16', 1, 'from 1'),
  ],
)
def test_invalid_topology_names_are_errors(text, slices, hint):
  """Breaks if a typo becomes another TPU, or the message does not list valid names."""
  with pytest.raises(ConfigError, match=hint):
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
SHAPES = hlo.StepShapes(
  embeddings=frozenset({(64, 128), (32, 128)}),
  similarities=frozenset({(64, 64)}),
  parameters=frozenset({(3, 3, 8, 8), (64, 1000), (64, 128), (8,)}),
  image_sizes=((32, 32), (96, 96)),
)


def test_parse_collectives():
  """Breaks if a collective is missed, has the wrong size, or is counted once for each fusion it appears in."""
  collectives = hlo.collectives(TEXT, 4)
  assert [(c.kind, c.bytes, c.devices) for c in collectives] == [
    ('all-gather', 64 * 128 * 4, 4),
    ('all-reduce', 2 * 8 * 4, 4),
    ('all-reduce', 2 * 8 * 4 + 64 * 1000 * 4 + 2 * 4, 4),
    ('all-reduce', 2 * (9 * 64 + 64 * 128), 4),
  ]
  assert [c.traffic for c in collectives[:2]] == [0.75 * 64 * 128 * 4, 2 * 0.75 * 64]


def test_purposes_of_collectives():
  """Breaks if the parts of a combined collective are not distinguished, or a kernel with the shape of the
  embeddings counts as embeddings."""
  groups = verdict.group_collectives(hlo.collectives(TEXT, 4), SHAPES, 4)
  assert [dict(g.purposes) for g in groups] == [
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
def test_replica_groups(groups, devices):
  """Breaks if a collective inside groups of devices counts as one over all devices, or the reverse."""
  text = f'  %c = f32[8] all-reduce(%a), channel_id=1, {groups}, to_apply=%add\n'
  assert [c.devices for c in hlo.collectives(text, 8)] == [devices]


def test_collectives_in_loops_are_counted_per_iteration():
  """Breaks if a collective in a loop is counted once instead of once per iteration."""
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
  (collective,) = hlo.collectives(text, 2)
  assert collective.times == 6 and collective.traffic == 6 * 32


def problems(text, recipe='simclr_imagenet', **fields):
  """The problems of a program on 4 devices, for a recipe with one BatchNorm layer of 8 channels."""
  recipe = config.load(recipe, {'batch_size': '32', 'model.bn_groups': '1', **fields})
  stats = {'mean': np.zeros(8, np.float32), 'var': np.zeros(8, np.float32)}
  state = train_state.TrainState(jnp.int32(0), {}, {'stats': stats}, {})
  groups = verdict.group_collectives(hlo.collectives(text, 4), SHAPES, 4)
  return verdict.problems(recipe, state, groups, 4, width=128)


def test_a_correct_program_has_no_problems():
  """Breaks if a problem is reported for a correct program."""
  assert problems(TEXT) == []


def test_missing_negatives_are_detected():
  """Breaks if a program whose devices have only their own images as negatives passes."""
  (problem,) = problems('HloModule jit_step\n\n' + MAIN)
  assert 'embeddings are not gathered' in problem
  supervised = {'recipe': 'supervised_imagenet', 'data.num_classes': '1000'}
  assert problems('HloModule jit_step\n\n' + MAIN, **supervised) == []
  half = TEXT.replace('f32[64,128]{1,0:T(8,128)} all-gather', 'f32[32,128]{1,0} all-gather')
  assert 'embeddings are not gathered' in problems(half)[0]  # one of two views
  assert problems(half, recipe='moco_imagenet') == []


@pytest.mark.parametrize('sabotage', ['stem_bn/reduce_sum', 'jvp(ResNet)/stem_bn'])
def test_missing_batch_norm_statistics_are_detected(sabotage):
  """Breaks if a program passes whose devices compute BatchNorm statistics of their own images only."""
  (problem,) = problems(TEXT.replace(sabotage, 'jvp()'))
  assert 'BatchNorm of 1 group(s) does not reach all devices' in problem
  lines = [x for x in TEXT.splitlines() if 'jvp(ResNet)/stem_bn' not in x or 'transpose' in x]
  assert len(problems('\n'.join(lines))) == 1
  two_groups_per_device = {'model.bn_groups': '8'}
  assert problems('\n'.join(lines), **two_groups_per_device) == []


def test_network_without_batch_norm():
  """Breaks if a network without BatchNorm layers is reported for not exchanging their statistics."""
  state = train_state.TrainState(jnp.int32(0), {}, {'stats': {}}, {})
  assert verdict.problems(config.load('supervised_imagenet'), state, [], 4, width=128) == []


@pytest.mark.parametrize(
  'moved',
  ['u8[64,96,96,3]', 'f32[2,32,3,32]', 'bf16[32,3072]', 'bf16[8,16,16,64]', 'f32[32,32,96]'],
)
@pytest.mark.parametrize('kind', ['all-gather', 'all-to-all', 'collective-permute'])
def test_moved_images_are_detected(moved, kind):
  """Breaks if images, in any layout, or activations move between devices unnoticed."""
  line = f'  %m = {moved}{{0}} {kind}(%a), channel_id=99, replica_groups={{{{0,1,2,3}}}}\n'
  (problem,) = problems(TEXT.replace('  ROOT', line + '  ROOT'))
  assert 'images move between devices' in problem


def test_shuffled_images_may_move():
  """Breaks if ShuffleBN, which moves images on purpose, is a problem, or hides other images that move."""
  shapes = hlo.StepShapes(
    frozenset(), frozenset(), frozenset(), ((32, 32), (96, 96)), shuffled=32 * 32 * 32 * 3
  )
  shuffled = hlo.Array('f32', (32, 32, 32, 3), 'jit(step)/jvp()/mul')
  assert hlo.purpose(shuffled, shapes, 4) == 'shuffled images'
  assert hlo.purpose(hlo.Array('u8', (32, 96, 96, 3), ''), shapes, 4) == 'images'
  assert hlo.purpose(hlo.Array('f32', (64, 32, 32, 3), ''), shapes, 4) == 'images'


@pytest.mark.parametrize(
  ('dims', 'purpose'),
  [
    ((64, 128), 'embeddings'),
    ((4, 16, 128), 'embeddings'),  # of each of 4 devices
    ((4, 16, 64), 'similarities'),
    ((4096, 256), 'memory bank'),
    ((4, 8, 8, 256), 'activations'),
    ((8, 8, 128), 'activations'),
  ],
)
def test_purposes_by_shape(dims, purpose):
  """Breaks if embeddings, similarities or rows of a memory bank count as activations, or the reverse."""
  shapes = dataclasses.replace(SHAPES, sharded_rows=frozenset({(256,)}))
  assert hlo.purpose(hlo.Array('f32', dims, ''), shapes, 4) == purpose


@pytest.mark.parametrize(
  ('name', 'purpose'),
  [
    ('jit(step)/jvp(ResNet)/stem_bn/reduce_sum', 'BatchNorm (forward)'),
    ('jit(step)/transpose(jvp(ResNet))/block/bn2/reduce_sum', 'BatchNorm (backward)'),
    ('jit(step)/jvp(Mine)/BatchNorm_0/reduce_sum', 'BatchNorm (forward)'),
    ('jit(step)/jvp(Mine)/abnormal/reduce_sum', 'other'),
  ],
)
def test_names_of_batch_norm_layers(name, purpose):
  """Breaks if a BatchNorm layer of the package, or with flax's automatic name, is not recognised."""
  assert hlo.purpose(hlo.Array('f32', (2, 512), name), SHAPES, 4) == purpose


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
def test_memory_in_error_messages(message, needed, limit):
  """Breaks if a program that does not fit is reported without its size."""
  gib = 2**30
  memory = check.memory_from_message(message)
  assert memory == (needed and needed * gib, limit and limit * gib)


@pytest.mark.parametrize('resize_on', ['device', 'host'])
def test_shapes_of_streamed_batches(tmp_path, resize_on):
  """Breaks if a batch of a real stream has other shapes than those that compile-check compiles for."""
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


def test_shapes_of_batches_on_the_devices():
  """Breaks if batches of images in device memory have other shapes than those that compile-check compiles for."""
  c = config.load('simclr_digits', TINY)
  images = data.load(c.data, 'train')
  assert isinstance(images, data.Arrays)
  mesh = sharding.make_mesh(jax.devices()[:2])
  real = loader.for_training(images, 0, 8, augment.pipelines(c.augment, 2), c.image_size, mesh)
  constants, rows = loader.shapes(
    len(images), 8, 2, c.image_size, 'device', images.images.shape[1:3]
  )
  for actual, expected in ((real.constants, constants), (real(0), rows)):
    assert {k: (v.shape, v.dtype) for k, v in actual.items()} == {
      k: (v.shape, v.dtype) for k, v in expected.items()
    }
  real.close()


def state_of(recipe):
  """The shapes of the state of a prepared recipe."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  return jax.eval_shape(train_state.programs(recipe, mesh)[0], jax.ShapeDtypeStruct((), np.uint32))


def test_prepare_recipe():
  """Breaks if a recipe is compiled in float32, or with a batch that the devices cannot share."""
  recipe, notes = check.prepare(config.load('simclr_imagenet'), 128)
  assert (recipe.dtype, recipe.data.examples, notes) == ('bfloat16', 1281167, [])
  assert check.prepare(config.load('simclr_images'), 4)[1]
  with pytest.raises(ConfigError, match='128: set --config.batch_size=128 or 256'):
    check.prepare(config.load('moco_imagenet', {'batch_size': '200'}), 128)


SMALL = {
  'model.depth': '18',
  'model.width_multiplier': '0.125',
  'image_size': '32',
  'batch_size': '48',
  'augment.view1': 'supervised',
}
FIELDS = [f'--config.{k}={v}' for k, v in SMALL.items()]

# A method in a file of your own, whose embeddings have a width that no recipe field gives.
OWN_METHOD = """
import jax

from simclr_jax import losses
from simclr_jax.fields import Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import network

FIELDS = {'width': Field(40, 'of the embeddings', Range(1))}


def build(config):
  net = network.build(config)

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    params['projection'] = jax.random.normal(rng, (config.model.head_dim, config.width))
    return params, {'stats': stats}

  def loss(params, state, batch, rng):
    n, views, *image = batch['views'].shape
    outputs, stats = net.apply(params, state['stats'], batch['views'].reshape(n * views, *image))
    value, metrics = losses.nt_xent(outputs[-1] @ params['projection'], 0.1)
    z = metrics.pop('z')
    metrics |= {'loss': value, 'features': outputs[0], 'embeddings': z.reshape(n, views, -1)}
    return value, ({'stats': stats}, metrics)

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(init, loss, encoder, joint_views=2, contrastive=True)
"""
RECIPE = """
from simclr_jax import fields


def get_config():
  config = fields.recipe('own_method.py')
  config.data.num_classes = 10
  return config
"""


@pytest.fixture
def own_recipe(tmp_path, monkeypatch):
  """The path of a recipe for `OWN_METHOD`."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'own_method.py').write_text(OWN_METHOD)
  (tmp_path / 'own_recipe.py').write_text(RECIPE)
  return str(tmp_path / 'own_recipe.py')


@pytest.mark.parametrize(
  'recipe', ['simclr_imagenet', 'moco_imagenet', 'memory_bank_imagenet', 'end_to_end_imagenet']
)
def test_embeddings_of_built_in_methods(recipe):
  """Breaks if the embeddings of a built-in contrastive method are not those of its projection head."""
  recipe, _ = check.prepare(config.load(recipe, SMALL), 4)
  assert verdict.embedding_width(recipe, state_of(recipe)) == network.output_size(recipe) == 128


def test_embeddings_of_a_method_in_a_file(own_recipe):
  """Breaks if the embeddings of a method outside the package are not recognised by their own shape."""
  recipe, _ = check.prepare(config.load(own_recipe, SMALL), 4)
  state = state_of(recipe)
  width = verdict.embedding_width(recipe, state)
  assert width == 40
  assert verdict.step_shapes(recipe, state, 4, width).embeddings == {(48, 40), (96, 40)}


def compile_check(*arguments):
  """Runs the command in a process of its own; returns its JSON."""
  process = subprocess.run(
    [sys.executable, '-m', 'simclr_jax', 'compile-check', '--topology=v5e-4', '--json', *arguments],
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


def bytes_by_purpose(result):
  """Bytes that the collectives of a result move per step, by purpose."""
  total: collections.Counter[str] = collections.Counter()
  for c in result['collectives']:
    for purpose, size in c['bytes_by_purpose'].items():
      total[purpose] += c['count'] * size
  return total


@pytest.mark.parametrize(
  ('arguments', 'hint'),
  [
    (['--config=simclr_imagenet', '--topology=v3-100'], 'v3-64, v3-128'),
    (['--config=simclr_imagnet', '--topology=v3-8'], 'did you mean'),
  ],
)
def test_invalid_arguments(arguments, hint, capsys):
  """Breaks if a typo is compiled, or ends in a traceback."""
  assert cli.main(['compile-check', *arguments]) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and hint in error


def test_without_libtpu(monkeypatch, capsys):
  """Breaks if the error message for a missing libtpu does not say how to install it."""
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  assert cli.main(['compile-check', '--config=simclr_imagenet', '--topology=v3-8']) == 2
  assert 'pip install' in capsys.readouterr().err


def needs_libtpu():
  pytest.importorskip('libtpu', reason='libtpu is not installed: pip install .[compile-check]')


def test_compile_simclr():
  """Breaks if the TPU compiler rejects the step, or its program does not compute SimCLR over all devices."""
  needs_libtpu()
  result = compile_check('--config=simclr_imagenet', *FIELDS)
  assert result['problems'] == [] and result['devices'] == 4 and result['dtype'] == 'bfloat16'
  assert 0 < result['memory']['total'] < 2**28 and result['flops'] > 0
  assert {c['devices'] for c in result['collectives']} == {4}
  total = bytes_by_purpose(result)
  state = state_of(check.prepare(config.load('simclr_imagenet', SMALL), 4)[0])
  assert total['embeddings'] == 2 * 48 * 128 * 4  # [2n, d], float32
  # Mean and mean square of every channel, float32.
  assert total['BatchNorm (forward)'] == 4 * sum(
    x.size for x in jax.tree.leaves(state.state['stats'])
  )
  # Kernels and the probe in float32; scales and offsets are part of BatchNorm's sums.
  params = dict(state.params)
  probe = sum(p.size for p in jax.tree.leaves(params.pop('probe')))
  kernels = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
  assert total['gradients'] == 4 * (kernels + probe)
  assert sum(c['count'] for c in result['collectives'] if 'gradients' in c['bytes_by_purpose']) == 1


def test_compile_a_method_in_a_file(own_recipe):
  """Breaks if the program of a method outside the package fails, or its embeddings are not recognised."""
  needs_libtpu()
  result = compile_check(f'--config={own_recipe}', *FIELDS)
  assert result['problems'] == []
  assert bytes_by_purpose(result)['embeddings'] == 2 * 48 * 40 * 4


@pytest.mark.parametrize('field', ['data.num_classes=0', 'accumulate_steps=2'])
def test_compile_variants_of_simclr(field):
  """Breaks if a recipe without labels, or with accumulated gradients, fails or is reported as wrong."""
  needs_libtpu()
  result = compile_check('--config=simclr_imagenet', *FIELDS, f'--config.{field}')
  assert result['problems'] == []
  assert bytes_by_purpose(result)['embeddings'] == 2 * 48 * 128 * 4  # over all micro-batches


def test_compile_distillation():
  """Breaks if a distillation cannot be compiled without a trained teacher."""
  needs_libtpu()
  fields = ['--config.data.num_classes=10', '--config.model.sk_ratio=0']
  purposes = bytes_by_purpose(compile_check('--config=distill_imagenet:self', *FIELDS, *fields))
  assert 'gradients' in purposes and 'images' not in purposes


def multiply_adds(size):
  """Multiply-adds of ResNet-50 on one image, from the table in its paper: of all convolutions, and of the stem."""
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


def test_operations_and_traffic_of_the_published_setting():
  """Breaks if FLOPs or bytes of ResNet-50 in docs/tpu.md differ from those that are counted by hand."""
  cell = TABLE / 'simclr_imagenet-v1-v3-128.json'
  if not cell.exists():
    pytest.skip('benchmarks/tpu_table lacks this result: make tpu-table')
  cell = json.loads(cell.read_text())
  views = 2 * 4096 // 128
  total, stem = multiply_adds(224)
  assert 4.08e9 < total < 4.10e9  # the published 4.1 GFLOP of ResNet-50
  crop = 224 * 512 * 512 * 3 + 224 * 224 * 512 * 3  # two matrix products
  expected = 2 * views * (3 * total - stem + crop)  # images need no gradient
  np.testing.assert_allclose(cell['flops'], expected, rtol=0.02)

  moved = bytes_by_purpose(cell)
  state = state_of(check.prepare(config.load('simclr_imagenet'), 128)[0])
  stats = sum(x.size for x in jax.tree.leaves(state.state['stats']))
  params = dict(state.params)
  probe = sum(p.size for p in jax.tree.leaves(params.pop('probe')))
  kernels = sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
  assert {k: moved[k] for k in ('embeddings', 'BatchNorm (forward)', 'gradients')} == {
    'embeddings': 2 * 4096 * 128 * 4,
    'BatchNorm (forward)': 4 * stats,
    'gradients': 4 * (kernels + probe),
  }
