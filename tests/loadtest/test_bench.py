"""The benchmark compares like with like: the same fresh prompts for both, in turns, with the service's own settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_openai_server
import psutil
import pytest
import yaml

from loadtest import bench
from loadtest.bench import Bench, Records, delivery_table, figures_to_reach, in_turn, rate, ratio, report
from loadtest.compare.accounting import ProcessTree
from loadtest.compare.servers import Command
from loadtest.worker import config_of
from serve_app.engine.cpu.threads import usable_cores

ROUNDS = 3
Turn = tuple[str, tuple[int, ...], int]
"""Who was asked, what (an id for each chat), and how many at a time."""
Run = tuple[Records, list[Turn]]


class FakeWorker:
    """Answers at once, and remembers what everybody was asked."""

    log: list[Turn]

    def __init__(self, kind: str, arguments: list[str], checkout: Path | None = None) -> None:
        self.tree = ProcessTree(psutil.Process())
        self._kind = "other" if checkout else kind

    def run(self, prompts: list[list[int]], new_tokens: int, concurrency: int = 1) -> dict[str, Any]:
        self.log.append((self._kind, tuple(prompt[0] for prompt in prompts), concurrency))
        timings = {"ttft_s": [0.1], "itl_s": [0.01, 0.01, 0.01]} if self._kind == "engine" else {}
        return {"seconds": 1.0, "tokens": len(prompts) * new_tokens} | timings

    def close(self) -> None:
        pass


@contextmanager
def quiet(tree: ProcessTree, record: dict[str, Any], beside: ProcessTree | None = None) -> Iterator[None]:
    """In place of `accounted`: nobody else uses this machine."""
    yield
    record |= dict.fromkeys(("client_cpu_s", "beside_cpu_s", "other_cpu_s"), 0.1) | {"wall_s": 1.0, "disturbed": False}


def one_id(folder: Path, asked: list[Any]) -> list[list[int]]:
    """An id for each chat: the fake service counts one token for one message."""
    return [[hash(str(chat))] for chat in asked]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of all contenders, none of which computes; what the service was asked is in the log too."""
    folder = tmp_path_factory.mktemp("bench")
    log: list[Turn] = []
    drive = bench.drive

    async def noted(load: Any, asked: list[Any], concurrency: int) -> Any:
        log.append(("service", tuple(ids[0] for ids in one_id(folder, asked)), concurrency))
        return await drive(load, asked, concurrency)

    def command(config: dict[str, Any], work: Path) -> Command:
        program = [sys.executable, str(Path(fake_openai_server.__file__)), str(config["http_options"]["port"])]
        return Command(program, {}, "/health", 30)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(FakeWorker, "log", log, raising=False)
        patch.setattr(bench, "Worker", FakeWorker)
        patch.setattr(bench, "render", one_id)
        patch.setattr(bench, "resolve", lambda *_, **__: SimpleNamespace(tokenizer_folder=folder))
        patch.setattr(bench, "serve_app_command", command)
        patch.setattr(bench, "drive", noted)
        patch.setattr(bench, "accounted", quiet)
        run = Bench({"applications": [{"import_path": "x"}]}, 4, folder)
        run.measure(ROUNDS, with_service=True)
    return run.results, log


def test_no_round_repeats_anothers_prompts_and_both_get_the_same(measured: Run) -> None:
    results, log = measured
    for kind in ("engine", "service"):
        asked = [prompt for who, prompts, _ in log if who == kind for prompt in prompts]
        assert len(set(asked)) == len(asked)
    of_service = [(prompts, concurrency) for who, prompts, concurrency in log if who == "service"]
    of_engine = [(prompts, concurrency) for who, prompts, concurrency in log if who == "engine"]
    assert of_engine[-len(of_service) :] == of_service
    assert [concurrency for _, concurrency in of_service] == list(bench.CONCURRENCY) * ROUNDS
    assert {name: len(records) for name, records in results.items()} == {
        **dict.fromkeys(["generate@1", "seed@1"], ROUNDS),
        **{f"{who}@{count}": ROUNDS for who in ("engine alone", "engine", "service") for count in bench.CONCURRENCY},
    }


def test_the_one_that_came_first_comes_last_in_the_next_round(measured: Run) -> None:
    _, log = measured
    turns = [who for who, _, _ in log][-2 * ROUNDS * len(bench.CONCURRENCY) :]
    even, odd = ["engine", "service"] * 3, ["service", "engine"] * 3
    assert turns == even + odd + even
    assert [in_turn("ab", turn) for turn in range(3)] == ["ab", "ba", "ab"]


def test_a_report_can_be_made_of_a_run(measured: Run) -> None:
    text = report(measured[0], "about")
    assert text.startswith("about\n\n| contender |")
    assert "service / engine" in text
    without = {name: found for name, found in measured[0].items() if not name.startswith(("engine@", "service@"))}
    assert "service" not in report(without, "about")


def test_two_checkouts_answer_the_same_fresh_prompts_in_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log: list[Turn] = []
    monkeypatch.setattr(FakeWorker, "log", log, raising=False)
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "render", one_id)
    monkeypatch.setattr(bench, "accounted", quiet)
    monkeypatch.setattr(bench, "resolve", lambda *_, **__: SimpleNamespace(tokenizer_folder=tmp_path))
    text = bench.comparison(bench.compare(2, 4, 1, tmp_path))
    asked = {kind: [prompts for who, prompts, _ in log if who == kind][1:] for kind in ("other", "engine")}
    assert asked["other"] == asked["engine"]
    assert [len(prompts) for prompts in asked["other"]] == [1, 8, 32, 1] * 2
    assert len({prompt for prompts in asked["other"] for prompt in prompts}) == 84
    assert [who for who, _, _ in log][2:] == ["other", "engine"] * 4 + ["engine", "other"] * 4
    assert text.splitlines()[1] == "       8:    32.0 ->    32.0 tok/s, x 1.00"


@pytest.mark.parametrize(("disturbances", "kept"), [([], 1.0), ([1.0], 2.0), ([1.0, 2.0, 3.0], 3.0)])
def test_a_disturbed_round_is_made_again_with_other_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, disturbances: list[float], kept: float
) -> None:
    monkeypatch.setattr(bench, "resolve", lambda *_, **__: SimpleNamespace(tokenizer_folder=tmp_path))
    run = Bench({"applications": [{}]}, 4, tmp_path)
    asked: list[str] = []

    def take(count: int, chats: list[Any]) -> dict[str, Any]:
        asked.append(str(chats))
        return {"engine": {"seconds": float(len(asked)), "tokens": 1, "disturbed": len(asked) in disturbances}}

    run._undisturbed("round 0", 8, take)
    assert [(r["seconds"], r["turn"]) for r in run.results["engine@8"]] == [(kept, "round 0")]
    assert len(set(asked)) == kept


def records(seconds: list[float], ttft_s: float = 0.1, disturbed: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    common = {"tokens": 100, "itl_s": [0.02, 0.03, 0.04], "ttft_s": [ttft_s], "wall_s": 10.0}
    common |= {"client_cpu_s": 0.5, "beside_cpu_s": 1.2, "other_cpu_s": 0.3}
    return [
        common | {"seconds": each, "turn": turn, "disturbed": turn in disturbed} for turn, each in enumerate(seconds)
    ]


def results(service_s: list[float], late_s: float) -> Records:
    engine = [1.0, 2.0, 4.0]  # the machine becomes slower from round to round
    return {
        "generate@1": records([1.0, 2.0, 4.0]),
        "seed@1": records([10.0, 20.0, 40.0]),
        **{f"engine alone@{count}": records([0.5, 0.5, 0.5]) for count in (1, 8, 32)},
        **{f"engine@{count}": records(engine) for count in (1, 8, 32)},
        **{f"service@{count}": records(service_s, 0.1 + late_s) for count in (1, 8, 32)},
    }


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    drifting = results([1.25, 2.2, 8.0], 0.0)
    assert ratio(drifting["service@8"], drifting["engine@8"]) == pytest.approx(0.8)  # of 0.8, 0.91, 0.5


def test_a_round_that_was_disturbed_counts_only_where_there_is_no_other() -> None:
    engine, service = records([1.0, 1.0, 1.0], disturbed=(0,)), records([4.0, 5.0, 1.25], disturbed=(1,))
    assert ratio(service, engine) == pytest.approx(0.8)
    assert rate(engine) == 100
    every = results([1.25, 2.5, 5.0], 0.0) | {"engine@8": records([1.0, 2.0, 4.0], disturbed=(0, 1, 2))}
    assert "**80.0%*** (80% to 80%)" not in delivery_table(every)
    assert "**80.0%**\\* (80% to 80%)" in delivery_table(every)
    assert [line.rpartition(": ")[2] for line in figures_to_reach(every)][2:4] == [
        "disturbed by other programs, no evidence", "NOT reached",
    ]  # fmt: skip


def test_delivery_is_a_row_for_each_number_of_streams() -> None:
    lines = delivery_table(results([1.25, 2.5, 5.0], 0.012)).splitlines()
    assert lines[3] == (
        "| 8 | 200.0 | 50.0 | 40.0 | **80.0%** (80% to 80%) | 0.05 | 0.12 | 0.03 | 100.0 | 112.0 | **12.0** "
        "| 20.0 / 40 | 20.0 / 40 |"
    )
    assert len({line.count("|") for line in lines}) == 1


def test_what_was_asked_for_is_reached_or_not() -> None:
    assert [line.rpartition(": ")[2] for line in figures_to_reach(results([1.25, 2.5, 5.0], 0.012))] == [
        "reached", "reached", "reached", "NOT reached", "NOT reached",
    ]  # fmt: skip
    assert [line.rpartition(": ")[2] for line in figures_to_reach(results([1.1, 2.2, 4.4], 0.009))[-2:]] == [
        "reached", "reached",
    ]  # fmt: skip


def test_the_engine_has_the_settings_of_the_service(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    data = bench.config_of(Path("configs/serve.yaml"), batch_invariant=True)
    path.write_text(yaml.safe_dump(data))
    engine = config_of(path).engine
    assert engine.batch_invariant
    assert engine.threads == usable_cores()
    assert engine.max_running == data["applications"][0]["args"]["engine"]["max_running"]
    data["applications"][0]["args"]["engine"] |= {"threads": 3, "prompt_lookup": False}
    path.write_text(yaml.safe_dump(data))
    assert (config_of(path).engine.threads, config_of(path).engine.prompt_lookup) == (3, False)
