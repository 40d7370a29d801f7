"""The package's import graph against docs/architecture.md: no folder in a circle, no import up."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'simclr_jax'
DOC = ROOT / 'docs/architecture.md'


def imports(package=PACKAGE, name='simclr_jax'):
  """(importing room, imported room) -> 'file:line', where a room is a top-level folder or file of the package.

  Imports inside functions count. The package's own `__init__.py` is no room: it imports nothing at import time.
  """
  rooms = {p.stem if p.suffix == '.py' else p.name for p in package.iterdir()}
  edges = {}
  for path in sorted(package.rglob('*.py')):
    relative = path.relative_to(package)
    room = relative.parts[0].removesuffix('.py')
    if room in ('__init__', '__main__'):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        modules = [f'{node.module}.{alias.name}' for alias in node.names]
      else:
        continue
      for module in modules:
        parts = module.split('.')
        if parts[0] == name and len(parts) > 1 and parts[1] in rooms and parts[1] != room:
          edges.setdefault((room, parts[1]), f'{relative}:{node.lineno}')
  return edges


def circle(edges):
  """A circle of rooms, as a list of edges, or an empty list."""
  graph = {}
  for a, b in edges:
    graph.setdefault(a, []).append(b)
  done = set()

  def visit(room, path):
    if room in path:
      loop = [*path[path.index(room) :], room]
      return list(zip(loop, loop[1:]))
    if room in done:
      return []
    for other in sorted(graph.get(room, ())):
      found = visit(other, [*path, room])
      if found:
        return found
    done.add(room)
    return []

  return next((c for c in (visit(room, []) for room in sorted(graph)) if c), [])


def test_no_folder_imports_in_a_circle():
  """Breaks if two folders need each other: the message names the imports that close the circle."""
  edges = imports()
  closing = [f'{a} imports {b} ({edges[a, b]})' for a, b in circle(edges)]
  assert not closing, '; '.join(closing)


def test_a_circle_is_found_and_named(tmp_path):
  """Breaks if the test above cannot fail."""
  package = tmp_path / 'simclr_jax'
  (package / 'low').mkdir(parents=True)
  (package / 'low/a.py').write_text('def f():\n  from simclr_jax import high\n')
  (package / 'high.py').write_text('from simclr_jax.low import a\n')
  edges = imports(package)
  assert edges == {('low', 'high'): 'low/a.py:2', ('high', 'low'): 'high.py:1'}
  assert circle(edges) == [('high', 'low'), ('low', 'high')]


def layers():
  """The rows of the table in docs/architecture.md, from the bottom: the rooms of each layer."""
  rows = [line.split('|')[1] for line in DOC.read_text().splitlines() if line.startswith('| `')]
  return [
    [r.removesuffix('.py').rstrip('/') for r in re.findall(r'`([\w./]+)`', row)] for row in rows
  ]


def test_imports_go_down():
  """Breaks if a file imports something from a higher layer, or the document lacks a file or folder."""
  height = {room: i for i, row in enumerate(layers()) for room in row}
  edges = imports()
  rooms = {
    p.name.removesuffix('.py')
    for p in PACKAGE.iterdir()
    if p.name not in ('__init__.py', '__main__.py', '__pycache__', 'configs')
    and (p.suffix == '.py' or (p.is_dir() and any(p.glob('*.py'))))
  }
  assert set(height) == rooms
  up = [f'{a} -> {b} ({where})' for (a, b), where in edges.items() if height[a] < height[b]]
  assert not up, up


def test_the_document_lists_the_imports():
  """Breaks if the column 'may import' of docs/architecture.md lacks an import that exists."""
  edges, above = imports(), []
  for line in DOC.read_text().splitlines():
    if not line.startswith('| `'):
      continue
    (room,), cell = re.findall(r'`([\w./]+)`', line.split('|')[1]), line.split('|')[3]
    room, named = room.removesuffix('.py').rstrip('/'), set(re.findall(r'`(\w+)`', cell))
    allowed = set(above) - named if 'all rows above' in cell else named
    imported = {b for a, b in edges if a == room}
    assert imported <= allowed, (room, imported - allowed)
    above.append(room)


@pytest.mark.parametrize('folder', ['data', 'evaluate', 'methods', 'models', 'compile_check'])
def test_no_circle_of_files_inside_a_folder(folder):
  """Breaks if two files of one folder need each other."""
  name = f'simclr_jax.{folder}'
  files = {p.stem for p in (PACKAGE / folder).glob('*.py')}
  edges = {}
  for path in (PACKAGE / folder).glob('*.py'):
    if path.stem == '__init__':
      continue
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(name):
        inside = node.module.removeprefix(name).strip('.')
        for other in [inside.split('.')[0]] if inside else [a.name for a in node.names]:
          if other in files:
            edges[path.stem, other] = f'{path.name}:{node.lineno}'
  assert not circle(edges), circle(edges)
