"""The HTTP server: every contract of `protocols` in front of one reranker.

`app.create_app` makes the application, `run.serve` runs it until a signal says stop.
"""
