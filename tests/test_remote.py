"""What a URL names is fetched once and whole, and a URL's secrets are told to nobody."""

import base64
import http.server
import threading
import time

import pytest
from softpref import remote
from softpref.errors import ConfigError
from softpref.remote import NotReached, fetch, fingerprint, is_url, masked, public_url


class Handler(http.server.SimpleHTTPRequestHandler):
    login = None

    def send_head(self):
        if self.login and self.headers.get("Authorization") != self.login:
            self.send_error(401)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, cache):
    """A web server over `web.folder`; it asks for a login once `web.handler.login` is set."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = type("OfThisTest", (Handler,), {})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=str(folder))
    )
    server.folder, server.handler = folder, handler
    server.host = f"127.0.0.1:{server.server_port}"
    server.url = f"http://{server.host}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host:8443/a/b.jsonl?sig=secret#row", "https://host:8443/a/b.jsonl"),
        ("https://token@host/a.jsonl", "https://host/a.jsonl"),
        ("s3://key:secret@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        ("abfs://container@account.dfs.core.windows.net/a?sv=secret", None),
        ("hf://gpt2@main/config.json", "hf://gpt2@main/config.json"),
        ("s3://bucket/folder/", "s3://bucket/folder/"),
        ("owner/name", "owner/name"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("/data/what?.jsonl", "/data/what?.jsonl"),
    ],
)
def test_a_url_is_shown_without_its_secrets_and_a_path_as_it_is(url, shown):
    assert public_url(url) == (shown or "abfs://container@account.dfs.core.windows.net/a")


def test_urls_are_told_from_paths_hub_ids_and_registered_models():
    assert all(map(is_url, ("s3://b/k", "memory://x", "HTTPS://h/f")))
    assert not any(map(is_url, ("owner/name", "/a//b", "models:/m@champion", "C:/x", "story")))


def test_a_file_in_s3_is_fetched_and_fetched_again_only_when_it_has_changed(bucket, cache):
    bucket.put_object(Bucket="team", Key="deep/rows", Body=b"one")
    before = fingerprint("s3://team/deep/rows")
    path = fetch("s3://team/deep/rows")
    assert (path.name, path.read_bytes()) == ("rows", b"one")
    path.write_bytes(b"kept")  # it shows whether the file is fetched anew
    assert fetch("s3://team/deep/rows").read_bytes() == b"kept"
    assert fingerprint("s3://team/deep/rows") == before
    bucket.put_object(Bucket="team", Key="deep/rows", Body=b"two")
    assert fetch("s3://team/deep/rows").read_bytes() == b"two"
    assert fingerprint("s3://team/deep/rows") not in (before, "")


@pytest.mark.parametrize("url", ["s3://team/folder", "s3://team/folder/", "s3a://team/folder"])
def test_a_folder_in_s3_keeps_its_shape(bucket, url):
    for key in ("folder/", "folder/a.jsonl", "folder/deeper/b.jsonl", "folder.txt"):
        bucket.put_object(Bucket="team", Key=key, Body=key.encode() if "." in key else b"")
    folder = fetch(url)
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert folder.name == "folder"
    assert found == {"a.jsonl": "folder/a.jsonl", "deeper/b.jsonl": "folder/deeper/b.jsonl"}
    before = fingerprint(url)
    bucket.put_object(Bucket="team", Key="folder/c.jsonl", Body=b"c")
    assert fingerprint(url) not in (before, "")


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "a//b"])
def test_a_key_that_would_leave_the_folder_is_refused(bucket, tmp_path, key):
    bucket.put_object(Bucket="team", Key=f"folder/{key}", Body=b"x")
    with pytest.raises(ConfigError, match="is not a usable file name"):
        fetch("s3://team/folder")
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("url", ["s3://team/absent.jsonl", "s3://nobodys-bucket/rows.jsonl"])
def test_an_absent_key_or_bucket_certainly_does_not_exist(bucket, url):
    for look in (fetch, fingerprint):
        with pytest.raises(ConfigError, match=rf"source {url} does not exist") as refusal:
            look(url)
        assert not isinstance(refusal.value, NotReached)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}, "Forbidden"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "Forbidden"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "Unable to locate credentials"),
    ],
)
def test_wrong_and_absent_credentials_are_told_by_the_variables_to_set(
    bucket, monkeypatch, caplog, changes, reason
):
    bucket.put_object(Bucket="team", Key="rows.jsonl", Body=b"{}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for variable, value in changes.items():
        if value:
            monkeypatch.setenv(variable, value)
        else:
            monkeypatch.delenv(variable)
    with pytest.raises(NotReached, match=reason) as refusal:
        fetch("s3://team/rows.jsonl")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"):
        assert variable in str(refusal.value)
    assert "a-wrong-secret" not in str(refusal.value)
    assert fingerprint("s3://team/rows.jsonl") == ""  # it may well exist
    assert "Changes will not be noticed" in caplog.text


def test_a_store_that_does_not_answer_is_told_by_its_address(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(NotReached, match=r"cannot be reached .*127.0.0.1:9.*set AWS_ENDPOINT_URL_S3"):
        fetch("s3://team/rows.jsonl")


def test_the_general_endpoint_variable_serves_as_well(bucket, monkeypatch, s3_server):
    bucket.put_object(Bucket="team", Key="rows.jsonl", Body=b"{}")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server[0])
    assert fetch("s3://team/rows.jsonl").read_bytes() == b"{}"


def test_a_web_file_is_named_by_its_path_and_its_secrets_stay_unsaid(web, cache, caplog):
    (web.folder / "rows.jsonl").write_text("{}\n")
    web.handler.login = "Basic " + base64.b64encode(b"me:password").decode()
    url = f"http://me:password@{web.host}/rows.jsonl?sig=signature"
    path = fetch(url)
    assert (path.name, path.read_text()) == ("rows.jsonl", "{}\n")
    assert fingerprint(url)
    for wrong, message in (
        (f"http://me:other@{web.host}/rows.jsonl?sig=signature", r"cannot be read with the cred.*NETRC"),
        (f"http://me:password@{web.host}/absent.jsonl?sig=signature", "does not exist"),
        ("http://me:password@127.0.0.1:9/rows.jsonl?sig=signature", "cannot be reached"),
    ):
        with pytest.raises(ConfigError, match=message) as refusal:
            fetch(wrong)
        assert refusal.value.__cause__ is None  # a traceback would show what caused it
        assert refusal.value.__suppress_context__
        for secret in ("password", "other", "signature"):
            assert secret not in str(refusal.value)
    assert "signature" not in caplog.text


def test_a_web_page_is_a_folder_only_when_its_url_ends_like_one(web):
    (web.folder / "folder").mkdir()
    for name in ("a b.jsonl", "c.jsonl"):
        (web.folder / "folder" / name).write_text(name)
    folder = fetch(f"{web.url}/folder/")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "a b.jsonl": "a b.jsonl",
        "c.jsonl": "c.jsonl",
    }
    assert fetch(f"{web.url}/folder").is_file()  # the page itself
    (web.folder / "empty").mkdir()
    with pytest.raises(ConfigError, match="no links"):
        fetch(f"{web.url}/empty/")


def test_a_file_that_breaks_off_leaves_nothing(memory, cache, monkeypatch):
    memory.pipe("/rows.jsonl", b"x" * 1000)
    whole = type(memory).get_file

    def cut(self, source, target, **options):
        whole(self, source, target, **options)
        with open(target, "r+b") as file:
            file.truncate(10)

    monkeypatch.setattr(type(memory), "get_file", cut)
    with pytest.raises(ConfigError, match="broke off after 10 of 1,000 bytes"):
        fetch("memory://rows.jsonl")
    assert not [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.undo()


def test_what_is_empty_or_of_no_use_is_refused(memory, cache):
    memory.pipe("/nothing.jsonl", b"")
    with pytest.raises(ConfigError, match=r"memory://nothing.jsonl is empty"):
        fetch("memory://nothing.jsonl")
    memory.pipe("/folder/README.md", b"text")
    with pytest.raises(ConfigError, match=r"holds no file of use, only README\.md"):
        fetch("memory://folder", choose=lambda names: [])


def test_a_file_url_is_read_where_it_is(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text("{}")
    assert fetch(f"file://{tmp_path}/rows.jsonl") == tmp_path / "rows.jsonl"
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/rows", r"s4:// cannot be read"),
        ("s3://", "names no file or folder"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused_without_asking(url, message):
    with pytest.raises(ConfigError, match=message):
        remote.check_url(url, "source")


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")]
)
def test_an_absent_package_is_told_with_the_extra_that_brings_it(monkeypatch, scheme, package, extra):
    def absent(*_, **__):
        raise ImportError(f"Install {package}")

    monkeypatch.setattr("fsspec.url_to_fs", absent)
    with pytest.raises(NotReached, match=rf"{scheme}:// needs {package}: pip install 'softpref\[{extra}\]'"):
        fetch(f"{scheme}://bucket/rows.jsonl")
    assert fingerprint(f"{scheme}://bucket/rows.jsonl") == ""


@pytest.mark.parametrize("scheme", ["gs", "gcs", "abfs", "abfss", "az"])
def test_the_clients_of_other_clouds_are_there_and_take_such_urls(scheme, monkeypatch):
    import fsspec

    # a login that its owner made up: nothing is asked
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"key").decode())
    options = {"token": "anon"} if scheme.startswith("g") else {}
    _, path = fsspec.url_to_fs(f"{scheme}://place/folder/rows.jsonl", **options)
    assert path == "place/folder/rows.jsonl"


def test_a_client_that_searches_for_credentials_too_long_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(remote, "_LOOK", 0.2)
    monkeypatch.setattr(remote, "_listing", lambda url: time.sleep(5))
    began = time.monotonic()
    assert fingerprint("gs://bucket/rows.jsonl") == ""
    assert time.monotonic() - began < 3
    assert "no answer within" in caplog.text
    assert "GOOGLE_APPLICATION_CREDENTIALS" in caplog.text


def test_several_that_ask_at_once_fetch_once(cache):
    calls = []

    def fill(folder):
        calls.append(1)
        time.sleep(0.2)
        (folder / "file").write_text("x")

    threads = [threading.Thread(target=remote.kept, args=("key", fill)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_home_that_cannot_be_written_is_no_hindrance(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = remote.kept("key", lambda folder: (folder / "x").touch())
    assert (folder / "x").exists()
    assert tmp_path not in folder.parents


class Answer:
    def __init__(self, status):
        self.status_code = status
        self.headers, self.request, self.text, self.reason_phrase = {}, None, "", ""


@pytest.mark.parametrize(
    ("error", "certain"),
    [
        ("RepositoryNotFoundError 404", True),
        ("RepositoryNotFoundError 401", False),
        ("RevisionNotFoundError 404", True),
        ("ConnectionError 0", False),
    ],
)
def test_only_what_the_hub_denies_for_certain_is_refused(monkeypatch, caplog, error, certain):
    import huggingface_hub
    from huggingface_hub import errors

    name, status = error.split()

    def refuse(self, repo_id, **options):
        assert options["timeout"] == 10
        kind = getattr(errors, name, ConnectionError)
        failure = kind.__new__(kind)
        failure.args, failure.response = ("no",), Answer(int(status))
        raise failure

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    if certain:
        with pytest.raises(ConfigError, match="owner/name"):
            remote.pin_repository("dataset", "owner/name", "v1", "source")
    else:
        assert remote.pin_repository("dataset", "owner/name", "v1", "source") == ("owner/name", "v1", "")
        assert "does not say its commit" in caplog.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:word@host/a failed", "at http://host/a failed"),
        ("{'source': 'https://host/a?X-Amz-Signature=word&b'}", "{'source': 'https://host/a'}"),
        ('{"a": "{\\"b\\": \\"s3://word@host/c?d=word\\"}"}', '{"a": "{\\"b\\": \\"s3://host/c\\"}"}'),
        ("postgresql://me:word#2@host/db", "postgresql://host/db"),
        ("hf://owner/model@main and abfs://box@account/a", "hf://owner/model@main and abfs://box@account/a"),
        ("http://host/#/experiments/7?workflowType=x", "http://host/#/experiments/7?workflowType=x"),
        ("me@host asks: why?", "me@host asks: why?"),
    ],
)
def test_a_text_shows_no_secret_of_its_urls(text, shown):
    assert masked(text) == shown
