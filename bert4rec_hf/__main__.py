"""`python -m bert4rec_hf` is the command `bert4rec`."""

import sys

from .cli import main

sys.exit(main())
