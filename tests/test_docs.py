"""What the documents claim exists: tests named in docs/reliability.md, links between documents, pages of the site."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])


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
      assert anchor in slugs, target


def test_generated_pages_are_those_of_the_code():
  """Breaks if a field or a recipe was changed without `python docs/hooks.py`."""
  spec = importlib.util.spec_from_file_location('hooks', ROOT / 'docs/hooks.py')
  hooks = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(hooks)
  for name, make in hooks.PAGES.items():
    assert (ROOT / 'docs' / name).read_text() == make(), f'run python docs/hooks.py for {name}'


def test_the_site_has_every_page():
  """Breaks if a page is missing from the navigation, or the navigation names a page that does not exist."""
  named = set(
    re.findall(r'[\w/]+\.(?:md|ipynb)', (ROOT / 'mkdocs.yml').read_text().split('\nnav:')[1])
  )
  generated = {'commands.md', 'contributing.md', 'changelog.md'}
  docs = ROOT / 'docs'
  paths = [*docs.rglob('*.md'), *docs.rglob('*.ipynb')]  # a notebook becomes a page
  pages = {str(path.relative_to(docs).with_suffix('.md')) for path in paths}
  assert named == pages | generated
