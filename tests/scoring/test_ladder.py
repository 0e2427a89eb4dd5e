"""The ladder: valid rungs for every method, rates by factor, a table of all costs, and resuming after an interrupt."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from sft.baselines.encoder import load_encoder, tune_encoder
from sft.errors import RecipeError
from sft.models.load import load_base
from sft.models.tune import count_parameters, tune_model
from sft.recipe.baseline_schema import MOVES_POSITIONS, BaselineRecipe
from sft.recipe.load import load_any_recipe
from sft.scoring import ladder as module
from sft.scoring.ladder import ENCODER, LLM, ladder, rate_of, rung_overrides
from tests.helpers.builders import write_recipe
from tests.helpers.places import SAMPLES

pytestmark = pytest.mark.heavy


def encoder_recipe(path: Path, base: Path | str, objective: str = "classification", **changes: str) -> Path:
    news = objective != "extractive_qa"
    sections = {
        "objective": objective,
        "task": "newsgroups" if news else "squad_v2",
        "model": f"{{base: '{base}'}}",
        "data": f"{{train: '{SAMPLES / ('newsgroups.jsonl' if news else 'squad_train.json')}'}}",
        "train": "{learning_rate: 1e-4}",
        "eval": "{share: 0.2}",
    } | changes
    path.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()))
    return path


def rung(method: str, path: Path, kind: str, run: Path):
    changes = rung_overrides(method, load_any_recipe(path), kind, run)
    return load_any_recipe(path, changes)


def test_virtual_tokens_shorten_the_input_of_an_encoder(tiny_bert, tmp_path):
    data = f"{{train: '{SAMPLES / 'newsgroups.jsonl'}', max_seq_length: 512}}"
    path = encoder_recipe(tmp_path / "r.yaml", tiny_bert, data=data)
    assert rung("prompt_tuning", path, "bert", tmp_path).data.max_seq_length == 492
    assert rung("lora", path, "bert", tmp_path).data.max_seq_length == 512


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Replaces the processes: writes files as training and scoring do. `fails`: methods whose training fails."""

    def install(fails: Sequence[str] = (), interrupted: str = "") -> list[list[str]]:
        ran: list[list[str]] = []

        def run_logged(command: Sequence[str], log: Path) -> int:
            ran.append(list(command))
            method, run = log.stem, log.with_suffix("")
            if method == interrupted:
                raise KeyboardInterrupt
            if method in fails:
                log.write_text("loading\nerror: tune: no such modules [q_proj] in this base\n")
                return 2
            n = 1 + LLM.index(method) if method in LLM else 9
            run.mkdir(exist_ok=True)
            if "eval" not in command:
                cost = {"parameters": 1000, "trainable_parameters": 10 * n, "train_seconds": 60.0 + n}
                cost |= {"train_peak_memory_gib": 1.5, "disk_mib": 0.25, "train_cpu_seconds": 1.0}
                (run / "cost.json").write_text(json.dumps(cost))
                return 0
            (run / "eval").mkdir()
            total = {"questions": 12, "exact": 40.0 + n, "exact_95": [30.0, 60.0], "f1": 1.0, "f1_95": [0.0, 2.0]}
            results = {"task": "squad_v2", "questions": 12, "scores": {"total": total}}
            (run / "eval" / "results.json").write_text(json.dumps(results))
            return 0

        monkeypatch.setattr(module, "run_logged", run_logged)
        return ran

    return install


@pytest.mark.parametrize("tune", ["{method: lora, r: 4, target_modules: [q_proj], use_dora: true}", "{method: full}"])
@pytest.mark.parametrize("method", LLM)
def test_every_rung_of_an_llm_is_a_recipe_of_that_method(method, tune, tiny, tmp_path):
    data = "{train: data/samples/squad_train.json, share_prefixes: true}"
    recipe = rung(method, write_recipe(tmp_path / "r.yaml", tiny, tune=tune, data=data), "llama", tmp_path / "out")
    lora = method in ("lora", "qlora", "dora")
    assert recipe.tune.method == ("lora" if lora else method)
    assert recipe.train.output_dir == tmp_path / "out"
    assert (recipe.model.quantization is not None) == (method == "qlora")
    assert recipe.model.dtype == "float32"
    if lora:
        assert recipe.tune.peft["use_dora"] == (method == "dora")
        own = {"r": 4, "target_modules": ["q_proj"]} if "q_proj" in tune else {"r": 16, "target_modules": "all-linear"}
        assert own.items() <= recipe.tune.peft.items()
    assert recipe.data.share_prefixes == ("auto" if method == "prompt_tuning" else True)


@pytest.mark.parametrize("method", LLM)
def test_a_quantized_recipe_keeps_its_settings_for_qlora_and_the_others_start_from_the_plain_base(
    method, tiny, tmp_path
):
    model = f"{{base: '{tiny}', quantization: {{load_in_4bit: true, bnb_4bit_quant_type: fp4}}}}"
    recipe = rung(method, write_recipe(tmp_path / "r.yaml", tiny, model=model), "llama", tmp_path / "out")
    quantization = recipe.model.quantization
    assert (quantization.bnb_4bit_quant_type if quantization else None) == ("fp4" if method == "qlora" else None)


@pytest.mark.parametrize("method", LLM)
@pytest.mark.parametrize("base", ["tiny", "tiny_qwen"])
def test_every_rung_fits_llama_and_qwen(method, base, request, tmp_path):
    folder = request.getfixturevalue(base)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    recipe = rung(method, write_recipe(tmp_path / "r.yaml", folder, tune="{method: full}"), kind, tmp_path / "out")
    trainable, parameters = count_parameters(tune_model(load_base(recipe.model, torch.device("cpu")), recipe.tune, 1))
    assert 0 < trainable <= parameters
    assert (trainable == parameters) == (method == "full")


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        (objective, method)
        for objective in ("classification", "extractive_qa")
        for method in ENCODER
        if objective == "classification" or method not in MOVES_POSITIONS
    ],
)
def test_every_rung_fits_a_bert(method, objective, tiny_bert, tmp_path):
    recipe = rung(method, encoder_recipe(tmp_path / "r.yaml", tiny_bert, objective), "bert", tmp_path / "out")
    assert isinstance(recipe, BaselineRecipe)
    assert recipe.tune.method == ("lora" if method == "dora" else method)
    base = load_encoder(recipe.model, objective, 1, ["a", "b"] if objective == "classification" else [])
    trainable, parameters = count_parameters(tune_encoder(base, recipe.tune, objective, 1))
    assert 0 < trainable <= parameters


def test_ia3_names_modules_if_peft_does_not_know_the_architecture(tiny, tiny_bert, tmp_path):
    llm, encoder = write_recipe(tmp_path / "l.yaml", tiny), encoder_recipe(tmp_path / "e.yaml", tiny_bert)
    assert rung("ia3", llm, "llama", tmp_path).tune.peft == {}
    assert rung("ia3", llm, "smollm3", tmp_path).tune.peft["feedforward_modules"] == ["down_proj"]
    assert rung("ia3", encoder, "bert", tmp_path).tune.peft == {}
    assert rung("ia3", encoder, "electra", tmp_path).tune.peft["target_modules"] == ["key", "value", "output.dense"]


def test_rates_follow_from_the_method_of_the_recipe(tiny, tiny_bert, tmp_path):
    lora = load_any_recipe(write_recipe(tmp_path / "l.yaml", tiny))  # 1e-3
    methods = ("lora", "dora", "full", "ia3", "prompt_tuning")
    assert [rate_of(m, lora) for m in methods] == [1e-3, 1e-3, 1e-4, 8e-3, 3e-2]
    full = load_any_recipe(encoder_recipe(tmp_path / "e.yaml", tiny_bert))  # 1e-4
    methods = ("full", "gradual_unfreezing", "lora", "linear_probe")
    assert [rate_of(m, full) for m in methods] == [1e-4, 1e-4, 1e-3, 3e-3]


@pytest.mark.slow
def test_two_rungs_end_to_end(tiny, tmp_path, capfd):
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    out = tmp_path / "ladder"
    rows = ladder(recipe, ["lora", "ia3"], ["train.max_steps=1", "eval.limit=4"], out)
    assert [row["failed"] for row in rows] == [None, None], [p.read_text() for p in out.glob("*.log")]
    assert (out / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run").exists()  # the recipe's own output_dir
    assert rows[0]["trainable_parameters"] > rows[1]["trainable_parameters"] > 0
    assert rows[0]["train_peak_memory_gib"] > 0
    assert rows[0]["questions"] == 4
    assert rows[0]["score_95"][0] <= rows[0]["score"] <= rows[0]["score_95"][1]
    assert json.loads((out / "ladder.json").read_text()) == rows
    assert (out / "ladder.png").stat().st_size > 10_000
    assert f"next: graft compare {out}/lora {out}/ia3 --out {out}/compare" in capfd.readouterr().out


def test_the_table_shows_score_interval_and_all_costs(tiny, tmp_path, fake, capsys):
    fake()
    rows = ladder(write_recipe(tmp_path / "r.yaml", tiny), [], [], tmp_path / "out", ["full=5e-5"])
    assert [row["method"] for row in rows] == list(LLM)
    lines = (tmp_path / "out" / "ladder.md").read_text().splitlines()
    assert lines[0] == "| method | EM | 95 % | trained | % of all | peak GiB | train s | disk MiB | rate |"
    assert lines[2] == "| linear_probe | 41.0 | 30.0 - 60.0 | 10 | 1 | 1.50 | 61 | 0.2 | 0.003 |"
    assert lines[-1].startswith("| full |")
    assert lines[-1].endswith("| 5e-05 |")
    output = capsys.readouterr().out
    for word in ("EM", "95 %", "trained", "peak GiB", "disk MiB", "linear_probe", "prompt_tuning", "30.0 - 60.0"):
        assert word in output
    full = yaml.safe_load((tmp_path / "out" / "full.yaml").read_text())
    assert float(full["train"]["learning_rate"]) == 5e-5


def test_a_failing_rung_is_named_and_the_others_continue(tiny, tmp_path, fake, capsys):
    fake(fails=["ia3"])
    rows = ladder(write_recipe(tmp_path / "r.yaml", tiny), ["ia3", "lora"], [], tmp_path / "out")
    assert rows[0]["failed"] == "tune: no such modules [q_proj] in this base"
    assert rows[1]["failed"] is None
    assert r"failed: tune: no such modules \[q_proj\] in this base |" in (tmp_path / "out" / "ladder.md").read_text()
    output = capsys.readouterr().out
    assert "    loading" in output  # the last lines of its log
    assert "no such modules [q_proj]" in output.partition("lora:")[2]  # also in the table, with its brackets
    assert "graft compare" not in output


def test_a_rung_with_a_setting_that_its_method_lacks_fails_alone(tiny, tmp_path, fake):
    fake()
    recipe = write_recipe(tmp_path / "r.yaml", tiny, tune="{method: linear_probe}", model=f"{{base: '{tiny}'}}")
    changes = module.rung_overrides
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rung_overrides", lambda m, *a: [*changes(m, *a), *["tune.rr=1"] * (m == "lora")])
        rows = ladder(recipe, ["lora", "full"], [], tmp_path / "out")
    assert "tune.rr" in rows[0]["failed"]
    assert rows[1]["failed"] is None


def test_an_interrupted_ladder_resumes(tiny, tmp_path, fake, capsys):
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny), tmp_path / "out"
    methods = ["ia3", "lora", "full"]
    fake(interrupted="lora")
    with pytest.raises(KeyboardInterrupt):
        ladder(recipe, methods, ["train.max_steps=1"], out, ["full=1e-5"])
    output = capsys.readouterr().out
    command = f"graft ladder {recipe} --out {out} --methods ia3,lora,full --set train.max_steps=1 --rate full=1e-5"
    assert f"resume with: {command}" in output
    assert [row["method"] for row in json.loads((out / "ladder.json").read_text())] == ["ia3"]

    (out / "lora" / "checkpoint-1").mkdir(parents=True)
    (out / "lora" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (out / "full").mkdir()  # a rung that failed before its first checkpoint
    shutil.copy(out / "lora.yaml", out / "full.yaml")
    with pytest.raises(RecipeError, match="/full was made .* --out"):
        ladder(recipe, methods, ["train.max_steps=1"], out, ["full=1e-5"])
    shutil.rmtree(out / "full")
    ran = fake()
    rows = ladder(recipe, methods, ["train.max_steps=1"], out, ["full=1e-5"])
    assert [row["failed"] for row in rows] == [None] * 3
    assert "ia3: finished before, EM 43.0" in capsys.readouterr().out
    assert [command[4:] for command in ran] == [
        ["train", "--resume", str(out / "lora")],
        ["eval", str(out / "lora"), "--out", str(out / "lora" / "eval")],
        ["train", str(out / "full.yaml")],
        ["eval", str(out / "full"), "--out", str(out / "full" / "eval")],
    ]

    shutil.rmtree(out / "full" / "eval")
    ran = fake()
    ladder(recipe, methods, ["train.max_steps=1"], out, ["full=1e-5"])
    assert [command[4] for command in ran] == ["eval"]  # a trained rung is only scored
    (out / "full" / "cost.json").unlink()
    shutil.rmtree(out / "full" / "eval")
    ran = fake()
    ladder(recipe, methods, ["train.max_steps=1"], out, ["full=1e-5"])
    assert [command[4] for command in ran] == ["train", "eval"]  # without a checkpoint, from the start


def test_finished_rungs_of_other_settings_are_not_mixed_in(tiny, tmp_path, fake):
    recipe, out = write_recipe(tmp_path / "r.yaml", tiny), tmp_path / "out"
    fake()
    ladder(recipe, ["lora"], [], out)
    with pytest.raises(RecipeError, match="/lora was made .* --out"):
        ladder(recipe, ["lora"], ["tune.r=2"], out)
    with pytest.raises(RecipeError, match="/lora was made .* --out"):
        ladder(recipe, ["lora"], [], out, ["lora=1e-5"])


def test_output_of_a_command_is_in_the_log_and_its_exit_code_is_returned(tmp_path):
    log = tmp_path / "x.log"
    assert module.run_logged(["sh", "-c", "echo out; echo err >&2; exit 3"], log) == 3
    assert module.run_logged(["true"], log) == 0
    assert log.read_text() == "$ sh -c 'echo out; echo err >&2; exit 3'\nout\nerr\n$ true\n"


@pytest.mark.parametrize(
    ("methods", "rates", "message"),
    [
        (["lorra"], [], "--methods lorra: none of .*did you mean lora"),
        (["gradual_unfreezing"], [], "--methods gradual_unfreezing: none of"),
        (["lora"], ["full=1e-4"], "--rate full=1e-4: write METHOD=VALUE"),
        (["lora"], ["lora=fast"], "--rate lora=fast"),
        (["lora"], ["lora=-1"], "--rate lora=-1"),
        (["lora"], ["lora"], "--rate lora:"),
    ],
)
def test_mistakes_on_the_command_line_are_named_before_anything_runs(methods, rates, message, tiny, tmp_path, fake):
    ran = fake()
    with pytest.raises(RecipeError, match=message):
        ladder(write_recipe(tmp_path / "r.yaml", tiny), methods, [], tmp_path / "out", rates)
    assert ran == []
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_held_out_data_or_weights_is_no_ladder(tiny, tmp_path):
    with pytest.raises(RecipeError, match=r"needs eval\.data or eval\.share"):
        ladder(write_recipe(tmp_path / "r.yaml", tiny, eval="{limit: 3}"), [], [], tmp_path / "out")
    with pytest.raises(RecipeError, match="floor:majority has no weights"):
        ladder(encoder_recipe(tmp_path / "f.yaml", "floor:majority"), [], [], tmp_path / "out")
    with pytest.raises(RecipeError, match="mlm has no score"):
        ladder(encoder_recipe(tmp_path / "m.yaml", tiny, "mlm"), [], [], tmp_path / "out")
