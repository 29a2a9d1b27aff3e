"""Google Cloud Storage on loopback: gcp-storage-emulator with two features added that TensorStore needs.

Objects appear whole, cannot be appended to or renamed, and a write may depend on an object's generation, as in the real
service.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET = "bucket"


def _generation(storage, bucket, name) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _download(request, response, storage, *args, **kwargs):
    objects_download(request, response, storage, *args, **kwargs)
    response["x-goog-generation"] = _generation(storage, request.params["bucket_name"], request.params["object_id"])


def _insert(request, response, storage, *args, **kwargs):
    wanted, name = request.query.get("ifGenerationMatch"), request.query.get("name")
    if wanted and name and wanted[0] != _generation(storage, request.params["bucket_name"], name[0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    objects_insert(request, response, storage, *args, **kwargs)


objects_download, objects_insert = objects.download, objects.insert


@contextlib.contextmanager
def object_store(refuses: Callable[[str], bool] = lambda name: False) -> Iterator[dict[str, str]]:
    """Run the store in a thread; yield the environment variables that direct a program's gs:// paths to it.

    Args:
        refuses: whether a read or write of the named object is answered with 503 at this moment.
    """

    def with_refusals(handler):
        def handle(request, response, storage, *args, **kwargs):
            names = [*request.query.get("name", ()), request.params.get("object_id")]
            if any(name and refuses(name) for name in names):
                response.status = HTTPStatus.SERVICE_UNAVAILABLE
                return
            handler(request, response, storage, *args, **kwargs)

        return handle

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    new = {objects_download: with_refusals(_download), objects_insert: with_refusals(_insert)}
    objects.download = new[objects_download]  # objects.get calls it by name
    handlers = [
        (path, {method: new.get(handler, handler) for method, handler in methods.items()})
        for path, methods in server.HANDLERS
    ]
    before, server.HANDLERS = server.HANDLERS, handlers
    url = f"http://127.0.0.1:{port}"
    try:
        with server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET):
            yield {
                "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GOOGLE_CLOUD_PROJECT": "none",
                # Otherwise gcsfs asks Google, with credentials, for the kind of bucket.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "NO_GCE_CHECK": "true",
            }
    finally:
        server.HANDLERS, objects.download = before, objects_download
