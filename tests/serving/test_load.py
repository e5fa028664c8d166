"""Short forms of the load tests, without what depends on the machine's speed; `make soak` runs the long ones."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.load.checks import ON_ONE_SERVER, run_test
from tests.serving.load.client import compute_percentile
from tests.serving.load.process import ServerProcess
from tests.serving.load.scale import Row, Scale
from tests.serving.load.suites import SUITES

SHORT = Scale(seconds=5, clients=8, steps=3, side=32, kills=8, images=8, repeats=1, max_batch=4)


@pytest.fixture(scope="module")
def server(pipeline_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(str(pipeline_folder), "--max-batch", str(SHORT.max_batch)) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2", "3", "4", "5", "6", "9", "1", "14"])
def test_a_server_under_load_answers_each_request_with_its_own_image(
    name: str, pipeline_folder: Path, request: pytest.FixtureRequest
):
    server = request.getfixturevalue("server") if name in ON_ONE_SERVER else None
    rows: list[Row] = asyncio.run(run_test(name, str(pipeline_folder), SHORT, server))
    assert rows and [row for row in rows if not row.passed and not row.is_timing] == []


def test_suites_are_paths_of_tests():
    assert [path for _, paths in SUITES.values() for path in paths if not (Path(__file__).parent / path).exists()] == []


def test_percentiles_are_values_that_were_measured():
    values = [float(value) for value in range(100, 0, -1)]
    assert compute_percentile(values, 50) == 51 and compute_percentile(values, 95) == 96
    assert compute_percentile([3.0], 95) == 3.0 and compute_percentile([], 95) == 0.0
