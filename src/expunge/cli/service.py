"""`expunge worker` and `expunge serve`: the processes of the deletion service."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from expunge.cli.requests import PolicyFile, opened

LogLevel = Annotated[str, typer.Option("--log", help="debug, info, warning or error.")]


def worker(
    policy: PolicyFile = "service.toml",
    processes: Annotated[
        int,
        typer.Option(
            "--processes", help="Worker processes; any that dies is started again.", min=1
        ),
    ] = 1,
    requests: Annotated[
        int, typer.Option("--requests", help="Requests that a process plans at a time.", min=1)
    ] = 4,
    patience: Annotated[
        int, typer.Option("--patience", help="Seconds to let a deletion end after SIGTERM.", min=0)
    ] = 10,
    log: LogLevel = "info",
) -> None:
    """Carry out requests until it is stopped; may be killed at any time, and run on several machines."""
    with opened(policy):
        pass  # complain before anything is started
    from expunge.service.supervise import Workers, run_worker

    as_json = not sys.stderr.isatty()
    if processes == 1:
        run_worker(policy, requests, log, as_json, patience)
        return
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    workers = Workers(policy, processes, requests=requests, level=log, as_json=as_json, patience=patience)  # fmt: skip
    try:
        while not stop.wait(0.5):
            pass
    finally:
        workers.stop()


def serve(
    policy: PolicyFile = "service.toml",
    host: Annotated[
        str, typer.Option("--host", help="Address; one that others can reach needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port.", min=1, max=65535)] = 8077,
    token_file: Annotated[
        str | None,
        typer.Option("--token-file", help="File with the bearer token; $EXPUNGE_TOKEN otherwise."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option("--workers", help="Worker processes beside the server; 0 for none.", min=0),
    ] = 1,
    log: LogLevel = "info",
) -> None:
    """Serve requests, certificates and predictions over HTTP."""
    with opened(policy) as service:
        import signal

        import uvicorn

        from expunge.core.errors import UserError
        from expunge.service import logs
        from expunge.service.api import create_app
        from expunge.service.auth import check_binding, token_from
        from expunge.service.supervise import Workers

        token = token_from(token_file)
        check_binding(host, token)
        as_json = not sys.stderr.isatty()
        logs.configure(log, as_json=as_json)
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(service, token), host=host, port=port, log_config=None, access_log=False,
                proxy_headers=False, server_header=False, limit_concurrency=1000,
                timeout_graceful_shutdown=5,
            )
        )  # fmt: skip
        crew = Workers(policy, workers, level=log, as_json=as_json) if workers else None
        logs.logger().info(
            "serving", host=host, port=port, workers=workers, token=token is not None
        )
        for number in (signal.SIGTERM, signal.SIGINT):  # the server raises them again at its end
            signal.signal(number, signal.SIG_IGN)
        try:
            server.run()
        except SystemExit as error:  # the address is taken
            raise UserError(f"cannot listen on {host}:{port}; is it in use?") from error
        finally:
            if crew is not None:
                crew.stop()
