"""The order of the training images, which is computed and not stored.

A run reads one endless sequence of epochs, each shuffled anew. Step i reads positions [i * n, (i + 1) * n)
of the sequence, so a batch may span two epochs and no image is dropped. Any position is computed in
constant time and memory, whatever the size of the data set.
"""

import functools
import math

import numpy as np

ROUNDS = 12


def permute(seed: int, epoch: int, position: np.ndarray, examples: int) -> np.ndarray:
  """The images at some positions of an epoch: a random permutation of `range(examples)`.

  A Feistel network on pairs (left, right) below (a, b), where a * b is at least the number of images; a
  result that is not below `examples` goes through the network again (cycle walking, Black & Rogaway 2002).

  Args:
    seed, epoch: select the permutation.
    position: int `[n]`, from 0 to `examples - 1`.
    examples: number of images, at least 1.

  Returns:
    int64 `[n]`, indices of images.
  """
  keys = _round_keys(seed, epoch)
  a = math.isqrt(examples - 1) + 1
  b = -(-examples // a)
  index = np.array(position, np.int64)
  active = np.arange(len(index))
  while len(active):
    left, right = np.divmod(index[active].astype(np.uint64), np.uint64(b))
    for i in range(0, ROUNDS, 2):
      left = (left + _mix(right ^ keys[i])) % np.uint64(a)
      right = (right + _mix(left ^ keys[i + 1])) % np.uint64(b)
    index[active] = (left * np.uint64(b) + right).astype(np.int64)
    active = active[index[active] >= examples]
  return index


@functools.lru_cache(maxsize=4)
def _round_keys(seed, epoch):
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(
    0, 2**64, ROUNDS, dtype=np.uint64
  )


def _mix(x):
  """The finalizer of SplitMix64 (Steele et al. 2014) without its top bit, so that sums stay below 2^64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def rows(seed: int, step: int, batch_size: int, examples: int) -> dict[str, np.ndarray]:
  """The batch of a step, as int32 arrays `[batch_size]`.

  Returns:
    `index`: of the image in the data set; `epoch`, and `position` in the epoch.
  """
  sequence = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
  epoch, position = np.divmod(sequence, examples)
  index = np.empty(batch_size, np.int32)
  for e in np.unique(epoch):
    in_epoch = epoch == e
    index[in_epoch] = permute(seed, int(e), position[in_epoch], examples)
  return {
    'index': index,
    'epoch': epoch.astype(np.int32),
    'position': position.astype(np.int32),
  }
