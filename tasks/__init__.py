"""One stage a file: read declared inputs, call the library, write declared outputs and metrics."""

from graftline import program

program.end_quietly_while_importing()
