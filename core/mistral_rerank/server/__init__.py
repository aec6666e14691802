"""The HTTP server: every protocol of `protocols` in front of one reranker.

`app.create_app` makes the application, `run.serve` runs it until a signal says stop.
"""
