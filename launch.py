"""python launch.py recipe=NAME|PATH.yaml [job=JOB] [key=value ...]: see --help."""

import sys

from framework.cli import main

if __name__ == "__main__":
    sys.exit(main())
