"""Tools that work on files alone; each is a command of `python -m trainer`."""
