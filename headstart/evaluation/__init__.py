"""Evaluate a model: bits per byte, agreement of its heads with text, acceptance, repetition, benchmark tasks."""
