"""`python -m layerpeft` is the command `layerpeft`."""

import sys

from layerpeft.cli import main

sys.exit(main())
