"""Writes images as folders in the OCI image layout, for tests."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
COMPRESSIONS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": lambda data: subprocess.run(["zstd", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout,
}


@dataclass(frozen=True)
class Link:
    """A symbolic link, or another name of a file of the same archive."""

    to: str
    is_hard: bool = False


Files = dict[str, bytes | Link | None]  # None: a folder


def archive_of(files: Files) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, Link):
                member.type, member.linkname = tarfile.LNKTYPE if content.is_hard else tarfile.SYMTYPE, content.to
            else:
                member.size, member.mode = len(content), 0o755 if content.startswith(b"\x7fELF") else 0o644
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return packed.getvalue()


class Layout:
    """Writes the OCI image layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs" / "sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self.manifests: list[dict[str, object]] = []

    def blob(self, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / "sha256" / digest).write_bytes(content)
        return {"mediaType": "application/x", "digest": f"sha256:{digest}", "size": len(content)}

    def document(self, content: object) -> dict[str, object]:
        return self.blob(json.dumps(content).encode())

    def add(
        self,
        *layers: Files,
        tag: str = "latest",
        architecture: str | None = None,
        runtime: dict[str, object] | None = None,
        compress: str = "gzip",
    ) -> None:
        contents = [archive_of(layer) for layer in layers]
        runtime = runtime or {"Env": ["PATH=/opt/bin:/bin", "WITH=a=b"], "WorkingDir": "/srv", "Cmd": ["sh"]}
        rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in contents]}
        config = self.document(
            {"architecture": architecture or "any", "os": "linux", "config": runtime, "rootfs": rootfs}
        )
        config["mediaType"] = "application/vnd.oci.image.config.v1+json"
        blobs = [self.blob(COMPRESSIONS[compress](one)) for one in contents]
        for blob in blobs:
            blob["mediaType"] = f"application/vnd.oci.image.layer.v1.tar+{compress}"
        manifest = self.document({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": blobs})
        manifest["mediaType"] = MANIFEST
        manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
        if architecture is not None:
            manifest["platform"] = {"architecture": architecture, "os": "linux"}
        self.manifests.append(manifest)
        self.save()

    def save(self) -> None:
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.manifests}))
