"""The command line with a fault in one of its processes: python faulty.py PROCESS STEP FAULT WORDS...

The fault comes when that process has the batch of that step: hang, raise, or exit.
"""

import os
import sys
import time

from simclr_jax import cli, train_state

process, at, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
build = train_state.build


def faulty(*args, **kwargs):
  state, step = build(*args, **kwargs)

  def run(state, i):
    if i == at and int(os.environ['JAX_PROCESS_ID']) == process:
      if fault == 'hang':
        time.sleep(3600)
      if fault == 'raise':
        raise RuntimeError('out of order')
      os._exit(9)
    return step(state, i)

  run.loader = step.loader
  return state, run


train_state.build = faulty
sys.exit(cli.main(sys.argv[4:]))
