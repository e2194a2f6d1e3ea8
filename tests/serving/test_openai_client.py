"""Check with the official client that a real server returns the offline output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from headstart.decoding.constraints import Constraint
from headstart.decoding.settings import Penalties
from headstart.serving.server import Server

NAME = "python-bytes-8"
PROMPT = "def f("
BOOLEAN = {"name": "a", "schema": {"type": "boolean"}}
ALL = {"speculative": {"policy": "fixed"}}
"""All heads draft in every pass, for the number that pays depends on the machine."""


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_completion_is_the_offline_output(client, model) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=40, temperature=0.8, seed=5, extra_body=ALL
    )
    offline = model.generate(PROMPT, max_new_tokens=40, temperature=0.8, seed=5, heads=8)
    assert answer.choices[0].text == offline.text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 40, 46)
    told = answer.usage.speculative
    assert told["passes"] == offline.stats.passes and told["accepted"] == sum(offline.stats.accepted)
    assert [each["head"] for each in told["per_position"]] == [2, 3, 4, 5, 6, 7, 8]
    assert [each["accepted"] for each in told["per_position"]] == offline.stats.accepted


def test_a_stream_is_the_offline_output_with_origins(client, model) -> None:
    stream = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"speculative": {"origins": True, "policy": "fixed"}},
    )  # fmt: skip
    *chunks, last = list(stream)
    offline = model.generate(PROMPT, max_new_tokens=40, heads=8)
    assert "".join(chunk.choices[0].text for chunk in chunks) == offline.text
    assert len(chunks) > 5 and chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    parts = [part for chunk in chunks for part in chunk.choices[0].speculative["tokens"]]
    assert "".join(part["text"] for part in parts) == offline.text
    assert [part["head"] for part in parts for _ in part["text"]] == offline.origins and max(offline.origins) > 2
    assert chunks[-1].choices[0].speculative["tokens_per_pass"] == round(offline.stats.tokens_per_pass, 3)
    assert not last.choices and last.usage.completion_tokens == 40


def test_origins_and_usage_are_sent_on_request_only(client) -> None:
    chunks = list(client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, stream=True))
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert not any(hasattr(chunk.choices[0], "speculative") for chunk in chunks)


@pytest.mark.parametrize("asked", [{"enabled": False}, {"heads": 3}, {"policy": "fixed"}, {"acceptance": "match"}])
def test_speculative_settings_do_not_change_the_text(asked, client, model) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=24, temperature=0.7, seed=1, extra_body={"speculative": asked}
    )
    assert answer.choices[0].text == model.generate(PROMPT, max_new_tokens=24, temperature=0.7, seed=1).text
    heads = 1 if asked == {"enabled": False} else asked.get("heads", 8)
    assert len(answer.usage.speculative["per_position"]) == heads - 1


def test_each_choice_has_the_next_seed(client, model) -> None:
    answer = client.completions.create(
        model=NAME, prompt=[PROMPT, "class A"], n=2, max_tokens=20, temperature=1, seed=7
    )
    wanted = [
        model.generate(prompt, max_new_tokens=20, temperature=1.0, seed=seed).text
        for prompt in (PROMPT, "class A")
        for seed in (7, 8)
    ]
    assert [choice.text for choice in answer.choices] == wanted and len(set(wanted)) == 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(PROMPT) + len("class A") and answer.usage.completion_tokens == 80


def test_a_random_seed_is_reported(client, model) -> None:
    answers = [client.completions.create(model=NAME, prompt=PROMPT, max_tokens=20) for _ in range(2)]
    for answer in answers:
        offline = model.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=answer.seed)
        assert answer.choices[0].text == offline.text
    assert answers[0].seed != answers[1].seed


def test_prompts_of_token_ids_and_echo(client, model) -> None:
    ids = model.tokenizer.encode(PROMPT)
    plain = model.generate(PROMPT, max_new_tokens=10).text
    for prompt, count in ((ids, 1), ([ids, ids], 2), (PROMPT, 1), ([PROMPT, PROMPT], 2)):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=10, temperature=0, echo=True)
        assert [choice.text for choice in answer.choices] == [PROMPT + plain] * count


def test_stop_strings_are_not_in_the_text(client, model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=60).text
    stop = whole[20:23]
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=60, temperature=0, stop=[stop, "\0"])
    assert answer.choices[0].text == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].finish_detail == "stop"


def test_tokens_and_strings_that_stop_may_be_part_of_the_text(client, model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=60)
    stop = whole.text[20:23]
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    kept = client.completions.create(**asked, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == whole.text[: whole.text.index(stop) + 3]
    token = whole.tokens[12]
    stopped = client.completions.create(**asked, extra_body={"stop_token_ids": [token], "ignore_eos": True})
    assert stopped.choices[0].text == model.tokenizer.decode(whole.tokens[: whole.tokens.index(token) + 1])
    assert stopped.choices[0].finish_reason == "stop"


def test_penalties_and_bias_are_those_of_decoding(client, model) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=30, temperature=0.9, seed=3, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=0.4, logit_bias={"32": -100, "120": 2},
        extra_body={"repetition_penalty": 1.2, "top_k": 20, "min_p": 0.01},
    )  # fmt: skip
    penalties = Penalties(1.2, 0.5, 0.4, ((32, -100.0), (120, 2.0)))
    offline = model.generate(
        PROMPT, max_new_tokens=30, temperature=0.9, seed=3, top_p=0.9, top_k=20, min_p=0.01, penalties=penalties
    )
    assert answer.choices[0].text == offline.text and " " not in offline.text


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_decoding(stream, client, model) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2, "stream": stream}
    answers = list(client.completions.create(**asked)) if stream else [client.completions.create(**asked)]
    told = [answer.choices[0].logprobs for answer in answers]
    offline = model.generate(PROMPT, max_new_tokens=12, logprobs=2)
    assert [x for part in told for x in part.token_logprobs] == pytest.approx(offline.logprobs, abs=1e-4)
    assert "".join(token for part in told for token in part.tokens) == offline.text
    assert [at for part in told for at in part.text_offset] == list(range(12))
    assert all(len(best) == 2 for part in told for best in part.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_an_echo_has_the_log_probabilities_of_the_prompt(stream, ids, client, model) -> None:
    """lm-eval's local-completions reads them."""
    tokens = model.tokenizer.encode(PROMPT)
    asked = {"model": NAME, "prompt": tokens if ids else PROMPT, "max_tokens": 2, "temperature": 0, "echo": True}
    asked |= {"logprobs": 1, "stream": stream}
    answers = list(client.completions.create(**asked)) if stream else [client.completions.create(**asked)]
    told = [answer.choices[0].logprobs for answer in answers]
    offline = model.generate(PROMPT, max_new_tokens=2, logprobs=1, prompt_logprobs=1)
    first, *others = [chance for part in told for chance in part.token_logprobs]
    assert first is None and others == pytest.approx([*offline.prompt_logprobs, *offline.logprobs], abs=1e-4)
    assert "".join(answer.choices[0].text for answer in answers) == PROMPT + offline.text
    assert "".join(token for part in told for token in part.tokens) == PROMPT + offline.text
    assert [at for part in told for at in part.text_offset] == list(range(len(tokens) + 2))
    first, *best = [pairs for part in told for pairs in part.top_logprobs]
    wanted = [chance for ((_, chance),) in offline.prompt_top_logprobs]
    assert first is None and [max(pairs.values()) for pairs in best[:-2]] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_has_no_completion_tokens(stream, client, model) -> None:
    asked = {"model": NAME, "prompt": [PROMPT, "x"], "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
        *chunks, last = list(client.completions.create(**asked))
        choices, usage = [chunk.choices[0] for chunk in chunks], last.usage
    else:
        answer = client.completions.create(**asked)
        choices, usage = answer.choices, answer.usage
    for choice in choices:
        text = (PROMPT, "x")[choice.index]
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert len(choice.logprobs.tokens) == len(text) and choice.logprobs.token_logprobs[0] is None
    assert len(choices) == 2 and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 0, 7)
    plain = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=0, echo=True)
    assert plain.choices[0].text == PROMPT and plain.choices[0].logprobs is None


@pytest.mark.parametrize(
    ("asked", "constraint"),
    [
        ({"extra_body": {"guided_regex": "[a-c]{3,5}x"}}, Constraint.regex("[a-c]{3,5}x")),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, Constraint.choice(["yes", "no"])),
        (
            {"extra_body": {"response_format": {"type": "json_schema", "json_schema": BOOLEAN}}},
            Constraint.json_schema({"type": "boolean"}),
        ),
        ({"extra_body": {"guided_json": {"enum": [1, 2]}}}, Constraint.json_schema({"enum": [1, 2]})),
        ({"extra_body": {"guided_json": '{"enum": [1, 2]}'}}, Constraint.json_schema({"enum": [1, 2]})),
        ({"extra_body": {"structured_outputs": {"json": {"enum": [1, 2]}}}}, Constraint.json_schema({"enum": [1, 2]})),
        ({"extra_body": {"structured_outputs": {"regex": "[a-c]{3}"}}}, Constraint.regex("[a-c]{3}")),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, Constraint.choice(["yes", "no"])),
        (
            {"extra_body": {"response_format": {"type": "grammar", "grammar": 'root ::= "a" [bc]'}}},
            Constraint.lark('start: "a" /[bc]/'),
        ),
        ({"extra_body": {"structured_outputs": {"grammar": 'start: "ab"'}}}, Constraint.lark('start: "ab"')),
    ],
)  # fmt: skip
def test_constraints_hold(asked, constraint, client, model) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=30, temperature=1, seed=2, **asked)
    offline = model.generate(PROMPT, max_new_tokens=30, temperature=1.0, seed=2, constraint=constraint)
    assert answer.choices[0].text == offline.text and answer.choices[0].finish_reason == "stop"


def test_json_objects_start_with_a_brace(client) -> None:
    answer = client.completions.create(
        model=NAME, prompt="x = ", max_tokens=60, temperature=0, extra_body={"response_format": {"type": "json_object"}}
    )
    choice = answer.choices[0]
    assert choice.text.startswith("{")
    if choice.finish_reason == "stop":
        json.loads(choice.text)


def test_concurrent_requests_get_the_offline_output(client, model) -> None:
    """More requests than slots, of all kinds, streaming or not; one in three is refused."""

    def ask(i: int) -> str | int:
        asked = {"model": NAME, "prompt": f"def f{i}(", "max_tokens": 16 + i, "temperature": i % 3 / 2, "seed": i}
        if i % 3 == 0:
            try:
                client.completions.create(**{**asked, "extra_body": {"speculative": {"heads": 99}}})
            except openai.BadRequestError as error:
                return error.status_code
        if i % 2:
            return "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
        return client.completions.create(**asked).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(24)))
    for i, text in enumerate(found):
        wanted = model.generate(f"def f{i}(", max_new_tokens=16 + i, temperature=i % 3 / 2, seed=i).text
        assert text == (wanted if i % 3 else 400)
