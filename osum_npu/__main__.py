"""``python -m osum_npu``: the command line, as a launcher starts it."""

import sys

from osum_npu.cli.main import main

sys.exit(main())
