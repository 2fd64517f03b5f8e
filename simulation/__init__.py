"""The same rounds on one machine, without transport: `coordinator.rounds`, strategies and crypto.

Importing this package loads nothing: `simulation.learning` is the API, `simulation.command` the
command line. The picture is in README.md.
"""
