"""Recipes are strict: every mistake is one line with key, value, allowed values and the nearest valid key."""

import re
from pathlib import Path

import pytest
import yaml

from data.encode.chat import AUDITS
from sft.errors import RecipeError
from sft.recipe.load import check_baseline, check_recipe, dump_recipe, load_any_recipe, load_recipe
from sft.recipe.schema import Recipe
from sft.recipe.strict_yaml import YamlError, parse
from tests.helpers.builders import write_recipe
from tests.helpers.places import ROOT
from tests.helpers.recipes import MINIMAL, with_key


def test_minimal_recipe_is_complete():
    recipe = check_recipe(MINIMAL)
    assert recipe.tune.method == "lora"
    assert recipe.data.train[0].path == "data/samples/squad_train.json"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.learning_rat", 1e-4, r"train.learning_rat: unknown key, .* learning_rate\?"),
        ("trian", {}, r"trian: unknown key, .* train\?"),
        ("model.quantization.load_in_4bits", True, r"model.quantization.load_in_4bits: unknown key, .* load_in_4bit\?"),
        ("tune.lora_alfa", 3, r"tune.lora_alfa: unknown key .* lora, .* lora_alpha\?"),
        ("tune.method", "lorra", "tune.method: 'lorra' is none of"),
        ("tune.r", "many", "tune.r: .*integer"),
        ("train.learning_rate", "abc", "train.learning_rate: .* number.*found 'abc'"),
        ("train.learning_rate", True, "train.learning_rate: a number .* not true"),
        ("train.learning_rate", -1, "train.learning_rate: .* greater than 0, found -1"),
        ("train.examples_per_step", 2.5, "train.examples_per_step: .*integer"),
        ("train.lr_scheduler_type", "cosin", "train.lr_scheduler_type: .* 'linear', 'cosine'"),
        ("train.per_device_train_batch_size", 4, "use train.examples_per_step"),
        ("train.warmup_ratio", 0.1, "use train.warmup_steps"),
        ("train.gradient_accumulation_steps", 4, "use train.examples_per_step"),
        ("cutoff_len", 512, "cutoff_len: unknown key; write data.max_length"),
        ("train.lora_rank", 8, "write tune.r"),
        ("tune.lora_r", 8, "write tune.r"),
        ("tune.lora_target", "all", "write tune.target_modules"),
        ("tune.learning_rate", 1e-4, "write train.learning_rate"),
        ("learning_rate", 1e-4, "write train.learning_rate"),
        ("model.load_in_4bit", True, "write model.quantization.load_in_4bit"),
        ("model.model_name_or_path", "x", "write model.base"),
        ("train.loraplus_lr_ratio", 16, "write tune.loraplus_lr_ratio"),
        ("train.num_epochs", 3, "write train.num_train_epochs"),
        ("train.fp16", True, "train.fp16: .*train.bf16"),
        ("train.load_best_model_at_end", True, "train.load_best_model_at_end: .*save_total_limit"),
        ("data.train", [{"path": "data/samples/squad_train.json", "subset": "x"}], r"data.train\[0\].subset: .* write config"),
        ("train.label_smoothing_factor", 1.0, "train.label_smoothing_factor: .* less than 1"),
        ("train.neftune_noise_alpha", 0, "train.neftune_noise_alpha: .* greater than 0"),
        ("train.report_to", "wandbb", "train.report_to.*'tensorboard'.*found 'wandbb'"),
        ("tune", {"method": "ia3", "loraplus_lr_ratio": 2}, "loraplus_lr_ratio works only with method lora"),
        ("tune.loraplus_lr_ratio", 0.5, "tune.loraplus_lr_ratio: .* greater than or equal to 1"),
        ("tune.loraplus_lr_embedding", 1e-6, "loraplus_lr_embedding needs loraplus_lr_ratio"),
        ("train.lr_scheduler_type", "cosine_with_min_lr", "train.lr_scheduler_kwargs: .*min_lr_rate"),
        ("train.lr_scheduler_type", "warmup_stable_decay", "train.lr_scheduler_kwargs: .*num_decay_steps"),
        ("train.lr_scheduler_type", "reduce_lr_on_plateau", "train.lr_scheduler_type: .* 'linear'"),
        ("train.lr_scheduler_kwargs", {"min_lr": 1e-5}, "train.lr_scheduler_kwargs.min_lr: .* linear"),
        ("train", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler_kwargs: "),
        ("data.train", "missing.json", r"data.train\[0\].path: missing.json: no such file"),
        ("data.train", [], "data.train: "),
        ("eval.data", "missing.json", "eval.data.path: missing.json: no such file"),
        ("model.base", "nowhere", "model.base: nowhere is no folder"),
        ("model.chat_template", "none.jinja", "model.chat_template: no such file"),
        ("task", "squad", "task: .* 'squad_v2'"),
        ("train.eval_strategy", "epoch", "eval_strategy epoch needs eval.data"),
        ("tune.method", "freeze", "tune: method freeze needs trainable"),
        ("tune.trainable", ["x"], "tune: trainable works only with method freeze"),
        ("model.quantization", {"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ("model.quantization", {"bnb_4bit_quant_type": "nf4"}, "neither load_in_4bit nor load_in_8bit is true"),
        ("train.seed", 2**32, "train.seed: .* less than 4294967296"),
        ("tune", {"method": "freeze", "trainable": ["("]}, r"tune.trainable: '\(' .* regular expression"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_that_names_key_and_remedy(key, value, message):
    with pytest.raises(RecipeError, match=message) as caught:
        check_recipe(with_key(key, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cosine", {"num_cycles": 0.4}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-6}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-6}),
        ("inverse_sqrt", {"timescale": 50}),
        ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear"}),
    ],
)
def test_schedules_take_the_arguments_that_transformers_has_for_them(name, arguments, tmp_path):
    recipe = check_recipe(with_key("train", {"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments}))
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml").train.lr_scheduler_kwargs == arguments


@pytest.mark.parametrize(("written", "read"), [("none", ()), ("tensorboard", ("tensorboard",)), ([], ())])
def test_trackers_are_a_list_a_name_or_none(written, read):
    assert check_recipe(with_key("train.report_to", written)).train.report_to == read


def test_a_baseline_is_not_told_of_keys_that_it_lacks():
    tree = with_key("train.cutoff_len", 512) | {"objective": "classification", "task": "newsgroups"}
    with pytest.raises(RecipeError, match="train.cutoff_len: unknown key") as caught:
        check_baseline(tree, check_files=False)
    assert "write data.max_length" not in str(caught.value)


def test_quantized_base_refuses_methods_that_train_it():
    tree = with_key("model.quantization", {"load_in_4bit": True}) | {"tune": {"method": "full"}}
    with pytest.raises(RecipeError, match="tune.method full .* model.quantization"):
        check_recipe(tree)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1E5", 1e5), ("-.5", -0.5), ("7", 7), ("012", 12), ("no", "no"), ("on", "on"), ("yes", "yes"),
        ("true", True), ("null", None), ("~", None), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("0x10", "0x10"),
        ("1_000", "1_000"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert parse(f"key: {text}", "r.yaml") == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"r\.yaml:2: the key a .*twice"),
        ("a: {b: 1, b: 2}", r"r\.yaml:1: the key b .*twice"),
        ("a: &x 1\nb: *x", r"r\.yaml:1: anchors and aliases"),
        ("a: !!python/object/apply:os.system ['x']", r"r\.yaml:1: the tag .* is not allowed"),
        ("a: [1,", r"r\.yaml:1"),
        ("a: " + 5000 * "7", r"r\.yaml: .* value: Exceeds"),
        ("a: " + 3000 * "[", r"r\.yaml: .* value: maximum recursion"),
        ("a:\n\t- b", r"r\.yaml:2"),
        ("? [1]\n: 2", r"r\.yaml:1: a key .*plain text"),
    ],
)
def test_surprising_yaml_is_refused_with_its_line(text, message):
    with pytest.raises(YamlError, match=message):
        parse(text, "r.yaml")


def test_types_come_from_the_field(tmp_path):
    path = write_recipe(
        tmp_path / "r.yaml", "owner/model", train="{learning_rate: '2e-4', save_strategy: no, bf16: no}"
    )
    train = load_recipe(path).train
    assert (train.learning_rate, train.save_strategy, train.bf16) == (2e-4, "no", False)


def test_values_of_a_peft_config_come_from_its_fields_too():
    tune = check_recipe(with_key("tune", {"method": "lora", "use_dora": "no", "r": "8"})).tune
    assert tune.peft == {"use_dora": False, "r": 8}


def test_overrides_set_keys_at_any_depth(tmp_path):
    path = write_recipe(tmp_path / "r.yaml", "owner/model")
    recipe = load_recipe(path, ["train.learning_rate=3e-4", "model.quantization.load_in_4bit=true", "tune.r=2"])
    assert recipe.train.learning_rate == 3e-4
    assert recipe.model.quantization is not None
    assert recipe.tune.peft["r"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train", "write KEY=VALUE"),
        ("data.train.0.path=x", "no such file|is a value|is a list"),
        ("task.x=1", "--set task.x: task is a value"),
        ("train.lr=1", "unknown key"),
    ],
)
def test_override_that_fits_nowhere_is_an_error(tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path / "r.yaml", "owner/model"), [override])


def test_dumped_recipe_reads_back_as_the_same():
    recipe = check_recipe(with_key("tune", {"method": "ia3", "target_modules": ["k_proj"]}))
    assert check_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_schema_describes_every_section():
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == {"task", "model", "tune", "data", "train", "eval", "export"}
    assert schema["$defs"]["Train"]["additionalProperties"] is False


def test_every_declared_key_is_read_somewhere():
    """A key that nothing reads is a promise that is not kept."""
    import inspect

    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    import sft.recipe.schema as schema

    files = (*ROOT.rglob("sft/**/*.py"), *ROOT.rglob("data/**/*.py"))
    code = "".join(p.read_text() for p in files if p.name not in ("recipe.py", "recipe_file.py"))
    owners = {
        schema.Model: ("model", "recipe.model"), schema.Tune: ("tune", "recipe.tune"), schema.Data: ("data", "recipe.data"),
        schema.Eval: ("settings", "recipe.eval"), schema.Export: ("recipe.export",), schema.TrainSource: ("source", "s"),
        schema.Recipe: ("recipe",),
    }  # fmt: skip
    for section, names in owners.items():
        for key in section.model_fields:
            assert any(re.search(rf"\b{re.escape(name)}\.{key}\b", code) for name in names), f"{section.__name__}.{key}"
    assert set(schema.Audit.model_fields) == {*AUDITS, "leaks"}
    # these two sections are passed on as a whole
    own = {"examples_per_step", "attn_implementation", "compile_layers"}  # read by name
    assert set(schema.Train.model_fields) - own <= set(SFTConfig.__dataclass_fields__)
    assert set(schema.Quantization.model_fields) <= set(inspect.signature(BitsAndBytesConfig).parameters)


SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
BASELINES = [path for path in SHIPPED if "\nobjective:" in path.read_text()]


@pytest.mark.parametrize("path", BASELINES, ids=lambda p: p.stem)
def test_shipped_baseline_loads(path: Path):
    recipe = load_any_recipe(path)
    assert recipe.eval.data or recipe.eval.share
    assert path.name in path.read_text().splitlines()[0]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem != "qwen_lora" else [], id=path.stem)
        for path in SHIPPED
        if path not in BASELINES
    ],
)
def test_shipped_recipe_loads_and_dry_runs(path: Path, tiny_qwen, capsys):
    from sft.training.dry_run import print_plan

    overrides = []
    if path.stem.startswith(("qwen", "smollm_squad")):
        overrides += ["data.train=data/samples/squad_train.json", "eval.data=data/samples/squad_dev.json"]
    if path.stem.startswith("qwen"):
        overrides.append(f"model.base={tiny_qwen}")
    print_plan(load_recipe(path, overrides))
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert "estimated time" in printed
    head = path.read_text().splitlines()[0]
    assert path.name in head


def test_splits_of_one_dataset_train_and_evaluate_and_one_file_does_not():
    for name in ("sklearn:20newsgroups", "owner/data"):
        tree = with_key("eval.data", name) | {"data": {"train": name}}
        assert check_recipe(tree).eval.data.path == name
        tree["eval"] = {"data": {"path": name, "split": "train"}}
        with pytest.raises(RecipeError, match="is also in data.train"):
            check_recipe(tree)
    with pytest.raises(RecipeError, match="is also in data.train"):
        check_recipe(with_key("eval.data", "./data/samples/squad_train.json"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_config_is_one_that_accelerate_reads(path: Path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes == 2
