"""What the documents name exists: tests, links between documents, commands, recipes, fields, pages of the site."""

import base64
import importlib.util
import json
import pathlib
import re
import shlex
import types

import pytest

from simclr_jax import cli, config, fields

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])
spec = importlib.util.spec_from_file_location('hooks', ROOT / 'docs/hooks.py')
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def test_tests_named_in_reliability_exist():
  """Breaks if a guarantee names a test that was renamed or removed."""
  text = (ROOT / 'docs/reliability.md').read_text()
  cited = re.findall(r'(test_\w+): ((?:`\w+(?:\.\.\.)?`(?:, )?)+)', text)
  assert len(cited) > 20
  for file, names in cited:
    tests = re.findall(r'^def test_(\w+)', (ROOT / f'tests/{file}.py').read_text(), re.MULTILINE)
    for name in re.findall(r'`(\w+)', names):
      assert any(name in test for test in tests), (file, name)


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
  """Breaks if a document links to a file or heading that does not exist."""
  for target in re.findall(r'\]\(([^)]+)\)', path.read_text()):
    if '://' in target:
      continue
    file, _, anchor = target.partition('#')
    linked = path.parent / file if file else path
    assert linked.exists(), target
    if anchor:
      headings = re.findall(r'^#+ (.+)$', linked.read_text(), re.MULTILINE)
      slugs = [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings]
      slugs += re.findall(r'<a id="(.+?)">', linked.read_text())
      assert anchor in slugs, target


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.name)
def test_commands_are_valid(path):
  """Breaks if a command in a block of a document is refused: its name, an argument, a recipe or a field."""
  names = set(fields.TABLE).union(*map(fields.of_method, fields.method_names()))
  blocks = re.findall(r'```(?:bash|sh)\n(.*?)```', path.read_text(), re.DOTALL)
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  for line in (line.strip() for line in lines):
    if not re.match(r'(srun )?simclr-jax [a-z]', line):
      continue
    words = shlex.split(line.removeprefix('srun ').replace('$i', '0'), comments=True)
    args = cli.parse(words[1 : words.index('&') if '&' in words else None])
    assert set(args.overrides) <= names, line
    recipe = getattr(args, 'config', None) or ''
    if re.match('[a-z]', recipe) and not recipe.endswith('.py'):
      config.load(recipe)


def test_generated_pages_are_those_of_the_code():
  """Breaks if a field or a recipe was changed without `python docs/hooks.py`."""
  for name, make in hooks.PAGES.items():
    assert (ROOT / 'docs' / name).read_text() == make(), f'run python docs/hooks.py for {name}'


def test_the_site_has_every_page():
  """Breaks if a page is missing from the navigation, or the navigation names a page that does not exist."""
  named = re.findall(r'[\w/]+\.md', (ROOT / 'mkdocs.yml').read_text().split('\nnav:')[1])
  generated = {'commands.md', 'contributing.md', 'changelog.md'}
  docs = ROOT / 'docs'
  files = [*docs.rglob('*.md'), *docs.rglob('*.ipynb')]
  pages = {str(file.relative_to(docs).with_suffix('.md')) for file in files}
  assert set(named) == pages | generated and len(named) == len(set(named))


def test_a_notebook_becomes_a_page():
  """Breaks if the site loses cells or pictures of a tutorial, or shows what a progress bar has overwritten."""
  outputs = [
    {'text': ['10 %\r', '100 %\r\n', 'done\n']},
    {'data': {'image/png': base64.b64encode(b'picture').decode(), 'text/plain': ['<Figure>']}},
  ]
  cells = [
    {'cell_type': 'markdown', 'source': ['# Title\n', 'First $x$.']},
    {'cell_type': 'code', 'source': ['f()'], 'outputs': outputs},
  ]
  content = json.dumps({'cells': cells})
  notebook = types.SimpleNamespace(src_uri='tutorials/name.ipynb', content_string=content)
  page = hooks.notebook_page(notebook)
  assert page['tutorials/name/0.png'] == b'picture'
  text = page['tutorials/name.md']
  assert text.startswith('# Title\n') and '```python\nf()\n```' in text
  assert '](name/0.png)' in text and text.endswith('```text\n100 %\ndone\n```')
