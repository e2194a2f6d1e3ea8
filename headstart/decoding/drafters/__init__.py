"""Drafters: siblings that propose the drafts of the next windows."""
