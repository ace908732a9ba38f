"""Configurations of Axolotl, LLaMA-Factory and TRL as options of `moeify train`, and why some keys have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeify.registry import suggest

Options = dict[str, Any]
Rule = Callable[[Any], Options | str]
"""From the value of a key to options of `moeify train`, or to the reason why there are none."""


@dataclass(frozen=True)
class Translation:
    """What a configuration is in the terms of `moeify train`.

    Attributes:
        options: of `moeify train`, by name.
        left_out: the keys without an equivalent, and why.
        anyway: keys that ask for what `moeify train` does in any case.
        unset: keys that ask for nothing: null, false or empty.
    """

    options: Options = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    anyway: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        import yaml

        notes = [f"# {key}: {reason}" for key, reason in self.left_out.items()]
        rest = {"done in any case": self.anyway, "ask for nothing": self.unset}
        idle = [f"# {what}: {', '.join(keys)}" for what, keys in rest.items() if keys]
        head = ["# without an equivalent, and left out:"] if notes else []
        options = yaml.safe_dump(self.options, sort_keys=False, allow_unicode=True) if self.options else ""
        return "\n".join([*head, *notes, *idle, options])


def translate(program: str, configuration: Mapping[str, Any]) -> Translation:
    """The options of `moeify train` that a configuration of another program amounts to.

    Args:
        program: `axolotl`, `llamafactory` or `trl`.
        configuration: its keys and values, as its file has them.

    Raises:
        ValueError: an unknown program, or a value that cannot be what its key says.
    """
    if program not in PROGRAMS:
        raise ValueError(f"no configuration of {program!r} is known; {suggest(program, list(PROGRAMS))}")
    rules, made = PROGRAMS[program], Translation()
    for key, value in configuration.items():
        if value is None or value is False or value in ([], {}, ""):
            made.unset.append(key)
            continue
        try:
            found = rules.get(key, _unknown)(value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {value!r:.60} cannot be read: {error}") from None
        if isinstance(found, str):
            made.left_out[key] = found
        elif found:
            made.options.update(found)
        else:
            made.anyway.append(key)
    _count_samples(made.options)
    return made


def _count_samples(options: Options) -> None:
    """Turn the samples of a micro-batch into those of a step, which moeify counts."""
    if "batch" in options:
        options["batch"] *= options.get("accumulate", 1)


def _unknown(value: Any) -> str:
    return "moeify train has no option for it"


def _option(name: str, kind: Callable[[Any], Any] = str) -> Rule:
    return lambda value: {name: kind(value)}


def _no(reason: str) -> Rule:
    return lambda value: reason


def _unless(default: Callable[[Any], bool], reason: str) -> Rule:
    """Nothing to say where a value is what `moeify train` does anyway."""
    return lambda value: {} if default(value) else reason


def _weight_of_own_loss(value: Any) -> str:
    return (
        f"at perfect balance the loss of transformers is k, of all layers together, and that of moeify 1, of each; "
        f"balance={value} times k is near it"
    )


_EPOCHS = _no("moeify train counts optimizer steps; set steps")
_ADAPTER = _no("moeify train trains whole models; use PEFT with SparseTrainer or BalanceCallback")
_MEMORY = _no("moeify train has no option for it; SparseTrainer takes it in TrainingArguments")
_LOGS = _no("moeify train writes metrics.jsonl, pictures and report.html in every run")
_OPTIMIZER = _unless(lambda value: str(value).startswith("adamw"), "moeify train uses AdamW")
_SCHEDULE = _unless(lambda value: value == "cosine", "moeify train decays by cosine")
_WARM_UP = _no("moeify train warms up for 5 % of the steps")
_TEMPLATE = _no("moeify train learns plain text, without a template or a mask of the prompt")
_PREFERENCES = _no("moeify train learns no preferences and no rewards; use moeify.integrations.trl")


def _tokens(value: Any) -> Options | str:
    return {"length": int(value)} if int(value) >= 2 else "a sample has at least 2 tokens"


_COMMON: dict[str, Rule] = {
    "output_dir": _option("output"),
    "max_steps": lambda value: {"steps": int(value)} if int(value) > 0 else _EPOCHS(value),
    "gradient_accumulation_steps": _option("accumulate", int),
    "learning_rate": _option("learning_rate", float),
    "weight_decay": _option("weight_decay", float),
    "seed": _option("seed", int),
    "num_train_epochs": _EPOCHS, "num_epochs": _EPOCHS,
    "gradient_checkpointing": _MEMORY, "activation_checkpointing": _MEMORY, "bf16": _MEMORY, "fp16": _MEMORY,
    "max_grad_norm": _MEMORY, "deepspeed": _MEMORY, "fsdp": _MEMORY,
    "logging_steps": _LOGS, "report_to": _LOGS, "save_steps": _LOGS, "save_strategy": _LOGS,
    "optim": _OPTIMIZER, "optimizer": _OPTIMIZER, "lr_scheduler": _SCHEDULE, "lr_scheduler_type": _SCHEDULE,
    "warmup_steps": _WARM_UP, "warmup_ratio": _WARM_UP,
    "router_aux_loss_coef": _weight_of_own_loss, "moe_aux_loss_coef": _weight_of_own_loss,
    "packing": _unless(bool, ""), "sample_packing": _unless(bool, ""),
}  # fmt: skip
"""Keys that several programs share, most of them of `TrainingArguments`; moeify packs texts into blocks anyway."""


def _axolotl_data(value: Any) -> Options | str:
    if len(value) > 1:
        return f"moeify train reads one file, folder or data set, not {len(value)}; put the files into a folder"
    if (kind := value[0].get("type", "completion")) not in ("completion", "pretrain"):
        return f"type {kind!r} has a template, and moeify train learns plain text; its data is {value[0].get('path')}"
    return {"data": value[0]["path"]}


def _axolotl_balance(value: Any) -> Options:
    return {name: value[name] for name in value} if isinstance(value, Mapping) else {"balance": float(value)}


def _axolotl_controller(value: Any) -> Options:
    import json

    return {"controller": value if isinstance(value, str) else json.dumps(value)}


def _axolotl_plugins(value: Any) -> Options | str:
    others = [name for name in value if not name.startswith("moeify.")]
    return f"moeify train runs no plugins of Axolotl: {', '.join(others)}" if others else {}


def _llamafactory_data(value: Any) -> str:
    return f"{value} is a name in dataset_info.json; give its file as data"


PROGRAMS: dict[str, dict[str, Rule]] = {
    "axolotl": _COMMON | {
        "base_model": _option("model"), "sequence_len": _tokens, "micro_batch_size": _option("batch", int),
        "datasets": _axolotl_data, "plugins": _axolotl_plugins, "moe_recipe": _option("recipe"),
        "moe_balance": _axolotl_balance, "moe_controller": _axolotl_controller, "moe_report": _LOGS,
        "adapter": _ADAPTER, "lora_r": _ADAPTER, "lora_alpha": _ADAPTER, "lora_target_modules": _ADAPTER,
        "lora_dropout": _ADAPTER, "chat_template": _TEMPLATE, "rl": _PREFERENCES,
    },
    "llamafactory": _COMMON | {
        "model_name_or_path": _option("model"), "cutoff_len": _tokens,
        "per_device_train_batch_size": _option("batch", int), "dataset": _llamafactory_data,
        "stage": lambda value: {} if value in ("sft", "pt") else _PREFERENCES(value),
        "do_train": _unless(bool, ""), "template": _TEMPLATE,
        "finetuning_type": lambda value: {} if value == "full" else _ADAPTER(value),
        "lora_rank": _ADAPTER, "lora_alpha": _ADAPTER, "lora_target": _ADAPTER, "lora_dropout": _ADAPTER,
    },
    "trl": _COMMON | {
        "model_name_or_path": _option("model"), "max_length": _tokens,
        "per_device_train_batch_size": _option("batch", int), "dataset_name": _option("data"),
        "chat_template_path": _TEMPLATE, "assistant_only_loss": _TEMPLATE,
        "completion_only_loss": _TEMPLATE, "use_peft": _ADAPTER, "lora_r": _ADAPTER, "lora_alpha": _ADAPTER,
        "lora_target_modules": _ADAPTER,
        "beta": _PREFERENCES,
    },
}  # fmt: skip
"""The keys that are understood, by program."""
