"""The command line with a fault injected into one process: python faulty.py PROCESS STEP FAULT ARGUMENT...

The fault (hang, raise or exit) happens when that process has received the batch of that step.
"""

import os
import sys
import time

from simclr_jax import cli, train_state

process, fault_step, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
build = train_state.build


def build_faulty(*args, **kwargs):
  state, step = build(*args, **kwargs)

  def run(state, i):
    if i == fault_step and int(os.environ['JAX_PROCESS_ID']) == process:
      if fault == 'hang':
        time.sleep(3600)
      if fault == 'raise':
        raise RuntimeError('injected fault')
      os._exit(9)
    return step(state, i)

  run.loader = step.loader
  return state, run


train_state.build = build_faulty
sys.exit(cli.main(sys.argv[4:]))
