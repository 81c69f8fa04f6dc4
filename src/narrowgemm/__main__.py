"""`python -m narrowgemm ...`, the same as the `narrowgemm` command."""

import sys

from .cli.main import main

sys.exit(main())
