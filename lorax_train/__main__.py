"""``python -m lorax_train``: the same as ``lorax-train``."""

import sys

from lorax_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
