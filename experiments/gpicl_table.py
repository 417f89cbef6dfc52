"""The table of Kirsch et al. 2022, section 4: accuracy after 99 examples of models that were meta-trained on MNIST alone.

    python -m experiments.gpicl_table runs/in_context/mnist_paper [more runs ...]

reads the ``test.csv`` of each run (``metalearn test``) and sets it beside the published numbers.
"""

import argparse

from metalearn.analysis.compare import beside_published, format_table
from metalearn.analysis.runs import read_evaluations

# Per cent, by stream; unseen_held_out is MNIST. The reproduction is the best public one, github.com/Lerostre/gpicl.
PUBLISHED = {
    "paper, transformer": {"unseen_held_out": 73.70, "fashion_mnist": 62.24, "cifar10": 19.40, "random": 100.0},
    "paper, VSML": {"unseen_held_out": 79.04, "fashion_mnist": 68.49, "cifar10": 24.09, "random": 100.0},
    "best public reproduction": {"unseen_held_out": 52.3, "fashion_mnist": 45.8, "cifar10": 11.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders with a test.csv")
    print(format_table(beside_published(read_evaluations(parser.parse_args().runs, "test"), PUBLISHED)))


if __name__ == "__main__":
    main()
