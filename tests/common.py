"""What tests share that their subprocesses need, too: nothing here touches JAX."""

import json


def records(workdir) -> list[dict]:
  """The steps of a run's metrics.jsonl without what depends on the clock; none if there is no such file."""
  path = workdir / 'metrics.jsonl'
  # The last line may be half written.
  lines = [json.loads(x) for x in path.read_text().split('\n')[:-1]] if path.exists() else []
  clock = ('steps_per_second', 'examples_per_second', 'data_wait', 'time')
  return [
    {k: v for k, v in r.items() if k not in clock and not k.startswith('seconds_')}
    for r in lines
    if 'event' not in r
  ]
