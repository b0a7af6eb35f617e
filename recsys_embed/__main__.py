"""``python -m recsys_embed`` is the same as ``recsys-embed``."""

import sys

from recsys_embed.cli import main

if __name__ == "__main__":
    sys.exit(main())
