"""`python -m quailora`."""

import sys

from .cli.main import main

sys.exit(main())
