"""`python -m sailplan` is the `sailplan` command."""

import sys

from sailplan.cli.main import main

sys.exit(main())
