"""Helpers of the tests that their subprocesses use, too: nothing here imports JAX."""

import json


def records(workdir) -> list[dict]:
  """The steps in a run's metrics.jsonl, without timing fields; empty if the file does not exist."""
  path = workdir / 'metrics.jsonl'
  # The last line may be incomplete.
  lines = [json.loads(x) for x in path.read_text().split('\n')[:-1]] if path.exists() else []
  timing = ('steps_per_second', 'examples_per_second', 'data_wait', 'time')
  return [
    {k: v for k, v in r.items() if k not in timing and not k.startswith('seconds_')}
    for r in lines
    if 'event' not in r
  ]
