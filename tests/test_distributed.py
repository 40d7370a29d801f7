"""Joining several processes: what is refused. What they do together is in test_faults and test_methods."""

import jax
import pytest

from simclr_jax import cli
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed


@pytest.mark.parametrize(
  ('words', 'expected'),
  [
    (['--coordinator=localhost:1'], '--num-processes and --process-id must be given, too'),
    (['--coordinator=localhost', '--num-processes=2', '--process-id=0'], 'is not HOST:PORT'),
    (
      ['--coordinator=a:1', '--num-processes=2', '--process-id=2'],
      '--process-id=2 is not from 0 to 1',
    ),
  ],
)
def test_half_a_job_is_refused(words, expected, tmp_path, capsys):
  """Breaks if a slip makes the process wait for others, or train alone."""
  run = ['pretrain', '--config=simclr_digits', f'--workdir={tmp_path}/run', *words]
  assert cli.main(run) == 2
  assert expected in capsys.readouterr().err


def test_the_environment_is_asked(monkeypatch):
  """Breaks if a launcher's variables are not read, or a wrong one gives a traceback."""
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES='two' is not a number"):
    distributed.initialize(None, None, None)
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  with pytest.raises(ConfigError, match='--coordinator and --process-id must be given'):
    distributed.initialize(None, None, None)


def test_one_process_agrees_with_itself():
  """Breaks if a run of one process needs others."""
  assert distributed.gather({'a': 1}) == [{'a': 1}] and distributed.is_main_process()
  distributed.check_equal({'a': 1})
  assert distributed.run_on_all(lambda: 3) == 3
  with pytest.raises(ConfigError, match='^no$'):
    distributed.run_on_all(lambda: (_ for _ in ()).throw(ConfigError('no')))


def test_a_tpu_that_jax_does_not_see(monkeypatch):
  """Breaks if a training begins on the CPU of a TPU machine without being asked to."""
  distributed.check_accelerator(lambda: (4, 'v5e'))  # the tests say jax_platforms=cpu
  monkeypatch.setattr(type(jax.config), 'jax_platforms', None, raising=False)
  with pytest.raises(ConfigError, match='4 TPU chips, but JAX sees only the CPU'):
    distributed.check_accelerator(lambda: (4, 'v5e'))
  distributed.check_accelerator(lambda: (0, None))
