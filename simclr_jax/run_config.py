"""The recipe of a run: `config.json` in its directory, and the copy in each of its checkpoints."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from simclr_jax import config as recipes, fields, plugins
from simclr_jax.config import check_code, flatten
from simclr_jax.data import augment
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime.checksum import crc32
from simclr_jax.validation import check_json

FILE = 'config.json'
EXPORT = 'encoder.json'  # of an exported encoder
VALUE = (str, int, float, bool, [(str, int, float, bool)])
RECIPE = {'method': str, str: (*VALUE, {str: VALUE})}  # for `check_json`
RECORD = {
  'config': RECIPE, 'checksum?': int, 'command?': str, 'versions?': {str: str}, 'images?': {str: object},
  'extended?': [{'from_step': int, 'epochs': int, 'steps': int}],
}  # fmt: skip
# Entries of an architecture that are no fields of the group `model` -> the field of the recipe.
OF_ARCHITECTURE = {
  'image_size': 'image_size', 'channels': 'data.channels', 'eval_view': 'augment.eval', 'ops': 'augment.ops',
  'code': 'code',
}  # fmt: skip
LENGTH = ('epochs', 'steps')  # fields that `pretrain --extend` changes


def write(
  workdir: pathlib.Path, config: ml_collections.ConfigDict, about: Mapping[str, Any]
) -> None:
  """Writes `config.json`.

  Args:
    workdir: directory of the run.
    config: its recipe.
    about: further entries, plain data, such as the command line.
  """
  values = config.to_dict()
  files.write_json(workdir / FILE, {'config': values, 'checksum': _checksum(values), **about})


def is_run(workdir: pathlib.Path) -> bool:
  """Whether a folder is a run directory: it has `config.json` or checkpoints."""
  return (workdir / FILE).is_file() or checkpoint.exists(workdir / 'checkpoints')


def record(workdir: pathlib.Path) -> dict[str, Any]:
  """The contents of `config.json`: `config`, the recipe, `versions`, `images`, `command`, `extended`.

  If the file is missing or damaged, what the newest checkpoint contains of these, with a warning. For an exported
  encoder, what `encoder.json` contains of these.

  Raises:
    ConfigError: `workdir` is not a run directory, or the file is damaged and there is no checkpoint.
  """
  path = workdir / FILE
  try:
    contents = files.read_json(path)
    check_json(contents, RECORD, f'{path} is damaged: it')
    return contents
  except FileNotFoundError:
    problem = f'{workdir} is not a run directory: it has no {FILE}'
    if (workdir / EXPORT).is_file():
      return _of_export(workdir / EXPORT)
  except ConfigError as error:
    problem = f'{error}; restore the file from a backup'
  saved = _of_checkpoint(workdir)
  if saved is None:
    raise ConfigError(problem)
  logging.warning('%s; the recipe of the newest checkpoint is used', problem.split(';')[0])
  return saved


def _of_checkpoint(workdir) -> dict[str, Any] | None:
  """The record in the newest checkpoint that has a recipe; None without one."""
  metadata = checkpoint.newest_metadata(workdir / 'checkpoints')
  if metadata is None or 'config' not in metadata:
    return None
  check_json(metadata, RECORD, f'the checkpoints in {workdir} are damaged: the metadata')
  names = [name.removesuffix('?') for name in RECORD]
  return {name: metadata[name] for name in names if name in metadata}


def _of_export(path) -> dict[str, Any]:
  """The record of the run from which an encoder was exported, or for imported weights, of an equal recipe."""
  contents = files.read_json(path)
  check_json(contents, {'provenance': {'config?': object}}, f'{path} is damaged: it')
  if 'config' not in contents['provenance']:
    raise ConfigError(f'{path} has no recipe, because the encoder was not trained: name a run')
  about = {k: v for k, v in contents['provenance'].items() if k != 'checksum'}  # of the checkpoint
  check_json(about, RECORD, f'{path} is damaged: the provenance')
  return about


def read(workdir: pathlib.Path) -> dict:
  """The recipe of a run as plain data, with the current fields and names.

  The recipe of the newest checkpoint counts. `config.json` is used before there is a checkpoint, and for fields that
  may change on resume. If somebody edited `config.json`, a warning names the edited fields.

  Raises:
    ConfigError: as for `record`.
  """
  contents = record(workdir)
  saved = (_of_checkpoint(workdir) or contents)['config']
  values, saved = upgraded(contents['config']), upgraded(saved)
  edited = contents.get('checksum') not in (None, _checksum(contents['config']))
  changes = _changes(saved, values, resumable=edited)
  if not edited:
    changes = {name: change for name, change in changes.items() if name not in LENGTH}
  if not changes:
    return values
  logging.warning(
    '%s was edited (%s): the recipe of the checkpoint is used', workdir / FILE, _sentence(changes)
  )
  return saved


def with_old_defaults(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> ml_collections.ConfigDict:
  """A recipe to resume a run with, locked: fields that are newer than the run keep its results, `fields.OLD_DEFAULTS`."""
  recorded = flatten(record(workdir)['config'])
  missing = {name: v for name, v in fields.OLD_DEFAULTS.items() if name not in recorded}
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(missing)
  return config.lock()


def _checksum(values):
  return crc32(json.dumps(values, sort_keys=True))


def load(
  workdir: pathlib.Path, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """The recipe of a run, checked and locked.

  Args:
    workdir: directory of the run.
    overrides: as for `config.load`.

  Raises:
    ConfigError: as for `read` and `config.load`; or a Python file that the recipe names has changed since the run.
  """
  values = read(workdir)
  check_code(values.get('code', ()), flatten(values))  # before any of these files is executed
  return recipes.finish(ml_collections.ConfigDict(values), overrides)


def check_unchanged(
  old: dict, new: ml_collections.ConfigDict, workdir: str, ignored: Sequence[str] = ()
) -> None:
  """Checks that a run may be resumed with a recipe.

  Args:
    old: the recipe of the run.
    new: the recipe to resume with.
    workdir: directory of the run, for the message.
    ignored: fields that may differ.

  Raises:
    ConfigError: fields differ that may not change on resume; the message has their old and new values.
  """
  changes = {name: change for name, change in _changes(old, new).items() if name not in ignored}
  if changes:
    hint = ''
    if changes.keys() <= set(LENGTH):
      hint = ', or, when the run is complete, train longer with --extend'
    raise ConfigError(
      f'{workdir} contains a run with a different configuration ({_sentence(changes)}): '
      f'restore these values or choose a new --workdir{hint}'
    )


def _changes(old, new, resumable=False) -> dict[str, tuple[Any, Any]]:
  """Field -> values in two recipes; fields that may change on resume only if `resumable`."""
  old_flat, new_flat = flatten(old), flatten(new)
  table = fields.of_recipe(new['method'])
  changes = {}
  for field in sorted(old_flat.keys() | new_flat.keys()):
    before, after = old_flat.get(field, 'absent'), new_flat.get(field, 'absent')
    if before == after or (field in table and table[field].resumable and not resumable):
      continue
    if plugins.is_file(str(before)) and plugins.is_file(str(after)):
      continue  # the file may have moved; the field `code` shows whether its content is the same
    changes[field] = (before, after)
  return changes


def _sentence(changes):
  return '; '.join(
    f'{field}: {before!r} -> {after!r}' for field, (before, after) in changes.items()
  )


def upgraded(old: dict) -> dict:
  """Converts the recipe of an older version: renamed fields get their new names, new fields their defaults.

  Raises:
    ConfigError: a field has the name of a group of fields, or the other way round.
  """
  flat = flatten(fields.recipe(old['method'])) | fields.OLD_DEFAULTS
  for name, value in flatten(old).items():
    flat[fields.RENAMED.get(name, name)] = fields.upgraded_value(name, value)
  nested: dict = {}
  for name, value in flat.items():
    *group, key = name.split('.')
    part = nested
    for g in group:
      part = part.setdefault(g, {}) if isinstance(part, dict) else part
    if not isinstance(part, dict) or isinstance(part.get(key), dict):
      raise ConfigError(f'the recipe of the run is damaged: {name!r} is not a field')
    part[key] = value
  return nested


def upgraded_architecture(old: dict) -> dict:
  """Converts the `architecture` of an encoder that an older version exported.

  Raises:
    ConfigError: a Python file that the encoder needs is missing or has changed since.
  """
  values = {
    name: field.default for name, field in fields.TABLE.items() if name.startswith('model.')
  }
  for name, value in old.items():
    field = f'model.{name}'
    new = fields.RENAMED.get(field, field)
    values[new if new in values else name] = fields.upgraded_value(field, value)
  values = {'channels': 3, **{k.removeprefix('model.'): value for k, value in values.items()}}
  for name in (*OF_ARCHITECTURE, *values):
    if name not in values and name in ('image_size', 'eval_view'):
      raise ConfigError(f'the architecture has no {name}')
    field = OF_ARCHITECTURE.get(name, f'model.{name}')
    if name in values and field in fields.TABLE:
      recipes.check_field(field, fields.TABLE[field], values[name])
  own_files = {'model.encoder': values['encoder'], 'augment.ops': values.get('ops', '')}
  check_code(values.get('code', ()), own_files)
  augment.parse(values['eval_view'], random=False)
  return values
