"""Decoders that `bench decode --parts peers` compares, each in a process and a Python of its own."""
