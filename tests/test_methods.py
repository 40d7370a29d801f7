"""What holds for every method: it is found by its file name, so that a new one is tested by being there.

`python tests/test_methods.py PROCESS ADDRESS` is one of two processes with four devices each.
"""

import atexit
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from common import records

from simclr_jax import config as recipes, data, fields, methods, runs, sharding, train, train_state
from simclr_jax.models import network

STEPS = 10
SMALL = {
  'data.source': 'digits',
  'data.num_classes': '10',
  'data.test_split': 'test',
  'augment.view1': 'torch_crop(0.2, 1) | flip',
  'model.depth': '8',
  'model.width_multiplier': '0.125',
  'model.stem': 'strided',
  'model.head_dim': '16',
  'image_size': '32',
  'batch_size': '32',
  'steps': str(STEPS),
  'learning_rate_scaling': 'none',
  'warmup_epochs': '0',
  'schedule_first_epoch': '0',  # 1 leaves a run of one epoch no learning rate
  'log_every_steps': '1',
  'checkpoint_every_steps': '5',
  'keep_checkpoints': '3',
  'knn_every_epochs': '0',
  'tensorboard': 'false',
}
# Groups of 8 examples, a queue that 32 does not divide, few negatives.
SMALL_FIELDS = {'queue_size': '100', 'negatives': '64'}
# Gentle: float rounding that flips a ReLU must stay below the tolerance for ten steps.
SMALL_RATE = {'lars': '0.001', 'sgd': '0.0003', 'nesterov': '0.0003', 'adamw': '0.0001'}
SMALL_GROUPS = {'model.bn_groups': '4'}
VARIANTS = {name: list(recipes.variants(name)) or [''] for name in recipes.names()}
SPECS = [f'{name}:{v}'.rstrip(':') for name, variants in VARIANTS.items() for v in variants]
SHORT = [f'{name}:{variants[0]}'.rstrip(':') for name, variants in VARIANTS.items()]


@functools.cache
def small(spec, **changes):
  """A built-in recipe, made small."""
  recipe = recipes.load(spec)
  wanted = {k: v for k, v in SMALL_FIELDS.items() if recipe.get(k)}
  if 'teacher' in recipe:
    wanted['teacher'] = teacher()
  groups = SMALL_GROUPS if recipe.model.bn_groups > 1 else {}
  rate = {'learning_rate': SMALL_RATE[recipe.optimizer]}
  return recipes.load(spec, {**SMALL, **rate, **wanted, **groups, **changes})


@functools.cache
def teacher():
  """A run with a classifier."""
  if 'TEACHER' in os.environ:  # of the process that started this one
    return os.environ['TEACHER']
  folder = pathlib.Path(tempfile.mkdtemp(prefix='simclr_jax_teacher'))
  atexit.register(shutil.rmtree, folder)
  assert train.pretrain(small('finetune_small', steps='1'), folder, quiet=True) == 0
  return str(folder)


def slow(*specs):
  return [pytest.param(spec, marks=pytest.mark.slow) for spec in specs]


def cases():
  """One recipe for every method, and the memory of SimCLR v2."""
  first = {recipes.load(spec).method: spec for spec in reversed(SPECS)}
  assert set(first) == set(fields.method_names()), 'every method needs a recipe'
  quick = [first[name] for name in ('simclr', 'moco', 'memory_bank')]
  others = [spec for spec in first.values() if spec not in quick]
  return [*quick, *slow(*others, 'simclr_imagenet:v2', 'moco_cifar10:symmetric')]


def ten_steps(spec, devices):
  """Losses of the first ten steps, and the state after them."""
  recipe = small(spec)
  mesh = sharding.make_mesh(devices)
  state, step = train_state.build(
    recipe, data.load(recipe.data, 'train'), mesh, teacher=runs.load_teacher(recipe)
  )
  losses = []
  for i in range(STEPS):
    state, metrics = step(state, i)
    losses.append(float(metrics['loss']))
  return losses, state, step


@functools.cache
def eight(spec):
  return ten_steps(spec, jax.devices())


@pytest.fixture(scope='module')
def two_processes(request, tmp_path_factory):
  """The losses of all selected cases on two processes with four devices each."""
  selected = {item.callspec.params['spec'] for item in request.session.items
              if item.originalname == 'test_one_result_whatever_the_hardware'}  # fmt: skip
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': '4', 'JAX_PLATFORMS': 'cpu', 'TEACHER': teacher()}
  files = [(tmp_path_factory.mktemp('process') / str(i)).open('w+') for i in range(2)]
  processes = [
    subprocess.Popen(
      [sys.executable, __file__, str(i), address, *sorted(selected)], env=env, stdout=f, stderr=f
    )
    for i, f in enumerate(files)
  ]
  codes = [p.wait(timeout=900) for p in processes]
  texts = []
  for f in files:
    f.seek(0)
    texts.append(f.read())
  assert codes == [0, 0], texts[0][-3000:] + texts[1][-3000:]
  found = [json.loads(t.splitlines()[-1]) for t in texts]
  assert found[0] == found[1]
  return found[0]


@pytest.mark.parametrize('spec', cases())
def test_one_result_whatever_the_hardware(spec, two_processes):
  """Breaks if a loss depends on how many devices or processes compute it."""
  one, one_state, _ = ten_steps(spec, jax.devices()[:1])
  many, many_state, _ = eight(spec)
  assert len(set(one)) == STEPS
  np.testing.assert_allclose(many, one, rtol=1e-5)
  np.testing.assert_allclose(two_processes[spec], one, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(one_state.state), jax.tree.leaves(many_state.state)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('spec', cases())
def test_resumed_equals_uninterrupted(spec, tmp_path):
  """Breaks if queue, pointer, key encoder, bank or anything else is not in the checkpoint whole."""
  recipe = small(spec)
  assert train.pretrain(recipe, tmp_path / 'whole') == 0
  # What a run killed after step 5 leaves behind.
  (tmp_path / 'killed').mkdir()
  shutil.copy(tmp_path / 'whole/config.json', tmp_path / 'killed')
  shutil.copytree(tmp_path / 'whole/checkpoints/5', tmp_path / 'killed/checkpoints/5')
  assert train.pretrain(recipe, tmp_path / 'killed') == 0
  whole, killed = (records(tmp_path / run) for run in ('whole', 'killed'))
  assert [r['step'] for r in killed] == list(range(6, STEPS + 1))
  assert killed == whole[5:]
  crcs = [_crc32(tmp_path / run) for run in ('whole', 'killed')]
  assert crcs[0] == crcs[1]
  state = ''.join(crcs[0])
  for part in {'moco': ('queue', 'pointer', 'key'), 'memory_bank': ('bank',)}.get(
    recipe.method, ()
  ):
    assert part in state


def test_first_and_last_step_are_logged_with_all_figures(tmp_path):
  """Breaks if the first loss is never seen, or the last record lacks the embeddings' figures."""
  recipe = small('supervised_imagenet', steps='3', log_every_steps='20')
  assert train.pretrain(recipe, tmp_path) == 0
  found = records(tmp_path)
  assert [r['step'] for r in found] == [1, 3]
  assert all({'loss', 'z_std', 'rank'} <= set(r) for r in found)


def _crc32(workdir):
  path = workdir / 'checkpoints' / str(STEPS) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


@pytest.mark.parametrize('spec', cases())
def test_images_stay_where_they_are(spec):
  """Breaks if a method moves images between devices, other than for a shuffle, or the bank."""
  recipe = small(spec)
  _, state, step = eight(spec)
  moved = [kind for shape, kind in collectives(step, state) if _holds_images(shape, recipe)]
  if recipe.method == 'memory_bank':
    rows = len(state.state['bank'])
    assert not any(f'[{rows},' in shape for shape, _ in collectives(step, state))
  assert moved == ['all-gather'] * (recipe.get('shuffle') == 'permute') * (
    1 + recipe.get('symmetric', 0)
  )


def test_transpose_shuffle_is_an_all_to_all():
  """Breaks if the fast shuffle gathers all images on every device."""
  recipe = small(
    'moco_cifar10', **{'shuffle': 'transpose', 'model.bn_groups': '8', 'batch_size': '64'}
  )
  train_set = data.load(recipe.data, 'train')
  state, step = train_state.build(recipe, train_set, sharding.make_mesh())
  moved = {kind for shape, kind in collectives(step, state) if _holds_images(shape, recipe)}
  assert moved == {'all-to-all'}


def test_aligned_groups_need_no_communication():
  """Breaks if BatchNorm in as many groups as devices talks between devices to normalise."""
  for groups, silent in (('8', True), ('1', False)):
    recipe = small('moco_imagenet:v1', **{'model.bn_groups': groups})
    mesh = sharding.make_mesh()
    net = network.build(recipe)
    x = np.zeros((32, 32, 32, 3), np.float32)
    params, stats = jax.eval_shape(net.init, jax.random.key(0), x)
    rows = jax.NamedSharding(mesh, jax.P('data'))
    whole = jax.NamedSharding(mesh, jax.P())

    def forward(params, stats, x, net=net):
      return net.apply(params, stats, x)[0][-1]

    compiled = jax.jit(forward, in_shardings=(whole, whole, rows), out_shardings=rows)
    with jax.set_mesh(mesh):
      text = compiled.lower(params, stats, x).compile().as_text()
    assert (KINDS.search(text) is None) == silent


KINDS = re.compile(
  r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
)


def collectives(step, state):
  """(shape, kind) of all collective operations of the compiled step."""
  text = step.lower(state, 0).compile().as_text()
  return re.findall(rf'= (\(?\w+\[[\d,]*\].*?) ({KINDS.pattern})(?:-start)?\(', text)


def _holds_images(shape, recipe):
  size = recipe.image_size
  return f'{size},{size},3' in shape


@pytest.mark.parametrize('spec', cases())
def test_sharded_state_is_split_and_the_rest_replicated(spec):
  """Breaks if the bank is on every device, or anything else is not."""
  _, state, _ = eight(spec)
  rows = methods.build(recipes.with_examples(small(spec), 6000)).sharded_state
  for key, part in state.state.items():
    for leaf in jax.tree.leaves(part):
      assert leaf.sharding.is_fully_replicated == (key not in rows)
      assert len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize('spec', cases())
def test_bfloat16_stays_inside(spec):
  """Breaks if on accelerators keys, queue, bank, statistics or the loss are kept in bfloat16."""
  recipe = recipes.with_examples(small(spec, dtype='bfloat16'), 6000)
  method = methods.build(recipe)
  views = jax.ShapeDtypeStruct((32, method.views, 32, 32, 3), np.float32)
  label = jax.ShapeDtypeStruct((32,), np.int32)
  scalar = jax.ShapeDtypeStruct((), np.int32)
  batch = {'views': views, 'label': label, 'index': label, 'step': scalar, 'steps': scalar}
  batch['teacher'] = runs.load_teacher(recipe)
  params, state = jax.eval_shape(method.init, jax.random.key(0), batch)
  loss, (new, metrics) = jax.eval_shape(method.loss, params, state, batch, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  for name, x in {'': loss, **metrics}.items():
    assert getattr(x, 'dtype', np.float32) != jax.numpy.bfloat16, name


@pytest.mark.parametrize('spec', [*SHORT, *slow(*(spec for spec in SPECS if spec not in SHORT))])
def test_every_recipe_steps(spec):
  """Breaks if a built-in recipe cannot be built, or its own augmentation or loss gives a NaN."""
  own = recipes.load(spec)
  changes = {'augment.view1': own.augment.view1, 'batch_size': '16', 'image_size': '16'}
  if own.optimizer == 'nesterov':  # a smaller step is lost in rounding
    changes['learning_rate'] = '0.01'
  if own.model.sk_ratio:  # only bottlenecks have selective kernels
    changes |= {'model.depth': '50', 'model.width_multiplier': '0.0625'}
  recipe = small(spec, **changes)
  train_set = data.load(recipe.data, 'train')
  mesh = sharding.make_mesh(jax.devices()[:1])
  state, step = train_state.build(recipe, train_set, mesh, teacher=runs.load_teacher(recipe))
  before = jax.device_get(state.params)
  for i in range(3):  # a classifier and a last gamma of 0 hold back what is below, a step each
    state, metrics = step(state, i)
  assert all(np.isfinite(float(v)) for k, v in metrics.items())
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
  assert np.mean(jax.tree.leaves(changed)) > 0.8


def main():
  jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
  assert jax.process_count() == 2 and jax.device_count() == 8
  print(json.dumps({spec: ten_steps(spec, jax.devices())[0] for spec in sys.argv[3:]}))


if __name__ == '__main__':
  main()
