"""`python -m modelstore` is the `modelstore` command."""

from modelstore.cli.main import main

if __name__ == "__main__":
    main()
