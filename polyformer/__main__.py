"""`python -m polyformer` is the `polyformer` command."""

from polyformer.cli import main

if __name__ == "__main__":
    main()
