"""What the documents claim exists: tests named in docs/reliability.md, links between documents."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])


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
