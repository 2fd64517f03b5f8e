"""What an operator types: each command is a request to a coordinator, and its answer on a terminal.

At import nothing is loaded but the command line's own library: a command waits for what it needs.
"""
