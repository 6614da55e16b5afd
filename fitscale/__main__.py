"""`python -m fitscale` is the `fitscale` program."""

from fitscale.cli import program

if __name__ == "__main__":
    program()
