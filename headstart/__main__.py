"""`python -m headstart`, so that `torchrun -m headstart train ...` works."""

from headstart.entry import main

if __name__ == "__main__":
    main()
