"""``python -m mesa_gguf``: the command line."""

import sys

from .cli import main

sys.exit(main())
