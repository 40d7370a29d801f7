"""Damaged files of every kind that the program reads: see `fuzz`."""

import os

import fuzz
import pytest

COUNT = int(
  os.environ.get('SIMCLR_JAX_FUZZ_COUNT', '190')
)  # mutants of each kind in `make test-faults`


@pytest.fixture(scope='module', autouse=True)
def template(tmp_path_factory):
  """The place of the run that all kinds of its files share."""
  folder = tmp_path_factory.mktemp('fuzz')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('SIMCLR_JAX_FUZZ_RUN', str(folder / 'run'))
    yield


def test_damaged_results():
  """Breaks if a damaged evaluation.json is a traceback or other numbers; the other kinds are fault tests."""
  counts, failures = fuzz.fuzz('evaluation', 12)
  assert not failures and sum(counts.values()) == 12, '\n'.join(failures)


@pytest.mark.faults
@pytest.mark.parametrize('kind', fuzz.KINDS)
def test_damaged_files(kind):
  """Breaks if a damaged file crashes the program, is a traceback, hangs, fills the memory or changes a result."""
  counts, failures = fuzz.fuzz(kind, COUNT, seed=1)
  assert not failures and sum(counts.values()) == COUNT, '\n'.join(failures)


def test_the_fuzzer_finds_faults(monkeypatch):
  """Breaks if crashes, hangs and other exceptions of the program go unnoticed."""
  for code, message in (
    ('os._exit(9)', 'the process ended with 9'), ('time.sleep(99)', 'no answer'), ('1 / 0', 'ZeroDivisionError'),
  ):  # fmt: skip
    monkeypatch.setenv('SIMCLR_JAX_FUZZ_FAULT', code)
    monkeypatch.setattr(fuzz, 'SECONDS', 2)
    counts, failures = fuzz.fuzz('evaluation', 1)
    assert len(failures) == 1 and message in failures[0], failures
