"""``python -m tests.recipes vae pinn`` runs the programs of those pages and prints what they print."""

import argparse
import os
import tempfile
import warnings

from tests.recipes.programs import NAMES, run


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.recipes", description=__doc__)
    parser.add_argument("recipes", nargs="+", choices=NAMES)
    return parser.parse_args(arguments)


def main(arguments=None):
    warnings.simplefilter("ignore")  # Lightning's remarks on small runs
    for name in parse(arguments).recipes:
        with tempfile.TemporaryDirectory() as folder:
            before = os.getcwd()
            os.chdir(folder)
            print(run(name)[1], end="")
            os.chdir(before)


if __name__ == "__main__":
    main()
