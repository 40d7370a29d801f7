"""The commands of `simclr-jax`, one file each: its help, its arguments, and what it does.

The docstring of a file is the help of its command; the first line is the summary. Functions of a file:

  add_arguments(parser)  declares the arguments
  check(args)            optional: reports invalid arguments before JAX is imported
  run(args)              runs the command and returns the exit code

`args` is the result of `cli.parse`. JAX is imported inside `run`, so that `--help` and errors about arguments are fast.
"""

import importlib
from types import ModuleType

NAMES = (
  'pretrain', 'check-data', 'probe', 'knn', 'finetune', 'distill', 'simclrv2', 'transfer', 'embed',
  'export', 'import', 'report', 'recipes', 'fields', 'compile-check', 'doctor',
)  # fmt: skip
# Commands that always run in a single process.
SINGLE_PROCESS = (
  'check-data', 'compile-check', 'doctor', 'export', 'fields', 'import', 'recipes', 'report',
)  # fmt: skip
# Those of them that compile programs for this machine.
COMPILING = ('export', 'report')
# Commands for which all fields of a recipe can be set with --config.FIELD=VALUE; for most others, only data.*.
WITH_FIELDS = (
  'pretrain',
  'finetune',
  'distill',
  'simclrv2',
  'transfer',
  'compile-check',
  'recipes',
)
WITHOUT_FIELDS = ('doctor', 'fields', 'import')


def module(name: str) -> ModuleType:
  """The module of a command, one of `NAMES`."""
  file = 'import_weights' if name == 'import' else name.replace('-', '_')  # `import` is a keyword
  return importlib.import_module(f'{__name__}.{file}')
