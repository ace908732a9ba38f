"""Benchmarks measure by turns, mark rows of busy machines, end in their time, and go on where they stopped."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_round_measures_all_in_an_order_of_its_own(benchmarks):
    measure, calls = benchmarks("measure"), []
    ways = {name: lambda turn, name=name: calls.append((turn, name)) or float(turn) for name in "abcd"}
    assert measure.in_turn(ways, 8) == {name: [float(turn) for turn in range(8)] for name in "abcd"}
    orders = ["".join(name for at, name in calls if at == turn) for turn in range(8)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1


def test_long_rounds_end_after_three(benchmarks, monkeypatch):
    measure = benchmarks("measure")
    monkeypatch.setattr(measure, "ENOUGH", 0)
    assert measure.in_turn({"slow": float}, 7) == {"slow": [0.0, 1.0, 2.0]}


def test_a_program_goes_on_with_what_its_file_lacks_and_ends_in_time(benchmarks, monkeypatch, tmp_path, capsys):
    measure, now = benchmarks("measure"), [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    chosen = measure.parser("", rounds=1).parse_args(
        ["--minutes", "2", "--resume", "--out", str(tmp_path / "rows.csv")]
    )
    begin, columns = measure.start(chosen), [*measure.HEAD, "tokens", "pass"]
    wanted = [{"tokens": str(tokens), "pass": "forward"} for tokens in range(5)]
    other = begin | {"commit": "another"}
    measure.report(
        chosen.out, columns, [begin | wanted[1], other | wanted[0], begin | wanted[2] | {"pass": "backward"}]
    )
    asked = []
    for point in measure.points(chosen, begin, wanted):
        asked.append(point["tokens"])
        assert measure.ALLOWANCE.of_point == now[0] + (120 - now[0]) / (4 - len(asked) + 1)
        now[0] += 50
        assert len(measure.in_turn({"slow": float}, 7)["slow"]) == 1
    assert asked == ["0", "2", "3"]
    said = capsys.readouterr().out
    assert "1 of 5 points are in" in said
    assert "the time is up, 1 of 5 points are left" in said
    measure.ALLOWANCE.begin(None)


def test_one_command_runs_all_programs_and_names_those_that_failed(benchmarks, monkeypatch, tmp_path, capsys):
    everything, ran = benchmarks("all"), []

    def run(words, seconds, variables):
        ran.append(words)
        assert seconds > 60 * float(words[words.index("--minutes") + 1])
        return None if "price.py" in words[1] else int("peak.py" in words[1])

    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(sys, "argv", ["all.py", "--minutes", "1", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: peak"):
        everything.main()
    assert [Path(words[1]).stem for words in ran] == list(everything.PROGRAMS)
    assert all(Path(words[1]).is_file() and "--resume" in words for words in ran)
    assert sum(float(words[words.index("--minutes") + 1]) for words in ran) > 1  # what one leaves, the next has
    assert "the time is up for price; the same command" in capsys.readouterr().out


def stat(of_all, steal=0):
    return f"cpu  {of_all} 0 0 999 999 0 0 {steal} 0 0\ncpu0 1 0 0 0 0 0 0 0 0 0\n"


def test_rows_of_a_loaded_machine_are_marked(benchmarks, monkeypatch, tmp_path, capsys):
    conditions, measure = benchmarks("conditions"), benchmarks("measure")
    clock, ticks = iter([0.0, 2.0, 4.0]), os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(conditions, "PROC", tmp_path)
    monkeypatch.setattr(conditions.time, "monotonic", lambda: next(clock))
    ours = tmp_path / "7" / "stat"
    ours.parent.mkdir()
    ours.write_text(f"7 (a) b) S 1 {os.getpgrp()} 1 0 -1 0 0 0 0 0 0 0 0 0 0 20\n")
    (tmp_path / "stat").write_text(stat(0))
    monkeypatch.setattr(measure, "OTHERS", conditions.Others())
    (tmp_path / "stat").write_text(stat(3 * ticks, steal=ticks))
    ours.write_text(f"7 (a) b) S 1 {os.getpgrp()} 1 0 -1 0 0 0 0 0 {2 * ticks} {ticks // 2} 0 0 20 0\n")
    file = tmp_path / "rows.csv"
    measure.report(file, ["what", "others"], [{"what": "loaded"}])
    measure.report(file, ["what", "others"], [{"what": "quiet"}])
    assert file.read_text().split("\n")[1:3] == ["loaded,0.75 busy", "quiet,0.00"]
    assert "others used 0.75 cores" in capsys.readouterr().out


def test_rows_name_the_processor_as_torch_sees_it(avx2):
    program = "import conditions; print(conditions.processor()['isa'])"
    said = subprocess.run([sys.executable, "-c", program], env=avx2, cwd=FOLDER, capture_output=True, text=True)
    assert said.stdout.strip() in {"AVX2", "NO AVX", "DEFAULT"}, said.stderr


def test_ratios_are_taken_round_by_round(benchmarks):
    measure = benchmarks("measure")
    assert measure.ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    assert measure.summary(("ratio", "quartiles"), [3.0], ".2f") == {"ratio": "3.00", "quartiles": "3.00-3.00"}
    assert measure.quartiles([1.0, 9.0]) == (1.0, 5.0, 9.0)
    assert measure.quartiles([1.0, 2.0, 9.0]) == (1.0, 2.0, 9.0)


def test_rows_of_other_columns_are_refused(benchmarks, tmp_path):
    measure, file = benchmarks("measure"), tmp_path / "results" / "rows.csv"
    for value in "12":
        measure.report(file, ["date", "what"], [{"date": "today", "what": value}])
    assert file.read_text().split() == ["date,what", "today,1", "today,2"]
    with pytest.raises(ValueError, match="choose another --out"):
        measure.report(file, ["date", "which"], [])


def test_a_peer_that_cannot_be_the_best_is_left_out(benchmarks, monkeypatch):
    run = benchmarks("run")
    took = {"transformers/eager": 1100.0, "transformers/grouped_mm": 100.0}
    monkeypatch.setattr(run, "timed", lambda steps, device: {n: lambda turn, n=n: took.get(n, 99.0) for n in steps})
    case = run.Case(run.blocks_of((16, 32, 4, 2), torch.float32), 32)
    found, left_out = run.timers(case)
    assert set(found) == {"transformers/grouped_mm", "moeify", "moeify/packed"}
    row = run.rows_of({name: [1.0] for name in found}, left_out, lambda name: 1.0)[-1]
    assert row["implementation"] == "transformers/eager"
    assert row["quartiles_ms"] == "left out: 1100 ms is more than 10 times what another peer takes"


def test_rows_name_the_peers_of_a_layer_for_which_there_is_no_time(benchmarks, no_time, monkeypatch):
    run = benchmarks("run")
    monkeypatch.setattr(run, "IS_INSTALLED", False)
    case = run.Case(run.blocks_of((16, 32, 4, 2), torch.bfloat16), 32)
    found, left_out = run.timers(case)
    assert set(found) == {"moeify", "moeify/packed"}
    made = run.rows_of({name: [1.0] for name in found}, left_out, lambda name: 1.0)
    rows = {row["implementation"]: row for row in made}
    assert all("speedup_over_best_peer" not in rows[name] for name in found)
    assert rows["transformers/eager"]["quartiles_ms"].startswith("left out: one pass takes about ")
    assert rows["kt-kernel"]["quartiles_ms"] == "left out: not installed"
    assert "median_ms" not in rows["transformers/eager"]


def test_rows_name_the_models_for_which_there_is_no_time(benchmarks, no_time, tiny_decoder, monkeypatch):
    train_step, decode, roofline = (benchmarks(name) for name in ("train_step", "decode", "roofline"))
    monkeypatch.setattr(train_step, "MODELS", {"sparse": lambda: tiny_decoder, "dense": lambda: tiny_decoder})
    monkeypatch.setattr(train_step, "HIDDEN", 1)
    for program in (train_step, roofline):
        monkeypatch.setattr(program, "limits", lambda dtype: (1e9, 1e9))
    found, left_out = train_step.contenders("bf16")
    assert not found
    assert len(train_step.rows_of({}, left_out, {}, {})) == 4
    for name in ("decode", "prefill"):
        monkeypatch.setattr(decode, name, lambda *args, **settings: 1.0)
    monkeypatch.setattr(decode, "twin", lambda model, bits: model)
    tasks, skipped = decode.ways("sparse", tiny_decoder, [4])
    assert {what for implementation, _, what in tasks if implementation == "moeify"} >= {"prefill", "decode, batch 4"}
    assert {what for _, _, what in skipped} == {"prefill", "decode, batch 4"}
    assert [row["what"] for row in decode.rows_of(tiny_decoder, {}, skipped, [1.0])] == ["prefill", "decode, batch 4"]
    monkeypatch.setattr(roofline, "Bandwidth", lambda: lambda turn: 1.0)
    rows = roofline.measure({"sparse": tiny_decoder}, {("sparse", "transformers/eager"): roofline.speed}, 4, 1)
    assert [row["batch"] for row in rows] == ["4"]


def test_slow_ways_share_the_time_of_a_point(benchmarks, monkeypatch):
    allowance = benchmarks("allowance")
    monkeypatch.setattr(allowance.time, "monotonic", lambda: 100.0)
    here = allowance.Allowance()
    assert here.refuse(1e18, 1.0, 3) is None, "without --minutes nothing is left out"
    here.begin(1)
    assert here.begin_point(left=3)
    assert here.refuse(10.0, 2.0, passes=2) is None  # 10 of 15 seconds
    assert here.refuse(10.0, 2.0, passes=2) == "left out: one pass takes about 5 s"
    assert here.refuse(5.0, 1.0, passes=1) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_that_is_late_is_ended_with_its_processes_and_files(benchmarks, monkeypatch, tmp_path):
    everything, note = benchmarks("all"), tmp_path / "note"
    program = (
        "import os, subprocess, sys, tempfile, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open('{note}.new', 'w').write(str(child.pid) + ' ' + tempfile.mkdtemp()); "
        f"os.rename('{note}.new', '{note}'); time.sleep(60)"
    )
    wait = subprocess.Popen.wait

    def wait_for_note(process, timeout=None):
        while timeout == 7 and not note.exists():
            time.sleep(0.01)
        return wait(process, 0 if timeout == 7 else timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_note)
    assert everything.run([sys.executable, "-c", "raise SystemExit(3)"], 60, {}) == 3
    assert everything.run([sys.executable, "-c", program], 7, {}) is None
    child, folder = note.read_text().split()
    assert not Path(folder).exists()
    state, until = Path(f"/proc/{child}/stat"), time.monotonic() + 30
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":  # a killed process takes a moment
        assert time.monotonic() < until, "the child of the program is still running"
        time.sleep(0.01)
