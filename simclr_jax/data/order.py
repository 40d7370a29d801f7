"""Which image stands where: the order of the examples, computed and not remembered.

The run reads one endless sequence: pass after pass over the data, each in an order of its own. Step i
takes places [i * n, (i + 1) * n) of it, so a batch may straddle two passes and no image is dropped.
Any place is found in constant time and memory, whatever the size of the data set.
"""

import functools
import math

import numpy as np

ROUNDS = 12


def permute(seed: int, epoch: int, position: np.ndarray, examples: int) -> np.ndarray:
  """Which example stands at `position` in pass `epoch`: a permutation of `range(examples)`.

  A Feistel network on pairs (left, right) below (a, b), a * b just above the number of examples; a
  result that is no example goes through it again (cycle walking, Black & Rogaway 2002).

  Args:
    seed, epoch: which permutation.
    position: integers `[n]` from 0 to `examples - 1`.
    examples: how many there are, at least 1.

  Returns:
    int64 `[n]`.
  """
  keys = _round_keys(seed, epoch)
  a = math.isqrt(examples - 1) + 1
  b = -(-examples // a)
  index = np.array(position, np.int64)
  walking = np.arange(len(index))
  while len(walking):
    left, right = np.divmod(index[walking].astype(np.uint64), np.uint64(b))
    for i in range(0, ROUNDS, 2):
      left = (left + _mix(right ^ keys[i])) % np.uint64(a)
      right = (right + _mix(left ^ keys[i + 1])) % np.uint64(b)
    index[walking] = (left * np.uint64(b) + right).astype(np.int64)
    walking = walking[index[walking] >= examples]
  return index


@functools.lru_cache(maxsize=4)
def _round_keys(seed, epoch):
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(
    0, 2**64, ROUNDS, dtype=np.uint64
  )


def _mix(x):
  """The finalizer of SplitMix64 (Steele et al. 2014), less its top bit: sums with it stay below 2^64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


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
    index[here] = permute(seed, int(e), position[here], examples)
  return {
    'index': index,
    'epoch': epoch.astype(np.int32),
    'position': position.astype(np.int32),
  }
