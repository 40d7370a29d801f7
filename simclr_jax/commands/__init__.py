"""The commands of `simclr-jax`, one file each: its help, its arguments, and what it does.

The docstring of a command's file is its help: the first line is the summary. `add_arguments(parser)` declares the
arguments, `run(args)` does the work and returns the exit code. `check(args)`, if there is one, comes first and finds
errors that need no JAX. `args.overrides` has the fields that were set with
`--config.FIELD=VALUE`, `args.command` the command line. JAX is imported inside `run`, so that `--help` and errors
about arguments take no seconds.
"""

import importlib
from types import ModuleType

NAMES = (
  'pretrain', 'check-data', 'probe', 'knn', 'finetune', 'distill', 'simclrv2', 'transfer', 'embed',
  'export', 'report', 'recipes', 'fields', 'compile-check',
)  # fmt: skip
# These run in one process, also where others take part in a multi-process run.
SINGLE_PROCESS = ('check-data', 'compile-check', 'export', 'fields', 'recipes', 'report')


def module(name: str) -> ModuleType:
  """The file of a command."""
  return importlib.import_module(f'{__name__}.{name.replace("-", "_")}')
