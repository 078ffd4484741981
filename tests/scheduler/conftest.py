"""There is no package below tests/, so the helpers that stand beside the tests are imported by path."""

import importlib.util
import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("headgate", derandomize=True, deadline=None, database=None)
settings.load_profile("headgate")

_spec = importlib.util.spec_from_file_location("gate_world", Path(__file__).with_name("gate_world.py"))
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["gate_world"] = _module
_spec.loader.exec_module(_module)
