"""A model on its way from the coordinator to the operator's disk: whole, or not there."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.admin_client import Unreachable
from fedloom.adapters import read_adapter
from fedloom.artifacts import ArtifactReference, PartialFile
from fedloom.errors import Reason, Refused
from fedloom.export_forms import (
    Exported,
    Form,
    TrainedModel,
    export_forms,
    require_installed,
)
from fedloom.exports import require_replaceable
from fedloom.model_cards import CARD_FILE
from fedloom.plans import ADAPTER_FILE, load_plan
from fedloom.rank_pruning import pruned

if TYPE_CHECKING:
    from coordinator.admin_client import AdminClient

RETRY_SECONDS, RETRIES = 1.0, 10
Files = tuple[tuple[str, ArtifactReference], ...]


def download_model(
    client: "AdminClient",
    run_id: bytes,
    out: Path,
    forms: tuple[Form, ...] = (Form.ONNX,),
    rank: int = 0,
) -> Exported:
    """Fetch the run's model and make `out` a folder of it in these forms.

    `rank`: that its adapter is pruned to; 0 leaves it. A cut costs nothing but the parts on their
    way. Raises ConfigError for a run that the coordinator cannot read, Refused for bytes that are
    not what their digests say or a merged model that answers otherwise than the adapter.
    """
    require_replaceable(out)  # now, and not after gigabytes
    require_installed(forms)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        download = _Download(Path(folder))
        failures = 0
        while not download.is_whole:
            try:
                download.go_on(client, run_id)
            except Unreachable:
                failures += 1
                if failures > RETRIES:
                    raise
                time.sleep(RETRY_SECONDS)
        plan = load_plan(Path(folder))
        theta = read_adapter(Path(folder) / ADAPTER_FILE, plan.layout)
        description = (Path(folder) / CARD_FILE).read_text(encoding="utf-8")
        model = TrainedModel(Path(folder), plan, theta, description)
        return export_forms(pruned(model, rank) if rank else model, forms, out)


class _Download:
    """The files of one export as they arrive, one after another."""

    def __init__(self, folder: Path) -> None:
        self.files: Files | None = None
        self._folder = folder
        self._whole = 0  # files

    @property
    def is_whole(self) -> bool:
        return self.files is not None and self._whole == len(self.files)

    def go_on(self, client: "AdminClient", run_id: bytes) -> None:
        """Receive from where it was cut; what was received stays, whatever ends the stream."""
        steps = client.export(run_id, self._offset())
        manifest = next(steps, None)
        if isinstance(manifest, bytes) or manifest is None:
            raise Refused(Reason.MALFORMED, "expected the list of files first")
        self._check(manifest)
        while not self.is_whole:
            name, reference = manifest[self._whole]
            with PartialFile(self._partial(name), reference) as file:
                while not file.complete:
                    part = next(steps, b"")
                    if not isinstance(part, bytes) or not part:
                        raise Refused(Reason.MALFORMED, f"expected more of {name}")
                    file.append(part)
                file.finish(self._folder / name)
            self._whole += 1

    def _check(self, manifest: Files) -> None:
        for name, _ in manifest:
            if Path(name).name != name or name.startswith("."):
                raise Refused(Reason.MALFORMED, f"expected the name of a file, found {name!r}")
        if self.files not in (None, manifest):
            raise Refused(Reason.STATE_DIVERGED, "the run went on meanwhile: export it again")
        self.files = manifest

    def _offset(self) -> int:
        if self.files is None:
            return 0
        done = sum(reference.size_bytes for _, reference in self.files[: self._whole])
        partial = None if self.is_whole else self._partial(self.files[self._whole][0])
        return done + (partial.stat().st_size if partial is not None and partial.exists() else 0)

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.part"
