"""What `headstart convert --to hf-code` lays beside a model: code that needs torch and transformers alone."""
