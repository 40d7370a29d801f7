"""Recipes: loads, overrides and checks them, before any device is used. `run_config` has those of runs."""

import ast
import math
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import ml_collections

from simclr_jax import fields, plugins
from simclr_jax.errors import ConfigError
from simclr_jax.validation import did_you_mean

# Folders of the built-in recipes: inside the package if it is installed, beside the package in a checkout.
FOLDERS = (
  pathlib.Path(__file__).parent / 'configs',
  pathlib.Path(__file__).parents[1] / 'configs',
)
OWN_FILES = ('method', 'model.encoder', 'augment.ops')  # fields that may name a Python file
PIPELINES = ('augment.view1', 'augment.view2', 'augment.eval')
KINDS = {
  bool: 'true or false',
  int: 'an integer',
  float: 'a number',
  str: 'a string',
  tuple: 'numbers: 1,2',
}


def names() -> list[str]:
  """The names of the built-in recipes."""
  return sorted({p.stem for folder in FOLDERS for p in folder.glob('[a-z]*.py')})


def description(name: str) -> str:
  """The first line of the file of a recipe.

  Args:
    name: a built-in recipe, or a path.

  Raises:
    ConfigError: there is no such recipe, or its file fails.
  """
  return (_module(name).__doc__ or '').strip().split('\n')[0]


def variants(name: str) -> dict[str, str]:
  """The variants of a recipe: name -> description, the default first; empty if it has none. As for `description`."""
  return dict(getattr(_module(name), 'VARIANTS', {}))


def _module(name) -> ModuleType:
  candidates = (pathlib.Path(name), *(folder / f'{name}.py' for folder in FOLDERS))
  path = next((p for p in candidates if p.is_file()), None)
  if path is None:
    raise ConfigError(
      f'no recipe {name!r}{did_you_mean(name, names())}; available recipes: {", ".join(names())}'
    )
  return plugins.load(path, 'recipe', 'get_config()')


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
  """Loads a recipe and overrides fields.

  A recipe is a Python file, whose function `get_config` is called: load only files that you trust.

  Args:
    spec: the name of a built-in recipe, or a path; the text after ':' is the variant, which is passed to `get_config`.
    overrides: field -> value, or the value as text: `{'epochs': 5, 'data.dir': '/data'}` or `{'epochs': '5'}`.

  Returns:
    The recipe, checked and locked.

  Raises:
    ConfigError: there is no such recipe, variant or field, or a value has the wrong type or is not allowed.
  """
  name, _, variant = spec.partition(':')
  module, available = _module(name), variants(name)
  if variant and available and variant not in available:
    raise ConfigError(
      f'the recipe {name} has no variant {variant!r}, only {", ".join(available)}'
      + did_you_mean(variant, available)
    )
  try:
    config = module.get_config(variant) if variant else module.get_config()
  except (ValueError, TypeError) as error:
    raise ConfigError(f'the recipe {spec!r} cannot be built: {error}') from None
  return finish(config, overrides)


def finish(
  config: ml_collections.ConfigDict, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """Overrides fields of an unlocked recipe, checks and locks it; arguments and errors as for `load`."""
  for field, value in (overrides or {}).items():
    _override(config, field, value)
  _record_own_files(config)
  config.lock()
  check(config)
  return config


def _override(config, field, value):
  flat = flatten(config)
  if field not in flat:
    raise ConfigError(f'the recipe has no field {field!r}{did_you_mean(field, flat)}')
  if field == 'code':
    raise ConfigError('code is filled in by the program')
  old = flat[field]
  try:
    parsed = _typed(fields.upgraded_value(field, value), old)
    config.update_from_flattened_dict({field: parsed})
  except (ValueError, TypeError, SyntaxError):
    raise ConfigError(f'{field}={value!r} is not {KINDS[type(old)]}') from None


def _typed(value, like):
  """`value`, parsed if it is text, as a value of the type of `like`; raises TypeError or ValueError."""
  kind = type(like)
  if kind is str and not isinstance(value, (bool, int, float, tuple, list)) and value is not None:
    return str(value)  # a path, for instance
  if isinstance(value, str):
    text = value.strip()
    if kind is float:
      return float(text)
    text = {'true': 'True', 'false': 'False'}.get(text.lower(), text)
    value = ast.literal_eval(text or '()')
    if kind is bool and value in (0, 1):
      return bool(value)
  if hasattr(value, 'item'):  # a scalar of numpy
    value = value.item()
  if kind is tuple:
    items = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(_typed(item, like[0] if like else 0) for item in items)
  if kind is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise TypeError(value)
  return value


def _record_own_files(config):
  """Makes the paths of the user's own files absolute, and records their checksums in the field `code`."""
  code, flat = [], flatten(config)
  for field in OWN_FILES:
    if plugins.is_file(flat.get(field, '')):
      path = pathlib.Path(flat[field]).expanduser().resolve()
      code.append(f'{field}={plugins.checksum(path, field)}')
      config.update_from_flattened_dict({field: str(path)})
  config.code = tuple(code)


def check_code(recorded: tuple[str, ...] | list[str], flat: Mapping[str, Any]) -> None:
  """Checks that the user's own files have not changed.

  Args:
    recorded: the field `code` of a run: `FIELD=CHECKSUM` for each file.
    flat: the flattened recipe of the run, which has the paths of the files.

  Raises:
    ConfigError: a file has changed or cannot be read.
  """
  for entry in recorded:
    field, digest = entry.split('=')
    now = plugins.checksum(flat[field], field)
    if now != digest:
      raise ConfigError(
        f'{field}: {flat[field]} has changed since it was used (checksum {digest} then, {now} now): '
        'restore the file, or train again'
      )


def flatten(config: ml_collections.ConfigDict | dict) -> dict[str, Any]:
  """A nested recipe as a flat dict, such as `{'data.dir': value}`; lists become tuples, references are resolved."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      flat.update({f'{key}.{k}': v for k, v in flatten(value).items()})
    else:
      flat[key] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
  return flat


def check(config: ml_collections.ConfigDict) -> None:
  """Checks every field and combinations of fields.

  Raises:
    ConfigError: naming the field, its value and the allowed values.
  """
  flat = flatten(config)
  if 'method' not in flat:
    raise ConfigError("the recipe lacks the field 'method'")
  for name, field in fields.of_recipe(flat['method']).items():
    if name not in flat:
      raise ConfigError(f'the recipe lacks the field {name!r}')
    check_field(name, field, flat[name])
  _check_combinations(config)
  _check_pipelines(flat)


def check_field(name: str, field: fields.Field, value: Any) -> None:
  """Checks the type and the value of one field; errors as for `check`."""
  kind = type(field.default)
  items = value if kind is tuple and isinstance(value, (tuple, list)) else [value]
  types = {type(field.default[0]) if field.default else None} if kind is tuple else {kind}
  if (kind is tuple) != isinstance(value, (tuple, list)) or not all(
    type(item) in types or types == {None} or (types == {float} and type(item) is int)
    for item in items
  ):
    raise ConfigError(f'{name}={value!r} is not {KINDS[kind]}')
  if any(isinstance(item, float) and not math.isfinite(item) for item in items):
    raise ConfigError(f'{name}={value} is not a finite number')
  if field.allowed:
    field.allowed.check(name, value)


def _check_combinations(config):
  """Checks that involve several fields, or more than the range of one."""
  if len(config.first_loss) != 2:
    raise ConfigError(f'first_loss={config.first_loss} is not two numbers: LOWEST,HIGHEST')
  steps = config.profile_steps
  if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
    raise ConfigError(f'profile_steps={steps} is not FIRST,LAST')
  if config.batch_size % config.accumulate_steps:
    raise ConfigError(
      f'batch_size={config.batch_size} is not divisible by accumulate_steps={config.accumulate_steps}'
    )
  if not config.steps and not config.epochs:
    raise ConfigError('epochs=0 and steps=0: set epochs or steps')
  if not config.steps and config.warmup_epochs > config.epochs:
    raise ConfigError(
      f'warmup_epochs={config.warmup_epochs:g} is longer than the training, epochs={config.epochs}'
    )
  if config.warmup_epochs and config.schedule != 'cosine':
    raise ConfigError(
      f'warmup_epochs={config.warmup_epochs}: only schedule=cosine has a warm-up, '
      f'{config.schedule} has none'
    )
  limits = config.data.range
  if len(limits) != 2 or (any(limits) and limits[0] >= limits[1]):
    raise ConfigError(f'data.range={limits} is not LOW,HIGH: the values of black and white')
  model = config.model
  if model.normalize != 'none' and config.data.channels != 3:
    raise ConfigError(
      f'model.normalize={model.normalize} is for RGB images, but data.channels={config.data.channels}: '
      'set --config.model.normalize=none'
    )
  if model.width_multiplier * 64 % 1:
    raise ConfigError(
      f'model.width_multiplier={model.width_multiplier}: 64 times the value must be an integer'
    )
  if model.sk_ratio and model.variant != 'simclr':
    raise ConfigError(
      f'model.sk_ratio={model.sk_ratio}: selective kernels need model.variant=simclr, '
      f'not {model.variant}'
    )
  if config.batch_size // config.accumulate_steps % model.bn_groups:
    raise ConfigError(
      f'batch_size={config.batch_size}{_per_micro_batch(config)} is not divisible by '
      f'model.bn_groups={model.bn_groups}'
    )


def _check_pipelines(flat):
  from simclr_jax.data import augment  # needs JAX

  for field in PIPELINES:
    if flat[field] or field != 'augment.view2':
      try:
        pipeline = augment.with_ops(flat[field], flat['augment.ops'])
        augment.parse(pipeline, field != 'augment.eval')
        augment.check_channels(pipeline, flat['data.channels'])
      except ConfigError as error:
        raise ConfigError(f'{field}: {error}') from None


def _per_micro_batch(config):
  return f' / accumulate_steps={config.accumulate_steps}' if config.accumulate_steps > 1 else ''


def with_examples(
  config: ml_collections.ConfigDict, examples: int, value_range: tuple[float, float] = (0.0, 0.0)
) -> ml_collections.ConfigDict:
  """The recipe with `data.examples` set to the number of training images, locked.

  `value_range`: as of `data.value_range`; it becomes `data.range`, if the recipe has none.

  Raises:
    ConfigError: the recipe sets another number.
  """
  if config.data.examples not in (0, examples):
    raise ConfigError(
      f'data.examples={config.data.examples}, but the training split has {examples} images'
    )
  filled = config.copy_and_resolve_references()
  filled.data.examples = examples
  if not any(filled.data.range):
    filled.data.range = value_range
  return filled.lock()


def check_against(
  config: ml_collections.ConfigDict, train, devices: int, warmup_steps: int, steps: int
) -> None:
  """Checks a recipe against the training set and the devices.

  Args:
    config: a recipe.
    train: the training set, a `data.Dataset`.
    devices: number of devices.
    warmup_steps, steps: length of the warm-up and of the training.

  Raises:
    ConfigError: naming the field, its value and the conflict.
  """
  from simclr_jax.data import channels  # needs JAX

  if channels(train) != config.data.channels:
    raise ConfigError(
      f'data.channels={config.data.channels}, but the images have {channels(train)}: '
      f'set --config.data.channels={channels(train)}'
    )
  examples, classes = len(train), config.data.num_classes
  if classes and train.classes > classes:
    raise ConfigError(
      f'data.num_classes={classes}, but the training labels go up to {train.classes - 1}: '
      'set data.num_classes to the number of classes, or to 0 for no online probe'
    )
  if config.batch_size > examples:
    raise ConfigError(
      f'batch_size={config.batch_size} is larger than the data set, {examples} images'
    )
  if config.batch_size // config.accumulate_steps % devices:
    raise ConfigError(
      f'batch_size={config.batch_size}{_per_micro_batch(config)} is not divisible by the number of '
      f'devices, {devices}'
    )
  if warmup_steps > steps:
    raise ConfigError(
      f'warmup_epochs={config.warmup_epochs:g} is {warmup_steps} steps, longer than the training, {steps} '
      'steps: lower warmup_epochs or train longer'
    )


def architecture(config: ml_collections.ConfigDict, classifier: bool = False) -> dict:
  """The architecture of the encoder of a recipe, or of its classifier, as plain data.

  Returns:
    The `model` part of the recipe; `image_size`; `channels`; `eval_view`, the preprocessing pipeline; with Python files of the
    user's own, `code` and `ops`; for a classifier, `classes` and `head_layer`.
  """
  from simclr_jax.data import augment  # needs JAX

  values = {
    **config.model.to_dict(),
    'image_size': config.image_size,
    'channels': config.data.channels,
    'eval_view': augment.with_ops(config.augment.eval, config.augment.ops),
  }
  code = [entry for entry in config.code if not entry.startswith('method=')]
  if code:
    values |= {'code': code, 'ops': config.augment.ops}
  if classifier:
    values |= {'classes': config.data.num_classes, 'head_layer': config.head_layer}
  return values
