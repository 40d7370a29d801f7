"""Recipes and their fields: values of every type, the one table of fields, and the commands that list them."""

import numpy as np
import pytest
from conftest import TINY, fails

from simclr_jax import cli, config, fields, train, train_state
from simclr_jax.data import digits
from simclr_jax.errors import ConfigError
from simclr_jax.models import mlp, norm, resnet
from simclr_jax.momentum import SHUFFLES
from simclr_jax.validation import Choices


@pytest.mark.parametrize(
  'field, value, expected',
  [
    ('epochs', 5, 5), ('epochs', '5', 5), ('epochs', '1e3', 1000), ('epochs', 2.0, 2),
    ('epochs', np.int64(7), 7), ('temperature', 1, 1.0), ('temperature', '0.3', 0.3),
    ('temperature', np.float32(0.5), 0.5), ('tensorboard', False, False), ('tensorboard', 'False', False),
    ('tensorboard', '0', False), ('tensorboard', 'TRUE', True), ('decay_epochs', (1, 2), (1, 2)),
    ('decay_epochs', [3], (3,)), ('decay_epochs', '1,2', (1, 2)), ('decay_epochs', '(1, 2)', (1, 2)),
    ('decay_epochs', '7', (7,)), ('decay_epochs', '', ()), ('first_loss', '1,2.5', (1.0, 2.5)),
    ('profile_steps', '10,15', (10, 15)), ('data.name', '123', '123'), ('data.labels', '10', '10'),
    ('model.width_multiplier', 2, 2.0), ('batch_size', '1_024', 1024),
  ],
)  # fmt: skip
def test_typed_values_and_text(field, value, expected):
  """Breaks if a value from Python, or its text from the command line, is refused or becomes another one."""
  recipe = config.load('simclr_digits', {'schedule': 'multistep', 'warmup_epochs': 0, field: value})
  found = config.flatten(recipe)[field]
  assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
  'field, value, expected',
  [
    ('epochs', 2.7, 'epochs=2.7 is not an integer'), ('epochs', '2.7', "epochs='2.7' is not an integer"),
    ('epochs', True, 'epochs=True is not an integer'), ('epochs', None, 'epochs=None is not an integer'),
    ('epochs', (1,), 'epochs=(1,) is not an integer'), ('tensorboard', 2, 'tensorboard=2 is not true or false'),
    ('tensorboard', 'yes', "tensorboard='yes' is not true or false"),
    ('decay_epochs', (1.5,), 'decay_epochs=(1.5,) is not numbers: 1,2'),
    ('decay_epochs', ('a',), "decay_epochs=('a',) is not numbers: 1,2"),
    ('temperature', None, 'temperature=None is not a number'), ('data.name', 5, 'data.name=5 is not a string'),
    ('seed', 2**32, 'seed=4294967296 is out of range'), ('model', 3, "no field 'model'"),
    ('code', ('a',), 'code is filled in by the program'), ('epochs', '__import__("os")', 'is not an integer'),
  ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(field, value, expected):
  """Breaks if 2.7 epochs become 2, or a mistake in a Python program is a traceback of a library."""
  with pytest.raises(ConfigError) as error:
    config.load('simclr_digits', {field: value})
  assert expected in str(error.value)


def test_derived_values_follow_overrides():
  """Breaks if a warm-up of 10 % of the epochs keeps its length when the epochs change, or cannot be set itself."""
  assert config.load('simclr_digits', {'epochs': 50}).warmup_epochs == 5.0
  assert config.load('simclr_digits', {'epochs': 50, 'warmup_epochs': 2}).warmup_epochs == 2.0


def test_fields_set_on_a_loaded_recipe_are_checked(tmp_path):
  """Breaks if a value that `load` refuses can be set afterwards and is used."""
  recipe = config.load('simclr_digits', TINY)
  recipe.batch_size = -4
  with pytest.raises(ConfigError, match='batch_size=-4 is out of range'):
    train.pretrain(recipe, tmp_path / 'run')
  with pytest.raises(ConfigError, match='batch_size=-4 is out of range'):
    train_state.build(recipe, digits.load(None, 'train'))
  with pytest.raises(AttributeError):
    recipe.batchsize = 3
  with pytest.raises(TypeError):
    recipe.batch_size = 'many'


def test_the_table_agrees_with_the_code():
  """Breaks if a field allows a value that the code does not know, or lacks one."""
  table = fields.TABLE
  assert table['model.depth'].allowed.values == tuple(resnet.DEPTHS)
  assert table['model.stem'].allowed.values == tuple(resnet.STEMS)
  assert set(table['model.variant'].allowed.values) == set(resnet.VARIANTS)
  assert set(table['model.normalize'].allowed.values) == {'none', *resnet.NORMALIZE}
  assert table['model.bn_layout'].allowed.values == norm.LAYOUTS
  assert set(table['model.head_norm'].allowed.values) == set(mlp.NORMS)
  assert fields.of_method('moco')['shuffle'].allowed.values == SHUFFLES


@pytest.mark.parametrize('method', fields.method_names())
def test_every_field_is_described_and_its_default_is_allowed(method):
  """Breaks if a field has no sentence, or a default that would be refused."""
  imported = __import__(f'simclr_jax.methods.{method}', fromlist=['FIELDS']).FIELDS
  assert fields.of_method(method) == imported  # read from the text, without importing JAX
  for name, field in fields.of_recipe(method).items():
    assert len(field.help) > 8 and not field.help.endswith('.'), name
    if field.allowed:
      field.allowed.check(name, field.default)
    if isinstance(field.allowed, Choices):
      assert len(field.allowed.values) > 1


def test_what_may_change_on_resume():
  """Breaks if a field that changes results may be changed in the middle of a run."""
  resumable = {name for name, field in fields.TABLE.items() if field.resumable}
  assert resumable == {
    'log_every_steps', 'checkpoint_every_steps', 'keep_checkpoints', 'knn_every_epochs', 'knn_images',
    'tensorboard', 'watchdog_seconds', 'profile_steps', 'sharding', 'rematerialize', 'first_loss',
    'data.dir', 'data.table', 'data.test_split', 'data.threads', 'knn_features',
  }  # fmt: skip
  compiled = {
    n for m in fields.method_names() for n, f in fields.of_recipe(m).items() if not f.compiled
  }
  assert compiled == {
    'seed', 'data.dir', 'data.table', 'data.holdout', 'data.holdout_seed', 'data.alpha', 'data.range', 'data.label_seed',
    'teacher', 'knn_features',
  }  # fmt: skip
  local = {'data.dir', 'data.table', 'data.threads'}
  assert {n for n, f in fields.TABLE.items() if f.local} == local


def test_fields_command(capsys):
  """Breaks if a user cannot find a field, its default, its range and what it means."""
  assert cli.main(['fields', 'temperature']) == 0
  text = capsys.readouterr().out
  assert 'Fields of method=simclr' in text and 'temperature = 0.1; at least 0.001' in text
  assert cli.main(['fields']) == 0
  text = capsys.readouterr().out
  names = {n for m in fields.method_names() for n in fields.of_recipe(m)}
  assert all(f'  {name} = ' in text for name in names)
  assert 'keep_checkpoints = 2; at least 1; may change on resume' in text
  assert "no field matches 'temprature', did you mean 'temperature'?" in fails(
    capsys, 'fields', 'temprature'
  )


def test_recipes_command(capsys):
  """Breaks if a recipe or variant has no description, or one cannot be shown with all its fields."""
  assert cli.main(['recipes']) == 0
  text = capsys.readouterr().out
  for name in config.names():
    assert f'\n{name} ' in f'\n{text}' and len(config.description(name)) > 20
    assert all(f'  :{v} ' in text and len(about) > 8 for v, about in config.variants(name).items())
  assert cli.main(['recipes', 'moco_imagenet:v2', '--config.epochs=800']) == 0
  text = capsys.readouterr().out
  assert 'temperature: 0.2' in text and 'epochs: 800' in text
  assert "has no variant 'v3', only v1, v2" in fails(capsys, 'recipes', 'moco_imagenet:v3')
