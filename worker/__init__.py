"""The worker: a front for the wire, and an engine process that holds the gate and the engine."""
