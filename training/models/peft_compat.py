"""What LoRA uses of PEFT that PEFT does not promise. tests/training/models/test_peft_compat.py says what it relies on.

Loads PEFT late.
"""

from __future__ import annotations

from typing import Any


def refuses_layer(lm: Any, end: str) -> bool:
    """Return whether PEFT does not accept a name as that of a linear layer of this type of model.

    Of mixtures of experts it takes the names that experts had as single layers for the tensor that holds all of them;
    of some models with states it refuses layers whose weights the fused kernel reads past the adapter.

    Private: `peft.tuners.tuners_utils._check_lora_target_modules_mamba`, and from the internal module
    `peft.utils.transformers_weight_conversion` the function `convert_peft_config_for_transformers`, which removes such
    names from the `target_modules` of a configuration.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[end])
    try:
        _check_lora_target_modules_mamba(config, lm, end.rpartition(".")[2])
        convert_peft_config_for_transformers(config, lm, None)
    except ValueError:
        return True
    return not config.target_modules
