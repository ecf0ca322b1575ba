"""A policy of one stand-in model, as a file has it."""

POLICY = """
[service]
database = "service.db"
poll_seconds = 0.05
per_second = 100000
burst = 100000
[models.fake]
kind = "custom"
deleter = "fakes:make"
[models.held]
kind = "custom"
deleter = "fakes:make"
hold = true
"""
