"""The HTTP server: every protocol of `protocols` in front of one reranker.

`app.create_app` makes the application, `lifecycle.serve` runs it until a signal stops it. `mcp.serve` serves a reranker
to an agent over MCP instead.
"""
