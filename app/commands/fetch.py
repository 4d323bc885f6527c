"""`kdpo download`: the files of a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from app.commands.connect import ApiKey, AsJson, DataDir, Url, connected
from app.commands.show import byte_bar, out, print_json
from kdpo.client import Client
from kdpo.downloads import DownloadProgress
from kdpo.types import Job


def download(
    what: Annotated[str, typer.Argument(help="A checkpoint (ckpt_…), or the job that made one.")],
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=32)] = 4,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
    data_dir: DataDir = None,
) -> None:
    """Bring a checkpoint to a folder and check every hash; a broken download goes on."""
    with connected(url, api_key, data_dir=data_dir) as here:
        files = bring(here.client, what, folder, parallel=parallel)
    if as_json:
        print_json({"folder": str(folder.absolute()), "files": files})
    else:
        out().print(f"{len(files)} files in {folder}, all hashes are right", soft_wrap=True)


def bring(client: Client, what: str | Job, folder: Path, *, parallel: int = 4) -> list[str]:
    """Download with a bar and return the paths."""
    paths: dict[str, None] = {}
    with byte_bar("download") as bars:

        def tell(progress: DownloadProgress) -> None:
            paths[progress.path] = None
            if bars is not None:
                bars.update(
                    bars.task_ids[0], completed=progress.done_bytes, total=progress.total_bytes
                )

        client.download(what, folder, parallel=parallel, on_progress=tell)
    return sorted(paths)
