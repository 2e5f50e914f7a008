"""An event sink that writes TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from fedml_plugin_fedmosaic.core import events as ev


class TensorBoardSink:
    """Writes losses, scores, bytes and seconds; the step is the number of finished rounds.

    Tags: ``<strategy>/loss/client<i>``, ``<strategy>/<scope>/<view>/client<i>/<task>``,
    ``<strategy>/bytes/{up,down}`` and ``<strategy>/round_s``.

    Args:
        folder: where the event files go; made if needed.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(log_dir=str(folder))

    def __call__(self, event: ev.Event) -> None:
        """Takes one event; those without a number for a plot are left out."""
        if isinstance(event, ev.ClientTrained):
            tag = f"loss/{event.pass_name}/client{event.client_id}"
            self._scalar(event, tag, event.mean_loss, event.round_idx)
        elif isinstance(event, ev.Evaluated):
            tag = f"{event.scope}/{event.view}/client{event.client_id}/{event.task}"
            self._scalar(event, tag, event.value, event.round_idx)
        elif isinstance(event, ev.RoundFinished):
            up, down = sum(event.uplink_bytes.values()), sum(event.downlink_bytes.values())
            self._scalar(event, "bytes/up", up, event.round_idx)
            self._scalar(event, "bytes/down", down, event.round_idx)
            self._scalar(event, "round_s", event.duration_s, event.round_idx)
        elif isinstance(event, ev.RunFinished):
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self._writer.close()

    def __enter__(self) -> TensorBoardSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _scalar(self, event: ev.Event, tag: str, value: float, round_idx: int) -> None:
        name = f"{event.strategy}/{tag}"
        self._writer.add_scalar(name, value, round_idx + 1)
