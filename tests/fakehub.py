"""A read-only Hugging Face Hub on the loopback interface that serves one folder as one repository."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from loopback import Handler, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repo_id: str, folder: Path) -> Iterator[str]:
    """Serves `folder` as the model repository `repo_id`; yields the endpoint."""

    class Repository(Handler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
            if path.startswith(f"/api/models/{repo_id}/tree/"):
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name, file in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if path.startswith(f"/api/models/{repo_id}"):
                info = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            if path.startswith(f"/{repo_id}/resolve/"):
                name = path.removeprefix(f"/{repo_id}/resolve/").split("/", 1)[1]
                if name not in files:
                    return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                body = files[name].read_bytes()
                return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)
            return self.answer(404, b"", X_Error_Code="RepoNotFound")

    with serving(Repository) as endpoint:
        yield endpoint


def environment(endpoint: str, cache: Path, offline: bool = False) -> dict[str, str]:
    """For a process that takes `endpoint` for the Hub and keeps what it fetches in `cache`."""
    return os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
