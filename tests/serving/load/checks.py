"""The load tests by their numbers; each returns rows of what is wanted and what was measured."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.serving.load.arrivals import check_fairness, check_latency, check_overload
from tests.serving.load.batching import check_batching, check_images
from tests.serving.load.bodies import check_bombs, check_oversize
from tests.serving.load.leavers import check_deaf_clients, check_kills, check_slow_connections
from tests.serving.load.process import ServerProcess
from tests.serving.load.scale import Row, Scale
from tests.serving.load.soak import check_soak
from tests.serving.load.suites import SUITES, run_suite

ON_ONE_SERVER: dict[str, Callable[[ServerProcess, Scale], Awaitable[list[Row]]]] = {
    "2": check_images,
    "3": check_latency,
    "4": check_overload,
    "5": check_soak,
    "6": check_kills,
    "7": check_slow_connections,
    "8": check_deaf_clients,
    "9": check_oversize,
    "11": check_bombs,
}
ON_THEIR_OWN: dict[str, Callable[[str, Scale], Awaitable[list[Row]]]] = {"1": check_batching, "14": check_fairness}
TESTS = sorted([*ON_ONE_SERVER, *ON_THEIR_OWN, *SUITES], key=int)


async def run_test(name: str, model: str, scale: Scale, server: ServerProcess | None = None) -> list[Row]:
    """Run a test by its number, on servers of its own, or on one that is there if the test changes no option."""
    if name in SUITES:
        return run_suite(name)
    # As a full path, which commands in other folders take too
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    if name in ON_THEIR_OWN:
        return await ON_THEIR_OWN[name](model, scale)
    if server is not None:
        return await ON_ONE_SERVER[name](server, scale)
    with ServerProcess(model, "--max-batch", str(scale.max_batch)) as server:
        return await ON_ONE_SERVER[name](server, scale)
