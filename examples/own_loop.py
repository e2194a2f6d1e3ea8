"""Train several heads in a loop of your own: `multi_token_step` makes the gradients, the rest of the loop is yours.

python examples/own_loop.py runs/own-loop
"""

# %% A byte-level model with 4 heads, trained on the files of this folder.
import sys
from pathlib import Path

import torch

import headstart
from headstart.data.tokenizers import ByteTokenizer
from headstart.formats.huggingface import save_model
from headstart.integrations.multi_token import multi_token_step
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def main(out: Path, steps: int = 300) -> float:
    """Train and save a model; return the loss of head 1 in the last step, in nats per byte."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = Transformer(ModelConfig(dim=64, layers=6, attention_heads=4, heads=4, context=256))
    text = "".join(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py")))
    tokens = torch.tensor(tokenizer.encode(text))

    # %% The loop. Rows are 64 positions and 4 tokens more: head k predicts the token k ahead.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = torch.full((4,), torch.nan)
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - 68, (8,))
        rows = torch.stack([tokens[start : start + 68] for start in starts])
        seen = multi_token_step(model, rows)  # no loss.backward(): the step differentiates one head after the other
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses = seen.sums / seen.counts
        if step % 50 == 0:
            print(f"step {step}: " + "  ".join(f"head {k} {loss:.3f}" for k, loss in enumerate(losses, start=1)))

    # %% Save the model and generate with it: several tokens per pass.
    save_model(model, out, tokenizer)
    written = headstart.load(out).generate("import ", max_new_tokens=60)
    print(f"{written.text!r}: {written.stats.tokens_per_pass:.2f} tokens a pass")
    return float(losses[0])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-loop"))
