"""Decoders that `headstart bench decode --parts peers` sets beside ours: each in an interpreter of its own."""
