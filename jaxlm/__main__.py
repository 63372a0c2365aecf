"""`python -m jaxlm` is the command `jaxlm`."""

import sys

from jaxlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
