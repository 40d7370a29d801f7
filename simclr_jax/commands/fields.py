"""list the fields of recipes

Examples:
  simclr-jax fields
  simclr-jax fields 'data.*'
  simclr-jax fields temperature

Shows the default and the allowed values of each field, and whether it may change when a run is resumed.
"""

import argparse
import fnmatch


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  parser.add_argument(
    'pattern', nargs='?', default='*', help="name, part of a name, or pattern with '*'"
  )


def run(args: argparse.Namespace) -> int:
  """Prints the fields."""
  from simclr_jax import fields
  from simclr_jax.errors import ConfigError
  from simclr_jax.validation import did_you_mean

  groups = {'all methods': fields.TABLE}
  groups |= {f'method={name}': fields.of_method(name) for name in fields.method_names()}
  pattern = args.pattern if '*' in args.pattern else f'*{args.pattern}*'
  matching = {
    title: {name: field for name, field in table.items() if fnmatch.fnmatch(name, pattern)}
    for title, table in groups.items()
  }
  if not any(matching.values()):
    names = {name for table in groups.values() for name in table}
    raise ConfigError(f'no field matches {args.pattern!r}{did_you_mean(args.pattern, names)}')
  for title, table in matching.items():
    if table:
      print(f'\nFields of {title}')
    for name, field in table.items():
      _print(name, field)
  return 0


def _print(name, field):
  allowed = f'; {field.allowed}' if field.allowed else ''
  resumable = '; may change on resume' if field.resumable else ''
  print(f'  {name} = {field.default!r}{allowed}{resumable}')
  print(f'      {field.help}')
