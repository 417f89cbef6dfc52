"""Sweeps of fake runs, in this process or as a driver of its own."""

import sys
from pathlib import Path

from sweep.fake_runs import main

from metalearn.executors import Workers
from metalearn.sweep.driver import Driver, Options
from metalearn.sweep.grid import read_sweep_file


class Silent:
    def recalled(self, complete, failed):
        pass

    def started(self, cell):
        pass

    def ended(self, cell, outcome):
        pass


def sweep(file, folder, workers=2, timeout_seconds=None, overrides=(), **options):
    """The outcomes of a sweep of fake runs, and its driver."""
    plan = read_sweep_file(file, overrides)
    make = lambda: Workers(workers, 1, timeout_seconds, preload="metalearn.sweep.work")  # noqa: E731
    driver = Driver(plan, Path(folder), main, make, Options(workers=workers, **options), Silent())
    return driver.run()


if __name__ == "__main__":
    sweep(sys.argv[1], sys.argv[2])
