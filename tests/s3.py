"""An S3 server for tests: the one that AWS_ENDPOINT_URL names, or one of this process.

Fixtures: `s3_url`, a fresh and empty `s3://bucket/prefix`, with what reaches it in AWS_* of the environment; `s3_is_real`;
`proxy`, one before the server that fails on command.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.storage.proxy import Proxy

BUCKET = "modelstore-tests"


@pytest.fixture(scope="session")
def s3_is_real() -> bool:
    """Whether the server is a real one: the stand-in does not promise that a conditional write is atomic."""
    return "AWS_ENDPOINT_URL" in os.environ


@pytest.fixture(scope="session")
def s3_server(s3_is_real: bool) -> Iterator[str]:
    """The endpoint of the server, with our bucket in it."""
    boto3 = pytest.importorskip("boto3")
    if s3_is_real:
        endpoint, server = os.environ["AWS_ENDPOINT_URL"], None
        settings: dict[str, str] = {}
    else:
        moto = pytest.importorskip("moto.server")
        server = moto.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        settings = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", endpoint_url=endpoint)
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        yield endpoint
    if server is not None:
        server.stop()


@pytest.fixture
def s3_url(s3_server: str) -> Iterator[str]:
    """An empty place of its own for each test, emptied again afterwards."""
    boto3 = pytest.importorskip("boto3")
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield f"s3://{BUCKET}/{prefix}"
    bucket = boto3.resource("s3", endpoint_url=s3_server).Bucket(BUCKET)
    bucket.objects.filter(Prefix=f"{prefix}/").delete()


@pytest.fixture
def proxy(s3_server: str) -> Iterator[Proxy]:
    """A proxy before the server, that drops, stalls or cuts requests on command."""
    proxy = Proxy(s3_server)
    yield proxy
    proxy.close()
