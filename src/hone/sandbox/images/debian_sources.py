"""Where the packages of a Debian or Ubuntu image come from: its sources as apt reads them, of which we keep what is safe."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hone.sandbox.errors import ImageError
from hone.sandbox.files.stacked import Stacked

SOURCES = "/etc/apt/sources.list"
FOLDER = "/etc/apt/sources.list.d"
ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<rest>.*)")


@dataclass(frozen=True, slots=True)
class Source:
    """A repository. signed_by: an absolute path in the image, a key itself, a fingerprint, or nothing."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""

    def stanza(self, signed_by: str) -> str:
        """As apt reads it, with the key where we have put it."""
        lines = ["Types: deb", f"URIs: {' '.join(self.uris)}", f"Suites: {' '.join(self.suites)}"]
        if self.components:
            lines.append(f"Components: {' '.join(self.components)}")
        if signed_by:
            lines.append(f"Signed-By: {signed_by}")
        return "\n".join(lines) + "\n"


def sources_of(base: Stacked) -> list[Source]:
    """All sources of an image. Raises `ImageError` for one that cannot be checked, or is not behind HTTP."""
    found = []
    for path in (SOURCES, *(f"{FOLDER}/{name}" for name in base.names(FOLDER))):
        text = (base.read(path) or b"").decode(errors="replace")
        if path.endswith(".list"):
            found += list(_of_lines(text, path))
        elif path.endswith(".sources"):
            found += list(_of_stanzas(text, path))
    return found


def _of_lines(text: str, path: str) -> Iterator[Source]:
    for line in text.splitlines():
        match = ONE_LINE.match(line.partition("#")[0].strip())
        if match is None or len(match["rest"].split()) < 2:
            continue
        options = dict(option.partition("=")[::2] for option in (match["options"] or "").split())
        uri, suite, *components = match["rest"].split()
        _check(path, [uri], options.get("trusted", "no"))
        yield Source((uri,), (suite,), tuple(components), options.get("signed-by", ""))


def _of_stanzas(text: str, path: str) -> Iterator[Source]:
    for stanza in re.split(r"\n\s*\n", text):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes") == "no":
            continue
        uris = fields.get("uris", "").split()
        _check(path, uris, fields.get("trusted", "no"))
        yield Source(
            tuple(uris),
            tuple(fields.get("suites", "").split()),
            tuple(fields.get("components", "").split()),
            fields.get("signed-by", ""),
        )


def _fields(stanza: str) -> dict[str, str]:
    """Fields by name in small letters; lines that go on keep their indentation."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[name] = fields.get(name, "") + "\n" + line
        else:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def _check(path: str, uris: list[str], trusted: str) -> None:
    for uri in uris:
        if not uri.startswith(("http://", "https://")):
            raise ImageError(f"{path} of the base names {uri!r}; only sources behind http and https are used")
    if trusted.lower() in ("yes", "true", "1"):
        raise ImageError(f"{path} of the base trusts a source whatever it sends; only signed ones are used")
