"""`python -m d2v_core` is `d2v`."""

from __future__ import annotations

import sys

from d2v_core.cli import main

sys.exit(main())
