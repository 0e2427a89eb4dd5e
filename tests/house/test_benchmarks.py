"""The throughput benchmark: Graft is measured as users run it, and its tables and charts say what was measured."""

import json
from dataclasses import replace

import pytest

from data.encode.pack import build_pack
from tests.benchmarks import gpu_ladder
from tests.benchmarks.growth import bounded_steps, points, report_growth
from tests.benchmarks.passages import (
    first_questions,
    read_passages,
    tree_tokens,
    with_length,
    with_questions,
    write_workload,
)
from tests.benchmarks.results import Flops, last_third, report, summarize
from tests.benchmarks.systems import BenchmarkError, Measurement, Settings, printed_example, run
from tests.benchmarks.throughput import measure_all
from tests.helpers.places import SAMPLES


@pytest.fixture(scope="module")
def passages():
    return read_passages(str(SAMPLES / "squad_dev.json"), seed=0)


@pytest.fixture(scope="module")
def workload(passages, tokenizer, tmp_path_factory):
    return write_workload(passages[:2], tmp_path_factory.mktemp("workload"), tokenizer)


def measurement(system: str, seconds: float, **changes) -> Measurement:
    counts = {
        "questions": 12,
        "executed_tokens": 1000,
        "trained_tokens": 60,
        "dtype": "float32",
        "losses": [3.0, 2.0, 1.0],
    }
    return Measurement(
        **{"system": system, "seconds": seconds, "wall_seconds": 2 * seconds, "peak_memory_gib": 1.0} | counts | changes
    )


@pytest.mark.slow
def test_a_training_with_graft_is_measured(workload, tiny, tmp_path):
    settings = Settings(str(tiny), batch=6, r=4, lora_alpha=8)
    (m,), failures = measure_all(["graft"], workload, tmp_path / "scratch", settings, tmp_path / "logs")
    assert not failures
    assert m.questions == workload.questions == 12
    # each step holds one context, so that no layout executes fewer tokens than its tree has
    assert sum(tree_tokens(tree)[0] for tree in workload.trees(6)) <= m.executed_tokens < workload.logical_tokens
    assert m.dtype in ("float32", "bfloat16")
    assert 0 < m.seconds < m.wall_seconds
    assert 0 < m.start_seconds < m.wall_seconds - m.seconds
    assert m.steady_questions_per_s > 0
    assert m.peak_memory_gib > 0.2
    assert len(m.losses) == 2
    assert "12 examples of 2 contexts" in (tmp_path / "logs" / "0-graft.txt").read_text()


def test_a_process_that_fails_shows_its_last_lines(tmp_path):
    with pytest.raises(BenchmarkError, match=r"(?s)exit code 3.*no such base"):
        run(["sh", "-c", "echo no such base; exit 3"], tmp_path / "log.txt")


def test_the_other_systems_get_the_same_prompts_and_answers(workload):
    rows = [json.loads(line) for line in workload.rows.read_text().splitlines()]
    assert [r["prompt"] + r["completion"] for r in rows] == [list(c.messages) for c in workload.conversations]


def test_a_tree_is_counted_as_a_pack_computes_it(workload):
    for tree in workload.trees(4):
        pack = build_pack([tree])
        assert tree_tokens(tree) == (len(pack.input_ids), sum(depth + 1 for depth in pack.position_ids))


def test_flops_are_those_of_the_shape(workload, tiny):
    flops = Flops(Settings(str(tiny), r=4, lora_alpha=8), workload)
    m = measurement("trl", 1.0)
    # two layers of hidden size 64: q and o 64 x 64, k and v 64 x 32, three of 64 x 128; the head 64 x vocabulary
    body = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    head = 64 * flops.model.config.vocab_size
    attention = 12 * 64 * 2 * (1000 / 12 + 1) / 2
    assert flops.of(m) == pytest.approx(1000 * (4 * body + 6 * lora + 4 * head + attention), rel=0.05)
    graft = flops.of(replace(m, system="graft-flat"))
    assert flops.of(m) - graft == pytest.approx(4 * head * (1000 - 60), rel=0.05)


def test_table_and_chart_hold_medians_and_ratios(workload, tiny, tmp_path, capsys):
    measured = [
        measurement("trl", 12.0),
        measurement("graft", 2.0),
        measurement("graft", 4.0),
        measurement("graft", 3.0),
    ]
    flops = Flops(Settings(str(tiny)), workload)
    summaries = summarize(measured, workload, flops, {"float32": 1e9, "bfloat16": 1e9})
    graft, trl = summaries
    assert (graft.system, graft.questions_per_s, graft.lowest, graft.highest) == ("graft", 4.0, 3.0, 6.0)
    assert (trl.times, graft.times) == (4.0, 1.0)
    assert (trl.executed_tokens_per_s, trl.trained_tokens_per_s, trl.loss) == pytest.approx((1000 / 12, 5.0, 1.0))
    assert trl.utilisation == pytest.approx(flops.of(measured[0]) / 12 / 1e9)
    report(tmp_path, {"workload": "12 questions"}, measured, summaries)
    assert "| trl | 1.00 | - | 4.00 x |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["summaries"][1]["system"] == "trl"
    assert (tmp_path / "throughput.png").stat().st_size > 5000
    assert "12 questions" in capsys.readouterr().out


def test_last_third_is_at_least_one_step():
    assert (last_third([5.0]), last_third([9.0, 9, 9, 9, 1, 3])) == (5.0, 2.0)


def test_the_example_that_llamafactory_prints_is_read():
    log = "training example:\ninput_ids:\n[1, 2,\n 3]\ninputs:\n[x]\nlabel_ids:\n[-100, -100, 3]\nlabels:\n"
    assert printed_example(log) == ([1, 2, 3], [-100, -100, 3])
    with pytest.raises(BenchmarkError, match="no training example"):
        printed_example("Traceback: no data")


def test_growth_varies_one_thing(passages, tokenizer):
    assert [len(p["qas"]) for p in first_questions(passages, 8)] == [6, 2]
    asked = [q["question"] for q in with_questions(passages[0], 13)["qas"]]
    assert len({*asked}) == 13
    assert asked[12] == f"(3) {asked[0]}"
    cut = with_length(passages[:8], 256, tokenizer)
    assert len(tokenizer(cut["context"], add_special_tokens=False)["input_ids"]) == pytest.approx(256, abs=1)
    assert all(a["text"] in cut["context"] for q in cut["qas"] for a in q["answers"])
    assert with_length(passages[:1], 5000, tokenizer) is None


def test_growth_bounds_its_runs_and_reports_them(passages, tokenizer, tmp_path):
    point = next(iter(points(passages, Settings("base"), tmp_path / "data", tokenizer)))
    assert bounded_steps(point, share=True) >= bounded_steps(point, share=False) >= 3
    measured = [measurement(s, 3.0, steady_questions_per_s=4.0, start_seconds=1.5) for s in ("graft", "graft-flat")]
    report_growth([(point, m) for m in measured], tmp_path)
    assert "| examples | 20 | graft | 4.00 | 333 | 1.00 | 1.5 | 3 |" in (tmp_path / "growth.md").read_text()
    assert (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.heavy
def test_the_ladder_of_a_gpu_step_runs_on_a_cpu():
    wanted = [replace(v, questions=8, pack_tokens=512) for v in gpu_ladder.variants() if v.rest != "compiled"]
    device, *lines = gpu_ladder.run("tiny", gpu_ladder.random_examples(48), wanted)
    assert device["device"] == "CPU"
    measured = {line["name"]: line for line in lines if "left_out" not in line}
    assert {line["left_out"] for line in lines if line["name"] not in measured} == {"needs a GPU"}
    shared, peer = measured["dequantized once, or bf16"], measured["peer: PEFT, packed rows, flash"]
    assert shared["tokens_per_step"] < 0.5 * peer["tokens_per_step"]
    assert abs(shared["loss"][0] - peer["loss"][0]) < 1e-4
    assert peer["gradient_cosine"] > 0.9999
    assert all(line["questions_per_s"] > 0 and gpu_ladder.as_text(line) for line in measured.values())


def test_examples_of_the_ladder_are_read_as_they_were_written(tmp_path):
    examples = gpu_ladder.random_examples(7)
    gpu_ladder.save_examples(examples, tmp_path / "e.npz")
    read = gpu_ladder.load_examples(tmp_path / "e.npz")
    assert [(e.ids, e.loss_mask) for e in read] == [(e.ids, e.loss_mask) for e in examples]
    assert [e.context for e in read] == [e.context for e in examples]
