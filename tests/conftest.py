"""One thread, passive waiting, no network, no display: set before torch is imported (two spinning processes on two cores crawl)."""

import os

os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="Agg", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"
)
