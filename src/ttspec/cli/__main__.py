"""`python -m ttspec.cli` is the same as `ttspec`."""

import sys

from ttspec.cli import main

sys.exit(main())
