"""Every shipped recipe as a run of a few steps on the short Llama: a row for each, of what is changed in it."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 2
SIZES = (f"max_steps={STEPS}", "num_train_epochs=1", "max_train_samples=8", "max_eval_samples=2", "sample_tokens=0")
SIZES += ("per_device_train_batch_size=2", "gradient_accumulation_steps=1", "warmup_steps=0", "logging_steps=1")
SIZES += ("save_strategy=steps", "save_steps=1", "use_cpu=true")
BRIEF = ('columns={text: "{answer}"}', "max_length=48")  # rows of a third of their length
CLASSES = ('columns={text: "{after}", label: "{coarse}"}', "max_length=48")


@dataclass(frozen=True)
class Tiny:
    """`block`: settings below `layerpeft:`; `quick`: it runs in the suite, where it stands for its kind, the others are slow."""

    block: tuple[str, ...] = ()
    data: tuple[str, ...] = BRIEF
    quick: bool = False
    base: str = (
        "{}"  # options that plain transformers needs besides, for a base that plain PEFT is to put the adapter on
    )

    @property
    def settings(self) -> list[str]:
        """What follows the recipe's name on a command line."""
        return [*SIZES, *self.data, *(f"layerpeft.{setting}" for setting in self.block)]


# recipes of a trainer, not of a method: tried with every method where trainers are
TASKS = (
    "causal_lm", "image_classification", "masked_lm", "multi_label", "question_answering", "regression", "seq2seq", "speech",
    "token_classification", "vision_sft", "whisper",
)  # fmt: skip

# recipes of TRL's trainers, tried with every method where those are
TRL = ("cpo", "distillation", "dpo", "gkd", "grpo", "kto", "online_dpo", "orpo", "reward", "rloo")

# the recipe of sentence-transformers' trainer, which is an extra
EMBEDDINGS = ("embeddings",)

R = "r=2"
EVERY = ("select.reselect_steps=1",)
BATCHES = ("select.num_batches=2",)

TINY = {
    "adagradselect": Tiny(("select.keep=2", "select.explore=1"), quick=True),
    "adapter_v2": Tiny(base='{"attention_bias": true, "mlp_bias": true}'),
    "aletheia": Tiny((*BATCHES, R, "rank_pattern={up_proj: 4}")),
    "badam": Tiny(EVERY),
    "cka_lora": Tiny((R, *BATCHES)),
    "distill": Tiny((R,)),
    "finercut": Tiny((R,), (*BRIEF, "drop.num_batches=1")),
    "frozen_nf4": Tiny((R, *BATCHES)),
    "full": Tiny(),
    "galore": Tiny((R, "update_proj_gap=1"), quick=True),
    "grass": Tiny(EVERY),
    "ir_tuning": Tiny((R, *EVERY, "select.rescore_steps=1"), CLASSES),
    "ir_tuning_gsm8k": Tiny((R, *EVERY)),
    "ist": Tiny((R, "select.rescore_steps=1")),
    "last_layers": Tiny((R,)),
    "layra": Tiny((R,)),
    "lisa": Tiny(EVERY),
    "lofit": Tiny((*BATCHES, "select.steps=2"), quick=True),
    "lora": Tiny((R,)),
    "ls_lora": Tiny((R, *BATCHES)),
    "luq": Tiny((R, "quant.select.num_batches=1", "quant.select.clusters=8")),
    "mean_bits": Tiny((R, "quant.select.num_batches=1")),
    "outliers": Tiny((R, *BATCHES)),
    "owlore": Tiny((R, *BATCHES, *EVERY)),
    "quickstart": Tiny((R, *BATCHES)),
    "revision": Tiny((R, *BATCHES), CLASSES),
    "slim_llm": Tiny((R, "quant.select.num_batches=1")),
    "soft": Tiny((R,)),
    "spectrum": Tiny(),
    "surgical": Tiny(BATCHES, quick=True),
    "telly": Tiny(),
}
