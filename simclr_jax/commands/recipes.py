"""list the built-in recipes, or show one with all its fields

Examples:
  simclr-jax recipes
  simclr-jax recipes moco_imagenet:v2
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  parser.add_argument(
    'name', nargs='?', metavar='RECIPE', help='a recipe, or the path of one; RECIPE:VARIANT'
  )


def run(args: argparse.Namespace) -> int:
  """Prints the list, or the recipe."""
  from simclr_jax import config as recipes

  if args.name:
    print(recipes.load(args.name, args.overrides))
    return 0
  for name in recipes.names():
    print(f'{name:22}{recipes.description(name)}')
    for i, (variant, text) in enumerate(recipes.variants(name).items()):
      print(f'  :{variant:19}{text}{"" if i else " (default)"}')
  return 0
