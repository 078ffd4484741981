"""There is no package below tests/, so what is tested here without an engine is imported by path."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).resolve().parent.parent / "compose" / "panels.py"
_spec = importlib.util.spec_from_file_location("panels", _file)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["panels"] = _module
_spec.loader.exec_module(_module)
