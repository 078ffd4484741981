"""Makes the simulated engine of an engine process raise when it meets a prompt of 13 tokens. Put on PYTHONPATH by a test."""

import sys

if "worker.core" in sys.orig_argv:
    from scheduler.batch import StepPlan
    from worker import simulated
    from worker.engine import StepResult

    run = simulated.SimulatedEngine.run
    cursed: set[int] = set()

    def raising(self: simulated.SimulatedEngine, plan: StepPlan) -> StepResult:
        cursed.update(request.key for request in plan.start if len(request.prompt) == 13)
        cursed.difference_update(plan.stop)
        if any(entry.key in cursed for entry in plan.entries):
            raise RuntimeError("thirteen tokens")
        return run(self, plan)

    simulated.SimulatedEngine.run = raising  # type: ignore[method-assign]
