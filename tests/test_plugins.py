"""Methods, encoders and ops of one's own, from files outside the package: trained, resumed, evaluated, exported."""

import json
import shutil

import jax
import numpy as np
import pytest
from common import records
from conftest import TINY, fails

from simclr_jax import cli, config, methods, plugins
from simclr_jax.data import digits
from simclr_jax.errors import ConfigError
from simclr_jax.runs import load_encoder

BYOL = '''
"""BYOL (Grill et al. 2020): the online network predicts the projection of its EMA copy; no negatives."""

import jax
import jax.numpy as jnp

from simclr_jax import losses
from simclr_jax.fields import Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import mlp, network
from simclr_jax.momentum import encode, init_ema, update_ema
from simclr_jax.optim import Group

FIELDS = {
  'key_momentum': Field(0.99, 'EMA momentum at the start; it increases to 1', Range(0.0, 1.0)),
  'predictor_hidden': Field(32, 'width of the hidden layer of the predictor', Range(1)),
}


def build(config):
  net = network.build(config)
  predictor = mlp.MLP(2, config.model.head_dim, config.predictor_hidden, norm='hidden')

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    ema = init_ema(params, stats)
    fresh = predictor.init(rng, jnp.zeros((2, config.model.head_dim)), train=False)
    params['predictor'] = fresh['params']
    return params, {'stats': stats, 'key': ema, 'predictor': fresh['batch_stats']}

  def loss(params, state, batch, rng):
    cosine = (jnp.cos(jnp.pi * batch['step'] / batch['steps']) + 1) / 2
    key = update_ema(state['key'], params, 1 - (1 - config.key_momentum) * cosine)
    stats, predicted, total = state['stats'], state['predictor'], 0.0
    for i in (0, 1):
      outputs, stats = net.apply(params, stats, batch['views'][:, i])
      p, predicted = network.apply_train(predictor, params['predictor'], predicted, outputs[-1])
      target, key = encode(net, key, batch['views'][:, 1 - i])
      q = losses.l2_normalize(p[-1])
      total += jnp.mean(2 - 2 * jnp.sum(q * target, axis=-1))
    new = {'stats': stats, 'key': key, 'predictor': predicted}
    metrics = {'loss': total, 'features': outputs[0], 'embeddings': jnp.stack([q, target], axis=1)}
    return total, (new, metrics)

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  groups = {'predictor': Group(rate_factor=10.0)}
  return Method(init, loss, encoder, ema_state=('key',), optimizer_groups=groups)
'''

ENCODER = '''
"""Two convolutions and an average: no BatchNorm."""

import flax.linen as nn
import jax.numpy as jnp


class Small(nn.Module):
  features: int
  dtype: object

  @nn.compact
  def __call__(self, x, train):
    for stride in (2, 2):
      x = nn.relu(nn.Conv(self.features, (3, 3), (stride, stride), dtype=self.dtype)(x))
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def build(config, dtype):
  return Small(int(64 * config['width_multiplier']), dtype)
'''

OPS = '''
import jax
import jax.numpy as jnp

from simclr_jax.data.ops import op
from simclr_jax.validation import Range


@op(draws=True, amount=Range(0.0, 1.0))
def darken(key, image, size, amount):
  """Multiplies an image by a number from 1 - amount to 1."""
  return image * (1 - amount * jax.random.uniform(key))
'''


def overrides(**extra):
  values = {
    **TINY,
    'steps': '4',
    'checkpoint_every_steps': '2',
    **{k.replace('__', '.'): v for k, v in extra.items()},
  }
  return [f'--config.{k}={v}' for k, v in values.items()]


def resumes(arguments, tmp_path):
  """Trains, and trains again from the middle: both must end alike. Returns the workdir."""
  run, killed = tmp_path / 'run', tmp_path / 'killed'
  assert cli.main(['pretrain', f'--workdir={run}', *arguments]) == 0
  killed.mkdir()
  shutil.copy(run / 'config.json', killed)
  shutil.copytree(run / 'checkpoints/2', killed / 'checkpoints/2')
  assert cli.main(['pretrain', f'--workdir={killed}', *arguments]) == 0
  assert records(killed) == records(run)[-len(records(killed)) :] and len(records(killed)) == 2
  return run


def evaluates(run, tmp_path):
  """kNN, probe, embed and export of a run; the export gives the same features."""
  assert cli.main(['knn', f'--workdir={run}', '--k=20']) == 0
  assert cli.main(['probe', f'--workdir={run}', '--cached', '--epochs=1']) == 0
  assert set(json.loads((run / 'evaluation.json').read_text())) == {'knn', 'linear_sgd'}
  out = tmp_path / 'features.npy'
  assert cli.main(['embed', f'--workdir={run}', '--split=test', f'--out={out}']) == 0
  assert cli.main(['export', f'--workdir={run}', f'--out={tmp_path / "export"}']) == 0
  exported = load_encoder(tmp_path / 'export')
  images = digits.load(None, 'test').images
  np.testing.assert_array_equal(exported(images), np.load(out))


def refuses_a_changed_file(capsys, path, run, arguments):
  """A changed file is refused on resume and in evaluations; the restored file is accepted."""
  text = path.read_text()
  path.write_text(text + '\n# changed\n')
  assert 'different configuration (code:' in fails(
    capsys, 'pretrain', f'--workdir={run}', *arguments
  )
  message = fails(capsys, 'knn', f'--workdir={run}')
  assert f'{path} has changed since it was used' in message and 'restore the file' in message
  path.write_text(text)
  assert cli.main(['pretrain', f'--workdir={run}', *arguments]) == 0  # complete


def test_a_method_of_ones_own(tmp_path, capsys):
  """Breaks if a method needs a change in the package, or its schedules, groups or state are lost on resume."""
  path = tmp_path / 'byol.py'
  path.write_text(BYOL)
  recipe = tmp_path / 'byol_digits.py'
  recipe.write_text(
    'from simclr_jax import config, fields\n\n'
    'def get_config():\n'
    f'  c = fields.recipe({str(path)!r})\n'
    "  c.data.source, c.data.num_classes, c.optimizer = 'digits', 10, 'sgd'\n"
    "  c.image_size, c.model.depth, c.model.stem, c.model.head_norm = 32, 8, 'strided', 'hidden'\n"
    "  c.augment.view1 = 'simclr_crop(0.2, 1)'\n"
    '  return c\n'
  )
  arguments = [f'--config={recipe}', *overrides(predictor_hidden='8', learning_rate='0.01')]
  run = resumes(arguments, tmp_path)
  recorded = json.loads((run / 'config.json').read_text())['config']
  assert recorded['method'] == str(path) and recorded['predictor_hidden'] == 8
  assert recorded['code'] == [f'method={plugins.checksum(path, "method")}']
  assert 'predictor' in ''.join(
    json.loads((run / 'checkpoints/4/_CHECKPOINT_METADATA').read_text())['custom_metadata']['crc32']
  )
  evaluates(run, tmp_path)
  refuses_a_changed_file(capsys, path, run, arguments)
  assert 'predictor_hidden=0 is out of range: at least 1' in fails(
    capsys, 'pretrain', f'--workdir={run}', *arguments, '--config.predictor_hidden=0'
  )


@pytest.mark.slow
def test_an_encoder_of_ones_own(tmp_path, capsys):
  """Breaks if networks other than ResNets, or without BatchNorm, cannot be trained, resumed or exported."""
  path = tmp_path / 'encoder.py'
  path.write_text(ENCODER)
  arguments = ['--config=simclr_digits', *overrides(model__encoder=str(path), warmup_epochs='0')]
  run = resumes(arguments, tmp_path)
  evaluates(run, tmp_path)
  assert load_encoder(run)(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 8)
  assert 'batch_stats' not in load_encoder(run).variables
  for block, wanted in (('4', 0), ('1', 2)):
    argv = ['finetune', f'--workdir={run}', '--labels=5', f'--name=block{block}', '--config.steps=2',
            f'--config.fine_tune_after_block={block}']  # fmt: skip
    if wanted:
      assert 'fine_tune_after_block=1 is for ResNets' in fails(capsys, *argv)
    else:
      assert cli.main(argv) == 0
  refuses_a_changed_file(capsys, path, run, arguments)
  path.unlink()
  assert f'the model.encoder file {path} cannot be read' in fails(capsys, 'knn', f'--workdir={run}')
  message = fails(
    capsys, 'embed', f'--workdir={tmp_path / "export"}', '--data=digits', '--out=/tmp/x.npy'
  )
  assert str(path) in message


@pytest.mark.slow
def test_ops_of_ones_own(tmp_path, capsys):
  """Breaks if an op outside the package is unknown to training, resuming or evaluations."""
  path = tmp_path / 'ops.py'
  path.write_text(OPS)
  view = 'simclr_crop(0.2, 1) | darken(0.5, p=0.5)'
  arguments = [
    '--config=simclr_digits',
    *overrides(augment__ops=str(path), augment__view1=view, warmup_epochs='0'),
  ]
  run = resumes(arguments, tmp_path)
  evaluates(run, tmp_path)
  assert cli.main(['report', f'--workdir={run}']) == 0
  refuses_a_changed_file(capsys, path, run, arguments)
  wrong = [a.replace('darken(0.5', 'darkn(0.5') for a in arguments]
  assert "darkn is neither an op nor a published pipeline, did you mean 'darken'?" in fails(
    capsys, 'pretrain', f'--workdir={tmp_path / "other"}', *wrong
  )


def test_a_moved_file_is_the_same_file(tmp_path):
  """Breaks if a run cannot be resumed after its method was moved to another folder."""
  path = tmp_path / 'encoder.py'
  path.write_text(ENCODER)
  arguments = ['--config=simclr_digits', *overrides(model__encoder=str(path), warmup_epochs='0')]
  assert cli.main(['pretrain', f'--workdir={tmp_path / "run"}', *arguments]) == 0
  moved = tmp_path / 'lib.py'
  path.rename(moved)
  arguments = ['--config=simclr_digits', *overrides(model__encoder=str(moved), warmup_epochs='0')]
  assert cli.main(['pretrain', f'--workdir={tmp_path / "run"}', *arguments]) == 0


def test_compiled_programs_depend_on_the_content_of_a_file(tmp_path):
  """Breaks if two versions of a file in one process share a compiled program."""
  path = tmp_path / 'encoder.py'
  path.write_text(ENCODER)
  values = {**TINY, 'model.encoder': str(path), 'warmup_epochs': '0'}
  shapes = []
  for features in ('64', '128'):
    path.write_text(ENCODER.replace('int(64 *', f'int({features} *'))
    recipe = config.with_examples(config.load('simclr_digits', values), 6000)
    method = methods.build(recipe)
    batch = {'views': jax.ShapeDtypeStruct((2, 2, 32, 32, 3), np.float32)}
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    shapes.append(params['probe']['kernel'].shape)
  assert shapes == [(8, 10), (16, 10)]


@pytest.mark.parametrize(
  'field, text, expected',
  [
    ('method', 'x = 1', 'has no function build()'),
    ('method', 'import nowhere', "fails: ModuleNotFoundError: No module named 'nowhere'"),
    ('method', 'FIELDS = {"a": open}', 'cannot be read: '),
    ('model.encoder', 'x = 1', 'has no function build()'),
    ('model.encoder', 'def build(config, dtype): return 3', 'returns int, not a flax.linen module'),
    ('augment.ops', 'x = 1', 'has no ops: decorate functions with simclr_jax.data.ops.op'),
    ('augment.ops', None, 'cannot be read: No such file or directory'),
  ],
)
def test_a_broken_file_is_one_sentence(tmp_path, field, text, expected):
  """Breaks if a mistake in a file of the user's own gives a traceback, or is found after the data was read."""
  path = tmp_path / 'mine.py'
  if text is not None:
    path.write_text(text)
  with pytest.raises(ConfigError) as error:
    methods.build(
      config.with_examples(config.load('simclr_digits', {**TINY, field: str(path)}), 6000)
    ).init(jax.random.key(0), {'views': np.zeros((2, 2, 32, 32, 3), np.float32)})
  assert str(path) in str(error.value) and expected in str(error.value)
