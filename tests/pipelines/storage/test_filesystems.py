"""A URI gives pyarrow's own file system, configured only by the environment."""

import base64
from pathlib import Path

import pytest
from pyarrow import fs

from pipelines.storage.filesystems import resolve

KEY = base64.b64encode(b"an account's key").decode()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no object storage."""
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "STORAGE_EMULATOR_HOST",
        "AZURE_STORAGE_ACCOUNT",
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_path_is_on_this_machine(tmp_path: Path):
    for uri in (str(tmp_path), f"file://{tmp_path}"):
        filesystem, path = resolve(uri)
        assert isinstance(filesystem, fs.LocalFileSystem)
        assert path == str(tmp_path)


@pytest.mark.parametrize("uri", ["ftp://host/file", "nonsense://host/file"])
def test_an_unknown_scheme_is_refused_with_those_that_work(uri: str):
    with pytest.raises(ValueError, match=rf"cannot open {uri}: .*; use a path, file://, s3://, gs://, az://"):
        resolve(uri)


@pytest.mark.parametrize("uri", ["s3://", "gs:///key", "az://@account"])
def test_a_uri_without_a_bucket_is_refused(uri: str, environment: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="names no bucket"):
        resolve(uri)


@pytest.mark.parametrize(
    ("uri", "variables"),
    [
        ("s3://me:hunter2@bucket/key", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3://hunter2@bucket/key", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket/key?access_key=me&secret_key=hunter2", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs://bucket/key?access_token=hunter2", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://container/key?sig=hunter2", "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY"),
        ("abfs://container:hunter2@account.dfs.core.windows.net", "AZURE_STORAGE_ACCOUNT and"),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, variables: str):
    with pytest.raises(ValueError, match=f"carries credentials or options; .* set {variables}") as error:
        resolve(uri)
    assert "hunter2" not in str(error.value)


def test_keys_are_taken_as_they_are_written(environment: pytest.MonkeyPatch):
    environment.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert resolve("s3://bucket/a b%20#c/")[1] == "bucket/a b%20#c"
    assert resolve("s3://bucket")[1] == "bucket"


def test_s3_is_at_the_endpoint_and_region_of_the_environment(environment: pytest.MonkeyPatch):
    environment.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    filesystem, _ = resolve("s3://bucket/key")
    assert isinstance(filesystem, fs.S3FileSystem)
    assert filesystem.region == "eu-west-1"
    environment.setenv("AWS_REGION", "eu-north-1")
    assert resolve("s3://bucket/key")[0].region == "eu-north-1"  # pyright: ignore[reportAttributeAccessIssue]


def test_one_file_system_serves_a_process_until_the_environment_changes(environment: pytest.MonkeyPatch):
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # Nobody is there: nothing is asked.
    first, _ = resolve("s3://bucket/key")
    assert resolve("s3://other/key")[0] is first
    environment.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert resolve("s3://bucket/key")[0] is not first


def test_gcs_is_google_or_the_emulator_of_the_environment(environment: pytest.MonkeyPatch):
    google, path = resolve("gs://bucket/key")
    assert isinstance(google, fs.GcsFileSystem)
    assert path == "bucket/key"
    for host in ("http://127.0.0.1:1", "127.0.0.1:1"):
        environment.setenv("STORAGE_EMULATOR_HOST", host)
        emulator, _ = resolve("gs://bucket/key")
        assert isinstance(emulator, fs.GcsFileSystem)
        assert emulator != google


@pytest.mark.parametrize(
    ("uri", "variables", "expected"),
    [
        (
            "az://container/key",
            {"AZURE_STORAGE_ACCOUNT": "account", "AZURE_STORAGE_KEY": KEY},
            {"account_key": KEY},
        ),
        ("az://container/key", {"AZURE_STORAGE_ACCOUNT": "account"}, {}),
        ("abfs://container@account.dfs.core.windows.net/key", {}, {}),
        (
            "abfss://container@account.dfs.core.windows.net/key",
            {"AZURE_STORAGE_KEY": KEY},
            {"account_key": KEY},
        ),
        (
            "abfs://container@account.blob.core.chinacloudapi.cn/key",
            {},
            {
                "blob_storage_authority": ".blob.core.chinacloudapi.cn",
                "dfs_storage_authority": ".dfs.core.chinacloudapi.cn",
            },
        ),
        (
            "az://container/key",
            {
                "AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=https;AccountName=account;"
                f"AccountKey={KEY};EndpointSuffix=core.windows.net"
            },
            {"account_key": KEY},
        ),
        (
            "az://container/key",
            {
                "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=account;AccountKey={KEY};"
                "BlobEndpoint=https://account.blob.core.windows.net/"
            },
            {"account_key": KEY},
        ),
        (
            "az://container/key",
            {
                "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=account;AccountKey={KEY};"
                "BlobEndpoint=http://127.0.0.1:1/account"
            },
            {
                "account_key": KEY,
                "blob_storage_authority": "127.0.0.1:1",
                "dfs_storage_authority": "127.0.0.1:1",
                "blob_storage_scheme": "http",
                "dfs_storage_scheme": "http",
            },
        ),
    ],
)
def test_azure_is_the_account_that_the_uri_or_the_environment_names(
    uri: str, variables: dict[str, str], expected: dict[str, str], environment: pytest.MonkeyPatch
):
    for name, value in variables.items():
        environment.setenv(name, value)
    filesystem, path = resolve(uri)
    assert path == "container/key"
    assert filesystem == fs.AzureFileSystem("account", **expected)


@pytest.mark.parametrize(
    ("uri", "variables", "message"),
    [
        ("az://container/key", {}, "set AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING"),
        (
            "abfs://container@one.dfs.core.windows.net/key",
            {"AZURE_STORAGE_ACCOUNT": "two"},
            "the URI names the Azure account one, the environment two",
        ),
        (
            "az://container/key",
            {"AZURE_STORAGE_ACCOUNT": "account", "AZURE_STORAGE_KEY": "hunter2!"},
            "not base64; check AZURE_STORAGE_KEY",
        ),
        (
            "az://container/key",
            {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=account;SharedAccessSignature=sig=hunter2"},
            "give an AccountKey",
        ),
    ],
)
def test_an_account_that_cannot_be_used_is_refused_and_its_key_not_repeated(
    uri: str, variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        resolve(uri)
    assert "hunter2" not in str(error.value)
