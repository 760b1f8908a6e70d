"""A plugin of sglang for tests: the id of a search says in which phase it is held, and what fails in it then.

An id is `fault@phase#number`. When a search reaches its phase, a file `ID.reached` appears in the folder; it is held there
until the test makes `ID.go`. `installed` makes the plugin known to a server; the server's own code holds nothing of this.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args

FOLDER_ENV = "SGLANG_ETS_TEST_FAULTS"
HOLD_LIMIT_S = 20.0
AGES_S = 1e6
POLL_S = 0.01
OUT_OF_VOCABULARY = 1 << 30
OUT_OF_MEMORY = "Out of memory even after retracting all other requests"

Phase = Literal["begin", "decode", "score", "select", "rank"]
PHASES: tuple[Phase, ...] = get_args(Phase)


def make_plugin(folder: Path) -> Mapping[str, str]:
    """The environment of a server that loads this plugin, with `folder` for the files of the phases."""
    metadata = folder / "ets_test_faults-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ets-test-faults\nVersion: 0\n", encoding="utf-8")
    entry = f"[sglang.srt.plugins]\nets_test_faults = {__name__}:register\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
    return {FOLDER_ENV: str(folder), "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@dataclass(frozen=True)
class Injection:
    """What the id of a search asks for."""

    rid: str
    fault: str
    phase: str

    @classmethod
    def of(cls, rid: str) -> Injection:
        fault, _, rest = str(rid).partition("@")
        return cls(str(rid), fault, rest.partition("#")[0])


class Phases:
    """The files by which a server and a test meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reached(self, rid: str) -> Path:
        return self.folder / f"{rid}.reached"

    def go(self, rid: str) -> Path:
        return self.folder / f"{rid}.go"

    def wait_for(self, path: Path) -> None:
        """Return when the file is there, or after `HOLD_LIMIT_S`."""
        end = time.monotonic() + HOLD_LIMIT_S
        while not path.exists() and time.monotonic() < end:
            time.sleep(POLL_S)

    def arrive(self, rid: str) -> bool:
        """Whether the search has come to its phase only now."""
        is_first = not self.reached(rid).exists()
        self.reached(rid).touch()
        return is_first

    def hold(self, rid: str) -> None:
        self.arrive(rid)
        self.wait_for(self.go(rid))


def register() -> None:
    """The entry point: faults happen in the process of the scheduler."""
    import multiprocessing
    import sys

    if multiprocessing.parent_process() is not None and "sglang.srt.managers.scheduler" in sys.modules:
        Faults(Phases(Path(os.environ[FOLDER_ENV]))).install()


class Faults:
    """What is put around the code of the server. Every part looks at the id of the search and does nothing for others."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._lives: dict[str, Any] = {}  # by their ids in the process
        self._scored: list[Injection] = []
        self._here = threading.local()

    def install(self) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sglang_ets import math_process
        from sglang_ets.core import selection
        from sglang_ets.engine import coordinator, voting
        from sglang_ets.engine.live import LiveSearch
        from sglang_ets.engine.scoring import StepScoring
        from sglang_ets.engine.step_queue import StepQueue
        from sglang_ets.prm.engine import PrmEngine

        target = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
        HookRegistry.register(target, self.before_result, HookType.BEFORE)
        put_around(coordinator.SearchCoordinator, "_begin", self.begin)
        put_around(coordinator.SearchCoordinator, "after_batch", self.after_batch)
        put_around(coordinator, "answerable", self.answerable)
        put_around(StepQueue, "feed", self.feed)
        put_around(PrmEngine, "open_prompt", self.open_prompt)
        put_around(StepScoring, "_score", self.score)
        put_around(PrmEngine, "_read", self.read)
        put_around(LiveSearch, "decide", self.decide)
        put_around(selection, "solve", self.solve)
        put_around(voting, "rank", self.rank)
        put_around(math_process, "_line", self.line)

    def _injection(self, search_id: str) -> Injection:
        live = self._lives.get(search_id)
        return Injection.of(live.rid if live is not None else "")

    def _arrive(self, search_id: str) -> bool:
        """Whether the search has come to its phase only now; its time is up there if that is its fault."""
        injection = self._injection(search_id)
        is_first = self._phases.arrive(injection.rid)
        if is_first and injection.fault == "deadline":
            self._lives[search_id].started_s -= AGES_S
        return is_first

    # ---- before the first level ----

    def begin(self, original: Callable[..., Any], coordinator: Any, live: Any) -> None:
        self._lives[live.id] = live
        original(coordinator, live)

    def feed(self, original: Callable[..., Any], queue: Any, order: Any) -> Any:
        return original(queue, [search_id for search_id in order if not self._is_held(search_id)])

    def _is_held(self, search_id: str) -> bool:
        injection = self._injection(search_id)
        if injection.phase != "begin":
            return False
        self._arrive(search_id)
        return not self._phases.go(injection.rid).exists()

    def open_prompt(self, original: Callable[..., Any], prm: Any, ids: Any, question: str, *owner: str) -> Any:
        injection = self._injection(*owner or ("",))  # the PRM warms up in nobody's name
        if (injection.fault, injection.phase) == ("prm raises", "begin"):
            raise RuntimeError("injected into the PRM")
        return original(prm, ids, question, *owner)

    # ---- steps decode ----

    def _decoding(self, reqs: Any) -> Iterator[tuple[int, Any, Injection]]:
        """Children in the middle of a step of the first level, whose search is to be hit there."""
        from sglang_ets.engine.children import ChildReq
        from sglang_ets.engine.live import ROOT

        for place, req in enumerate(reqs):
            if isinstance(req, ChildReq) and req.node_id != ROOT and len(req.step_ids) > 1 and not req.finished():
                injection = self._injection(req.spec.search_id)
                if injection.phase == "decode":
                    yield place, req, injection

    def before_result(self, _scheduler: Any, batch: Any, result: Any, *_args: Any) -> None:
        for place, req, injection in self._decoding(batch.reqs):
            if injection.fault.startswith("logits") and self._hits(injection, req):
                result.next_token_ids[place] = OUT_OF_VOCABULARY

    def after_batch(self, original: Callable[..., Any], coordinator: Any, batch: Any, result: Any) -> None:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        original(coordinator, batch, result)
        for _, req, injection in self._decoding(batch.reqs):
            if injection.fault.startswith("no memory"):
                if self._hits(injection, req):
                    req.to_finish = FINISH_ABORT(OUT_OF_MEMORY)
            elif not injection.fault.startswith("logits") and self._arrive(req.spec.search_id):
                self._hold_loop(injection)

    def _hold_loop(self, injection: Injection) -> None:
        """Of the searches with which a server is stopped only one can hold the loop up; this one has long steps instead."""
        if injection.fault != "stop":
            self._phases.hold(injection.rid)

    def _hits(self, injection: Injection, req: Any) -> bool:
        """One step of the search, which shares its row with no other, or every one."""
        if injection.fault.endswith("of all"):
            self._phases.arrive(injection.rid)
            return True
        return len(req.members) == 1 and self._phases.arrive(injection.rid)

    # ---- the PRM scores ----

    def score(self, original: Callable[..., Any], scoring: Any, batch: Any) -> Any:
        ids = dict.fromkeys(live.id for live, _ in batch)
        self._scored = [injection for search_id in ids if (injection := self._injection(search_id)).phase == "score"]
        for search_id in ids:
            if self._injection(search_id) in self._scored and self._arrive(search_id):
                self._phases.hold(self._injection(search_id).rid)
        return original(scoring, batch)

    def read(self, original: Callable[..., Any], prm: Any, readings: Any, extended: Any) -> Any:
        from dataclasses import replace

        scores = original(prm, readings, extended)
        for injection in self._scored:
            if injection.fault == "prm raises":
                raise RuntimeError("injected into the PRM")
            if injection.fault == "prm nan":
                scores = [replace(scores[0], score=float("nan")), *scores[1:]]
            if injection.fault == "prm nan of all":
                scores = [replace(score, score=float("nan")) for score in scores]
        return scores

    # ---- selection runs ----

    def decide(self, original: Callable[..., Any], live: Any, *args: Any) -> Any:
        injection = Injection.of(live.rid)
        if injection.phase == "select" and self._arrive(live.id):
            self._phases.hold(injection.rid)
        self._here.fault = injection.fault
        return original(live, *args)

    def solve(self, original: Callable[..., Any], *args: Any) -> Any:
        from sglang_ets.core.ilp import SolverFailure

        match getattr(self._here, "fault", ""):
            case "solver fails":
                raise SolverFailure("HiGHS ended with Time limit reached")
            case "solver raises":
                raise RuntimeError("injected into the solver")
        return original(*args)

    # ---- the answer is ranked ----

    def answerable(self, original: Callable[..., Any], live: Any) -> Any:
        return Named(live.id, original(live))

    def rank(self, original: Callable[..., Any], trajectories: Any, *args: Any) -> Any:
        injection = self._injection(trajectories.search_id)
        if injection.phase == "rank":
            self._arrive(trajectories.search_id)
            self._phases.hold(injection.rid)
        self._here.fault = injection.fault
        return original(trajectories, *args)

    def line(self, original: Callable[..., Any], process: Any, limit_s: float) -> Any:
        if getattr(self._here, "fault", "") == "voter dies" and self._here.__dict__.pop("is_up", False):
            process.kill()
            process.wait()
        self._here.is_up = True
        return original(process, limit_s)


class Named(list[Any]):
    """Trajectories that know their search."""

    def __init__(self, search_id: str, items: Any) -> None:
        super().__init__(items)
        self.search_id = search_id


def put_around(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, name, wrapper)


@contextmanager
def held(phases: Phases, rid: str) -> Iterator[None]:
    """The search waits in its phase while the block runs."""
    phases.wait_for(phases.reached(rid))
    assert phases.reached(rid).exists(), f"{rid} did not reach its phase"
    try:
        yield
    finally:
        phases.go(rid).touch()
