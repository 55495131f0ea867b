"""Metrics and health beside what serves sandboxes, where a port for them is given."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


@contextlib.asynccontextmanager
async def metrics_served(
    port: int | None, host: str, collectors: "Callable[[], Sequence[Collector]]", trouble: Callable[[], str]
) -> AsyncIterator[str]:
    """Serves `/metrics` and `/health` for as long, if there is a port; says where, as the end of a line.

    collectors: made only then, as prometheus_client belongs to an extra.
    """
    if port is None:
        yield ""
        return
    try:
        from hone.observability.exporter import Exporter

        made = collectors()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"metrics need {error.name}: pip install 'hone[metrics]', or leave out --metrics-port"
        ) from error
    async with Exporter(made, port, host=host, trouble=trouble) as exporter:
        yield f", metrics at http://{exporter.host}:{exporter.port}/metrics"
