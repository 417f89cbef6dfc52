"""``python -m metalearn``. Defines no classes: a class of ``__main__`` would differ from the imported one in every config."""

import sys

from metalearn.start import main

if __name__ == "__main__":
    sys.exit(main())
