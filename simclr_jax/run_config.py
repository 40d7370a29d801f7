"""The recipe of a run: `config.json` in its directory, and the copy in each of its checkpoints."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from simclr_jax import config as recipes, fields, plugins
from simclr_jax.config import check_code, flatten
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import checkpoint, files
from simclr_jax.runtime.checksum import crc32

FILE = 'config.json'
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


def record(workdir: pathlib.Path) -> dict[str, Any]:
  """The contents of `config.json`.

  Raises:
    ConfigError: `workdir` is not a run directory, or the file is damaged.
  """
  path = workdir / FILE
  try:
    contents = json.loads(path.read_text())
    contents['config']['method']
    return contents
  except FileNotFoundError:
    raise ConfigError(f'{workdir} is not a run directory: it has no {FILE}') from None
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ConfigError(
      f'{path} is damaged: it contains no recipe; restore the file from a backup'
    ) from None


def read(workdir: pathlib.Path) -> dict:
  """The recipe of a run as plain data, with the current fields and names.

  The recipe of the newest checkpoint counts. `config.json` is used before there is a checkpoint, and for fields that
  may change on resume. If somebody edited `config.json`, a warning names the edited fields.

  Raises:
    ConfigError: `workdir` is not a run directory, or its `config.json` is damaged.
  """
  contents = record(workdir)
  metadata = checkpoint.newest_metadata(workdir / 'checkpoints')
  try:
    values = upgraded(contents['config'])
    saved = upgraded(metadata['config']) if metadata and 'config' in metadata else values
  except (KeyError, TypeError, AttributeError):
    raise ConfigError(
      f'{workdir / FILE} is damaged: it contains no recipe; restore the file from a backup'
    ) from None
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
  """Converts the recipe of an older version: renamed fields get their new names, new fields their defaults."""
  flat = flatten(fields.recipe(old['method'])) | fields.OLD_DEFAULTS
  for name, value in flatten(old).items():
    flat[fields.RENAMED.get(name, name)] = _upgraded_value(name, value)
  nested: dict = {}
  for name, value in flat.items():
    *group, key = name.split('.')
    part = nested
    for g in group:
      part = part.setdefault(g, {})
    part[key] = value
  return nested


def _upgraded_value(field, value):
  return fields.OLD_VALUES.get(field, {}).get(value, value) if isinstance(value, bool) else value


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
    values[new if new in values else name] = _upgraded_value(field, value)
  values = {'channels': 3, **{k.removeprefix('model.'): value for k, value in values.items()}}
  files = {'model.encoder': values['encoder'], 'augment.ops': values.get('ops', '')}
  check_code(values.get('code', ()), files)
  return values
