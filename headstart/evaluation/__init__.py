"""What a model is worth: bits per byte, agreement of its heads with a text, acceptance and repetition."""
