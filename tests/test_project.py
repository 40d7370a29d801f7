"""The files of the project around the code: one version, valid forms."""

import pathlib
import re

import pytest
import yaml

from simclr_jax import __version__

ROOT = pathlib.Path(__file__).parents[1]


def test_the_citation_has_the_version_of_the_package():
  """Breaks if a release is cited by the number of another one."""
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == __version__
  assert citation['title'] == 'simclr_jax' and len(citation['references']) == 4


@pytest.mark.parametrize('name', ['bug_report', 'question'])
def test_issues_ask_for_the_doctor(name):
  """Breaks if a form is no form of GitHub, or does not ask for the versions."""
  form = yaml.safe_load((ROOT / f'.github/ISSUE_TEMPLATE/{name}.yml').read_text())
  assert {'name', 'description', 'body'} <= set(form)
  fields = {f['id']: f for f in form['body'] if f['type'] != 'markdown'}
  assert 'simclr-jax doctor' in fields['doctor']['attributes']['label']


def test_targets_of_make_exist():
  """Breaks if CONTRIBUTING.md or a workflow names a target that the Makefile lacks."""
  targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
  workflows = [*(ROOT / '.github/workflows').glob('*.yml')]
  for file in (ROOT / 'CONTRIBUTING.md', *workflows):
    named = re.findall(r'(?:`|run: )make ([\w-]+)', file.read_text())
    assert named and set(named) <= set(targets), (file.name, named)
