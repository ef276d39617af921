"""The command line: parse, call one function, render. The only package that knows click."""
