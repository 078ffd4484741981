"""Prints the package's own requirements, one a line, so that an image can have them before it has the sources."""

import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
