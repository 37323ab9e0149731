"""``python -m rudolph``."""

import sys

from rudolph.cli import main

sys.exit(main())
