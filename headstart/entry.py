"""The door that scripts of earlier installations call; the command line is in cli.py."""

from headstart.cli import main as main
