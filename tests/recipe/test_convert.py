"""Training files of other programs become recipes; what has no match or changes is a comment."""

import json
import random
from pathlib import Path

import pytest
import yaml

from sft.errors import RecipeError
from sft.recipe.convert import convert
from sft.recipe.load import load_recipe
from tests.helpers.graft import run as graft

TOKEN = "hf_" + 30 * "a"
ALPACA = [{"question": f"Where is ferry {i}?", "answer": f"At pier {i}."} for i in range(20)]
TURNS = [[{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}] for i in range(20)]
SHAREGPT = [
    [{"from": "human", "value": turn["content"]}, {"from": "gpt", "value": answer["content"]}] for turn, answer in TURNS
]
LLAMA_FACTORY = """\
### model
model_name_or_path: {base}
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
loraplus_lr_ratio: 16.0
### dataset
dataset: ferries,chats
template: llama3
cutoff_len: 512
max_samples: 1000
overwrite_cache: true
### output
output_dir: saves/ferry/lora/sft
save_steps: 500
report_to: none  # choices: [none, wandb, tensorboard]
hub_token: {token}
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
neftune_noise_alpha: 5
### eval
val_size: 0.2
eval_strategy: steps
eval_steps: 500
"""
REGISTRY = {
    "ferries": {"file_name": "ferries.json", "columns": {"prompt": "question", "response": "answer"}},
    "chats": {
        "file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "old": {"file_name": "old.jsonl", "formatting": "sharegpt"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
    "hub": {"hf_hub_url": "owner/name", "subset": "de", "formatting": "sharegpt"},
}  # fmt: skip
AXOLOTL = """\
base_model: {base}
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: ferries.json
    type:
      field_instruction: question
      field_output: answer
      format: "[INST] {{instruction}} [/INST]"
  - path: chats.jsonl
    type: chat_template
    field_messages: turns
    roles_to_train: [assistant]
  - path: old.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {{role: from, content: value}}
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 1024
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project: ferries
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens: {{pad_token: "<|end_of_text|>"}}
"""
JOB = {
    "object": "fine_tuning.job", "id": "ftjob-abc123", "model": "gpt-4o-mini-2024-07-18", "organization_id": "org-1",
    "training_file": "file-abc123", "validation_file": None, "seed": 7, "status": "succeeded",
    "method": {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
    },
    "integrations": [{"type": "wandb", "wandb": {"project": "ferries"}}],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder that the program is started from."""
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "data"):
        (folder / "ferries.json").write_text(json.dumps(ALPACA))
        for name, key, talks in (("chats", "turns", TURNS), ("old", "conversations", SHAREGPT)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({key: talk}) + "\n" for talk in talks))
    (tmp_path / "file-abc123.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TURNS))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(REGISTRY))
    return tmp_path


def converted(file: Path, text: str) -> tuple[str, dict]:
    file.write_text(text)
    recipe = convert(file)
    return recipe, yaml.safe_load(recipe)


def job(**changes) -> str:
    return json.dumps(JOB | changes)


def test_llama_factory_file_has_its_values_datasets_and_a_comment_for_the_rest(place):
    text, tree = converted(place / "lf.yaml", LLAMA_FACTORY.format(base="owner/base", token=TOKEN))
    assert tree["tune"] == {
        "method": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "loraplus_lr_ratio": 16.0,
    }  # fmt: skip
    assert tree["data"]["train"] == [
        {"path": "data/ferries.json", "format": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
        {"path": "data/chats.jsonl", "format": "messages", "columns": {"messages": "turns"}},
    ]
    train = tree["train"]
    assert (train["examples_per_step"], train["warmup_steps"], train["num_train_epochs"]) == (16, 0.1, 3.0)
    assert (train["neftune_noise_alpha"], train["report_to"], train["save_strategy"]) == (5, [], "steps")
    assert (tree["data"]["max_length"], tree["eval"]["share"]) == (512, 0.2)
    comments = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
    for key in ("template", "trust_remote_code", "overwrite_cache", "hub_token", "bf16", "gradient_accumulation_steps"):
        assert key in comments
    assert TOKEN not in text


def test_axolotl_file_has_its_values_datasets_and_a_comment_for_the_rest(place):
    text, tree = converted(place / "ax.yml", AXOLOTL.format(base="owner/base"))
    assert tree["model"] == {"base": "owner/base", "quantization": {"load_in_4bit": True}}
    assert tree["tune"] == {
        "method": "lora",
        "r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert tree["data"]["train"] == [
        {"path": "ferries.json", "format": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
        {"path": "chats.jsonl", "format": "messages", "columns": {"messages": "turns"}},
        {"path": "old.jsonl", "format": "sharegpt"},
    ]
    train = tree["train"]
    assert (train["lr_scheduler_type"], train["lr_scheduler_kwargs"]) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    assert (train["examples_per_step"], train["optim"], train["save_strategy"]) == (8, "adamw_8bit", "epoch")
    for key in (
        "sample_packing",
        "special_tokens",
        "flash_attention",
        "roles_to_train",
        "wandb_project",
        "type.format",
    ):
        assert key in text


@pytest.mark.parametrize("adapter", ["adapter:", ""])
def test_axolotl_without_adapter_trains_the_whole_model(adapter, place):
    text = AXOLOTL.format(base="owner/base").replace("adapter: qlora", adapter).replace("load_in_4bit: true", "")
    recipe, tree = converted(place / "ax.yml", text)
    assert tree["tune"] == {"method": "full"}
    assert "lora_alpha" in recipe


def test_schedule_that_is_not_known_here_is_a_comment(place):
    text, tree = converted(place / "ax.yml", AXOLOTL.format(base="owner/base").replace("cosine\n", "rex\n"))
    assert "lr_scheduler_type" not in tree["train"]
    assert "rex" in text
    assert "cosine_min_lr_ratio" in text


def test_openai_job_has_its_hyperparameters_and_an_open_base(place):
    text, tree = converted(place / "job.json", job())
    assert tree["data"]["train"] == [{"path": "file-abc123.jsonl", "format": "messages"}]
    train = tree["train"]
    assert (train["num_train_epochs"], train["examples_per_step"], train["seed"]) == (4, 16, 7)
    assert train["learning_rate"] == pytest.approx(1e-4)
    assert "gpt-4o-mini" in text
    assert "integrations" in text
    assert "org-1" not in text


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({"method": None, "hyperparameters": {"n_epochs": 2}}, 2),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}}, 3),
        ({"method": {"type": "supervised"}}, 3),
    ],
)
def test_openai_job_of_any_version_of_the_interface(changes, epochs, place):
    assert converted(place / "job.json", job(**changes))[1]["train"]["num_train_epochs"] == epochs


def test_file_that_openai_keeps_is_to_be_downloaded(place):
    text, tree = converted(place / "job.json", job(training_file="file-elsewhere"))
    assert tree["data"]["train"][0]["path"] == "file-elsewhere.jsonl"
    assert "training_file" in text


@pytest.mark.parametrize("program", ["llama_factory", "axolotl", "openai"])
def test_imported_recipe_passes_the_check(program, place, tiny):
    files = {
        "llama_factory": ("f.yaml", LLAMA_FACTORY.format(base=tiny, token=TOKEN)),
        "axolotl": ("f.yaml", AXOLOTL.format(base=tiny)),
        "openai": ("f.json", job()),
    }
    name, text = files[program]
    (place / name).write_text(text)
    graft("import", name, "--out", "r.yaml")
    assert "Ready to train" in graft("check", "r.yaml", "--set", f"model.base={tiny}").stdout
    assert load_recipe(place / "r.yaml").task == "instruct"
    assert "r.yaml" in graft("import", name, "--out", "r.yaml", code=2).stderr


def test_dataset_names_are_found_beside_the_file_and_on_the_hub(place, monkeypatch):
    text = LLAMA_FACTORY.format(base="owner/base", token="").replace("ferries,chats", "hub, old")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    _, tree = converted(place / "lf.yaml", text)
    assert tree["data"]["train"][0] == {"path": "owner/name", "format": "sharegpt", "config": "de"}
    assert Path(tree["data"]["train"][1]["path"]).is_file()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("a: 1", "LLaMA-Factory"),
        ("[1]", "LLaMA-Factory"),
        ("a: [", "f.yaml:1"),
        ("a: !!python/object/apply:os.system ['x']", "tag"),
        (LLAMA_FACTORY.replace("stage: sft", "stage: dpo"), "stage: dpo"),
        (LLAMA_FACTORY.replace("type: lora", "type: freeze"), "finetuning_type: freeze"),
        (LLAMA_FACTORY.replace("ferries,chats", "nowhere"), "dataset: nowhere"),
        (LLAMA_FACTORY.replace("ferries,chats", "pairs"), "dataset: pairs"),
        (LLAMA_FACTORY.replace("size: 2", "size: many"), "per_device_train_batch_size"),
        (LLAMA_FACTORY.replace("1.0e-4", "fast"), "train.learning_rate"),
        (LLAMA_FACTORY.replace("lr_scheduler_type: cosine", "lr_scheduler_type: [a]"), "train.lr_scheduler_type"),
        (AXOLOTL.replace("adapter: qlora", "adapter: llama-adapter"), "adapter: llama-adapter"),
        (AXOLOTL + "rl: dpo\n", "rl: dpo"),
        (AXOLOTL.replace("type: chat_template", "type: completion"), r"datasets\[1\].type: completion"),
    ],
)
def test_file_that_no_recipe_can_be_made_of_is_refused_by_name(text, key, place):
    with pytest.raises(RecipeError, match=key):
        converted(place / "f.yaml", text.format(base="owner/base", token=""))


@pytest.mark.parametrize("method", ["dpo", "reinforcement"])
def test_job_that_is_not_supervised_is_refused(method, place):
    with pytest.raises(RecipeError, match=f"method.type: {method}"):
        converted(place / "job.json", job(method={"type": method}))


def test_file_of_another_program_is_not_taken_for_a_recipe(place):
    (place / "ax.yml").write_text(AXOLOTL.format(base="owner/base"))
    with pytest.raises(RecipeError, match="Axolotl.*graft import"):
        load_recipe(place / "ax.yml")


@pytest.mark.parametrize("seed", range(3))
def test_any_value_is_converted_or_refused(seed, place):
    """No traceback, no secret, and what is written is read back."""
    rng = random.Random(seed)
    values = [
        None,
        True,
        -1,
        0.5,
        "",
        "auto",
        "a\nb: c",
        "x\u2028y",
        [],
        {},
        [{"a": 1}],
        {"a": [None]},
        TOKEN,
        10**30,
        "é" * 300,
    ]
    trees = [yaml.safe_load(t.format(base="owner/base", token=TOKEN)) for t in (LLAMA_FACTORY, AXOLOTL)] + [JOB]
    outcomes = set()
    for _ in range(150):
        tree = json.loads(json.dumps(rng.choice(trees)))
        for _ in range(rng.randrange(1, 3)):
            key = rng.choice([*tree, "new key", "a\nb", "wandb_api_key"])
            tree[key] = rng.choice(values)
        if isinstance(tree.get("datasets"), list) and tree["datasets"] and isinstance(tree["datasets"][0], dict):
            tree["datasets"][0][rng.choice(["type", "path", "split", "data_files", "name"])] = rng.choice(values)
        file = place / "f.json"
        file.write_text(json.dumps(tree))
        try:
            text = convert(file)
        except RecipeError:
            outcomes.add("refused")
        else:
            outcomes.add("converted")
            assert TOKEN not in text
            (place / "r.yaml").write_text(text)
            load_recipe(place / "r.yaml", check_files=False)
    assert outcomes == {"refused", "converted"}
