"""Submit, follow, list and stop diptych commands as jobs of a Ray cluster."""

import asyncio
import logging
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import installed, local_cluster
from cluster.ray_folder import wants_token
from cluster.staging import Staged, read_probe

# Name of the jobs by which `submit` finds out what the cluster has.
_PROBE = "diptych-probe"

_CONNECT_SECONDS, _ANSWER_SECONDS, _POLL_SECONDS, _LOST_SECONDS = 10.0, 60.0, 0.5, 60.0

# Exit codes as in a shell: ended by SIGTERM, which `jobs stop` sends; and by SIGPIPE.
_STOPPED, _PIPE_CLOSED = 143, 141


class Jobs:
    """The jobs of a Ray cluster."""

    def __init__(self, address: str | None = None) -> None:
        """`address` is the dashboard's URL or as for ray.init; unset: RAY_ADDRESS, or the cluster of `up`.

        Raises ValueError if there is none, it does not answer, or it requires a token that is not given.
        """
        there = _address(address)
        self.address = re.sub(r"//[^@/]*@", "//", there)
        from ray.job_submission import JobSubmissionClient

        # They would log each upload and connection.
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)
        # Else the variables would take precedence over `address`.
        os.environ["RAY_API_SERVER_ADDRESS"] = there
        with _plain_errors(self.address):
            _connect(there)
            self._client = JobSubmissionClient(there)
        limit_answers(self._client, _ANSWER_SECONDS)

    def probe(self, needed: list[str]) -> dict[str, Any]:
        """Run `installed` on the cluster as a job, which takes seconds; returns what it found."""
        source = Path(installed.__file__).name
        entrypoint = shlex.join(["python", source, *needed])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / source).write_bytes(Path(installed.__file__).read_bytes())
            identity = self._submit(entrypoint, {"working_dir": folder}, _PROBE)
        print(f"asking {self.address} what it has ...", file=sys.stderr)
        ended = self._wait(identity)
        with _plain_errors(self.address):
            log = self._client.get_job_logs(identity)
            self._client.delete_job(identity)
        return read_probe(log or ended.message or "")

    def submit(self, job: Staged) -> str:
        """Submit the job; returns its ID."""
        with tempfile.TemporaryDirectory() as folder:
            job.write(Path(folder))
            name = "-".join(word for word in job.command[:2] if word.isalpha())
            return self._submit(job.entrypoint, job.environment(Path(folder)), name)

    def follow(self, identity: str) -> int:
        """Print the job's log as it grows, until the job ends; returns its exit code.

        A lost connection is retried for a minute; the job continues meanwhile.
        """
        self.info(identity)
        log, answered = _Log(self._client, identity), time.monotonic()
        while True:
            with suppress(Exception):  # The next request shows whether the cluster is there.
                asyncio.run(log.stream())
            try:
                info = self.info(identity)
                answered = time.monotonic()
                with _plain_errors(self.address):
                    log.print_rest()
                if info.status.is_terminal():
                    return self._exit_code(info)
            except ValueError as error:
                if time.monotonic() - max(answered, log.grown) > _LOST_SECONDS:
                    see = f"see diptych jobs logs --follow {identity}"
                    sys.exit(f"diptych: {error}; the job may still run: {see}")
            time.sleep(_POLL_SECONDS)

    def log(self, identity: str) -> str:
        """The job's output so far."""
        self.info(identity)
        with _plain_errors(self.address):
            return self._client.get_job_logs(identity)

    def stop(self, identity: str) -> str:
        """Have the job save and end, and wait for it; returns its final status."""
        self.info(identity)
        with _plain_errors(self.address):
            self._client.stop_job(identity)
        return str(self._wait(identity).status)

    def info(self, identity: str) -> Any:
        """Ray's details of a job. Raises ValueError if there is no job of that ID."""
        if not identity:
            raise ValueError("the job's ID is empty; diptych jobs list shows the IDs")
        with _plain_errors(
            self.address, f"no job {identity!r} at {self.address}; diptych jobs list shows the IDs"
        ):
            return self._client.get_job_info(identity)

    def all(self) -> list[Any]:
        """Ray's details of the submitted jobs, newest first."""
        with _plain_errors(self.address):
            jobs = [job for job in self._client.list_jobs() if job.submission_id]
        submitted = [job for job in jobs if not str(job.submission_id).startswith(_PROBE)]
        return sorted(submitted, key=lambda job: job.start_time or 0, reverse=True)

    def _submit(self, command: str, environment: dict[str, Any], name: str) -> str:
        identity = f"{name}-{secrets.token_hex(4)}"
        with _plain_errors(self.address):
            return self._client.submit_job(
                entrypoint=command, submission_id=identity, runtime_env=environment
            )

    def _wait(self, identity: str) -> Any:
        while not (info := self.info(identity)).status.is_terminal():
            time.sleep(_POLL_SECONDS)
        return info

    def _exit_code(self, info: Any) -> int:
        """The command's own, or 128 + N if signal N ended it, as in a shell; 1 if there is none."""
        if str(info.status) == "STOPPED":
            return _STOPPED
        code = info.driver_exit_code
        if code is None and str(info.status) == "FAILED":
            happened = "was lost" if info.driver_node_id else "did not start"
            print(f"diptych: the job {happened}: {info.message}", file=sys.stderr)
            return 1
        return 128 - code if code and code < 0 else code or 0


class _Log:
    """A job's log; each character is printed once, however often the log is read.

    `grown` is the time of its last growth, by time.monotonic.
    """

    def __init__(self, client: Any, identity: str) -> None:
        self._client, self._identity, self._printed = client, identity, 0
        self.grown = 0.0

    async def stream(self) -> None:
        """Print new output until the job ends, the connection is lost, or nothing comes for a minute."""
        seen, stream = 0, self._client.tail_job_logs(self._identity)
        while (text := await asyncio.wait_for(anext(stream, None), _ANSWER_SECONDS)) is not None:
            self._print(text, seen)
            seen += len(text)

    def print_rest(self) -> None:
        """Print what was not printed yet."""
        self._print(self._client.get_job_logs(self._identity), 0)

    def _print(self, text: str, start: int) -> None:
        """Print the new part of `text`, which is the log from character `start`."""
        if new := text[max(0, self._printed - start) :]:
            try:
                print(new, end="", flush=True)
            except BrokenPipeError:  # The reader has left, as `| head` does.
                sys.exit(_PIPE_CLOSED)
            self._printed, self.grown = start + len(text), time.monotonic()


def _address(given: str | None) -> str:
    named = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    running = local_cluster.find()
    if running and named in (None, "", "auto", running.address, running.dashboard):
        os.environ.update(running.environment)
        return running.dashboard
    if not named:
        raise ValueError(
            "no cluster to submit to: give --address http://HOST:8265, set RAY_ADDRESS, or start one here "
            "with diptych cluster up"
        )
    return named


def _connect(address: str) -> None:
    """Raise ConnectionError if nothing listens; Ray's client would wait for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if port and not local_cluster.answers(f"{parts.hostname}:{port}", _CONNECT_SECONDS):
        raise ConnectionError


def limit_answers(client: Any, seconds: float) -> None:
    """Make requests fail after `seconds`. If Ray no longer has this private function, they wait."""
    with suppress(AttributeError):
        client._do_request = partial(client._do_request, timeout=seconds)


@contextmanager
def _plain_errors(address: str, missing: str = "") -> Iterator[None]:
    """Turn any failure of the cluster into a ValueError of one line; a 404 into one that says `missing`."""
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        raise ValueError(wants_token(address)) from error
    except (ConnectionError, OSError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address}; give its dashboard as --address http://HOST:8265"
        ) from error
    except (RuntimeError, RayError, KeyError) as error:
        if missing and "status code 404" in str(error):
            raise ValueError(missing) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"asking {address} failed: {first}; is it a Ray cluster's dashboard?") from error
