"""Run tasks of EleutherAI's lm-eval: ARC, HellaSwag, PIQA, MMLU, GSM8K, summaries with ROUGE and many more."""

from __future__ import annotations

from typing import Any

from headstart.api import LanguageModel
from headstart.errors import UsageError, first_line, needs_extra
from headstart.evaluation.settings import LmEvalSettings

PREFIX = "lm-eval:"


def run_lm_eval(model: LanguageModel, names: list[str], settings: LmEvalSettings, batch: int) -> dict[str, Any]:
    """Return lm-eval's results for the tasks `names` (without PREFIX), and what decoding took.

    The results are {task: {metric: value}}. Raises UsageError if lm-eval is not installed, does not know a task, or
    cannot get a task's data.
    """
    with needs_extra(f"{PREFIX}{names[0]}", "eval"):
        import lm_eval
        from lm_eval.tasks import TaskManager

        from headstart.evaluation.lm_eval_model import HeadstartLM
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise UsageError(f"{settings.include_path}: no such folder; name one that holds task files")
    own = None if settings.include_path is None else str(settings.include_path)
    manager = TaskManager(include_path=own, include_defaults=settings.defaults)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists them, "
            "and --lm-eval.include-path adds a folder of your own"
        )
    judged = HeadstartLM(model, batch)
    try:
        answer = lm_eval.simple_evaluate(
            judged,
            tasks=names,
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            apply_chat_template=settings.chat,
            batch_size=batch,
            gen_kwargs=None if settings.new_tokens is None else {"max_gen_toks": settings.new_tokens},
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UsageError(
            f"{', '.join(names)}: the data cannot be reached ({reason}); fetch it with a network, or write a task "
            "file for local data: --lm-eval.include-path FOLDER"
        ) from error
    assert answer is not None
    results = {
        task: {name.replace(",none", ""): value for name, value in values.items() if isinstance(value, (int, float))}
        for task, values in answer["results"].items()
    }
    found: dict[str, Any] = {"results": results, "cut_requests": judged.cut}
    if judged.passes:
        found |= {"tokens": judged.tokens, "tokens_per_pass": judged.committed / judged.passes}
    return found
