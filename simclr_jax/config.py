"""Recipes: finding, overriding and checking them, before any device is touched."""

import difflib
import importlib.util
import json
import math
import pathlib

import ml_collections

from simclr_jax import defaults, methods, optim
from simclr_jax.data import augment
from simclr_jax.errors import ConfigError
from simclr_jax.models import heads, norm, resnet

# Where recipes named without a path are found: beside the package in a checkout, inside it when
# installed.
FOLDERS = (
  pathlib.Path(__file__).parent / 'configs',
  pathlib.Path(__file__).parents[1] / 'configs',
)
# A run may be resumed with other values of these: they change no result.
FREE = (
  'log_every_steps',
  'checkpoint_every_steps',
  'keep_checkpoints',
  'knn_every_epochs',
  'knn_images',
  'tensorboard',
  'watchdog_seconds',
  'profile_steps',
  'sharding',
  'rematerialize',
  'first_loss',
  'data.dir',
  'data.test_split',
  'data.threads',
)


def names() -> list[str]:
  """The shipped recipes."""
  return sorted({p.stem for folder in FOLDERS for p in folder.glob('[a-z]*.py')})


def load(spec: str, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
  """Runs a recipe's `get_config` and sets fields.

  A recipe is a Python file and is executed: load none that you do not trust.

  Args:
    spec: a path, or the name of a shipped recipe; `:variant` behind it is given to `get_config`.
    overrides: field (`'data.dir'`) -> value as text; it gets the type of the recipe's value.

  Raises:
    ConfigError: no such recipe or field, or a value that is not of the field's type or range.
  """
  path, _, variant = spec.partition(':')
  found = [p for p in (pathlib.Path(path), *(f / f'{path}.py' for f in FOLDERS)) if p.is_file()]
  if not found:
    raise ConfigError(f'no recipe {path!r}{_did_you_mean(path, names())}; '
                      f'shipped ones: {", ".join(names())}')  # fmt: skip
  module_spec = importlib.util.spec_from_file_location('recipe', found[0])
  if module_spec is None:
    raise ConfigError(f'the recipe {str(found[0])!r} is not a Python file')
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except Exception as error:
    raise ConfigError(f'the recipe {found[0]} fails: {type(error).__name__}: {error}') from None
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'{found[0]} has no function get_config()')
  try:
    config = module.get_config(variant) if variant else module.get_config()
  except (ValueError, TypeError) as error:
    raise ConfigError(f'the recipe {spec!r} cannot be built: {error}') from None
  return _finish(config, overrides)


def from_dict(values: dict, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
  """A recipe from a run's config.json, as `load` gives it."""
  return _finish(ml_collections.ConfigDict(values), overrides)


def _finish(config, overrides):
  for field, text in (overrides or {}).items():
    _override(config, field, text)
  config.lock()
  check(config)
  return config


def flatten(config: ml_collections.ConfigDict | dict) -> dict[str, object]:
  """Nested recipe -> {'data.dir': value, ...}, derived values resolved."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      flat.update({f'{key}.{k}': v for k, v in flatten(value).items()})
    else:
      flat[key] = tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
  return flat


# field -> its lowest and highest number, None for no limit, or the words that it may be.
ALLOWED = {
  'seed': (0, 2**32 - 1),
  'epochs': (0, None),
  'steps': (0, None),
  'batch_size': (2, None),
  'image_size': (8, None),
  'learning_rate': (0.0, None),
  'schedule_first_epoch': (0, 1),
  'warmup_epochs': (0.0, None),
  'weight_decay': (0.0, None),
  'momentum': (0.0, 1.0),
  'log_every_steps': (1, None),
  'checkpoint_every_steps': (0, None),
  'keep_checkpoints': (1, None),
  'watchdog_seconds': (0.0, None),
  'sharding': ('replicated', 'fsdp'),
  'accumulate_steps': (1, None),
  'knn_every_epochs': (0, None),
  'knn_images': (0, None),
  'data.label_seed': (0, 2**32 - 1),
  'data.unlabelled': ('keep', 'drop'),
  'data.num_classes': (0, None),
  'data.examples': (0, None),
  'data.skip_bad': (0, None),
  'data.max_pixels': (1, 2**31 - 1),
  'data.shuffle_buffer': (1, None),
  'data.threads': (0, None),
  'model.width_multiplier': (1 / 64, None),
  'model.sk_ratio': (0.0, 1.0),
  'model.se_ratio': (0.0, 1.0),
  'model.bn_groups': (1, None),
  'model.head_layers': (1, 4),
  'model.head_dim': (1, None),
  'dtype': ('auto', 'float32', 'bfloat16'),
  'optimizer': ('lars', 'sgd', 'nesterov', 'adamw'),
  'learning_rate_scaling': ('linear', 'sqrt', 'none'),
  'schedule': optim.SCHEDULES,
  'weight_decay_on': ('kernels', 'all'),
  'data.source': ('arrays', 'digits', 'folder', 'tfds'),
  'data.on_device': ('auto', 'yes', 'no'),
  'data.resize_on': ('device', 'host'),
  'model.depth': tuple(resnet.DEPTHS),
  'model.stem': tuple(resnet.STEMS),
  'model.dialect': resnet.DIALECTS,
  'model.normalize': ('none', *resnet.NORMALIZE),
  'model.bn_layout': norm.LAYOUTS,
  'model.head': heads.MODES,
}


def check(config: ml_collections.ConfigDict) -> None:
  """Raises `ConfigError` with the field, its value and what is allowed."""
  flat = flatten(config)
  for field, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(f'{field}={value} is not a finite number')
  fields = methods.module(_get(flat, 'method')).FIELDS
  for field, allowed in {**ALLOWED, **{k: allowed for k, (_, allowed) in fields.items()}}.items():
    _check(field, _get(flat, field), allowed)
  for field in ('view1', 'view2', 'eval'):
    _check_pipeline(f'augment.{field}', _get(flat, f'augment.{field}'), field)
  if len(_get(flat, 'first_loss')) != 2:
    raise ConfigError(f'first_loss={flat["first_loss"]} is not two numbers: lowest,highest')
  if config.profile_steps and not (
    len(config.profile_steps) == 2 and 1 <= config.profile_steps[0] <= config.profile_steps[1]
  ):
    raise ConfigError(f'profile_steps={config.profile_steps} is not FIRST,LAST')
  if config.batch_size % config.accumulate_steps:
    raise ConfigError(
      f'batch_size={config.batch_size} is not divisible by accumulate_steps={config.accumulate_steps}'
    )
  part = config.batch_size // config.accumulate_steps
  if not config.steps and not config.epochs:
    raise ConfigError('epochs=0 and steps=0: one of them says how long to train')
  if not config.steps and config.warmup_epochs > config.epochs:
    raise ConfigError(
      f'warmup_epochs={config.warmup_epochs:g} is longer than the training, epochs={config.epochs}'
    )
  if config.warmup_epochs and config.schedule != 'cosine':
    raise ConfigError(
      f'warmup_epochs={config.warmup_epochs}: only schedule=cosine has a warm-up, '
      f'{config.schedule} has none'
    )
  if config.model.width_multiplier * 64 % 1:
    raise ConfigError(
      f'model.width_multiplier={config.model.width_multiplier}: 64 times it is not a whole number'
    )
  if config.model.sk_ratio and config.model.dialect != 'simclr':
    raise ConfigError(
      f'model.sk_ratio={config.model.sk_ratio}: selective kernels are of model.dialect=simclr, '
      f'not {config.model.dialect}'
    )
  if part % config.model.bn_groups:
    raise ConfigError(
      f'batch_size={config.batch_size}{_parts(config)} is not divisible by '
      f'model.bn_groups={config.model.bn_groups}'
    )
  if part == config.model.bn_groups and config.method != 'simclr':
    raise ConfigError(
      f'model.bn_groups={config.model.bn_groups} leaves one example in each group: '
      'use a larger batch_size'
    )


def _parts(config):
  return f' / accumulate_steps={config.accumulate_steps}' if config.accumulate_steps > 1 else ''


def _check(field, value, allowed):
  if allowed is None:
    return
  if len(allowed) > 2 or isinstance(allowed[0], (str, bool)):
    if value not in allowed:
      raise ConfigError(f'{field}={value!r} is not one of {", ".join(map(str, allowed))}')
    return
  lowest, highest = allowed
  if not isinstance(value, (int, float)):
    raise ConfigError(f'{field}={value!r} is not a number')
  if value < lowest or (highest is not None and value > highest):
    allowed = f'at least {lowest}' if highest is None else f'from {lowest} to {highest}'
    raise ConfigError(f'{field}={value} is out of range: {allowed}')


def _check_pipeline(field, text, kind):
  if not text and kind == 'view2':
    return
  try:
    augment.parse(text, random=kind != 'eval')
  except ValueError as error:
    raise ConfigError(f'{field}: {error}') from None


def with_examples(config: ml_collections.ConfigDict, examples: int) -> ml_collections.ConfigDict:
  """The recipe with `data.examples`, the number of training images, filled in.

  Raises:
    ConfigError: it says another number already.
  """
  if config.data.examples not in (0, examples):
    raise ConfigError(
      f'data.examples={config.data.examples}, but the training split has {examples} images'
    )
  filled = config.copy_and_resolve_references()
  filled.data.examples = examples
  return filled.lock()


def check_against(
  config: ml_collections.ConfigDict, train, devices: int, warmup_steps: int, steps: int
) -> None:
  """The checks that need the training set and the number of devices."""
  examples, classes = len(train), config.data.num_classes
  if classes and train.classes > classes:
    raise ConfigError(
      f'data.num_classes={classes}, but the training labels go up to {train.classes - 1}: '
      'set it to the number of classes, or to 0 for no online probe'
    )
  if config.batch_size > examples:
    raise ConfigError(
      f'batch_size={config.batch_size} is larger than the data set, {examples} images'
    )
  if config.batch_size // config.accumulate_steps % devices:
    raise ConfigError(
      f'batch_size={config.batch_size}{_parts(config)} is not divisible by the number of devices, '
      f'{devices}'
    )
  if warmup_steps > steps:
    raise ConfigError(
      f'warmup_epochs={config.warmup_epochs:g} are {warmup_steps} steps, '
      f'more than the whole training, {steps} steps'
    )


def read_run(workdir: pathlib.Path) -> dict:
  """The recipe that a workdir was begun with, as plain data."""
  path = workdir / 'config.json'
  try:
    found = json.loads(path.read_text())['config']
    # Fields that are newer than the run have their neutral values.
    return _filled(defaults.recipe(found['method']).to_dict(), found)
  except FileNotFoundError:
    raise ConfigError(f'{workdir} is not the workdir of a run: it has no config.json') from None
  except (ValueError, KeyError, TypeError):
    raise ConfigError(f'{path} is damaged: it does not hold a recipe') from None


def _filled(values, others):
  both = {
    k: _filled(values[k], v) if isinstance(v, dict) and k in values else v
    for k, v in others.items()
  }
  return {**values, **both}


def architecture(config: ml_collections.ConfigDict | dict, classifier: bool = False) -> dict:
  """What rebuilds a recipe's encoder, or its classifier, and its input."""
  found = {
    **dict(config['model']),
    'image_size': config['image_size'],
    'eval_view': config['augment']['eval'],
  }
  if classifier:
    found |= {'classes': config['data']['num_classes'], 'head_layer': config['head_layer']}
  return found


def check_unchanged(old: dict, new: ml_collections.ConfigDict, workdir: str) -> None:
  """Refuses to go on in a workdir that another recipe began.

  Raises:
    ConfigError: naming each field that differs, its old and its new value.
  """
  old_flat, new_flat = flatten(old), flatten(new)
  changes = [
    f'{field}: {old_flat.get(field, "absent")!r} -> {new_flat.get(field, "absent")!r}'
    for field in sorted(old_flat.keys() | new_flat.keys())
    if field not in FREE and old_flat.get(field, None) != new_flat.get(field, None)
  ]
  if changes:
    raise ConfigError(
      f'{workdir} holds a run of another recipe ({"; ".join(changes)}): '
      'restore these values or choose a new --workdir'
    )


def _get(flat, field):
  if field not in flat:
    raise ConfigError(f'the recipe lacks the field {field!r}')
  return flat[field]


def _did_you_mean(word, words):
  close = difflib.get_close_matches(word, words, n=1)
  return f', did you mean {close[0]!r}?' if close else ''


def _override(config, field, text):
  flat = flatten(config)
  if field not in flat:
    raise ConfigError(f'the recipe has no field {field!r}{_did_you_mean(field, list(flat))}')
  old = flat[field]
  try:
    if isinstance(old, bool):
      value = {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    elif isinstance(old, tuple):
      kind = type(old[0]) if old else int
      value = tuple(kind(part) for part in text.split(',')) if text else ()
    else:
      value = type(old)(text)
  except (ValueError, KeyError):
    kind = {bool: 'true or false', int: 'a whole number', float: 'a number', tuple: 'numbers: 1,2'}
    kind = kind[type(old)]
    raise ConfigError(f'{field}={text!r} is not {kind}') from None
  *parents, key = field.split('.')
  for parent in parents:
    config = config[parent]
  with (
    config.ignore_type()
  ):  # the value has the type of the old one; a derived field has its source's
    config[key] = value
