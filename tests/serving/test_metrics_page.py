"""Check /metrics with requests whose cost is known."""

from __future__ import annotations

import json

from serving.conftest import HTTP, metric, raw, until

from headstart.serving.server import Server


def test_counters_equal_the_usage_of_answers(server: Server) -> None:
    names = (
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "headstart_tokens_total",
        "headstart_passes_total",
        "headstart_prompt_tokens_total",
        "headstart_time_to_first_token_seconds_count",
        "headstart_tokens_per_pass_sum",
    )
    before = [metric(server, name) for name in names]
    position = metric(server, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="1")
    asked = {"prompt": "def f(", "max_tokens": 50, "temperature": 0, "speculative": {"policy": "fixed"}}
    usage = raw(server, json.dumps(asked).encode())[1]["usage"]
    told = usage["speculative"]
    gained = [metric(server, name) - was for name, was in zip(names, before)]
    head_2, head_3 = told["per_position"][:2]
    wanted = [head_2["drafted"], told["drafted"], told["accepted"], 50, told["passes"], 6, 1]
    assert gained[:-1] == wanted and abs(gained[-1] - told["tokens_per_pass"]) < 1e-2
    now = metric(server, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="1")
    assert now - position == head_3["accepted"] > 0


def test_an_idle_server_reports_no_load(server: Server) -> None:
    raw(server, b'{"prompt": "x", "max_tokens": 3, "n": 2}')
    until(lambda: metric(server, "headstart_live_slots") == 0 == metric(server, "headstart_queue_length"))


def test_the_page(server: Server) -> None:
    raw(server, b'{"prompt": "x", "max_tokens": 1}')
    raw(server, b'{"prompt": "x", "max_tokens": 0}')
    answer = HTTP.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for part in (
        'headstart_requests_total{endpoint="/v1/completions",model_name="python-bytes-8",status="400"}',
        'headstart_texts_total{model_name="python-bytes-8",outcome="length"}',
        "headstart_queue_length",
        "headstart_live_slots",
        "headstart_time_between_tokens_seconds_bucket",
    ):
        assert part in answer.text, part
    assert "_created" not in answer.text
