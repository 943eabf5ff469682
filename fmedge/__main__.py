"""`python -m fmedge` is `fmedge`."""

from fmedge.cli import main

if __name__ == "__main__":
    main()
