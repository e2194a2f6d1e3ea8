"""The code that `headstart convert --to hf-code` adds to a model. It needs only torch and transformers."""
