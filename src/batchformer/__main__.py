"""``python -m batchformer``."""

import sys

from .cli import main

if __name__ == "__main__":  # runs in processes of their own import this file again
    sys.exit(main())
