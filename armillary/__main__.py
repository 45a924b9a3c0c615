"""`python -m armillary`, for launchers that start a module in several processes: `torchrun -m armillary embed ...`."""

import sys

from armillary.engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
