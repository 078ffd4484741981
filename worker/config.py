"""What a worker is started with. Checked by the command line; passed to the front and the engine process as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker: which model on which engine and device, and its bounds."""

    model: str = "headgate-demo"  # the model that ships, a folder, a hub id; for the simulated engine a shape's name
    random_weights: str = ""  # a config.json that is served instead, with weights made up
    served_name: str = ""  # as clients call it; by default the model's own name
    engine: str = "native"  # native | simulated
    hardware: str = "h100"  # of the simulated engine: a name of the catalogue, or a JSON file
    device: str = "auto"  # of the native engine: auto | cpu | cuda | cuda:N
    dtype: str = "auto"
    threads: int = 0  # 0: measured
    kv_cache_bytes: int = 0  # 0: as much as fits sensibly
    context_tokens: int = 0  # 0: the model's
    max_sequences: int = 256
    max_waiting: int = 16384
    shared_prefix: bool = False  # cached blocks are hit across tenants
    seed: int = 0  # of the simulated engine's output lengths

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> WorkerConfig:
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})
