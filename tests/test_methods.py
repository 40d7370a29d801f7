"""Tests of every method. Methods are found by their file names, so that a new one is tested, too.

`python tests/test_methods.py PROCESS ADDRESS RECIPE...` is one of two processes with four devices each.
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
  'schedule_first_epoch': '0',  # with 1, the learning rate of a run of one epoch is 0
  'log_every_steps': '1',
  'checkpoint_every_steps': '5',
  'keep_checkpoints': '3',
  'knn_every_epochs': '0',
  'tensorboard': 'false',
}
# A queue whose size is no multiple of the batch size, few negatives.
SMALL_FIELDS = {'queue_size': '100', 'negatives': '64'}
# Small, so that differences from rounding stay below the tolerance for ten steps.
SMALL_RATE = {'lars': '0.001', 'sgd': '0.0003', 'nesterov': '0.0003', 'adamw': '0.0001'}
SMALL_GROUPS = {'model.bn_groups': '4'}  # of 8 examples
VARIANTS = {name: list(recipes.variants(name)) or [''] for name in recipes.names()}
SPECS = [f'{name}:{v}'.rstrip(':') for name, variants in VARIANTS.items() for v in variants]
SHORT = ['simclr_digits', 'moco_cifar10:asymmetric', 'finetune_small']


@functools.cache
def small(spec, **changes):
  """A built-in recipe with a small network and batch."""
  recipe = recipes.load(spec)
  sizes = {k: v for k, v in SMALL_FIELDS.items() if recipe.get(k)}
  if 'teacher' in recipe:
    sizes['teacher'] = teacher()
  groups = SMALL_GROUPS if recipe.model.bn_groups > 1 else {}
  rate = {'learning_rate': SMALL_RATE[recipe.optimizer]}
  return recipes.load(spec, {**SMALL, **rate, **sizes, **groups, **changes})


@functools.cache
def teacher():
  """The workdir of a run with a classifier."""
  if 'TEACHER' in os.environ:  # set by the process that started this one
    return os.environ['TEACHER']
  folder = pathlib.Path(tempfile.mkdtemp(prefix='simclr_jax_teacher'))
  atexit.register(shutil.rmtree, folder)
  assert train.pretrain(small('finetune_small', steps='1'), folder, quiet=True) == 0
  return str(folder)


def slow(*specs):
  """Parameters that run only in `make test-all`."""
  return [pytest.param(spec, marks=pytest.mark.slow) for spec in specs]


def cases():
  """One recipe per method, SimCLR v2's memory, and the symmetric loss of MoCo."""
  # The last entry of a method wins. These two react the least to rounding.
  order = [*reversed(SPECS), 'simclr_digits', 'moco_imagenet:v1']
  first = {recipes.load(spec).method: spec for spec in order}
  assert set(first) == set(fields.method_names()), 'every method needs a recipe'
  quick = [first[name] for name in ('simclr', 'moco')]
  others = [spec for spec in first.values() if spec not in quick]
  return [*quick, *slow(*others, 'simclr_imagenet:v2', 'moco_cifar10:symmetric')]


def ten_steps(spec, devices):
  """The losses of the first ten steps, the state after them, and the step function."""
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
def ten_steps_on_eight_devices(spec):
  return ten_steps(spec, jax.devices())


@pytest.fixture(scope='module')
def two_processes(request, tmp_path_factory):
  """The losses of all selected recipes in two processes with four devices each."""
  selected = {item.callspec.params['spec'] for item in request.session.items
              if item.originalname == 'test_results_do_not_depend_on_devices_or_processes'}  # fmt: skip
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
  losses = [json.loads(t.splitlines()[-1]) for t in texts]
  assert losses[0] == losses[1]
  return losses[0]


@pytest.mark.parametrize('spec', cases())
def test_results_do_not_depend_on_devices_or_processes(spec, two_processes):
  """Breaks if a loss depends on the number of devices or processes."""
  losses, state, _ = ten_steps(spec, jax.devices()[:1])
  eight_losses, eight_state, _ = ten_steps_on_eight_devices(spec)
  assert len(set(losses)) >= STEPS - 1  # near ln(classes), two may round to the same number
  np.testing.assert_allclose(eight_losses, losses, rtol=1e-5)
  np.testing.assert_allclose(two_processes[spec], losses, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(state.state), jax.tree.leaves(eight_state.state)):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('spec', cases())
def test_resumed_equals_uninterrupted(spec, tmp_path):
  """Breaks if a part of the state (queue, pointer, key encoder, bank) is missing in the checkpoint."""
  recipe = small(spec)
  assert train.pretrain(recipe, tmp_path / 'uninterrupted') == 0
  # The files of a run that was killed after step 5.
  (tmp_path / 'resumed').mkdir()
  shutil.copy(tmp_path / 'uninterrupted/config.json', tmp_path / 'resumed')
  shutil.copytree(tmp_path / 'uninterrupted/checkpoints/5', tmp_path / 'resumed/checkpoints/5')
  assert train.pretrain(recipe, tmp_path / 'resumed') == 0
  uninterrupted, resumed = (records(tmp_path / run) for run in ('uninterrupted', 'resumed'))
  assert [r['step'] for r in resumed] == list(range(6, STEPS + 1))
  assert resumed == uninterrupted[5:]
  checksums = [_checksums(tmp_path / run) for run in ('uninterrupted', 'resumed')]
  assert checksums[0] == checksums[1]
  state = ''.join(checksums[0])
  for part in {'moco': ('queue', 'pointer', 'key'), 'memory_bank': ('bank',)}.get(
    recipe.method, ()
  ):
    assert part in state


def test_first_and_last_step_have_all_metrics(tmp_path):
  """Breaks if the first loss is not logged, or the last record has no metrics of the embeddings."""
  recipe = small('supervised_imagenet', steps='3', log_every_steps='20')
  assert train.pretrain(recipe, tmp_path) == 0
  steps = records(tmp_path)
  assert [r['step'] for r in steps] == [1, 3]
  assert all({'loss', 'z_std', 'rank'} <= set(r) for r in steps)


def _checksums(workdir):
  path = workdir / 'checkpoints' / str(STEPS) / '_CHECKPOINT_METADATA'
  return json.loads(path.read_text())['custom_metadata']['crc32']


@pytest.mark.parametrize('spec', cases())
def test_images_are_not_moved_between_devices(spec):
  """Breaks if a method moves images, other than for shuffling BatchNorm, or the memory bank between
  devices.
  """
  recipe = small(spec)
  _, state, step = ten_steps_on_eight_devices(spec)
  moved = [kind for shape, kind in collectives(step, state) if _holds_images(shape, recipe)]
  if recipe.method == 'memory_bank':
    rows = len(state.state['bank'])
    assert not any(f'[{rows},' in shape for shape, _ in collectives(step, state))
  assert moved == ['all-gather'] * (recipe.get('shuffle') == 'permute') * (
    1 + recipe.get('symmetric', 0)
  )


def test_transpose_shuffle_is_an_all_to_all():
  """Breaks if shuffle=transpose gathers all images on every device."""
  recipe = small(
    'moco_cifar10', **{'shuffle': 'transpose', 'model.bn_groups': '8', 'batch_size': '64'}
  )
  train_set = data.load(recipe.data, 'train')
  state, step = train_state.build(recipe, train_set, sharding.make_mesh())
  moved = {kind for shape, kind in collectives(step, state) if _holds_images(shape, recipe)}
  assert moved == {'all-to-all'}


def test_batch_norm_groups_per_device_need_no_communication():
  """Breaks if BatchNorm with one group per device communicates between devices."""
  for groups, local in (('8', True), ('1', False)):
    recipe = small('moco_imagenet:v1', **{'model.bn_groups': groups})
    mesh = sharding.make_mesh()
    net = network.build(recipe)
    x = np.zeros((32, 32, 32, 3), np.float32)
    params, stats = jax.eval_shape(net.init, jax.random.key(0), x)
    by_row = jax.NamedSharding(mesh, jax.P('data'))
    replicated = jax.NamedSharding(mesh, jax.P())

    def forward(params, stats, x, net=net):
      return net.apply(params, stats, x)[0][-1]

    compiled = jax.jit(forward, in_shardings=(replicated, replicated, by_row), out_shardings=by_row)
    with jax.set_mesh(mesh):
      program = compiled.lower(params, stats, x).compile().as_text()
    assert (KINDS.search(program) is None) == local


KINDS = re.compile(
  r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
)


def collectives(step, state):
  """(shape, kind) of every collective operation in the compiled step."""
  program = step.lower(state, 0).compile().as_text()
  return re.findall(rf'= (\(?\w+\[[\d,]*\].*?) ({KINDS.pattern})(?:-start)?\(', program)


def _holds_images(shape, recipe):
  size = recipe.image_size
  return f'{size},{size},3' in shape


@pytest.mark.parametrize('spec', cases())
def test_only_sharded_state_is_sharded(spec):
  """Breaks if the memory bank is replicated on every device, or any other state is sharded."""
  _, state, _ = ten_steps_on_eight_devices(spec)
  sharded_state = methods.build(recipes.with_examples(small(spec), 6000)).sharded_state
  for key, part in state.state.items():
    for leaf in jax.tree.leaves(part):
      assert leaf.sharding.is_fully_replicated == (key not in sharded_state)
      assert len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize('spec', cases())
def test_state_and_loss_are_float32_with_bfloat16(spec):
  """Breaks if keys, queue, bank, BatchNorm statistics or the loss are bfloat16 with dtype=bfloat16."""
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
def test_every_recipe_trains(spec):
  """Breaks if a built-in recipe cannot be built, or its augmentation or loss gives a NaN."""
  published = recipes.load(spec)
  changes = {'augment.view1': published.augment.view1, 'batch_size': '16', 'image_size': '16'}
  if published.optimizer == 'nesterov':  # a smaller update is lost in rounding
    changes['learning_rate'] = '0.01'
  if published.model.sk_ratio:  # only bottlenecks have selective kernels
    changes |= {'model.depth': '50', 'model.width_multiplier': '0.0625'}
  recipe = small(spec, **changes)
  train_set = data.load(recipe.data, 'train')
  mesh = sharding.make_mesh(jax.devices()[:1])
  state, step = train_state.build(recipe, train_set, mesh, teacher=runs.load_teacher(recipe))
  before = jax.device_get(state.params)
  # A zero-initialised classifier or gamma has no gradient for the layers below, for one step each.
  for i in range(3):
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
