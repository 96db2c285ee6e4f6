"""As much of the Hugging Face Hub as takes an upload: a repository is made, files are announced, then committed."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from loopback import Handler, serving


@contextmanager
def receive(folder: Path, user: str = "someone", allowed: bool = True) -> Iterator[str]:
    """Takes every upload into `folder`/NAME as `user`, or forbids it; yields the endpoint."""

    class Receiver(Handler):
        def say(self, status: int, content: object) -> None:
            self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = urlparse(self.path).path
            if not allowed or self.headers.get("Authorization") != "Bearer hf_token":
                return self.say(403, {"error": "You have no right to do this."})
            if path == "/api/repos/create":
                name = json.loads(body)["name"]
                (folder / name).mkdir(exist_ok=True)
                return self.say(200, {"url": f"http://{self.headers['Host']}/{user}/{name}"})
            if path == "/api/validate-yaml":
                return self.say(200, {"errors": [], "warnings": []})
            _, _, _, owner, name, action, _ = path.split("/")  # /api/models/OWNER/NAME/ACTION/REVISION
            if owner != user or not (folder / name).is_dir():
                return self.say(404, {"error": "No such repository."})
            if action == "preupload":
                files = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
                return self.say(200, {"files": modes})
            for line in map(json.loads, body.splitlines()):  # commit
                if line["key"] == "file":
                    file = folder / name / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            return self.say(200, {"commitUrl": f"http://{self.headers['Host']}/{user}/{name}", "commitOid": "0" * 40})

    with serving(Receiver) as endpoint:
        yield endpoint
