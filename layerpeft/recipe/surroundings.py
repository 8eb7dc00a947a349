"""What a recipe names outside of itself: rows, the model's folder, the output folder, trackers, devices."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from layerpeft.errors import LayerpeftError, Problem, Problems, RecipeError, mentions, told, unknown
from layerpeft.integrations import sentences
from layerpeft.integrations.engines.engine import Engine
from layerpeft.integrations.engines.known import asked_for
from layerpeft.integrations.places import ADDRESS, expanded, missing
from layerpeft.model.precisions import missing_packages, named
from layerpeft.planning import optimizer_bytes
from layerpeft.quantization.config import LayerQuantConfig, used
from layerpeft.recipe import keys, rows, sources
from layerpeft.recipe.beside import losses, rewards, teachers
from layerpeft.recipe.beside.models import place_of
from layerpeft.recipe.forms import other_trainer
from layerpeft.recipe.recipe import Recipe, training_arguments
from layerpeft.recipe.shipped import beside, resolve
from layerpeft.recipe.tasks.shape import problems_of
from layerpeft.recipe.trainers.row import Row
from layerpeft.recipe.trainers.table import task_of
from layerpeft.saving.checkpoints import checkpoint_troubles, last_checkpoint
from layerpeft.saving.manifest import ADAPTER_FILES, MANIFEST, SHORTER
from layerpeft.saving.owned import RECORD, completed, files_below, strangers
from layerpeft.text import some
from layerpeft.tuners.config import QUANT_FIELDS, LayerLoraConfig
from layerpeft.tuners.merge import TOKENIZER
from layerpeft.tuners.precision import batches_wanted

# what each command writes into output_dir
SHORTER_RECORD = f"{SHORTER}.json"  # of what a shortened model lost
SCORED, COMPARED = ("scores.json", "scores.csv", "scores.png"), ("compare.json", "compare.png", "report.html")
RUNS = "compare.jsonl"  # of a comparison, as they end: its lines say themselves that they are ours
TRAINED = (
    *ADAPTER_FILES, MANIFEST, SHORTER_RECORD,
    "README.md", "recipe.yaml", "labels.json", "log.jsonl", "training_loss.png", "run.json", "report.html",
    *TOKENIZER, *sentences.FILES,
)  # fmt: skip
ITS_LOSS = "is learned beside the loss that a model makes by itself, and trainer:"
MODEL, TEACHER = "model_name_or_path", "teacher_model_name_or_path"
# how what a trainer needs is written
NEEDED = {
    "rewards": f", which say how good an answer is, as in `{rewards.EXAMPLE}`",
    TEACHER: ", the model that it learns from",
}
BESIDE = (*SCORED, *COMPARED, RUNS, RECORD)  # a run may start beside them

# what from_pretrained would be told past the keys that say which code runs
CODE = {
    "trust_remote_code": "write it at the top level, where it is seen: trust_remote_code: true",
    "code_revision": "write model_revision at the top level: a model and its code are of one revision",
    "weights_only": "pickles are not run; take the key out",
    "use_kernels": "fetches code; take the key out",
    "kernel_config": "fetches code; take the key out",
    "allow_all_kernels": "runs code of any origin; take the key out",
}

# what an engine that divides a model cannot do
IN_ONE = {
    "drop": "a model is shortened whole, and {} divides it: run this once without that (max_steps: 1 will do), then train the "
    "folder `shorter` of its output_dir as model_name_or_path, with drop taken out",
    "exits": "the head runs once for every exit within a pass, which {} does not let it; DDP and one process do",
}

# what to install for a tracker whose package is called otherwise
PIP = {"comet_ml": "comet-ml", "azure_ml": "azureml-core"}


def _of(key: str, sentence: str) -> Problem:
    """What is wrong with a top-level key."""
    return Problem((key,), f"{key}: {sentence}")


def on_hub(good: Mapping[str, Any]) -> bool:
    """Whether model or rows have to come from the hub."""
    named = [good.get(key) for key in (MODEL, TEACHER)]
    for value in (good.get("dataset_name"), good.get("eval_dataset")):
        named += sources.paths(value) if isinstance(value, str) or sources.several(value) else []
    named += [item for item in rewards.listed(good.get("rewards")) if isinstance(item, str) and "/" in item]
    return any(
        isinstance(n, str) and ADDRESS.fullmatch(n) and not Path(n).exists() and Path(n).suffix not in rows.READERS
        for n in named
    )


PATHS = (
    "model_name_or_path", "dataset_name", "eval_dataset", "resume_from_checkpoint", "chat_template_path", "deepspeed",
    "fsdp_config", "accelerator_config", TEACHER,
)  # fmt: skip


def placed(good: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """The settings, with every path that lies beside the recipe alone as a path from the current folder."""
    found = dict(good)
    if "rewards" in good:
        found["rewards"] = [
            beside(item, home) if rewards.is_place(item) else item for item in rewards.listed(good["rewards"])
        ]
    for key in PATHS:
        value = good.get(key)
        if isinstance(value, str):
            found[key] = beside(value, home)
        elif isinstance(value, list):
            found[key] = sources.renamed(value, lambda item: beside(item, home))
    return found


# ---- rows -----------------------------------------------------------------------------------------------------------


def data_problems(
    good: Mapping[str, Any],
    trainer: str,
    purpose: str,
    judged: bool = True,
    home: Path | None = None,
    sees: bool = False,
    of: Callable[[str, str], Problem] = _of,
) -> list[Problem]:
    """What is wrong with the rows and with the templates that read them; `judged`: the templates are known to be good or bad; `of`:
    makes a problem of what is wrong with a top-level key."""
    found: list[Problem] = []
    columns, field = good.get("columns"), good.get("dataset_text_field", "text")
    task = task_of(trainer, sees)
    if columns is not None and (
        wrong := rows.form_problem(trainer, columns, task.forms if task else (), task.more if task else ())
    ):
        name, sentence = wrong
        found.append(Problem(("columns", name), f"columns{'.' if name else ''}{name}: {sentence}"))
        judged = False
    for key in ("dataset_name", "eval_dataset"):
        if good.get(key) is None:
            continue
        try:
            files = _files(good[key], key, home)
            have = {file: rows.columns_of(file) for file in files or ()}
            broken = [s for file in files or () for s in rows.broken_lines(file)]
        except LayerpeftError as error:
            found += [of(key, problem.text) for problem in error.listed()]
            continue
        found += [of(key, sentence) for sentence in broken]
        if (
            key == "dataset_name"
            and good.get("sample_by")
            and files
            and not any(file.suffix == ".txt" for file in files)
        ):
            found.append(of("sample_by", "is for plain text (.txt), and the rows are no such files; take it out"))
        for file, names in have.items() if judged else ():
            place = f"{file}: " if len(have) > 1 else ""
            found_here = (
                rows.column_problems(trainer, names, columns, field)
                if task is None
                else problems_of(task, names, columns)
            )
            if any(not name for name, _ in found_here):
                found_here = [
                    (name, sentence + ("" if name else other_trainer(names))) for name, sentence in found_here
                ]
            for name, sentence in found_here:
                own = Problem(("columns", name), f"columns.{name}: {place}{sentence} ({key})")
                found.append(own if name else of(key, place + sentence))
        if files and key == "dataset_name":
            unread = [k for k in ("dataset_config", "dataset_train_split") if good.get(k) not in (None, "train")]
            found += [of(k, "files have neither splits nor configurations; name the file itself") for k in unread]
        if files and key == "dataset_name" and good.get("eval_dataset") is None:
            found += _held_out(good, purpose)
    return found


def _files(value: Any, key: str, home: Path | None) -> list[Path]:
    """The local files of all data sets that a value names. Raises: RecipeError with what is wrong with each."""
    problems = Problems("")
    found: list[Path] = []
    for one in sources.named(value, weighs=key == "dataset_name"):
        try:
            found += rows.local_files(one.path, home) or []
        except LayerpeftError as error:
            problems.absorb(error)
    problems.raise_if_any(RecipeError)
    return found


def _held_out(good: Mapping[str, Any], purpose: str) -> list[Problem]:
    """Files have no test split: what needs held-out rows needs `eval_dataset`."""
    found: list[Problem] = []
    if purpose == "compare":
        found.append(Problem(("dataset_name",), "eval_dataset: missing; arms are compared on held-out rows"))
    if good.get("eval_strategy", "no") != "no":
        found.append(_of("eval_strategy", "evaluates during training, but there is no eval_dataset"))
    if "dataset_test_split" in good:
        found.append(_of("dataset_test_split", "files have no splits; name the held-out file with eval_dataset"))
    return found


# ---- folders --------------------------------------------------------------------------------------------------------


def beside_problems(good: Mapping[str, Any], row: Row, purpose: str, home: Path, wrong: set[str]) -> list[Problem]:
    """What a trainer needs besides a model and rows, or cannot have."""
    found = [
        Problem((), f"{key}: missing; trainer: {row.name} needs it{NEEDED[key]}")
        for key in row.needs
        if not good.get(key) and key not in wrong
    ]
    if losses.KEY in row.keys:
        found += losses.problems(good.get(losses.KEY))
    engine = asked_for(SimpleNamespace(**good)) if row.vectors else None
    if engine is not None:
        text = f"{row.name} trains in one process, or in several that hold the whole model each (DDP); {engine.name} divides it"
        found.append(_of("trainer", text))
    if "rewards" in row.keys:
        found += rewards.problems(good.get("rewards"), home)
    if TEACHER in row.needs:
        lost, lacking = _model(good, home, TEACHER)
        found += lost + ([_of(TEACHER, lacking)] if lacking else [])
    if not row.evaluates:
        asked = [key for key in ("eval_dataset", "eval_strategy") if good.get(key) not in (None, "no")]
        found += [_of(key, f"trainer: {row.name} measures nothing on held-out rows; take it out") for key in asked]
    if not row.evaluates and purpose == "compare":
        found.append(_of("trainer", f"{row.name} measures nothing on held-out rows, by which arms are compared"))
    if not row.alone and purpose == "score":
        text = f"{row.name}: layers are scored by its loss in its own first step alone; trainer: sft scores them beforehand"
        found.append(_of("trainer", text))
    return found


def batch_problems(good: Mapping[str, Any], row: Row, config: LayerLoraConfig | None) -> list[Problem]:
    """What is measured or learned by the loss that a model makes of a batch by itself, of trainers that have another."""
    if row.alone:
        return []
    found = []
    if good.get("exits") is not None:
        found.append(_of("exits", f"{ITS_LOSS} {row.name} has its own; take it out"))
    if config is not None and config.distill is not None:
        found.append(Problem(("layerpeft", "distill"), f"distill: {ITS_LOSS} {row.name} has its own; take it out"))
    if config is not None and batches_wanted(config):
        text = f"precisions are measured on batches before training, of which a model makes no loss without trainer: {row.name}"
        found.append(Problem(("layerpeft", "quant"), f"quant: {text}; choose them by weights or by place"))
    return found


def teacher_problems(recipe: Recipe, wrong: set[str]) -> list[Problem]:
    """What keeps a teacher from teaching this model; of one on the hub it is found when it is loaded."""
    if TEACHER not in recipe.row.needs or wrong & {MODEL, TEACHER, "model_init_kwargs", "teacher_model_init_kwargs"}:
        return []
    try:
        if recipe.values.get(TEACHER) and Path(place_of(recipe[TEACHER])).is_dir():
            teachers.check(recipe)
    except RecipeError as error:
        return list(error.problems)
    return []


def folder_problems(good: Mapping[str, Any], purpose: str, home: Path | None = None) -> tuple[list[Problem], list[str]]:
    """What is wrong with the model's folder and the output folder, and what is only worth a word before training."""
    model, lacking = _model(good, home)
    output, full = _output(good, purpose, home)
    if purpose in ("plan", "preview"):
        return model + output, [f"{lacking}; a {purpose} needs none, training does"] * bool(lacking) + [full] * bool(
            full
        )
    model += [_of("model_name_or_path", lacking)] if lacking else []
    return model + output + ([Problem(("output_dir",), full)] if full else []), []


def _model(good: Mapping[str, Any], home: Path | None, key: str = MODEL) -> tuple[list[Problem], str]:
    wrong, lacking = ("", "") if good.get(key) is None else model_trouble(good[key], home)
    return ([_of(key, wrong)] if wrong else []), lacking


def model_trouble(name: str, home: Path | None = None) -> tuple[str, str]:
    """What is wrong with the folder of a model, and what it lacks for training; each empty where nothing is."""
    try:
        path = expanded(resolve(name))
    except RecipeError as error:
        return str(error), ""
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            return f"{path} holds an adapter, not a model; name its base model", ""
        if not (path / "config.json").is_file():
            return f"{path} has no config.json, so it is no model", ""
        if not any(held.endswith((".safetensors", ".bin")) for held in os.listdir(path)):
            return "", f"{path} has no weights (*.safetensors)"
    elif path.is_file():
        return f"{name!r} is a file; name the folder that holds config.json and the weights", ""
    elif not ADDRESS.fullmatch(name):
        return missing("folder", name, home), ""
    return "", ""


def _output(good: Mapping[str, Any], purpose: str, home: Path | None) -> tuple[list[Problem], str]:
    if "output_dir" not in good:
        return [], ""
    found: list[Problem] = []
    full = ""
    folder, resume = expanded(good["output_dir"]), good.get("resume_from_checkpoint")
    again = "resume_from_checkpoint"
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        found.append(_of("output_dir", f"{folder} is a {'file' if folder.exists() else 'link that leads nowhere'}"))
    elif resume is True:
        if not folder.is_dir() or last_checkpoint(folder) is None:
            found.append(_of(again, f"there is no complete checkpoint in {folder}"))
    elif isinstance(resume, str):
        if not expanded(resume).is_dir():
            found.append(_of(again, f"{missing('folder', resume, home)} (`true` takes the newest)"))
        elif troubles := checkpoint_troubles(expanded(resume)):
            found.append(_of(again, f"{resume} is not complete: {'; '.join(troubles)}"))
    elif purpose in ("train", "plan") and not good.get("overwrite_output_dir") and folder.is_dir():
        held = sorted(p.name for p in folder.iterdir() if p.name not in BESIDE)
        if held:
            full = (
                f"output_dir: {folder} is not empty ({some(held, 4, ', ...')}). Name another"
                f" ({shlex.quote(f'output_dir={folder}-2')}), go on with that run (resume_from_checkpoint=true), or write over it"
                " (overwrite_output_dir=true)"
            )
    if folder.is_dir() and (mine := _theirs(folder, good, purpose)):
        theirs = _not_ours(folder, mine)
        full, found = (theirs.text, found) if purpose == "plan" else (full, [*found, theirs])
    if resume and good.get("overwrite_output_dir"):
        found.append(_of("overwrite_output_dir", "resuming and writing over the run exclude each other"))
    return found, full


def checkpoints_in(folder: Path) -> list[str]:
    """The checkpoints of a run in its folder, by name."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(p.name for p in there if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir())


def refuse_strangers(folder: Path, names: Sequence[str]) -> None:
    """Raises: RecipeError where one of these names in a folder belongs to something that layerpeft did not write."""
    if mine := strangers(folder, names):
        raise RecipeError(_not_ours(folder, mine))


def _not_ours(folder: Path, names: Sequence[str]) -> Problem:
    other = shlex.quote(f"{folder}-2" if folder.name else "out")
    return _of(
        "output_dir",
        f"{folder} holds what layerpeft did not write, or what was changed since, and would replace or remove: "
        f"{some(names, 6, ', … ({} more)')}. Move it, or name another folder (output_dir={other})",
    )


def _theirs(folder: Path, good: Mapping[str, Any], purpose: str) -> list[str]:
    """What a command would replace or remove in its output folder, although layerpeft did not write it."""
    overwrite = bool(good.get("overwrite_output_dir"))
    if purpose not in ("train", "plan") or not overwrite and not good.get("resume_from_checkpoint"):
        return []
    # a new run clears the old one away, a limit all but the newest; one that was cut short while it was saved is on no record
    limited = completed(folder) if good.get("save_total_limit") else set()
    gone = [name for name in checkpoints_in(folder) if overwrite or name in limited] + [SHORTER] * overwrite
    gone += [p.name for p in folder.glob("exit-*") if p.is_dir()] * bool(good.get("exits"))
    old = [file for name in gone for file in files_below(folder, name)]
    return strangers(folder, (*TRAINED, RECORD, *old))


# ---- trackers, devices, arguments -----------------------------------------------------------------------------------


def device_problems(good: Mapping[str, Any]) -> list[Problem]:
    """Trackers, optimizers and kernels that are not there."""
    found: list[Problem] = []
    asked = good.get("report_to") or []
    names = [name for name in ([asked] if isinstance(asked, str) else asked) if name not in ("none", "all", "flyte")]
    if names:
        from transformers.integrations import get_available_reporting_integrations
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        there, known = get_available_reporting_integrations(), ["none", "all", *INTEGRATION_TO_CALLBACK]
        for name in [n for n in names if n not in there]:
            need = "set KUBEFLOW_TRAINER_SERVER_URL" if name == "kubeflow" else f"pip install {PIP.get(name, name)}"
            sentence = f"{name!r} is not there ({need})" if name in known else unknown("tracker", name, known)
            found.append(_of("report_to", sentence))
    optim = str(good.get("optim", ""))
    if optimizer_bytes.needs_full_weights(optim):
        found.append(_of("optim", str(optimizer_bytes.problem(optim))))
    attention = str(good.get("attn_implementation") or "")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention)
    if package and importlib.util.find_spec(package) is None:
        sentence = f"{attention} needs a package that is not installed ({package}); write `attn_implementation: sdpa`"
        found.append(_of("attn_implementation", sentence))
    for name in ("teacher_model_init_kwargs", "model_init_kwargs"):
        nested = good.get(name)
        found += [_of(name, f"{key}: {CODE[key]}") for key in CODE if isinstance(nested, dict) and key in nested]
    quantized = isinstance(nested, dict) and nested.get("quantization_config")
    if quantized and importlib.util.find_spec("bitsandbytes") is None:
        found.append(_of("model_init_kwargs", "quantization needs bitsandbytes (pip install bitsandbytes)"))
    return found + _precision_problems(good.get("layerpeft"), bool(quantized))


def _precision_problems(block: Any, quantized: bool) -> list[Problem]:
    """Precisions by layer over a base that is quantized whole, or by packages that are not there."""
    given = {k: v for k in QUANT_FIELDS if isinstance(block, Mapping) and (v := block.get(k)) is not None}
    found: list[Problem] = []
    for key, value in given.items():
        if quantized:
            sentence = f"{key}: model_init_kwargs quantizes the whole model already; take its quantization_config out"
            found.append(Problem(("layerpeft", key), sentence))
        with contextlib.suppress(LayerpeftError, ValueError, TypeError):  # reported where the config is made
            kinds = (named(value),) if key != "quant" else used(LayerQuantConfig.parse(value))
            missing = missing_packages(kinds)
            if missing:
                sentence = f"{key}: needs {' and '.join(missing)} (pip install 'layerpeft[quant]')"
                found.append(Problem(("layerpeft", key), sentence))
    return found


def engine_problems(good: Mapping[str, Any], config: LayerLoraConfig | None) -> list[Problem]:
    """What is asked for and cannot be right under the engine of the training arguments, or of `accelerate launch`."""
    engine = asked_for(SimpleNamespace(**good))
    if engine is None or config is None:
        return []
    alone = [_of(key, sentence.format(engine.name)) for key, sentence in IN_ONE.items() if good.get(key) is not None]
    return alone + _of_engine(engine, good, config)


def _of_engine(engine: Engine, good: Mapping[str, Any], config: LayerLoraConfig) -> list[Problem]:
    found = engine.refusals(sorted(config.needs(batches=True)))
    if good.get(engine.argument):
        return [_of(engine.argument, sentence) for sentence in found]
    why = f"(accelerate launch has asked for {engine.name})"
    return [Problem(("layerpeft", "select"), f"select: {sentence} {why}") for sentence in found]


def argument_problems(recipe: Recipe, complained: set[str]) -> list[Problem]:
    """What the trainer's own arguments class refuses, one after another: each time without the keys that it named."""
    found: list[Problem] = []
    known = keys.argument_settings(recipe.trainer)
    # held-out rows are measured before and after, whatever it says
    measured = {"eval_strategy": "epoch"} if recipe.row.writes and recipe.values.get("eval_dataset") else {}
    for _ in range(8):
        try:
            made = training_arguments(recipe, **measured)
            return found + ([] if "optim" in complained else _optimizer(made))
        except Exception as error:  # constructors of other libraries raise what they like
            text, named = told(error, 400), [k for k in known if mentions(error, k)]
            texts = {k: v for k, v in recipe.values.items() if k in known and isinstance(v, str) and len(v) > 3}
            culprits = [k for k in named if k in recipe.values]
            culprits = culprits or [k for k, v in texts.items() if mentions(error, v, word=False)]
        if not complained & set(named):
            found.append(_of(culprits[0], text) if culprits else Problem((), text))
        if not culprits:
            return found
        left = {k: v for k, v in recipe.values.items() if k not in culprits}
        recipe = replace(recipe, values=left | ({"bf16": False} if "bf16" in culprits else {}))  # TRL's default is true
    return found


def _optimizer(arguments: Any) -> list[Problem]:
    """A package that the optimizer needs and that is not there, or options that it does not take, in transformers' own words."""
    from transformers import Trainer

    name = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer_bytes.needs_full_weights(name):
        return []  # said elsewhere
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except Exception as error:  # of whichever kind each of the optimizers likes
        key = "optim_args" if arguments.optim_args and not mentions(error, "install") else "optim"
        return [_of(key, f"optimizer {name!r}: {told(error, 300)}")]
    return []


def has_bf16() -> bool:
    """Whether a device here multiplies in bfloat16."""
    from transformers.utils import is_torch_bf16_gpu_available

    return is_torch_bf16_gpu_available()
