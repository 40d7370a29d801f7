"""NT-Xent of a large batch: the whole matrix of similarities against blocks of its rows, in one run.

Loss and gradient of projections `[2n, 128]`. Prints seconds and temporary memory (by the compiler's count) of both, and
the ratio. The two run alternately, so that a busy machine slows both. A whole matrix of more than --limit GiB is not
computed; its memory is that of the compiler.

    python benchmarks/nt_xent.py [--rows 8192 16384 32768] [--rounds 5] [--limit 4]

With --queue, the same question for InfoNCE with a long queue: how much memory its `[n, K]` logits take.

    python benchmarks/nt_xent.py --queue 65536 --rows 256 1024 4096
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import blockwise, losses

D = 128
GIB = 2**30


def nt_xent(z):
  return losses.nt_xent(z, 0.1)[0]


def compiled(f, *shapes, whole=True):
  """The compiled loss and gradient of `f`: with the whole matrix, or in blocks."""
  limit, blockwise.WHOLE = blockwise.WHOLE, 2**62 if whole else 0
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  # A function of its own for each: jit would find the other program in its cache.
  program = jax.jit(jax.value_and_grad(lambda *a: f(*a))).lower(*arguments).compile()
  blockwise.WHOLE = limit
  return program


def seconds(program, *arguments):
  start = time.perf_counter()
  jax.block_until_ready(program(*arguments))
  return time.perf_counter() - start


def compare(m, rounds, limit):
  """Prints a line for 2n = m."""
  whole, blocks = (compiled(nt_xent, (m, D), whole=w) for w in (True, False))
  memory = [p.memory_analysis().temp_size_in_bytes / GIB for p in (whole, blocks)]
  line = f'2n = {m:7,}  memory: whole {memory[0]:7.3f} GiB, blocks {memory[1]:.3f} GiB'
  z = jnp.asarray(np.random.default_rng(0).normal(size=(m, D)), jnp.float32)
  programs = [blocks] if memory[0] > limit else [whole, blocks]
  times = np.array([[seconds(p, z) for p in programs] for _ in range(rounds + 1)])[1:]
  if len(programs) == 1:
    return f'{line}  blocks {np.median(times):.3f} s (the whole matrix is not computed)'
  ratio = times[:, 1] / times[:, 0]
  return (
    f'{line}  whole {np.median(times[:, 0]):.3f} s, blocks {np.median(times[:, 1]):.3f} s, '
    f'ratio {np.median(ratio):.2f} ({ratio.min():.2f}-{ratio.max():.2f})'
  )


def info_nce(n, K, rounds):
  """A line for n queries and a queue of K."""

  def loss(q, k, queue):
    return losses.info_nce(q, k, queue, 0.2)[0]

  program = compiled(loss, (n, D), (n, D), (K, D))
  rng = np.random.default_rng(0)
  arguments = [
    losses.l2_normalize(jnp.asarray(rng.normal(size=s), jnp.float32))
    for s in ((n, D), (n, D), (K, D))
  ]
  times = [seconds(program, *arguments) for _ in range(rounds + 1)][1:]
  memory = program.memory_analysis().temp_size_in_bytes / GIB
  return f'InfoNCE n = {n:6,} K = {K:,}  memory {memory:.3f} GiB  {np.median(times):.3f} s'


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rows', type=int, nargs='+', default=[8192, 16_384, 32_768])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--limit', type=float, default=4.0, help='GiB of temporaries')
  parser.add_argument('--queue', type=int, default=0)
  args = parser.parse_args()
  for rows in args.rows:
    if args.queue:
      print(info_nce(rows, args.queue, args.rounds), flush=True)
    else:
      print(compare(rows, args.rounds, args.limit), flush=True)


if __name__ == '__main__':
  main()
