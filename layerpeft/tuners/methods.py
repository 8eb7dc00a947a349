"""The methods there are, by the name that recipes and manifests know them by: one row for each."""

from layerpeft.integrations.peft import register
from layerpeft.saving.change import change_of
from layerpeft.selection.scoring import HANDED
from layerpeft.tuners.config import LayerLoraConfig
from layerpeft.tuners.full.config import LayerFullConfig
from layerpeft.tuners.galore.config import LayerGaloreConfig
from layerpeft.tuners.head.config import LayerHeadConfig
from layerpeft.tuners.model import tuner_for
from layerpeft.tuners.trial import run_steps
from layerpeft.tuners.unlock.config import LayerUnlockConfig

METHODS: dict[str, type[LayerLoraConfig]] = {}
DEFAULT = LayerLoraConfig.method


def add(config: type[LayerLoraConfig]) -> None:
    """Enters a method, by its config class, here and in PEFT's tables."""
    METHODS[config.method] = config
    tuner = tuner_for(config.seen_as)
    register(config.kind, config, tuner, tuner.prefix)


for _config in (LayerLoraConfig, LayerGaloreConfig, LayerFullConfig, LayerHeadConfig, LayerUnlockConfig):
    add(_config)
HANDED.update(run_steps=run_steps, change_of=change_of)
