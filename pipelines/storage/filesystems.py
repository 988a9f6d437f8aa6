"""Find the pyarrow file system for a URI, configured only by the environment."""

import base64
import binascii
import os
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from pipelines.storage.retry import CREDENTIALS, first_line, retrying

# Set by `diptych submit` in its job.
IN_A_JOB = "DIPTYCH_JOB"

_KNOWN = "use a path, file://, s3://, gs://, az:// or abfs://"
_AZURE = ("az", "abfs", "abfss")

_CLIENTS = {"s3": "AWS", "gs": "google", **dict.fromkeys(_AZURE, "Azure")}
_PREFIXES = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "AZURE_")

# Clients retry only briefly: `retrying` does the rest, and knows how long to wait.
_S3_ATTEMPTS, _S3_CONNECT_SECONDS, _GCS_RETRY_SECONDS = 2, 5, 1

# Azurite's account, published in its documentation; `UseDevelopmentStorage=true` means this one.
_EMULATOR = (
    "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzF"
    "T50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1"
)


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds `uri`, and the path within it: in object storage, bucket/key as written.

    Sends no request, except to find the region of an Amazon bucket. File systems are cached for the process.
    Raises ValueError for an unknown scheme, for credentials or options in the URI, and if the environment
    names no account.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), absolute(uri)
    scheme, _, place = uri.partition("://")
    if scheme in _CLIENTS:
        return _remote(scheme, place)
    try:
        if scheme == "file":
            return fs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise ValueError(f"cannot open {uri}: {first_line(error)}; {_KNOWN}") from error
    raise ValueError(f"cannot open {uri}: unknown scheme {scheme}://; {_KNOWN}")


def absolute(uri: str) -> str:
    """`uri`; a path is made absolute, because workers have another working directory.

    Raises ValueError for a relative path in a submitted job.
    """
    if os.environ.get(IN_A_JOB):
        check_shared(uri)
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def check_shared(uri: str, called: str | None = None) -> None:
    """Raise ValueError if `uri` is a relative path: other machines do not have that working directory.

    called: the name for `uri` in the message; unset: `uri` itself.
    """
    if "://" not in uri and not Path(uri).expanduser().is_absolute():
        raise ValueError(
            f"{called or uri} is a path in the job's own folder, which ends with the job; give "
            "s3://BUCKET/..., gs:// or az://, or an absolute path that all nodes share"
        )


def check_no_secret(uri: str) -> None:
    """Raise ValueError if a URI of object storage contains credentials or options."""
    scheme, _, place = uri.partition("://")
    if scheme not in _CLIENTS or not place:
        return
    bucket, account = _bucket(scheme, place)
    # A config is stored and shown, so it must not contain a secret; this message must not repeat it either.
    if "@" in bucket + account or ":" in bucket or "?" in place:
        raise ValueError(
            f"the {scheme}:// URI carries credentials or options; leave them out and set "
            f"{CREDENTIALS[_CLIENTS[scheme]]} in the environment"
        )


def _bucket(scheme: str, place: str) -> tuple[str, str]:
    """The bucket and, if it is named, the Azure account in the part of a URI after the scheme."""
    bucket = place.partition("/")[0]
    if scheme not in _AZURE:
        return bucket, ""
    # Azure's own form is abfs://container@account.dfs.core.windows.net/path.
    bucket, _, account = bucket.partition("@")
    return bucket, account


def _remote(scheme: str, place: str) -> tuple[fs.FileSystem, str]:
    check_no_secret(f"{scheme}://{place}")
    (bucket, account), key = _bucket(scheme, place), place.partition("/")[2]
    if not bucket:
        raise ValueError(f"{scheme}://{place} names no bucket; write {scheme}://BUCKET/PATH")
    if scheme == "s3" and _s3_endpoint(os.environ):
        # Servers other than Amazon's often do not support trailing checksums: MinIO then misses the body's
        # length. Without them an upload over http is signed with its SHA-256 and refused if that differs.
        # Downloads always ask for checksums, and diptych's files have their own.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_PREFIXES)))
    path = f"{bucket}/{key}".rstrip("/")
    if scheme == "s3":
        region = _s3_region(bucket, settings)
        return _s3(region, settings, os.getpid()), path
    if scheme == "gs":
        return _gcs(settings, os.getpid()), path
    return _azure(account, settings, os.getpid()), path


# The cache keys below include the process, because clients do not survive a fork, and the settings, because
# tests and notebooks change them. pyarrow's file systems read without Python's lock; fsspec would add three
# packages and their dependencies without a benefit here.
_Settings = tuple[tuple[str, str], ...]


@lru_cache(maxsize=8)
def _s3(region: str, settings: _Settings, process: int) -> fs.FileSystem:
    return fs.S3FileSystem(
        region=region,
        endpoint_override=_s3_endpoint(dict(settings)),  # pyarrow's constructor reads no AWS_ENDPOINT_URL.
        connect_timeout=_S3_CONNECT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        allow_delayed_open=True,  # Writes a small object in one request, with no upload to abort on failure.
    )


def _s3_endpoint(environment: Mapping[str, str]) -> str | None:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")


@lru_cache(maxsize=64)
def _s3_region(bucket: str, settings: _Settings) -> str:
    environment = dict(settings)
    named = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if named or _s3_endpoint(environment):
        return named or "us-east-1"
    return retrying(lambda: fs.resolve_s3_region(bucket), f"finding the region of s3://{bucket}")


@lru_cache(maxsize=8)
def _gcs(settings: _Settings, process: int) -> fs.FileSystem:
    limit = timedelta(seconds=_GCS_RETRY_SECONDS)
    emulator = dict(settings).get("STORAGE_EMULATOR_HOST")
    if not emulator:
        return fs.GcsFileSystem(retry_time_limit=limit)
    # Google's own clients read this variable; pyarrow does not.
    scheme, host = urlsplit(emulator if "://" in emulator else f"http://{emulator}")[:2]
    return fs.GcsFileSystem(anonymous=True, scheme=scheme, endpoint_override=host, retry_time_limit=limit)


@lru_cache(maxsize=8)
def _azure(host: str, settings: _Settings, process: int) -> fs.FileSystem:
    environment = dict(settings)
    connection = environment.get("AZURE_STORAGE_CONNECTION_STRING")
    options = (
        _connection_options(connection)
        if connection
        else {
            "account_name": environment.get("AZURE_STORAGE_ACCOUNT"),
            "account_key": environment.get("AZURE_STORAGE_KEY"),
        }
    )
    if host:
        account, _, suffix = host.partition(".")
        if options["account_name"] not in (None, account):
            raise ValueError(
                f"the URI names the Azure account {account}, the environment {options['account_name']}; "
                "leave one of them out"
            )
        suffix = suffix.removeprefix("dfs.").removeprefix("blob.")
        options |= {"account_name": account} | (_authorities(suffix) if suffix and not connection else {})
    if not options["account_name"]:
        raise ValueError(
            "no Azure account is named; set AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING"
        )
    _check_key(options["account_key"])
    return fs.AzureFileSystem(**options)


def _connection_options(connection: str) -> dict[str, Any]:
    """A connection string's account, key and server, as AzureFileSystem's arguments."""
    fields = dict(part.split("=", 1) for part in connection.split(";") if "=" in part)
    if fields.get("UseDevelopmentStorage") == "true":
        return _connection_options(_EMULATOR)
    if "SharedAccessSignature" in fields:
        # pyarrow's messages show the whole signature, which would then be in logs.
        raise ValueError(
            "AZURE_STORAGE_CONNECTION_STRING holds a shared access signature; give an AccountKey"
        )
    account, endpoint = fields.get("AccountName"), fields.get("BlobEndpoint")
    options = {"account_name": account, "account_key": fields.get("AccountKey")}
    if not endpoint:
        return options | _authorities(fields.get("EndpointSuffix", "core.windows.net"))
    scheme, host = urlsplit(endpoint)[:2]
    # pyarrow prepends the account to an authority that starts with a dot, and otherwise adds it to the path.
    host = host.removeprefix(account or "") if host.startswith(f"{account}.") else host
    return options | {
        "blob_storage_authority": host,
        "dfs_storage_authority": host.replace(".blob.", ".dfs.", 1),
        "blob_storage_scheme": scheme,
        "dfs_storage_scheme": scheme,
    }


def _authorities(suffix: str) -> dict[str, str]:
    return {"blob_storage_authority": f".blob.{suffix}", "dfs_storage_authority": f".dfs.{suffix}"}


def _check_key(key: str | None) -> None:
    try:
        base64.b64decode(key or "", validate=True)
    except binascii.Error:
        raise ValueError("the Azure account's key is not base64; check AZURE_STORAGE_KEY") from None
