"""Measurements of parts of the trainer with real engines: `asyncppo bench`."""
