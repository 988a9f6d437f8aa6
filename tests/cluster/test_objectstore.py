"""The local S3 server."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster.objectstore import s3_server
from pipelines import storage


def test_environment_is_as_before_once_the_server_has_stopped(tmp_path: Path) -> None:
    before = dict(os.environ)
    with s3_server(tmp_path, bucket="first-bucket") as server:
        storage.write("s3://first-bucket/a/b", b"content")
        assert storage.read("s3://first-bucket/a/b") == b"content"
        endpoint = server.variables["AWS_ENDPOINT_URL"]
        assert os.environ["AWS_ENDPOINT_URL"] == endpoint != before.get("AWS_ENDPOINT_URL")
    assert dict(os.environ) == before


def test_server_that_comes_back_has_its_objects_and_its_address(tmp_path: Path) -> None:
    with s3_server(tmp_path, bucket="lasting-bucket") as server:
        storage.write("s3://lasting-bucket/before", b"kept")
        address = dict(server.variables)
        server.stop()
        place = urlsplit(address["AWS_ENDPOINT_URL"])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((place.hostname, place.port)).close()
        server.start()
        assert server.variables == address
        assert storage.read("s3://lasting-bucket/before") == b"kept"


def test_objects_are_listed_replaced_and_deleted(bucket: str) -> None:
    storage.write(f"{bucket}/box/one", b"1")
    storage.write(f"{bucket}/box/two", b"2")
    storage.write(f"{bucket}/box/one", b"new")
    assert storage.names(f"{bucket}/box") == ["one", "two"]
    storage.remove(f"{bucket}/box/two")
    assert storage.names(f"{bucket}/box") == ["one"]
    assert storage.read(f"{bucket}/box/one") == b"new"
    assert storage.read(f"{bucket}/box/two") is None
