"""`python -m headstart`, so that `torchrun -m headstart train ...` works."""

from headstart.cli import main

if __name__ == "__main__":
    main()
