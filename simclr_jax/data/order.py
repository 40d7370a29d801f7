"""Which image stands where: the order of the examples, computed and not remembered.

The run reads one endless sequence: pass after pass over the data, each in an order of its own. Step i
takes places [i * n, (i + 1) * n) of it, so a batch may straddle two passes and no image is dropped.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
  """The order of pass `epoch`: int32 `[examples]`, a function of its arguments alone."""
  generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
  order = generator.permutation(examples).astype(np.int32)
  order.flags.writeable = False
  return order


def rows(seed: int, step: int, batch_size: int, examples: int) -> dict[str, np.ndarray]:
  """The batch of a step, as int32 arrays `[batch_size]`.

  Returns:
    `index`: which image of the data set; `epoch`: in which pass; `position`: its place in that pass.
  """
  place = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
  epoch, position = np.divmod(place, examples)
  index = np.empty(batch_size, np.int32)
  for e in np.unique(epoch):
    here = epoch == e
    index[here] = permutation(seed, int(e), examples)[position[here]]
  return {
    'index': index,
    'epoch': epoch.astype(np.int32),
    'position': position.astype(np.int32),
  }
