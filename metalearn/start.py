"""The command's first module: imports everything, for ``metalearn``, ``python -m metalearn`` and the processes that it forks.

What is imported stays until the end. Without a collector that looks at all of it again and again, the import takes three
quarters of the time, and the end of the process a tenth.
"""

import atexit
import gc

gc.disable()
from metalearn.cli import main as main  # noqa: E402

gc.enable()
gc.freeze()
atexit.register(gc.freeze)
