"""list the fields of recipes

Examples:
  simclr-jax fields
  simclr-jax fields 'data.*'
  simclr-jax fields temperature

Each field with its default, what is allowed, and whether a run may be resumed with another value.
"""

import fnmatch


def add_arguments(parser):
  """Declares the arguments."""
  parser.add_argument(
    'pattern', nargs='?', default='*', help="a name, part of one, or a pattern with '*'"
  )


def run(args) -> int:
  """Prints them."""
  from simclr_jax import fields
  from simclr_jax.errors import ConfigError
  from simclr_jax.validation import did_you_mean

  groups = {'all methods': fields.TABLE}
  groups |= {f'method={name}': fields.of_method(name) for name in fields.method_names()}
  pattern = args.pattern if '*' in args.pattern else f'*{args.pattern}*'
  chosen = {
    title: {name: field for name, field in table.items() if fnmatch.fnmatch(name, pattern)}
    for title, table in groups.items()
  }
  if not any(chosen.values()):
    names = {name for table in groups.values() for name in table}
    raise ConfigError(f'no field matches {args.pattern!r}{did_you_mean(args.pattern, names)}')
  for title, table in chosen.items():
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
