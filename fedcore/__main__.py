"""``python -m fedcore``: the command line, where its script is not on the path."""

import sys

from fedcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
