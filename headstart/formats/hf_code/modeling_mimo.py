"""Names for what Headstart wrote in MiMo's layout, so that transformers and what builds on it know its config.json.

vLLM and SGLang have the model of their own, and decode with its module for the token after next. Here it is trunk and
head 1 alone, a Qwen2.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM


class MiMoConfig(Qwen2Config):
    """A Qwen2's, and how many modules there are for further tokens."""

    model_type = "mimo"
    num_nextn_predict_layers: int = 0


class MiMoForCausalLM(Qwen2ForCausalLM):
    """Trunk and head 1."""

    config_class: Any = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"model\.mtp_layers\..*"]  # noqa: RUF012
