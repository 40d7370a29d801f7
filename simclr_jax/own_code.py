"""Methods, encoders and augmentation ops that are Python objects: finds or writes the file that a recipe can name.

A run must be readable by another program later, so a recipe names files. An object of a notebook or a script gets a
file of its own: its source, and the source of what it uses.
"""

import ast
import builtins
import hashlib
import inspect
import linecache
import os
import pathlib
import symtable
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from simclr_jax.errors import ConfigError
from simclr_jax.fields import Field
from simclr_jax.runtime import files
from simclr_jax.validation import Choices, Range

HINT = 'write it to a .py file and pass the path of the file'


def file_of(value: Any, kind: str, folder: pathlib.Path) -> str:
  """The path of a Python file that defines a method, an encoder or ops.

  Args:
    value: a path; a module with a file; or a Python object. A method: a function `build(config) -> Method`, or a class
      with it. An encoder: a flax.linen module, as a class or an instance, or a function `build(config, dtype)`. Ops:
      one or several functions decorated with `data.ops.op`.
    kind: 'method', 'encoder' or 'ops'.
    folder: where a file is written for an object that has none.

  Raises:
    ConfigError: the source of the object, or of something that it uses, is not available.
  """
  if isinstance(value, (str, os.PathLike)):
    return os.fspath(value)
  if isinstance(value, ModuleType):
    if not getattr(value, '__file__', None):
      raise ConfigError(f'the module {value.__name__} has no file: pass the path of a .py file')
    return str(value.__file__)
  module = sys.modules.get(getattr(value, '__module__', ''))
  file = getattr(module, '__file__', None)
  if file and getattr(module, 'build', None) is value:
    return str(file)
  text = _text(value, kind)
  path = folder / f'{kind}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.py'
  folder.mkdir(parents=True, exist_ok=True)
  files.write_text(path, text)
  return str(path)


def _text(value, kind):
  """The text of a file that defines the object under the name that the recipe expects."""
  code = _Code()
  values = value if isinstance(value, (list, tuple)) else [value]
  for v in values:
    origin = v if inspect.isclass(v) or inspect.isroutine(v) else type(v)
    code.add(origin.__name__, origin)
  if kind == 'ops':
    if not all(hasattr(v, 'definition') for v in values):
      raise ConfigError('ops: decorate the functions with simclr_jax.data.ops.op')
    return code.text()
  if kind == 'encoder' and not inspect.isroutine(value):
    return code.text(f'def build(config, dtype):\n  return {_construction(value)}')
  if not (inspect.isroutine(value) or hasattr(value, 'build')):
    raise ConfigError(f'{kind}: {value!r} is neither a function build(config) nor a class with one')
  name = value.__name__
  end = [f'build = {name}.build' if inspect.isclass(value) else f'build = {name}']
  fields = getattr(value, 'FIELDS', None) or code.namespace(value).get('FIELDS')
  if kind == 'method' and fields:
    for allowed in (Field, Range, Choices):
      code.add(allowed.__name__, allowed, '__main__')
    end.append(_fields(fields))
  return code.text(*(line for line in end if line != 'build = build'))


def _construction(value):
  """The expression that builds a flax module: of a class, with its defaults; of an instance, with its fields."""
  cls = value if inspect.isclass(value) else type(value)
  if not hasattr(cls, '__dataclass_fields__'):
    raise ConfigError(f'encoder: {cls.__name__} is no flax.linen module, nor a function')
  arguments = []
  for name, field in cls.__dataclass_fields__.items():
    given = getattr(value, name, field.default)
    if given is not field.default and name not in ('parent', 'name'):
      if not _is_literal(given):
        raise ConfigError(f'encoder: {name}={given!r} of {cls.__name__} is no literal: {HINT}')
      arguments.append(f'{name}={given!r}')
    elif name == 'dtype':
      arguments.append('dtype=dtype')
  return f'{cls.__name__}({", ".join(arguments)})'


def _fields(fields):
  """`FIELDS = {...}`, which `fields.of_method` reads without executing the file."""
  lines = []
  for name, (default, help, allowed, *flags) in fields.items():
    values = allowed.values if isinstance(allowed, Choices) else ()
    limits = (allowed.low, allowed.high) if isinstance(allowed, Range) else values
    kind = allowed and f'{type(allowed).__name__}({", ".join(map(repr, limits))})'
    rest = ', '.join([repr(default), repr(help), str(kind), *map(repr, flags)])
    lines.append(f'  {name!r}: Field({rest}),\n')
  return 'FIELDS = {\n' + ''.join(lines) + '}'


class _Code:
  """The source of objects and of everything that they use: imports, and definitions in the order of use."""

  def __init__(self):
    self._imports: dict[str, str] = {}
    self._definitions: dict[str, str] = {}
    self._known: dict[str, Any] = {}

  def text(self, *end: str) -> str:
    """The file; `end`: lines below the definitions."""
    return (
      '\n\n\n'.join(['\n'.join(self._imports.values()), *self._definitions.values(), *end]) + '\n'
    )

  def namespace(self, value: Any) -> Mapping[str, Any]:
    """The global names that the source of a function or class refers to."""
    function = inspect.unwrap(value)
    if hasattr(function, '__globals__'):
      return function.__globals__
    return vars(sys.modules[value.__module__])

  def add(self, name: str, value: Any, home: str = '') -> None:
    """Adds the import or the definition of an object.

    Args:
      name: the name under which it is used.
      value: the object.
      home: the module that uses it; an object of another module is imported. Empty: its own.
    """
    if name in self._known:
      if self._known[name] is not value:
        raise ConfigError(f'two different objects are called {name}: {HINT}')
      return
    self._known[name] = value
    own = getattr(value, '__name__', '')
    module = getattr(value, '__module__', None)
    if isinstance(value, ModuleType):
      self._imports[name] = f'import {own}' + (f' as {name}' if name != own else '')
    elif _is_literal(value):
      self._definitions[name] = f'{name} = {value!r}'
    elif not own or not module:
      raise ConfigError(
        f'{name}, a {type(value).__name__}, is used but cannot be written to a file: {HINT}'
      )
    elif (
      module not in (home or module, '__main__')
      and getattr(sys.modules[module], own, None) is value
    ):
      self._imports[name] = f'from {module} import {own}' + (f' as {name}' if name != own else '')
    else:
      self._define(name, value)

  def _define(self, name, value):
    source = _source(value)
    namespace = self.namespace(value)
    for used in sorted(_global_names(source)):
      if used in namespace and used != name:
        self.add(used, namespace[used], value.__module__)
      elif used not in (value.__name__, '__class__') and not hasattr(builtins, used):
        raise ConfigError(
          f'{value.__name__} uses {used}, which is not defined at the top level of its module: {HINT}'
        )
    alias = '' if name == value.__name__ else f'\n\n\n{name} = {value.__name__}'
    self._definitions[name] = source + alias


def _is_literal(value):
  try:
    return bool(ast.literal_eval(repr(value)) == value)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return False


def _source(value):
  """The source of a function or class, at the left margin, without a blank line at its end."""
  try:
    text = inspect.getsource(value)
  except (OSError, TypeError):
    text = _source_in_notebook(value)
  return textwrap.dedent(text).rstrip()


def _source_in_notebook(value):
  """The source of a class of a notebook, which has no file: the lines of the cell of its methods."""
  for function in map(inspect.unwrap, filter(inspect.isfunction, vars(value).values())):
    lines = linecache.getlines(function.__code__.co_filename)
    for node in ast.walk(ast.parse(''.join(lines))) if lines else ():
      if isinstance(node, ast.ClassDef) and node.name == value.__name__:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return ''.join(lines[first - 1 : node.end_lineno])
  raise ConfigError(f'the source of {value.__name__} is not available: {HINT}')


def _global_names(source: str) -> set[str]:
  """The global names that a piece of source refers to."""

  def walk(table: symtable.SymbolTable) -> Iterator[str]:
    for symbol in table.get_symbols():
      top = table.get_type() == 'module' and symbol.is_referenced() and not symbol.is_assigned()
      if symbol.is_global() or top:
        yield symbol.get_name()
    for child in table.get_children():
      yield from walk(child)

  return set(walk(symtable.symtable(source, 'source', 'exec')))
