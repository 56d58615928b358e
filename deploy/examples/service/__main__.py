"""Serves the model that a build left in a folder, until it is told to end.

    python deploy/examples/service out/quickstart --port 8000

It listens on this machine alone unless --host says otherwise, and knows neither users nor encryption: what does stands
in front of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import uvicorn

from app import Service
from inputs import Limits
from vitprune.errors import VitpruneError
from vitprune_deploy.runtime import load

END_S = 30  # for the requests that are in the service when it is told to end


def main() -> None:
    """Parse the arguments, load the model, serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of a build")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on  [%(default)s]")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free  [%(default)s]")
    parser.add_argument("--name", help="of the model in the service's paths  [that of the folder]")
    parser.add_argument("--runtime", help="which engine of the folder  [the one that was validated]")
    parser.add_argument("--threads", type=int, help="of the processor, for one batch  [all]")
    parser.add_argument("--places", type=int, default=Limits.places, help="requests at once  [%(default)s]")
    parser.add_argument("--images", type=int, default=Limits.images, help="in a request  [%(default)s]")
    parser.add_argument("--body-mb", type=int, default=Limits.body_bytes >> 20, help="of a request  [%(default)s]")
    given = parser.parse_args()
    try:
        model = load(given.folder, runtime=given.runtime, threads=given.threads)
    except VitpruneError as error:
        sys.exit(f"error: {error}")
    limits = Limits(images=given.images, body_bytes=given.body_mb << 20, places=given.places)
    service = Service(model, given.name or given.folder.resolve().name, limits)
    uvicorn.run(service.app(), host=given.host, port=given.port, access_log=False, timeout_graceful_shutdown=END_S)


if __name__ == "__main__":
    main()
