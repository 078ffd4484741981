"""Makes every logger say all it can, whatever level it is given. Put on PYTHONPATH by a test."""

import logging
import sys

logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
logging.Logger.setLevel = lambda self, level: None  # type: ignore[method-assign]
