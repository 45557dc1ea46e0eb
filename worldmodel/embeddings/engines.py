"""Engines that make the parts of a collection: processes of this host, or the tasks of a Ray cluster.

Parts that were finished remain after any interruption. So a part may be made twice, for example by a task of Ray that
is repeated because its host was lost: the same file is written again.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import Any, Literal

from data_pipelines.errors import UserError, one_line
from data_pipelines.processes import ending, spawned_pool
from worldmodel.embeddings.parts import Finished, Part, Work, embed_part

Engine = Literal["processes", "ray"]
PARTS_AHEAD = 2
"""Parts per process that are submitted at a time, so that no process waits for work."""


def make_parts(engine: Engine, work: Work, parts: Iterable[Part], num_processes: int | None) -> Generator[Finished]:
    """Make parts in any order, and yield each when it is finished. Closing it ends the processes.

    num_processes: parts that are made at a time; None: as many as the cluster of Ray has room for.

    Raises:
        UserError: as `embed_part`, a process died, or Ray is not installed or cannot be started.
    """
    if engine == "ray":
        return _by_ray(work, parts, num_processes)
    assert num_processes is not None
    return _by_processes(work, parts, num_processes)


def _by_processes(work: Work, parts: Iterable[Part], num_processes: int) -> Generator[Finished]:
    if num_processes == 1:
        yield from map(partial(embed_part, work), parts)
        return
    with ending(spawned_pool(num_processes)) as pool:
        try:
            ahead = PARTS_AHEAD * num_processes
            yield from _as_finished(lambda part: pool.submit(embed_part, work, part), parts, ahead)
        except BrokenProcessPool:
            raise UserError(
                "a process that embeds videos has died, perhaps because memory ran out: start again with fewer "
                "processes; finished parts remain"
            ) from None


def _by_ray(work: Work, parts: Iterable[Part], num_processes: int | None) -> Generator[Finished]:
    """Make each part as a task of Ray, on the cluster that RAY_ADDRESS names or that runs on this host.

    Without one, Ray is started on this host for this command.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise it reports its use to its makers
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError:
        raise UserError("engine=ray needs ray, which is not installed: pip install 'worldmodel[ray]'") from None
    uses_gpu = work.run.device.startswith("cuda")
    try:
        try:
            ray.init(include_dashboard=False, logging_level="ERROR")
        except Exception as error:  # Ray raises errors of many kinds
            raise UserError(f"Ray cannot be started, or its cluster cannot be reached: {one_line(error)}") from error
        needs = {"CPU": max(1, work.settings.num_workers)} | ({"GPU": 1} if uses_gpu else {})
        hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(host.get(kind, 0)) // count for kind, count in needs.items()) for host in hosts)
        if not room:
            wanted = " and ".join(f"{count} {kind}" for kind, count in needs.items())
            raise UserError(
                f"no host of the Ray cluster has {wanted}: lower data.num_workers, or choose another device"
            )
        task: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))(embed_part)
        ahead = num_processes or PARTS_AHEAD * room
        yield from _as_finished(lambda part: task.remote(work, part).future(), parts, ahead)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    except RayError as error:
        raise UserError(f"a task of Ray failed: {one_line(error)}; finished parts remain") from error
    finally:
        ray.shutdown()


def _as_finished(submit: Callable[[Part], "Future[Finished]"], parts: Iterable[Part], ahead: int) -> Iterator[Finished]:
    """Yield results in the order in which they come. At most `ahead` parts are submitted at a time."""
    remaining, pending = iter(parts), set[Future[Finished]]()
    while True:
        pending |= {submit(part) for part in islice(remaining, ahead - len(pending))}
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()
