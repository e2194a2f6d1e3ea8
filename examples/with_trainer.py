"""Train several heads with transformers' Trainer: the rows, arguments and callbacks of any causal model.

python examples/with_trainer.py runs/with-trainer
"""

# %% A new model with 4 heads. `MultiTokenTrainer("path/to/model", ...)` takes a model directory instead.
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

import headstart
from headstart.data.tokenizers import ByteTokenizer
from headstart.integrations.trainer import MultiTokenTrainer
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def main(out: Path, steps: int = 300) -> float:
    """Train, evaluate and save a model; return the loss of head 1 in evaluation, in nats per byte."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = Transformer(ModelConfig(dim=64, layers=6, attention_heads=4, heads=4, context=256))

    # %% Rows: token ids, and labels if some tokens are not to be predicted. Rows may differ in length.
    files = sorted(Path(__file__).parent.glob("*.py"))
    rows = [{"input_ids": tokenizer.encode(line)} for file in files for line in file.read_text().splitlines(True)]
    rows = [row for row in rows if len(row["input_ids"]) > 8]

    # %% Trainer, used as for any model. Its log has loss_head1 ... loss_head4 in addition to their sum.
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=50,
        save_steps=100,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = MultiTokenTrainer(
        model, arguments, tokenizer=tokenizer, head_weights=[1.0, 0.5, 0.25, 0.125],
        train_dataset=rows[:-8], eval_dataset=rows[-8:],
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    print({name: value for name, value in found.items() if "_head" in name})

    # %% The folder is a model directory that Headstart and any Hugging Face tool can read.
    trainer.save_model()
    print(repr(headstart.load(out).generate("import ", max_new_tokens=60).text))
    return float(found["eval_loss_head1"])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/with-trainer"))
