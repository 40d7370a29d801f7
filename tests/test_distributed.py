"""Options of multi-process runs, in one process. Runs of several processes are in test_faults and test_methods."""

import jax
import pytest

from simclr_jax import cli
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--coordinator=localhost:1'], '--num-processes and --process-id must be given, too'),
    (['--coordinator=localhost', '--num-processes=2', '--process-id=0'], 'is not HOST:PORT'),
    (
      ['--coordinator=a:1', '--num-processes=2', '--process-id=2'],
      '--process-id=2 is not from 0 to 1',
    ),
  ],
)
def test_incomplete_distributed_options_are_refused(arguments, expected, tmp_path, capsys):
  """Breaks if a missing or invalid option makes the process wait for others, or train on its own."""
  command = ['pretrain', '--config=simclr_digits', f'--workdir={tmp_path}/run', *arguments]
  assert cli.main(command) == 2
  assert expected in capsys.readouterr().err


def test_environment_variables(monkeypatch):
  """Breaks if the environment variables of a launcher are ignored, or an invalid one gives a
  traceback.
  """
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES='two' is not a number"):
    distributed.initialize(None, None, None)
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  with pytest.raises(ConfigError, match='--coordinator and --process-id must be given'):
    distributed.initialize(None, None, None)


def test_collectives_in_one_process():
  """Breaks if a single-process run waits for other processes."""
  assert distributed.gather({'a': 1}) == [{'a': 1}] and distributed.is_main_process()
  distributed.check_equal({'a': 1})
  assert distributed.run_on_all(lambda: 3) == 3
  with pytest.raises(ConfigError, match='^no$'):
    distributed.run_on_all(lambda: (_ for _ in ()).throw(ConfigError('no')))


def test_a_tpu_that_jax_does_not_find(monkeypatch):
  """Breaks if a run on a TPU machine trains on the CPU without JAX_PLATFORMS=cpu."""
  distributed.check_accelerator(lambda: (4, 'v5e'))  # the tests set jax_platforms=cpu
  monkeypatch.setattr(type(jax.config), 'jax_platforms', None, raising=False)
  with pytest.raises(ConfigError, match='4 TPU chips, but JAX sees only the CPU'):
    distributed.check_accelerator(lambda: (4, 'v5e'))
  distributed.check_accelerator(lambda: (0, None))
