"""`python -m open_mythos` equals `mythos`."""

import sys

from open_mythos.cli.main import main

sys.exit(main())
