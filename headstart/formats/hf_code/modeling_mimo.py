"""Classes for a model in MiMo's layout, so that transformers and tools on top of it can read its config.json.

vLLM and SGLang have classes of their own, and decode with the module for the token after next. These classes have only
trunk and head 1, a Qwen2.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM


class MiMoConfig(Qwen2Config):
    """Qwen2's configuration, and the number of modules for further tokens."""

    model_type = "mimo"
    num_nextn_predict_layers: int = 0


class MiMoForCausalLM(Qwen2ForCausalLM):
    """Trunk and head 1."""

    config_class: Any = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"model\.mtp_layers\..*"]  # noqa: RUF012
