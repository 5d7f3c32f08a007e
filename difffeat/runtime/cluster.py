"""`--executor ray`: shards of one store computed by several engines, on the GPUs of one machine or on many machines.

The driver holds the store's lock, hands out shards, and alone writes manifest, samples and quarantine. A worker is a Ray actor with an engine of its
own; it writes the shard that it was handed, then the shard's receipt, on a file system that all share. Receipts on disk are the only truth: what a
worker says is checked against them, and a worker that dies costs the shard it was at, which is handed out again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from difffeat.engines import Artifact
from difffeat.errors import ClusterError, ConfigError, require
from difffeat.recipe import RunRecipe
from difffeat.runtime.batch_size import LARGEST
from difffeat.runtime.configuration import Configuration
from difffeat.runtime.extract import MAX_BAD_FRACTION, check_source, cpu_cores, decode_workers, resumable, stored_batch_size
from difffeat.runtime.feeding import Opening, feeding_options
from difffeat.runtime.feeds import open_captions
from difffeat.runtime.files import Files
from difffeat.runtime.job import Event, Piece
from difffeat.runtime.latents import LatentCache
from difffeat.runtime.ledger import Ledger
from difffeat.runtime.manifest import Receipt
from difffeat.runtime.matching import Mode
from difffeat.runtime.origin import Origin
from difffeat.runtime.progress import Clock, Progress, Summary
from difffeat.runtime.samples import Source
from difffeat.runtime.summary import write_summary
from difffeat.runtime.table import sample_columns
from difffeat.runtime.tokens import require_known
from difffeat.runtime.worker import Answer, Order, Worker, raised
from difffeat.runtime.writer import StoreWriter

Say = Callable[[str], None]

ATTEMPTS = 3
"""Workers that a shard is handed to, one after the other, before it is given up."""
JOIN_SECONDS = 30.0
"""How long a stop waits for killed workers to end."""
COME_UP_SECONDS = 600.0
"""How long a run without workers waits for a new one."""
OBJECT_STORE = 128 << 20
"""Bytes of Ray's shared memory on this machine: orders are small, features never go through it."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How to spread a run.

    **Fields:** `workers` engines (None: one for each GPU, or for each machine where the engine is a CPU's); `address` of a Ray cluster that is there
    (None: this machine alone); `attempts` for each shard.
    """

    workers: int | None = None
    address: str | None = None
    attempts: int = ATTEMPTS

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers must be at least 1, got {self.workers}")


def extract_on_ray(
    opening: Opening,
    source: Source,
    out: str | Path,
    cluster: Cluster,
    *,
    run: RunRecipe | None = None,
    batch_size: int | None = 32,
    largest_batch: int = LARGEST,
    shard_size: int = 1024,
    num_workers: int | None = None,
    length_multiple: int = 8,
    overwrite: bool = False,
    mode: Mode = Mode.RESUME,
    rebatch: bool = False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    allow_unknown: bool = False,
    progress: Callable[[Progress], None] | None = None,
    say: Say = lambda _: None,
    origin: Origin | None = None,
    files: Files | None = None,
) -> Summary:
    """`extract` with several engines; the store has the same bytes. Arguments and errors as there, and

    Raises MissingExtra, ClusterError (no such cluster, too small, a worker differs from the others, or a shard cost too many workers).
    """
    run, out = run or RunRecipe(), Path(out).resolve()
    cached = None if opening.latent_cache is None else opening.latent_cache.resolve()
    opening = replace(opening, artifact=opening.artifact.resolve(), latent_cache=cached)  # workers live in other folders
    with _session(cluster, opening, num_workers, say) as crew:
        crew.hire(Worker, (crew.opening, run, out, length_multiple, crew.decoders))
        known = crew.configuration
        check_source(known.recipe, source, batch_size, shard_size, max_bad_fraction)
        if known.recipe.takes_text:
            tokenizer = Artifact.open(opening.artifact).tokenizer
            require_known(open_captions(known.recipe, run, tokenizer), source.samples, allow=allow_unknown, say=say)
        size = batch_size or (None if overwrite else stored_batch_size(out)) or crew.probe(source, largest_batch)
        cache = None if opening.latent_cache is None else LatentCache(opening.latent_cache, known.recipe, run)
        options, columns = feeding_options(known.recipe, length_multiple, cache), sample_columns(source.samples)
        if cache is not None:
            cache.require_same_images(source.samples, columns["bytes"])
        manifest = known.manifest(source, columns, run, batch_size=size, shard_size=shard_size, options=options)
        with StoreWriter(out, manifest, columns, mode=mode, overwrite=overwrite, rebatch=rebatch, origin=origin, files=files) as writer:
            clock = Clock(writer.manifest.rows, progress)
            ledger = Ledger(writer, source.samples, clock, retry=mode is Mode.RETRY, max_bad_fraction=max_bad_fraction)
            with resumable(writer, ledger):
                crew.work(writer, ledger)
                writer.sweep()
                writer.finish(ledger.receipts)
            executor = f"ray, {crew.size} workers"
            summary = ledger.summary(source, device=known.engine["device"], workers=crew.decoders, executor=executor)
            write_summary(summary, files)
            ledger.require_whole()
    return summary


class Crew:
    """The workers of one run, seen from the driver.

    **Arguments:** `ray` the library, connected; `num_workers` threads that decode for each worker, None for our choice.
    """

    def __init__(self, ray: Any, opening: Opening, cluster: Cluster, num_workers: int | None, say: Say) -> None:
        self._ray, self._cluster, self._say = ray, cluster, say
        on_gpu = opening.engine in ("trt", "rtx") or (opening.device or "").startswith("cuda")
        self.size, cores = _share(ray, cluster.workers, on_gpu)
        self._resources = {"num_cpus": cores, "num_gpus": 1 if on_gpu else 0}
        self.opening = replace(opening, device="cuda" if on_gpu else opening.device, threads=opening.threads or (None if on_gpu else cores))
        self.decoders = decode_workers(num_workers, cores)
        self._hired: Callable[[], Any] = lambda: None
        self._known: Configuration | None = None
        self._idle: deque[Any] = deque()
        self._at_work: dict[Any, tuple[Piece, Any]] = {}
        self._joining: dict[Any, Any] = {}

    @property
    def configuration(self) -> Configuration:
        """What all of them agree on."""
        assert self._known is not None
        return self._known

    def hire(self, kind: type[Worker], arguments: tuple[Any, ...]) -> None:
        """Start the workers and wait until all have opened their engines. Raises ClusterError where two are not alike, and what opening raises."""
        remote = self._ray.remote(kind).options(max_restarts=0, **self._resources)
        self._hired = lambda: remote.remote(*arguments)
        self._say(f"{self.size} workers open their engines")
        for _ in range(self.size):
            self._hire_one()
        for reference in list(self._joining):
            self._join(reference)

    def probe(self, source: Source, largest: int) -> int:
        """The batch size of the largest rate, on the first worker."""
        return int(self._result(self._idle[0].probe.remote(list(source.samples[:LARGEST]), largest), "probed batch sizes"))

    def work(self, writer: StoreWriter, ledger: Ledger) -> None:
        """Hand out every piece, and again where its worker died. Raises ClusterError naming the shard that cost too many, and what a worker raises.

        Whatever it raises, no worker writes any more by then.
        """
        todo, tries = deque(ledger.pieces()), Counter[int]()
        manifest = self._ray.put(writer.manifest)
        try:
            while todo or self._at_work:
                while todo and self._idle:
                    piece, actor = todo.popleft(), self._idle.popleft()
                    tries[piece.number] += 1
                    order = Order(piece, writer.match.digests[piece.number], writer.match.before[piece.number])
                    self._at_work[actor.compute.remote(order, manifest)] = (piece, actor)
                for reference in self._next():
                    if reference in self._joining:
                        self._join(reference)
                    elif (left := self._take(reference, writer, ledger, tries)) is not None:
                        todo.appendleft(left)
        except BaseException:
            self.dismiss()
            raise

    def dismiss(self) -> None:
        """Kill every worker, and wait until those at work have ended: afterwards somebody else may hold the store's lock."""
        for actor in (*self._idle, *self._joining.values(), *(actor for _, actor in self._at_work.values())):
            self._ray.kill(actor)
        if self._at_work:
            self._ray.wait(list(self._at_work), num_returns=len(self._at_work), timeout=JOIN_SECONDS)
        self._idle, self._joining, self._at_work = deque(), {}, {}

    def _hire_one(self) -> None:
        actor = self._hired()
        self._joining[actor.describe.remote()] = actor

    def _join(self, reference: Any) -> None:
        """A worker has opened its engine."""
        found, actor = self._result(reference, "opened its engine"), self._joining.pop(reference)
        if self._known is None:
            self._known = found
        elif difference := self._known.difference(found):
            raise ClusterError(f"two workers are not alike: {difference}. All machines need the same artifact, libraries and kind of device.")
        self._idle.append(actor)

    def _next(self) -> list[Any]:
        """Whoever has something to say. Raises ClusterError where nobody is at work and no worker that could be comes up."""
        timeout = None if self._at_work else COME_UP_SECONDS
        ready, _ = self._ray.wait([*self._at_work, *self._joining], num_returns=1, timeout=timeout)
        if not ready:
            raise ClusterError(
                f"all workers are gone, and no new one came up in {COME_UP_SECONDS:g} s. Finished shards are kept; look at the cluster, then run the "
                "same command again."
            )
        return ready

    def _take(self, reference: Any, writer: StoreWriter, ledger: Ledger, tries: Counter[int]) -> Piece | None:
        """Count a shard, once its receipt is seen on the driver's side too; or give back the piece whose worker died before its receipt was there."""
        piece, actor = self._at_work.pop(reference)
        answer = self._answer(reference)
        found = writer.shards.receipt(piece.number)
        if answer is not None:
            assert answer.event is not None
            if found != answer.event.receipt:
                raise ClusterError(
                    f"a worker says that shard {piece.number} is written, but {writer.path} on this machine does not show its receipt: they do not "
                    "share this file system. Put the store where all machines see it."
                )
            share = self.size
            ledger.clock.add({k: v / share for k, v in answer.working.items()}, {k: v / share for k, v in answer.waiting.items()})
            ledger.clock.merge_remarks(answer.remarks)
            ledger.clock.count_tokens(answer.tokens, answer.unknown)
            ledger.take(answer.event)
            self._idle.append(actor)
            return None
        self._hire_one()
        if found is not None and found != piece.receipt:
            ledger.take(Event(len(piece.rows), found, _still_bad(piece, found)))
            return None
        self._give_up_or_say(piece, tries[piece.number])
        return piece

    def _give_up_or_say(self, piece: Piece, tries: int) -> None:
        if tries >= self._cluster.attempts:
            raise ClusterError(
                f"shard {piece.number} (rows {piece.first_row} and on) was handed out {tries} times, and each time its worker died: out of memory, "
                "or a sample that kills the decoder. Finished shards are kept; look into the workers' logs, then run the same command again."
            )
        self._say(f"a worker died at shard {piece.number}; the shard is handed out again")

    def _answer(self, reference: Any) -> Answer | None:
        """None where the worker died. Raises what it raised."""
        try:
            return raised(self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:
            raise ClusterError(f"a worker failed: {error}") from error
        except self._ray.exceptions.RayError:  # the actor or its node is gone; what is on disk says how far it came
            return None

    def _result(self, reference: Any, what: str) -> Any:
        try:
            return raised(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            raise ClusterError(f"a worker failed before it had {what}: {error}") from error


def _still_bad(piece: Piece, receipt: Receipt) -> int:
    retried = {piece.first_row + int(row) for row in piece.rows}
    return 0 if piece.receipt is None else sum(entry["row"] in retried for entry in receipt.quarantined)


def _share(ray: Any, workers: int | None, on_gpu: bool) -> tuple[int, int]:
    """How many workers, and the cores of each: as many as leave room for all on the machines there are. Raises ClusterError where there is none."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(machine.get("GPU", 0) for machine in machines))
    size = workers or (gpus if on_gpu else len(machines))
    if on_gpu and not 1 <= size <= gpus:
        raise ClusterError(
            f"{size or 'no'} workers with a GPU each were asked for, and the cluster has {gpus} GPUs. Pass --workers, or --device cpu."
        )
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    for each in range(max(cores, default=0), 0, -1):
        if sum(count // each for count in cores) >= size:
            return size, each
    raise ClusterError(f"{size} workers were asked for, and the cluster has {sum(cores)} cores. Ask for fewer --workers.")


@contextlib.contextmanager
def _session(cluster: Cluster, opening: Opening, num_workers: int | None, say: Say) -> Iterator[Crew]:
    """Ray, connected or started here, and its workers, which end with it. Ray says nothing, serves nothing and reports nothing."""
    require("ray", "--executor ray", "ray")
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    import ray

    ours = not ray.is_initialized()
    # Ray prints the death of a worker to standard output, which belongs to results
    with tempfile.TemporaryDirectory(prefix="difffeat-ray-", ignore_cleanup_errors=True) as logs, contextlib.redirect_stdout(sys.stderr):
        if ours:
            with _signals_kept():
                _connect(ray, cluster, logs)
        crew = None
        try:
            crew = Crew(ray, opening, cluster, num_workers, say)
            yield crew
        finally:
            if crew is not None:
                crew.dismiss()
            if ours:
                ray.shutdown()


def _connect(ray: Any, cluster: Cluster, logs: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if cluster.address is not None:
            ray.init(address=cluster.address, **quiet)
            return
        cores = max(cpu_cores(), cluster.workers or 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, object_store_memory=OBJECT_STORE, _temp_dir=logs, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if cluster.address is None:
            raise ClusterError(f"Ray cannot be started on this machine ({error}). Look at its logs, or use --executor local.") from error
        raise ClusterError(
            f"no Ray cluster can be joined at {cluster.address} ({error}). Start one with ray start --head, or leave out --address. One that asks "
            "for a token is joined with RAY_AUTH_MODE=token in the environment; --address auto finds this machine's own, with its token."
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; a polite stop shall end as it does without Ray."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
