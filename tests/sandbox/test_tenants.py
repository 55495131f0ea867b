"""The file of tenants: what it may say, and that no secret of it is ever told."""

import pytest

from hone.sandbox.gateway.tenants import Scope, digest_of, read_tenants

TOKEN = "a token that is long enough"
FILE = f"""
[tenants.research]
max_sandboxes = 2000
creates_per_second = 200

[[tenants.research.tokens]]
sha256 = "{digest_of(TOKEN).hex()}"

[[tenants.research.tokens]]
environment = "HONE_TEST_TOKEN"
scopes = ["observe"]

[tenants.operations]
tokens = [{{ file = "FILE", scopes = ["admin"] }}]
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("HONE_TEST_TOKEN", "another token, as long")
    (tmp_path / "token").write_text("the token of a file\n")
    path = tmp_path / "tenants.toml"
    path.write_text(FILE.replace("FILE", str(tmp_path / "token")))
    return path


def test_tokens_open_what_they_are_for(path):
    tenants = read_tenants(path)
    research, reader, operations = (
        tenants.grant(token) for token in (TOKEN, "another token, as long", "the token of a file")
    )
    assert research.owner == reader.owner == "research"
    assert research.allows(Scope.CREATE)
    assert not research.allows(Scope.ADMIN)
    assert not reader.allows(Scope.CREATE)
    assert operations.allows(Scope.USE)
    assert tenants.grant("") is None
    assert tenants.grant(TOKEN + " ") is None
    assert tenants.quota("research").max_sandboxes == 2000
    assert tenants.quota("operations").max_sandboxes == float("inf")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "tenants: Field required"),
        ("[tenants.a]\n", "tenants.a.tokens: Field required"),
        ("[tenants.a]\ntokens = []\n", "at least 1 item"),
        ("[tenants.a]\ntokens = [{}]\n", "one of sha256, environment, file"),
        ('[tenants.a]\ntokens = [{ sha256 = "secret-in-plain" }]\n', "tenants.a.tokens.0.sha256"),
        ('[tenants.a]\ntokens = [{ environment = "HONE_NO_SUCH" }]\n', "token 1 of a: .HONE_NO_SUCH has no token"),
        ('[tenants.a]\ntokens = [{ file = "/no/such" }]\n', "token 1 of a: .*No such file"),
        ('[tenants.a]\nmax_sandbox = 1\ntokens = [{ environment = "HONE_TEST_TOKEN" }]\n', "max_sandbox: Extra"),
        ('[tenants.a]\ntokens = [{ environment = "HONE_TEST_TOKEN", scopes = ["root"] }]\n', "scopes"),
        ('[tenants.a]\ntokens = [{ environment = "HONE_TEST_TOKEN" }, { environment = "HONE_TEST_TOKEN" }]', "twice"),
        ('[tenants.a]\nmax_sandboxes = 0\ntokens = [{ environment = "HONE_TEST_TOKEN" }]\n', "greater than 0"),
        ("[tenants.a\n", "tenants.toml"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_without_its_secrets(path, text, told):
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        read_tenants(path)
    assert "secret-in-plain" not in str(error.value)
    assert "another token" not in str(error.value)
