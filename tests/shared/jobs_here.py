"""The runs of a comparison in the process of the test, one by one: faster where processes do not matter."""

from collections.abc import Callable, Sequence

from batchformer.engine.job_process import Job
from batchformer.engine.jobs import Ended
from batchformer.engine.resuming import DONE
from batchformer.engine.run import fit


def in_this_process(
    jobs: Sequence[Job], most: int, threads: int, devices: Sequence[str], ended: Callable[[Ended], None]
) -> None:
    """Stand in for ``batchformer.engine.jobs.run_jobs``."""
    for job in jobs:
        kept = (job.folder / DONE).exists()
        result = fit(
            job.recipe,
            job.overrides,
            job.folder,
            name=job.name,
            unit=job.unit,
            resume=job.folder.exists(),
            say=lambda line: None,
        )
        ended(Ended(job, result, kept=kept))
