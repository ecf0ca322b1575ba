"""`python -m expunge`, also what `accelerate launch -m expunge` runs."""

from expunge.cli.__main__ import main

if __name__ == "__main__":
    main()
